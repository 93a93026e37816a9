from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from simclr import optim
from simclr.model import projector, resnet
from simclr.optim import LARS, SCHEDULES, parameter_groups


def reference_step(p, g, buffer, lr, momentum, weight_decay, trust, eps, exclude):
    """One tensor at a time, as MMSelfSup v0.11.0, mmselfsup/core/optimizer/lars.py describes it."""
    p_norm, g_norm = p.norm().item(), g.norm().item()
    local_lr = 1.0
    if not exclude and p_norm != 0 and g_norm != 0:
        local_lr = trust * p_norm / (g_norm + weight_decay * p_norm + eps)
    d = lr * local_lr * (g + weight_decay * p)
    buffer = d if buffer is None else momentum * buffer + d
    return p - buffer, buffer


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_steps_equal_the_reference(exclude, momentum):
    torch.manual_seed(0)
    tensors = [torch.randn(4, 3), torch.randn(5), torch.zeros(2, 2)]
    parameters = [nn.Parameter(t.double()) for t in tensors]
    group = {"params": parameters, "lars_exclude": exclude}
    optimizer = LARS([group], lr=0.5, momentum=momentum, weight_decay=0.01, trust_coefficient=0.02)
    expected, buffers = [p.detach().clone() for p in parameters], [None] * 3
    for step in range(4):
        optimizer.param_groups[0]["lr"] = lr = 0.5 / (step + 1)
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p) if (step, i) != (1, 0) else torch.zeros_like(p)
            expected[i], buffers[i] = reference_step(
                expected[i], p.grad, buffers[i], lr, momentum, 0.01, 0.02, 1e-8, exclude
            )
        optimizer.step()
        torch.testing.assert_close([p.detach() for p in parameters], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_step_that_leaves_rates_on_a_gpu_is_the_same(momentum):
    torch.manual_seed(0)
    group = {"momentum": momentum, "weight_decay": 0.01}
    rates = torch.rand(2, dtype=torch.float64)
    tensors = [[torch.randn(n, 3, dtype=torch.float64) for n in (4, 2)] for _ in range(3)]
    found = copy.deepcopy(tensors)
    optim._sgd_without_waiting(group, *found, rates)
    for p, g, buffer, rate in zip(*tensors, rates.tolist(), strict=True):
        expected, _ = reference_step(p, g, buffer, rate, momentum, 0.01, 0, 0, exclude=True)
        torch.testing.assert_close(found[0].pop(0), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("exclude", [False, True])
def test_gradients_and_state_may_lie_in_memory_unlike_the_weights(exclude):
    """A state saved from a network in one memory format resumes in another."""
    torch.manual_seed(0)
    weights, *gradients = torch.randn(3, 4, 3, 2, 2).unbind()

    def step(p, gradient, state):
        optimizer = LARS([{"params": [p], "lars_exclude": exclude}], lr=0.1, weight_decay=0.1)
        if state:
            optimizer.load_state_dict(state)
        p.grad = gradient
        optimizer.step()
        return copy.deepcopy(optimizer.state_dict())

    def train(formats):
        p, state = weights, None
        for gradient, memory_format in zip(gradients, formats, strict=True):
            p = nn.Parameter(p.detach().clone(memory_format=memory_format))
            state = step(p, gradient, state)
        return p.detach()

    plain, last = torch.contiguous_format, torch.channels_last
    for formats in ((last, last), (last, plain), (plain, last)):
        torch.testing.assert_close(train(formats), train((plain, plain)), rtol=1e-6, atol=0)


def test_a_step_leaves_the_gradients_as_they_are():
    parameters = [nn.Parameter(torch.rand(3, 2)), nn.Parameter(torch.rand(3))]
    gradients = [torch.rand(3, 2), torch.rand(3)]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.clone()
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lars_exclude": True}]
    LARS(groups, lr=0.3, weight_decay=0.1).step()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, gradients, strict=True))


def test_a_step_by_hand():
    """‖p‖ = 5, ‖g‖ = 1: local lr 0.001·5 / (1 + 0.1·5) = 1/300; d = 0.3/300·(g + 0.1·p)."""
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([0.0, 1.0])
    LARS([p], lr=0.3, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), torch.tensor([3 - 0.0003, 4 - 0.0014]))


def test_the_learning_rate_is_inside_the_momentum_buffer():
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([{"params": [p], "lars_exclude": True}], lr=1.0)
    p.grad = torch.tensor([1.0])
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert p.item() == pytest.approx(1 - 1 - 0.9)


def test_adapted_weights_are_insensitive_to_the_scale_of_the_gradient_and_excluded_ones_are_not():
    def moved(divisor, exclude):
        p = nn.Parameter(torch.tensor([3.0, 4.0]))
        p.grad = torch.tensor([1.0, 2.0]) / divisor
        LARS([{"params": [p], "lars_exclude": exclude}], lr=0.3).step()
        return torch.tensor([3.0, 4.0]) - p.detach()

    torch.testing.assert_close(moved(8, False), moved(1, False), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved(8, True), moved(1, True) / 8)


def test_a_parameter_without_gradient_stays():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = LARS([p, q], lr=1.0)
    optimizer.step()
    assert torch.equal(q.detach(), torch.ones(2))
    assert q not in optimizer.state


def test_state_survives_saving():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def run(optimizer):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    first = LARS(model.parameters(), lr=0.1)
    run(first)
    second = LARS(model.parameters(), lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    run(first)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(weights)
    model.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    for p in model.parameters():
        p.grad *= 2  # `first` saw the gradient of both steps, which had not been zeroed
    second.step()
    torch.testing.assert_close(model.state_dict(), expected)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "trust_coefficient", "eps"])
def test_a_negative_setting_is_refused(name):
    with pytest.raises(ValueError, match=f"expected {name} ≥ 0, found -1"):
        LARS([nn.Parameter(torch.ones(1))], **{"lr": 0.1, name: -1})


@pytest.mark.parametrize(("exclude", "adapted_1d"), [("bias_and_bn", 0), ("bias_and_bn_but_shortcut", 4)])
def test_parameter_groups_of_the_published_network(exclude, adapted_1d):
    with torch.device("meta"):
        model = nn.ModuleDict({"backbone": resnet("resnet50"), "projector": projector(2048, 2048, 128)})
    adapted, excluded = parameter_groups(model, 1e-6, exclude)
    assert (adapted["weight_decay"], adapted["lars_exclude"]) == (1e-6, False)
    assert (excluded["weight_decay"], excluded["lars_exclude"]) == (0.0, True)
    # 53 convolutions and 2 linear layers; 53 + 2 BatchNorms of two vectors each.
    assert len(adapted["params"]) == 55 + adapted_1d
    assert len(excluded["params"]) == 110 - adapted_1d
    assert [tuple(p.shape) for p in adapted["params"] if p.ndim == 1] == [(256,), (512,), (1024,), (2048,)][
        :adapted_1d
    ]


def test_the_shortcuts_batchnorm_weights_are_all_that_the_two_publications_treat_differently():
    with torch.device("meta"):
        model = nn.ModuleDict({"backbone": resnet("resnet50"), "projector": projector(2048, 2048, 128)})
    names = {id(p): name for name, p in model.named_parameters()}

    def excluded(rule):
        return {names[id(p)] for p in parameter_groups(model, 1e-6, rule)[1]["params"]}

    all_of_them, but_shortcut = excluded("bias_and_bn"), excluded("bias_and_bn_but_shortcut")
    assert all_of_them == {name for name, p in model.named_parameters() if p.ndim == 1}
    assert all_of_them - but_shortcut == {f"backbone.layer{i}.0.downsample.1.weight" for i in (1, 2, 3, 4)}
    assert {f"projector.{i}.{kind}" for i in (1, 4) for kind in ("weight", "bias")} < but_shortcut


PUBLISHED = {
    # step 0, start of epochs 5, 10, 100, 199; lr 0.3, 200 epochs of 5,005 steps, 10 of warm-up
    "epoch_from_start": (3.0e-5, 0.149784, 0.298153, 0.150000, 1.851e-5),
    "epoch_after_warmup": (3.0e-5, 0.150018, 0.300000, 0.162387, 2.050e-5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedules_have_the_published_values(name):
    values = [SCHEDULES[name](5005 * epoch, 5005, 200, 0.3, 10) for epoch in (0, 5, 10, 100, 199)]
    assert values == pytest.approx(PUBLISHED[name], rel=5e-4)
    assert values[1:4] == pytest.approx(PUBLISHED[name][1:4], abs=5e-7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_after_warmup_the_rate_is_constant_within_an_epoch(name):
    rates = {SCHEDULES[name](step, 100, 20, 1.0, 2) for step in range(300, 400)}
    assert len(rates) == 1


def test_google_researchs_schedule_by_hand():
    """4,096 images per step, 312 steps per epoch: up from 0 to 4.8, half way down at the middle, to 0."""
    rate = SCHEDULES["step_after_warmup"]
    values = [rate(step, 312, 100, 4.8, 10) for step in (0, 1, 1560, 3120, 3120 + 14040, 31200)]
    assert values == pytest.approx([0, 4.8 / 3120, 2.4, 4.8, 2.4, 0], abs=1e-12)
    assert rate(5000, 312, 100, 4.8, 10) > rate(5001, 312, 100, 4.8, 10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_the_first_rate_is_the_full_one(name):
    assert SCHEDULES[name](0, 10, 5, 0.3, 0) == 0.3

from __future__ import annotations

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr import loss as loss_module
from simclr.loss import nt_xent


def algorithm_1(z0, z1, temperature):
    """The SimCLR paper's Algorithm 1, pair by pair: views of image k are rows 2k − 1 and 2k."""
    z = [row for pair in zip(z0.tolist(), z1.tolist(), strict=True) for row in pair]
    norm = [math.sqrt(sum(v * v for v in row)) for row in z]

    def s(i, j):
        return sum(a * b for a, b in zip(z[i], z[j], strict=True)) / (norm[i] * norm[j])

    def ell(i, j):
        others = sum(math.exp(s(i, k) / temperature) for k in range(len(z)) if k != i)
        return -math.log(math.exp(s(i, j) / temperature) / others)

    n = len(z) // 2
    return sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


def dense(z0, z1, temperature):
    """NT-Xent through autograd and the full matrix."""
    z = nn.functional.normalize(torch.cat([z0, z1]))
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)


# Seven images have 14 rows: strips of 1 (by either limit), of 3 with a shorter last one, and of all.
@pytest.fixture(
    params=[(1, 1), (2**22, 8), (3 * 14 + 13, 1), (2**22, 1)], ids="tile_{0[0]}_strips_{0[1]}".format
)
def tile(request, monkeypatch):
    monkeypatch.setattr(loss_module, "TILE", request.param[0])
    monkeypatch.setattr(loss_module, "STRIPS", request.param[1])


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.usefixtures("tile")
def test_equals_algorithm_1(views, temperature):
    assert nt_xent(*views, temperature).item() == pytest.approx(algorithm_1(*views, temperature), rel=1e-12)


@pytest.mark.usefixtures("tile")
def test_gradient_equals_autograd_of_the_full_matrix(views):
    ours, theirs = views.clone().requires_grad_(), views.clone().requires_grad_()
    nt_xent(*ours, 0.1).backward()
    dense(*theirs, 0.1).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.002, 0.999 / 64, 1 / 64, 0.03])
@pytest.mark.usefixtures("tile")
def test_low_temperatures_equal_the_full_matrix(views, temperature):
    """On either side of where exponentials are taken without their maximum."""
    ours, theirs = views.clone().requires_grad_(), views.clone().requires_grad_()
    found, expected = nt_xent(*ours, temperature), dense(*theirs, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.005, 0.999 / 64, 1 / 64])
def test_the_extremes_of_float32_are_exact(temperature):
    """Positives as far apart as they can be, and for half of the images also all negatives."""
    z0 = torch.cat([torch.ones(50, 4), -torch.ones(1, 4)])
    single, double = (torch.stack([z0, -z0]).to(dtype).requires_grad_() for dtype in (None, torch.float64))
    found, expected = nt_xent(*single, temperature), dense(*double, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("tile")
def test_gradcheck(views):
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), tuple(views[:, :4].requires_grad_()))


def test_default_temperature_is_the_papers(views):
    assert nt_xent(*views) == nt_xent(*views, temperature=0.1)


def test_identical_rows_give_log_of_the_number_of_others():
    assert nt_xent(torch.ones(8, 4), torch.ones(8, 4)).item() == pytest.approx(math.log(15))


def test_orthogonal_images_with_equal_views():
    """Each row: one logit 1/T, 2N − 2 logits 0."""
    z = torch.eye(6)
    expected = math.log(math.exp(1 / 0.5) + 10) - 1 / 0.5
    assert nt_xent(z, z, 0.5).item() == pytest.approx(expected)


def test_one_image_alone_has_loss_zero():
    assert nt_xent(torch.randn(1, 4), torch.randn(1, 4)).item() == pytest.approx(0, abs=1e-6)


def test_views_are_interchangeable(views):
    torch.testing.assert_close(nt_xent(*views), nt_xent(*views.flip(0)))


def test_order_of_images_and_length_of_rows_do_not_matter(views):
    shuffled = views[:, torch.randperm(7)] * torch.rand(2, 7, 1, dtype=views.dtype).add(0.1)
    torch.testing.assert_close(nt_xent(*views), nt_xent(*shuffled))


def test_positive_is_the_other_view_of_the_same_image(views):
    """MMSelfSup v0.5 paired rows of different images."""
    aligned = nt_xent(views[0], views[0])
    assert aligned < nt_xent(views[0], views[0].roll(1, 0))


def test_extreme_temperature_stays_finite():
    z = torch.eye(4).requires_grad_()
    loss = nt_xent(z, -z, 0.001)
    loss.backward()
    assert loss.item() == pytest.approx(1000 + math.log(6))
    assert torch.isfinite(z.grad).all()


def test_bfloat16_projections_are_contrasted_in_float32():
    z = torch.randn(2, 64, 128).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(*z)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(*z.float()), rtol=1e-6, atol=0)


def test_a_zero_row_has_a_finite_gradient():
    z = torch.zeros(2, 3, 4, requires_grad=True)
    nt_xent(*z).backward()
    assert torch.isfinite(z.grad).all()


def test_differing_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        nt_xent(torch.ones(3, 4), torch.ones(2, 4))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(x.numel() for x in tree_leaves(made) if torch.is_tensor(x)), 0)
        return made


def test_no_tensor_is_as_large_as_the_matrix(monkeypatch):
    """128 rows: 16,384 similarities, of which at most 1,024 exist at a time."""
    z = torch.randn(2, 64, 3, requires_grad=True)
    monkeypatch.setattr(loss_module, "TILE", 1024)
    with Largest() as largest:
        nt_xent(*z).backward()
    assert 512 < largest.elements <= 1024


def test_gradient_caching_over_micro_batches_gives_the_gradient_of_the_batch(views):
    """The projections are the leaves of the loss; their gradients go through the network in parts."""
    whole, parts = _network(), _network()
    nt_xent(*whole(views.flatten(0, 1)).chunk(2), 0.2).backward()

    micro_batches = views.split([3, 3, 1], 1)
    with torch.no_grad():
        z = torch.cat([parts(images) for images in micro_batches], 1)
    z.requires_grad_()
    nt_xent(*z, 0.2).backward()
    for images, gradient in zip(micro_batches, z.grad.split([3, 3, 1], 1), strict=True):
        parts(images).backward(gradient)
    for found, expected in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-12)


SPLITS = {1: [7], 2: [3, 4], 3: [4, 0, 3], 4: [1, 3, 2, 1]}


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def _rank_gradient(rank, sizes, views, folder):
    loss_module.TILE = 28  # strips of two rows
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=len(sizes))
    model = _network()
    loss = nt_xent(*model(views.split(sizes, 1)[rank].flatten(0, 1)).chunk(2), 0.2)
    loss.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)  # as DistributedDataParallel does
        parameter.grad /= len(sizes)
    torch.save([loss.detach(), *(p.grad for p in model.parameters())], folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", SPLITS)
def test_any_number_of_ranks_has_the_gradient_of_one_process(world, views, tmp_path):
    """The numbers of images per rank differ, as in the last batch of an epoch."""
    model = _network()
    loss = dense(*model(views.flatten(0, 1)).chunk(2), 0.2)
    loss.backward()
    # A fork server imports torch once for all ranks.
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(_rank_gradient, (SPLITS[world], views, tmp_path), world, start_method="forkserver")
    for rank in range(world):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        expected = [loss.detach(), *(p.grad for p in model.parameters())]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

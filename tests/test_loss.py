from __future__ import annotations

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

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


@pytest.fixture(params=[2**22, 40, 1], ids="tile_{}".format)
def tile(request, monkeypatch):
    monkeypatch.setattr(loss_module, "TILE", request.param)


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


SPLITS = {2: [3, 4], 4: [1, 3, 2, 1]}


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def _rank_gradient(rank, sizes, views, folder):
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

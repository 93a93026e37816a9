from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from simclr import BadInput, devices, distributed

SIZES = [3, 1, 4]


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(12)).double()


def _images():
    return torch.randn(sum(SIZES), 2, 2, 2, generator=torch.Generator().manual_seed(1)).double()


def _target():
    return torch.randn(sum(SIZES), 12, generator=torch.Generator().manual_seed(2)).double()


def _step(network, images, target):
    """One step of training with a loss that is a sum over images."""
    y = network(images)
    (y * target).sum().backward()
    buffers = [b.detach().clone() for b in network.buffers()]
    return [*(p.grad for p in network.parameters()), *buffers, network.eval()(images).detach()]


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=len(SIZES))
    network = distributed.sync_batchnorm(_network())
    found = _step(network, _images().split(SIZES)[rank], _target().split(SIZES)[rank])
    for parameter in network.parameters():
        dist.all_reduce(parameter.grad)
    rows = torch.full((SIZES[rank], 2), rank)
    cpu = torch.device("cpu")
    flags = [distributed.any_rank(rank == 1, cpu), distributed.any_rank(False, cpu)]
    torch.save((found, distributed.gather(rows), distributed.total(rows.sum()), flags), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(["simclr.pretrain", "matplotlib.pyplot", "torch._dynamo"])
    mp.start_processes(_rank, (folder,), nprocs=len(SIZES), start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(SIZES))]


def test_batchnorm_over_ranks_is_batchnorm_over_the_whole_batch(ranks):
    *expected, outputs = _step(_network(), _images(), _target())
    for (found, *_), part in zip(ranks, outputs.split(SIZES), strict=True):
        torch.testing.assert_close(found, [*expected, part], rtol=1e-9, atol=1e-12)


def test_gather_returns_the_rows_of_every_rank_in_order(ranks):
    for _, gathered, *_ in ranks:
        assert [part.tolist() for part in gathered] == [[[r, r]] * n for r, n in enumerate(SIZES)]


def test_total_is_the_sum_over_ranks(ranks):
    assert [int(total) for _, _, total, _ in ranks] == [2 * (1 * 1 + 2 * 4)] * 3


def test_any_rank_is_told_to_all(ranks):
    assert [flags for *_, flags in ranks] == [[True, False]] * 3


def test_a_single_process_needs_no_group():
    x = torch.ones(2, 3)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather(x) == [x]
    assert torch.equal(distributed.total(x), x)
    distributed.barrier()
    with distributed.process_group() as device:
        assert device.type in ("cpu", "cuda")
        assert not dist.is_initialized()


def test_sync_batchnorm_keeps_every_name():
    names = list(_network().state_dict())
    assert list(distributed.sync_batchnorm(_network()).state_dict()) == names


def test_tasks_that_srun_started_find_each_other(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "node1", "SLURM_PROCID": "3"}
    for name, value in {**step, "SLURM_LOCALID": "1", "SLURM_JOB_ID": "61234"}.items():
        monkeypatch.setenv(name, value)
    distributed.adopt_slurm_step()
    found = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["3", "1", "4", "node1", "21234"]
    monkeypatch.setenv("RANK", "0")  # torchrun under srun: its word counts
    distributed.adopt_slurm_step()
    assert os.environ["RANK"] == "0"


def test_a_job_of_one_task_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    distributed.adopt_slurm_step()
    assert "RANK" not in os.environ


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        places = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in places.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(BadInput, match=rf"localhost:{port}, where the processes meet: .*set MASTER_PORT"):
            distributed.join("gloo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("given", "refused"), [("0,1", True), ("", False), ("-1", False)])
def test_gpus_that_torch_does_not_see_are_not_replaced_by_the_cpu(monkeypatch, given, refused):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    if refused:
        with pytest.raises(BadInput, match=r"CUDA_VISIBLE_DEVICES=0,1 names, found none: torch .*gpus: 0"):
            devices.refuse_cpu()
        monkeypatch.setenv("SIMCLR_ALLOW_CPU", "1")
    devices.refuse_cpu()


def test_no_two_processes_of_a_node_share_a_gpu():
    assert [distributed.local_gpu(rank, 4, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [distributed.local_gpu(rank, 1, 4) for rank in range(4)] == [0, 1, 2, 3]  # tasks that see them all
    assert distributed.local_gpu(3, 1, 1) == 0  # a task to which Slurm shows its own
    for rank, processes, visible in ((4, 1, 4), (0, 5, 4), (1, 2, 1)):
        with pytest.raises(BadInput, match=rf"found process {rank} .from 0. and {visible} GPUs"):
            distributed.local_gpu(rank, processes, visible)

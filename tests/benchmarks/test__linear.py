"""The training loop that the linear evaluations and semi-supervised fine-tuning share."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from simclr import BadInput, distributed, rolling
from simclr.augment import augment
from simclr.benchmarks import _images, _linear, imagenet_linear, imagenet_mhead
from simclr.benchmarks._training import FrozenTraining
from simclr.checkpoint import Backbone
from simclr.datasets import Dataset, Samples
from simclr.model import GRID, resnet
from simclr.optim import LARS

CPU = torch.device("cpu")
CONFIG = FrozenTraining(
    image_size=16, resize=20, batch_size=8, epochs=4, lr=0.5, weight_decay=1e-3, micro_batch=3
)


@pytest.fixture
def images(tmp_path):
    """Twenty-one images of three classes, 24 × 20 pixels of noise around a colour."""
    rng = np.random.default_rng(0)
    labels = np.arange(21) % 3
    for i, label in enumerate(labels):
        pixels = rng.normal(60 + 60 * np.eye(3)[label], 30, (20, 24, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i}.png")
    samples = Samples([tmp_path / f"{i}.png" for i in range(21)], labels)
    return _images.Images(samples, _images.train_transform(CONFIG, jitter=0.4, lighting=0.1), seed=5)


def job(folder, config=CONFIG, signals=()):
    return _linear.Job(config, {"config": config.model_dump(mode="json")}, folder, CPU, list(signals))


def means(batch):
    """A frozen "backbone": mean and standard deviation of each colour."""
    return {"colours": torch.cat([batch.mean((2, 3)), batch.std((2, 3))], 1)}


def new_heads():
    return _linear.Heads({"colours": _linear.classifier(6, 3, torch.Generator().manual_seed(0))})


def train(images, folder, config=CONFIG, heads=None, frozen=means, optimizer=LARS):
    heads = heads or new_heads()
    sgd = optimizer(heads.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    schedule = _linear.steps((2,), 0.1)
    heads.curve = _linear.fit(job(folder, config), heads, sgd, images, schedule, frozen, config.micro_batch)
    return heads


# ---------------------------------------------------------------- the frozen backbone


@pytest.fixture(params=["resnet18_w0.25", "resnet50_w0.25"])
def network(request):
    """A network in evaluation mode whose BatchNorms are all different, as after a training."""
    torch.manual_seed(0)
    network = resnet(request.param).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return network


def test_folding_keeps_the_function_and_the_network(network):
    """Every layer equals the unfolded one within 1e-5 of its own spread."""
    images = torch.randn(4, 3, 64, 64)
    before = _linear.fingerprint(network)
    folded = _linear.folded(network)
    assert _linear.fingerprint(network) == before
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    ours, theirs = folded.forward_features(images), network.forward_features(images)
    assert list(ours) == [*GRID, "avgpool"]
    ours["forward"], theirs["forward"] = folded(images), network(images)
    for layer, expected in theirs.items():
        assert (ours[layer] - expected).abs().max() < 1e-5 * expected.std()


def test_a_frozen_backbone_learns_nothing_and_bfloat16_is_near(network):
    backbone = SimpleNamespace(model=lambda: network)
    images = torch.randn(4, 3, 64, 64)
    exact, near = (_linear.frozen_backbone(backbone, CPU, bfloat16) for bfloat16 in (False, True))
    assert not any(p.requires_grad for p in [*exact.parameters(), *near.parameters()])
    assert exact.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for layer, expected in exact.forward_features(images).items():
        found = near.forward_features(images.bfloat16())[layer]
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).std() < 0.03 * expected.std()


def test_bfloat16_is_only_for_gpus_and_is_recorded(tmp_path):
    config = CONFIG.model_copy(update={"precision": "bfloat16"})
    assert job(tmp_path, config).machine == {"processes": 1, "precision": "float32"}


@pytest.mark.gpu
def test_a_gpu_that_has_bfloat16_takes_it_where_the_config_says_so(tmp_path):
    on_gpu = job(tmp_path, CONFIG)._replace(device=torch.device("cuda"))
    assert not on_gpu.bfloat16
    asked = on_gpu._replace(config=CONFIG.model_copy(update={"precision": "bfloat16"}))
    assert asked.bfloat16 == torch.cuda.is_bf16_supported(including_emulation=False)


@pytest.mark.gpu
def test_a_gpu_gives_the_features_of_the_cpu(network):
    backbone, images = SimpleNamespace(model=lambda: network), torch.randn(4, 3, 64, 64)
    on_gpu = _linear.frozen_backbone(backbone, torch.device("cuda"), bfloat16=False)
    for layer, expected in network.cpu().forward_features(images).items():
        found = on_gpu.forward_features(images.cuda())[layer].cpu()
        assert (found - expected).std() < 3e-3 * expected.std()  # convolutions are in TF32 here


def test_a_changed_backbone_is_detected():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    batch = torch.rand(2, 3, 8, 8)
    with torch.no_grad(), _linear.unchanged(network.eval()):
        network(batch)
    with pytest.raises(RuntimeError, match="the frozen backbone changed"), _linear.unchanged(network.train()):
        network(batch)  # BatchNorm moves its running statistics
    with pytest.raises(RuntimeError, match="changed"), torch.no_grad(), _linear.unchanged(network):
        network[0].bias[1] += 1e-7


# ---------------------------------------------------------------- schedules


def test_schedules_are_the_published_ones():
    cosine = _linear.cosine(90)
    found = [1.6 * cosine(epoch) for epoch in (0, 30, 45, 60, 89)]
    assert found == pytest.approx([1.6, 1.2, 0.8, 0.4, 4.87e-4], rel=1e-3)
    steps = _linear.steps((30, 60), 0.1)
    assert [0.01 * steps(epoch) for epoch in (0, 29, 30, 59, 60, 89)] == pytest.approx(
        [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4]
    )


# ---------------------------------------------------------------- training


def test_training_in_pieces_equals_whole_batches_by_hand(images, tmp_path):
    """Against plain full-batch descent, written out; the batch of 8 arrives in pieces of 3, 3 and 2."""
    found = train(images, tmp_path)
    head = new_heads()["colours"]
    optimizer = LARS(head.parameters(), CONFIG.lr, 0.9, CONFIG.weight_decay)
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = CONFIG.lr * (1 if epoch < 2 else 0.1)
        order = np.random.default_rng((CONFIG.seed, epoch)).permutation(21)
        for start in range(0, 21, 8):
            crops, rows, labels = zip(*(images[epoch, int(i)] for i in order[start : start + 8]), strict=True)
            inputs = means(augment(torch.stack(crops), torch.stack(rows)))["colours"]
            optimizer.zero_grad()
            F.cross_entropy(head(inputs), torch.tensor(labels)).backward()
            optimizer.step()
    torch.testing.assert_close(found["colours"].weight, head.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["colours"].bias, head.bias, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found["colours"].weight, new_heads()["colours"].weight)


def test_the_step_does_not_depend_on_the_pieces_even_with_batchnorm(images, tmp_path):
    def heads():
        head = nn.Sequential(nn.BatchNorm1d(6, affine=False), new_heads()["colours"])
        return _linear.Heads({"colours": head})

    states = []
    for size in (2, 8, 100):
        config = CONFIG.model_copy(update={"micro_batch": size})
        states.append(train(images, tmp_path / str(size), config, heads()).state_dict())
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-5, atol=1e-7)


def test_heads_trained_together_equal_heads_trained_alone(images, tmp_path):
    """The sum of the losses leaves the heads independent."""

    def two(batch):
        return {"first": means(batch)["colours"], "second": -2 * means(batch)["colours"]}

    def head(seed):
        return _linear.classifier(6, 3, torch.Generator().manual_seed(seed))

    together = train(
        images, tmp_path / "both", heads=_linear.Heads({"first": head(1), "second": head(2)}), frozen=two
    )
    for seed, name in ((1, "first"), (2, "second")):
        alone = train(images, tmp_path / name, heads=_linear.Heads({name: head(seed)}), frozen=two)
        torch.testing.assert_close(
            alone[name].state_dict(), together[name].state_dict(), rtol=1e-5, atol=1e-8
        )


def test_the_curve_has_the_mean_loss_of_every_epoch(images, tmp_path):
    heads = train(
        images, tmp_path, CONFIG.model_copy(update={"epochs": 1, "batch_size": 21, "micro_batch": 4})
    )
    crops, rows, labels = zip(*(images[0, i] for i in range(21)), strict=True)
    inputs = means(augment(torch.stack(crops), torch.stack(rows)))["colours"]
    expected = F.cross_entropy(new_heads()["colours"](inputs), torch.tensor(labels)).item()
    assert heads.curve == [{"epoch": 1, "lr": 0.5, "colours": pytest.approx(expected, rel=1e-5)}]

    curve = train(images, tmp_path / "four").curve
    assert [row["lr"] for row in curve] == pytest.approx([0.5, 0.5, 0.05, 0.05])
    _linear.write_curve(curve, tmp_path / "m/linear.csv")
    lines = (tmp_path / "m/linear.csv").read_text().splitlines()
    assert lines[0] == "epoch,lr,colours"
    assert len(lines) == 5
    assert (tmp_path / "four/curve.csv").read_text() == (tmp_path / "m/linear.csv").read_text()
    assert (tmp_path / "m/linear.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "m").iterdir())) == 2
    _linear.write_curve(curve, None)


def test_divergence_stops_with_step_and_learning_rate(images, tmp_path):
    def infinite(batch):
        colours = means(batch)["colours"]
        calls.append(len(batch))
        return {"colours": colours * torch.inf if sum(calls) > 21 else colours}

    calls = []
    with pytest.raises(_linear.Diverged, match=r"the loss is nan at step 3 with a learning rate of 0\.5"):
        train(images, tmp_path, frozen=infinite)


def test_accuracy_counts_by_hand(images, tmp_path):
    labels = np.array([0, 1, 5, 6])
    data = _images.Images(Samples(images.samples.paths[:4], labels), _images.test_transform(CONFIG), 0)
    scores = torch.tensor(
        [
            [9.0, 0, 0, 0, 0, 0, 0],  # right
            [9, 8, 0, 0, 0, 0, 0],  # second
            [6, 5, 4, 3, 2, 1, 0],  # sixth
            [0, 0, 0, 0, 0, 0, 0],  # all equal: the highest class ranks last
        ]
    )

    def given(batch):
        return {"x": scores[len(seen) : len(seen) + len(batch)], "seen": seen.extend(batch)}

    seen = []
    heads = _linear.Heads({"x": nn.Identity()})
    assert _linear.accuracy(job(tmp_path), heads, data, given, 3) == {"x": 25, "x_top5": 50}
    assert not heads.training
    scores[2], seen[:] = torch.nan, []
    with pytest.raises(_linear.Diverged, match="the classifier gives infinity or NaN"):
        _linear.accuracy(job(tmp_path), heads, data, given, 3)


def test_divergence_on_another_rank_stops_this_one(images, tmp_path, monkeypatch):
    """A rank that raised alone would leave the others waiting in the sum."""
    asked = []
    monkeypatch.setattr(distributed, "any_rank", lambda flag, device: asked.append(flag) or len(asked) == 8)
    heads = _linear.Heads({"x": nn.LazyLinear(7)})
    with pytest.raises(_linear.Diverged, match="the classifier gives infinity or NaN"):
        _linear.accuracy(job(tmp_path), heads, images, lambda batch: {"x": batch.flatten(1)}, 3)
    assert asked == [False] * 8  # whether to stop, before each of seven batches; and whether all is finite


# ---------------------------------------------------------------- stopping and going on

MHEAD = imagenet_mhead.Config(
    image_size=32, resize=32, pooling="adaptive", batch_size=16, micro_batch=5, epochs=2, lr=0.05
)
LINEAR = imagenet_linear.Config(image_size=32, resize=32, batch_size=16, micro_batch=5, epochs=2)
STEPS = 6  # two epochs of 40 images


@pytest.fixture(scope="module")
def manifest(few_images) -> Path:
    return few_images(4, 3).manifest


def _run(config, backbone, manifest, folder, die_at=None, number=None, environment=None):
    """Evaluate; send signal `number` to this very process in step `die_at`, after it was computed."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stderr = (folder / f"stderr-{os.environ.get('RANK', 0)}.txt").open("w", buffering=1)
    _linear.SAVE_SECONDS, _linear.SAVE_SHARE = -1, 1e9  # after every step
    check = _linear.check_finite

    def dying(losses, step, optimizer):
        if step == die_at:
            os.kill(os.getpid(), number)
        check(losses, step, optimizer)

    _linear.check_finite = dying
    module = sys.modules[type(config).__module__]
    paths = folder / "work", folder / "curve.csv"
    metrics = module.evaluate(Backbone.open(backbone), Dataset.open(manifest), config, *paths)
    if distributed.rank() == 0:
        (folder / "metrics.json").write_text(json.dumps([metrics, metrics.details]))


def start(*arguments, **keywords):
    """Start `_run` in a process of its own; a fork server imports torch once for all of them."""
    preloaded = ["simclr.benchmarks._linear", "simclr.checkpoint", "matplotlib.pyplot", "torch._dynamo"]
    multiprocessing.set_forkserver_preload(preloaded)
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=arguments, kwargs=keywords)
    process.start()
    return process


def exit_status(process) -> int:
    process.join()
    return process.exitcode


def start_ranks(*arguments, world=2):
    """Start `_run` in `world` processes that train together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    places = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        start(
            *arguments,
            environment={
                key: str(value) for key, value in {**places, "RANK": rank, "LOCAL_RANK": rank}.items()
            },
        )
        for rank in range(world)
    ]


def left(folder):
    """Return what a finished evaluation leaves: weights, metrics, learning curve."""
    newest = max(folder.glob("work/*/checkpoint-*.pt"))
    metrics, _ = json.loads((folder / "metrics.json").read_text())
    return torch.load(newest, weights_only=True), metrics, (folder / "curve.csv").read_text()


@pytest.fixture(scope="module")
def finished(small_backbone, manifest, tmp_path_factory):
    """config → the folder of an uninterrupted evaluation."""
    folders = {}
    for name, config in (("mhead", MHEAD), ("linear", LINEAR)):
        folders[config] = tmp_path_factory.mktemp(name)
        assert exit_status(start(config, small_backbone.path, manifest, folders[config])) == 0
    return folders


@pytest.mark.parametrize("config", [MHEAD, LINEAR], ids=["SGD", "LARS"])
@pytest.mark.parametrize(
    ("number", "step", "status"),
    [
        (signal.SIGKILL, None, -signal.SIGKILL),
        (signal.SIGTERM, 1, rolling.STOPPED),
        (signal.SIGUSR1, STEPS - 1, rolling.STOPPED),  # trained to the end, not yet tested
    ],
)
def test_a_stopped_evaluation_ends_in_the_bits_of_an_unstopped_one(
    finished, small_backbone, manifest, tmp_path, config, number, step, status
):
    if step is None:
        step = random.randrange(1, STEPS)
        print(f"killed in step {step}")
    assert exit_status(start(config, small_backbone.path, manifest, tmp_path, step, number)) == status
    assert not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "curve.csv").exists()
    saved = torch.load(max(tmp_path.glob("work/*/checkpoint-*.pt")), weights_only=True)["step"]
    assert saved == (step if status < 0 else min(step + 2, STEPS))
    if status == rolling.STOPPED:
        assert "the same command goes on" in (tmp_path / "stderr-0.txt").read_text()
    assert exit_status(start(config, small_backbone.path, manifest, tmp_path)) == 0
    (ours, *our_files), (theirs, *their_files) = left(tmp_path), left(finished[config])
    assert our_files == their_files
    assert {**ours, "model": 0, "optimizer": 0} == {**theirs, "model": 0, "optimizer": 0}
    assert all(torch.equal(ours["model"][key], value) for key, value in theirs["model"].items())
    assert str(ours["optimizer"]) == str(theirs["optimizer"])


@pytest.mark.parametrize("config", [MHEAD, LINEAR], ids=["BatchNorm and SGD", "LARS"])
def test_two_processes_train_the_heads_of_one(finished, small_backbone, manifest, tmp_path, config):
    """Each has half of every batch, in micro-batches of its own; the last batch of an epoch is not whole."""
    ranks = start_ranks(config, small_backbone.path, manifest, tmp_path)
    assert [exit_status(rank) for rank in ranks] == [0, 0]
    (ours, our_metrics, _), (theirs, their_metrics, _) = left(tmp_path), left(finished[config])
    for key, expected in theirs["model"].items():
        torch.testing.assert_close(ours["model"][key], expected, rtol=1e-4, atol=1e-6)
    assert our_metrics == their_metrics
    assert ours["curve"] == [pytest.approx(row, rel=1e-5) for row in theirs["curve"]]
    _, details = json.loads((tmp_path / "metrics.json").read_text())
    assert details == {
        "train_images": 40,
        "val_images": 30,
        "epoch": 2,
        "processes": 2,
        "precision": "float32",
    }


def test_a_checkpoint_of_another_run_is_refused_and_both_are_named(images, tmp_path):
    train(images, tmp_path)
    with pytest.raises(BadInput, match=r"found one of another: config\.lr is 0\.5 there, 0\.4 here"):
        train(images, tmp_path, CONFIG.model_copy(update={"lr": 0.4}))


def test_a_truncated_checkpoint_falls_back_to_the_one_before(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_linear, "SAVE_SECONDS", -1)
    monkeypatch.setattr(_linear, "SAVE_SHARE", 1e9)
    whole = train(images, tmp_path)
    _, newest = sorted(tmp_path.glob("checkpoint-*.pt"))
    os.truncate(newest, newest.stat().st_size // 2)
    again = train(images, tmp_path)
    assert f"{newest} is broken" in capsys.readouterr().err
    assert all(torch.equal(again.state_dict()[key], value) for key, value in whole.state_dict().items())
    for path in tmp_path.glob("checkpoint-*.pt"):
        path.write_bytes(b"PK half a file")
    with pytest.raises(BadInput, match="no rolling checkpoint is whole; delete it"):
        train(images, tmp_path)


def test_checkpoints_are_written_at_intervals_that_grow_with_their_cost(images, tmp_path, monkeypatch):
    """A clock that only saving moves, by 10 s, and every step by 1 s: at a twentieth, one save in 200 s."""
    clock, saved = [0.0], []
    monkeypatch.setattr(_linear.time, "monotonic", lambda: clock[0])

    def slow(job, step, *_):
        saved.append(step)
        clock[0] += 10

    def one_second(batch):
        clock[0] += 1
        return means(batch)

    monkeypatch.setattr(_linear, "save", slow)
    config = CONFIG.model_copy(update={"batch_size": 1, "micro_batch": 1, "epochs": 20})
    train(images, tmp_path, config, frozen=one_second)
    assert saved == [121, 322, 420]  # after 120 s, then 200 s; the last of 20 × 21 steps


def test_a_signal_while_testing_exits_at_once(images, tmp_path, capsys):
    heads = _linear.Heads({"x": nn.Identity()})
    with pytest.raises(SystemExit) as stopped:
        _linear.accuracy(job(tmp_path, signals=[signal.SIGTERM]), heads, images, means, 3)
    assert stopped.value.code == rolling.STOPPED
    assert capsys.readouterr().err == "stopped while testing; the same command goes on\n"


# ---------------------------------------------------------------- the work folder


def place(config, tmp_path, checkpoint="a"):
    backbone = SimpleNamespace(checkpoint_sha256=checkpoint)
    dataset = SimpleNamespace(dataset=SimpleNamespace(manifest_sha256="b"))
    return _linear.at_work(tmp_path, config, backbone, dataset)


def test_work_of_another_config_or_backbone_is_kept_apart(tmp_path):
    with place(CONFIG, tmp_path) as first:
        pass
    with place(CONFIG, tmp_path) as again:
        assert again.folder == first.folder
        assert again.run == first.run
    with (
        place(CONFIG.model_copy(update={"lr": 0.4}), tmp_path) as other,
        place(CONFIG, tmp_path, "c") as third,
    ):
        assert len({first.folder, other.folder, third.folder}) == 3


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with place(CONFIG, tmp_path) as held:
        pass
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    command = [
        sys.executable,
        "-c",
        f"{hold}; print('held', flush=True); sys.stdin.read()",
        str(held.folder / "lock"),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BadInput, match="another run works in this folder"), place(CONFIG, tmp_path):
            pass
        holder.stdin.close()
    with place(CONFIG, tmp_path):
        pass


def test_config_refuses_crops_that_do_not_fit():
    with pytest.raises(ValueError, match="resize: 20 is smaller than image_size: 24"):
        FrozenTraining(image_size=24, resize=20, batch_size=1, epochs=1, lr=1, weight_decay=0)
    with pytest.raises(ValueError, match="crop_area: expected 0 < least ≤ greatest ≤ 1"):
        FrozenTraining(crop_area=(0.5, 0.4), batch_size=1, epochs=1, lr=1, weight_decay=0)

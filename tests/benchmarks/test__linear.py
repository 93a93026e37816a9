"""The training loop that the linear evaluations and semi-supervised fine-tuning share."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from simclr import BadInput, distributed
from simclr.benchmarks import _linear
from simclr.benchmarks._training import FrozenTraining
from simclr.datasets import Samples
from simclr.optim import LARS
from simclr.transforms import MEAN, STD

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
    return _linear.Images(samples, _linear.train_transform(_linear.resized_crop(CONFIG), 0.4, 0.1), seed=5)


def means(batch):
    """A frozen "backbone": mean and standard deviation of each colour."""
    return {"colours": torch.cat([batch.mean((2, 3)), batch.std((2, 3))], 1)}


def new_heads():
    return _linear.Heads({"colours": _linear.classifier(6, 3, torch.Generator().manual_seed(0))})


def train(images, folder, config=CONFIG, heads=None, frozen=means, optimizer=LARS):
    heads = heads or new_heads()
    sgd = optimizer(heads.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    schedule = _linear.steps((2,), 0.1)
    _linear.fit(heads, sgd, images, config, schedule, folder, CPU, frozen, config.micro_batch)
    return heads


# ---------------------------------------------------------------- transforms


def test_lighting_by_hand():
    alpha = np.array([1.0, -2.0, 10.0])
    # Red: −0.5675·0.2175·1 + 0.7192·0.0188·(−2) + 0.4009·0.0045·10
    red = -0.5675 * 0.2175 - 2 * 0.7192 * 0.0188 + 10 * 0.4009 * 0.0045
    green = -0.5808 * 0.2175 + 2 * 0.0045 * 0.0188 - 10 * 0.8140 * 0.0045
    blue = -0.5836 * 0.2175 + 2 * 0.6948 * 0.0188 + 10 * 0.4203 * 0.0045
    image = torch.rand(3, 4, 5)
    expected = image + torch.tensor([red, green, blue])[:, None, None]
    torch.testing.assert_close(_linear.lighting(image, alpha), expected)


def test_lighting_comes_before_normalisation():
    grey = Image.new("RGB", (16, 16), (128, 128, 128))

    def whole(image, rng):
        return image

    rng = np.random.default_rng(0)
    rng.random()  # the flip
    expected = _linear.lighting(torch.full((3, 16, 16), 128 / 255), rng.normal(0, 0.1, 3))
    expected = (expected - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    found = _linear.train_transform(whole, lighting_std=0.1)(grey, np.random.default_rng(0))
    torch.testing.assert_close(found, expected)


def test_jitter_is_always_on_and_leaves_the_hue():
    orange = Image.new("RGB", (8, 8), (160, 120, 80))
    transform = _linear.train_transform(lambda image, rng: image, jitter=0.4)
    for seed in range(20):
        pixel = transform(orange, np.random.default_rng(seed))[:, 0, 0] * torch.tensor(STD) + torch.tensor(
            MEAN
        )
        red, green, blue = pixel.tolist()
        assert max(abs(red - 160 / 255), abs(green - 120 / 255), abs(blue - 80 / 255)) > 1e-3
        # Green is half-way between red and blue, which only a turn of the hue (or clipping) would change.
        assert red == 1 or green == pytest.approx((red + blue) / 2, abs=0.02)


def test_shifted_crop_is_a_random_part_of_the_central_square():
    # 40 × 20 pixels: the central square of 20 begins at column 10.
    columns = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None], (20, 40, 3))
    crop = _linear.shifted_crop(CONFIG)
    lefts = set()
    for seed in range(60):
        pixels = np.asarray(crop(Image.fromarray(columns.copy()), np.random.default_rng(seed)))
        assert pixels.shape == (16, 16, 3)
        assert (np.diff(pixels[0, :, 0].astype(int)) == 1).all()
        lefts.add(int(pixels[0, 0, 0]))
    assert lefts == {10, 11, 12, 13, 14}


def test_an_item_is_a_function_of_seed_epoch_and_index(images):
    first = images[2, 7][0]
    torch.rand(3)
    np.random.default_rng().random()
    assert torch.equal(images[2, 7][0], first)
    assert not torch.equal(images[3, 7][0], first)
    other = _linear.Images(images.samples, images.transform, seed=6)
    assert not torch.equal(other[2, 7][0], first)


# ---------------------------------------------------------------- order and labels


def test_plan_covers_every_image_once_and_processes_share_batches(monkeypatch):
    plan = _linear.epoch_plan(21, CONFIG, 3, micro_batch=3)
    assert [[len(piece) for piece in batch] for batch in plan] == [[3, 3, 2], [3, 3, 2], [3, 2]]
    flat = [[item for piece in batch for item in piece] for batch in plan]
    assert sorted(index for batch in flat for _, index in batch) == list(range(21))
    assert {epoch for batch in flat for epoch, _ in batch} == {3}
    assert _linear.epoch_plan(21, CONFIG, 4, 3) != plan

    monkeypatch.setattr(_linear.distributed, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(_linear.distributed, "rank", lambda rank=rank: rank)
        shares.append(_linear.epoch_plan(21, CONFIG, 3, 100))
    for batch, *parts in zip(flat, *shares, strict=True):
        assert sorted(batch) == sorted(item for part in parts for piece in part for item in piece)


def test_plan_refuses_more_processes_than_images(monkeypatch):
    monkeypatch.setattr(_linear.distributed, "world_size", lambda: 6)
    with pytest.raises(BadInput, match="5 images, fewer than the 6 processes"):
        _linear.epoch_plan(21, CONFIG, 0, 8)


def test_labels_outside_the_classes_are_refused():
    samples = Samples(["a.jpg", "b.jpg"], np.array([0, 3]))
    with pytest.raises(BadInput, match=r"mini val: expected labels 0…2, found 3 for b\.jpg"):
        _linear.check_labels(samples, 3, "mini val")
    with pytest.raises(BadInput, match="at least one image"):
        _linear.check_labels(Samples([], np.array([], int)), 3, "mini val")


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
            items = [images[epoch, int(index)] for index in order[start : start + 8]]
            inputs = means(torch.stack([image for image, _ in items]))["colours"]
            optimizer.zero_grad()
            F.cross_entropy(head(inputs), torch.tensor([label for _, label in items])).backward()
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


@pytest.mark.parametrize("optimizer", [LARS, torch.optim.SGD])
def test_a_killed_training_resumes_to_the_same_bits(images, tmp_path, monkeypatch, optimizer):
    whole = train(images, tmp_path / "whole", optimizer=optimizer)
    save = _linear.save

    def save_and_die(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(_linear, "save", save_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(images, tmp_path / "killed", optimizer=optimizer)
    monkeypatch.setattr(_linear, "save", save)
    resumed = train(images, tmp_path / "killed", optimizer=optimizer)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)
    curves = [(tmp_path / name / "curve.csv").read_text() for name in ("whole", "killed")]
    assert curves[0] == curves[1]
    assert curves[0].splitlines()[0] == "epoch,lr,colours"
    assert [float(line.split(",")[1]) for line in curves[0].splitlines()[1:]] == pytest.approx(
        [0.5, 0.5, 0.05, 0.05]
    )


def test_a_broken_state_is_refused(images, tmp_path):
    (tmp_path / "state.pt").write_bytes(b"PK half a file")
    with pytest.raises(BadInput, match=r"state\.pt: expected a whole rolling checkpoint; delete it"):
        train(images, tmp_path)


def test_divergence_stops_with_step_and_learning_rate(images, tmp_path):
    def infinite(batch):
        colours = means(batch)["colours"]
        return {"colours": colours if (tmp_path / "state.pt").exists() is False else colours * torch.inf}

    with pytest.raises(_linear.Diverged, match=r"the loss is nan at step 3 with a learning rate of 0\.5"):
        train(images, tmp_path, frozen=infinite)


def test_accuracy_counts_by_hand():
    samples = SimpleNamespace(paths=range(4), labels=np.array([0, 1, 6, 6]))
    data = _linear.Images(samples, None, 0)
    scores = torch.tensor(
        [
            [9.0, 0, 0, 0, 0, 0, 0],  # right
            [9, 8, 0, 0, 0, 0, 0],  # second
            [6, 5, 4, 3, 2, 1, 0],  # last of seven
            [0, 0, 0, 0, 0, 0, 0],  # all equal: the highest class ranks last
        ]
    )
    data.__class__ = type("Given", (_linear.Images,), {"__getitem__": lambda self, item: item_of(self, item)})

    def item_of(self, item):
        return scores[item[1]], int(self.samples.labels[item[1]])

    heads = _linear.Heads({"x": nn.Identity()})
    assert _linear.accuracy(heads, data, CPU, lambda batch: {"x": batch}, 3) == {"x": 25, "x_top5": 50}
    scores[2] = torch.nan
    with pytest.raises(_linear.Diverged, match="the classifier gives infinity or NaN"):
        _linear.accuracy(heads, data, CPU, lambda batch: {"x": batch}, 3)


def test_divergence_on_another_rank_stops_this_one(images, monkeypatch):
    """A rank that raised alone would leave the others waiting in the sum."""
    asked = []
    monkeypatch.setattr(distributed, "any_rank", lambda flag, device: asked.append(flag) or True)
    heads = _linear.Heads({"x": nn.LazyLinear(7)})
    with pytest.raises(_linear.Diverged, match="the classifier gives infinity or NaN"):
        _linear.accuracy(heads, images, CPU, lambda batch: {"x": batch.flatten(1)}, 3)
    assert asked == [False]


# ---------------------------------------------------------------- the frozen backbone and the work folder


def test_a_changed_backbone_is_detected():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    batch = torch.rand(2, 3, 8, 8)
    with torch.no_grad(), _linear.unchanged(network.eval()):
        network(batch)
    with pytest.raises(RuntimeError, match="the frozen backbone changed"), _linear.unchanged(network.train()):
        network(batch)  # BatchNorm moves its running statistics
    with pytest.raises(RuntimeError, match="changed"), torch.no_grad(), _linear.unchanged(network):
        network[0].bias[1] += 1e-7


def place(config, tmp_path, checkpoint="a"):
    backbone = SimpleNamespace(checkpoint_sha256=checkpoint)
    dataset = SimpleNamespace(dataset=SimpleNamespace(manifest_sha256="b"))
    return _linear.workplace(tmp_path, config, backbone, dataset)


def test_work_of_another_config_or_backbone_is_kept_apart(tmp_path):
    with place(CONFIG, tmp_path) as first:
        pass
    with place(CONFIG, tmp_path) as again:
        assert again == first
    with (
        place(CONFIG.model_copy(update={"lr": 0.4}), tmp_path) as other,
        place(CONFIG, tmp_path, "c") as third,
    ):
        assert len({first, other, third}) == 3


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with place(CONFIG, tmp_path) as folder:
        pass
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    command = [
        sys.executable,
        "-c",
        f"{hold}; print('held', flush=True); sys.stdin.read()",
        str(folder / "lock"),
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

"""What the linear evaluations and semi-supervised fine-tuning see of their images."""

from __future__ import annotations

import pickle
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from simclr import BadInput, loading
from simclr.augment import augment
from simclr.benchmarks import (
    _images,
    imagenet_linear,
    imagenet_mhead,
    imagenet_semi,
    inat18_mhead,
    places205_mhead,
)
from simclr.benchmarks._training import FrozenTraining
from simclr.datasets import Samples
from simclr.transforms import HUE, MEAN, STD, center_crop

CPU = torch.device("cpu")
CONFIG = FrozenTraining(
    image_size=16, resize=20, batch_size=8, epochs=4, lr=0.5, weight_decay=1e-3, micro_batch=3
)
LEVELS = torch.tensor(STD)[:, None, None] * 255  # of a normalised view, per level of 8 bits


@pytest.fixture(scope="module")
def photos():
    return [Image.fromarray(photo).resize((320, 214)) for photo in load_sample_images().images]


def view(transform, image, seed):
    """Return a view as the device makes it."""
    crop, row = _images.crop(transform, image, np.random.default_rng(seed))
    return augment(crop[None], row[None])[0]


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize(
    ("transform", "mean", "greatest"),
    [
        pytest.param(_images.test_transform(CONFIG), 0.01, 0.01, id="test"),
        pytest.param(_images.train_transform(CONFIG), 0.1, 2.01, id="crop and flip"),
        pytest.param(_images.train_transform(CONFIG, "shifted"), 0.01, 0.01, id="shifted"),
        pytest.param(_images.train_transform(CONFIG, lighting=0.1), 0.1, 2.01, id="lighting"),
        pytest.param(_images.train_transform(CONFIG, jitter=0.4, lighting=0.1), 1.4, 6, id="all"),
    ],
)
def test_views_are_pils_but_for_its_rounding(photos, transform, mean, greatest):
    """The same draws by the device and by PIL: mean and greatest difference in levels of 8 bits.

    PIL rounds down after each of three blends, and a later contrast of 1.4 makes more of it.
    """
    theirs = [_images.reference(transform, photos[i % 2], np.random.default_rng(i)) for i in range(60)]
    ours = [view(transform, photos[i % 2], i) for i in range(60)]
    levels = ((torch.stack(ours) - torch.stack(theirs)) * LEVELS).abs()
    assert levels.mean() < mean
    assert levels.max() < greatest


def test_a_test_image_is_the_centre_crop_of_the_other_evaluations(photos):
    expected = center_crop(CONFIG.resize, CONFIG.image_size)(photos[0])
    torch.testing.assert_close(
        view(_images.test_transform(CONFIG), photos[0], 0), expected, rtol=0, atol=1e-5
    )


def test_light_by_hand():
    # Red: −0.5675·0.2175·1 + 0.7192·0.0188·(−2) + 0.4009·0.0045·10
    red = -0.5675 * 0.2175 - 2 * 0.7192 * 0.0188 + 10 * 0.4009 * 0.0045
    green = -0.5808 * 0.2175 + 2 * 0.0045 * 0.0188 - 10 * 0.8140 * 0.0045
    blue = -0.5836 * 0.2175 + 2 * 0.6948 * 0.0188 + 10 * 0.4203 * 0.0045
    assert _images.light(np.array([1.0, -2.0, 10.0])) == pytest.approx((red, green, blue))


def test_lighting_comes_before_normalisation_and_has_its_width():
    grey = Image.new("RGB", (16, 16), (128, 128, 128))
    transform = _images.train_transform(CONFIG, "shifted", lighting=0.1)
    lights = []
    for seed in range(2000):
        view_ = transform.draw(20, 20, np.random.default_rng(seed))
        lights.append(np.linalg.solve(_images.EIGENVECTORS, view_.lighting) / _images.EIGENVALUES)
    assert np.std(lights, axis=0) == pytest.approx([0.1] * 3, rel=0.05)
    assert np.mean(lights, axis=0) == pytest.approx([0] * 3, abs=0.01)
    drawn = torch.tensor(transform.draw(20, 20, np.random.default_rng(7)).lighting)
    expected = (128 / 255 + drawn - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(view(transform, grey, 7)[:, 3, 5], expected, rtol=0, atol=1e-5)


def test_jitter_is_always_on_and_leaves_the_hue():
    transform = _images.train_transform(CONFIG, jitter=0.4)
    views = [transform.draw(30, 20, np.random.default_rng(seed)) for seed in range(2000)]
    factors = np.array([each.jitter[:3] for each in views])
    assert ((factors >= 0.6) & (factors <= 1.4)).all()
    assert factors.min(0) == pytest.approx([0.6] * 3, abs=0.01)
    assert factors.max(0) == pytest.approx([1.4] * 3, abs=0.01)
    assert {each.jitter.hue for each in views} == {0}
    assert {each.jitter.order[-1] for each in views} == {HUE}
    orders, counts = np.unique([each.jitter.order[:3] for each in views], axis=0, return_counts=True)
    assert len(orders) == 6
    assert counts.min() > 270  # of 333
    assert np.mean([each.flip for each in views]) == pytest.approx(0.5, abs=0.04)


def test_shifted_crop_is_a_random_part_of_the_central_square():
    # 40 × 20 pixels: the central square of 20 begins at column 10.
    columns = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None], (20, 40, 3))
    transform = _images.train_transform(CONFIG, "shifted")
    corners = set()
    for seed in range(300):
        crop, row = _images.crop(transform, Image.fromarray(columns.copy()), np.random.default_rng(seed))
        assert crop.shape == (3, 16, 16)
        assert (crop[0, 0].int().diff() == 1).all()
        assert not row[1:4].any()  # neither jitter nor grayscale nor blur
        corners.add(int(crop[0, 0, 0]))
    assert corners == {10, 11, 12, 13, 14}


def test_transforms_can_be_sent_to_a_worker_however_it_is_started(photos):
    for transform in (
        _images.test_transform(CONFIG),
        _images.train_transform(CONFIG, "shifted"),
        _images.train_transform(CONFIG, jitter=1),
    ):
        again = pickle.loads(pickle.dumps(transform))
        assert torch.equal(view(again, photos[0], 3), view(transform, photos[0], 3))


def test_an_item_is_a_function_of_seed_epoch_and_index(photos, tmp_path):
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    samples = Samples([tmp_path / "0.png", tmp_path / "1.png"], np.array([4, 3]))
    images = _images.Images(samples, _images.train_transform(CONFIG, jitter=0.4), seed=5)
    crop, row, label = images[2, 1]
    assert label == 3
    torch.rand(3)
    np.random.default_rng().random()
    assert torch.equal(images[2, 1][0], crop)
    assert torch.equal(images[2, 1][1], row)
    assert not torch.equal(images[3, 1][0], crop)
    other = _images.Images(samples, images.transform, seed=6)
    assert not torch.equal(other[2, 1][0], crop)


def test_a_batch_is_loaded_in_order_and_finished_on_the_device(photos, tmp_path):
    photos[0].save(tmp_path / "0.png")
    samples = Samples([tmp_path / "0.png"] * 5, np.arange(5))
    images = _images.Images(samples, _images.train_transform(CONFIG, jitter=0.4, lighting=0.1), seed=0)
    with _images.load(images, iter([[(0, 3), (1, 1)], [(0, 4)]]), CPU) as batches:
        found = list(batches)
    assert [labels.tolist() for _, labels in found] == [[3, 1], [4]]
    for (views, _), items in zip(found, ([(0, 3), (1, 1)], [(0, 4)]), strict=True):
        for made, (epoch, index) in zip(views, items, strict=True):
            expected = view(images.transform, photos[0], (0, epoch, index))
            torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def test_workers_load_what_one_process_does(photos, tmp_path, monkeypatch):
    photos[1].save(tmp_path / "0.png")
    samples = Samples([tmp_path / "0.png"] * 9, np.arange(9))
    images = _images.Images(samples, _images.train_transform(CONFIG, jitter=0.4), seed=0)
    items, found = loading.pieces([(3, index) for index in range(9)], 2), []
    workers = loading.workers
    for number in (0, 2):
        monkeypatch.setattr(loading, "workers", lambda _, number=number: workers(number))
        with _images.load(images, items, CPU) as batches:
            found.append([(views, labels.tolist()) for views, labels in batches])
    alone, together = found
    assert [labels for _, labels in together] == [labels for _, labels in alone]
    for (ours, _), (theirs, _) in zip(together, alone, strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- order and labels


def test_plan_covers_every_image_once_and_processes_share_batches(monkeypatch):
    steps = list(_images.plan(21, CONFIG, 100))
    assert [len(step) for step in steps] == [8, 8, 5] * CONFIG.epochs
    epochs = [list(chain(*steps[first : first + 3])) for first in range(0, len(steps), 3)]
    for epoch, items in enumerate(epochs):
        assert sorted(items) == [(epoch, index) for index in range(21)]
    assert len({tuple(index for _, index in items) for items in epochs}) == CONFIG.epochs

    in_pieces = list(_images.plan(21, CONFIG, 3))
    assert [len(piece) for piece in in_pieces] == [3, 3, 2, 3, 3, 2, 3, 2] * CONFIG.epochs
    assert list(chain(*in_pieces)) == list(chain(*steps))

    monkeypatch.setattr(_images.distributed, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(_images.distributed, "rank", lambda rank=rank: rank)
        shares.append(list(_images.plan(21, CONFIG, 100)))
    for step, *parts in zip(steps, *shares, strict=True):
        assert sorted(step) == sorted(item for part in parts for item in part)


@pytest.mark.parametrize("first", [0, 1, 3, 7, 11, 12])
def test_the_plan_goes_on_where_it_stopped(first):
    whole = list(_images.plan(21, CONFIG, 100))
    assert list(_images.plan(21, CONFIG, 100, first)) == whole[first:]


def test_plan_refuses_more_processes_than_images(monkeypatch):
    monkeypatch.setattr(_images.distributed, "world_size", lambda: 6)
    with pytest.raises(BadInput, match="5 images, fewer than the 6 processes"):
        _images.steps_per_epoch(21, CONFIG)
    assert _images.steps_per_epoch(24, CONFIG) == 3


# Images of a split → steps of an epoch, of the whole training, and images of an epoch's last step.
PUBLISHED = [
    (imagenet_mhead, 1_281_167, 5_005, 450_450, 143),  # resnet50_mhead_linear-8xb32-steplr-90e_in1k.py
    (imagenet_linear, 1_281_167, 313, 28_170, 3_215),  # resnet50_linear-8xb512-coslr-90e_in1k.py
    (places205_mhead, 2_448_873, 9_566, 267_848, 233),  # resnet50_mhead_8xb32-steplr-28e_places205.py
    (inat18_mhead, 437_513, 1_710, 143_640, 9),  # resnet50_mhead_8xb32-steplr-84e_inat18.py
    (imagenet_semi, 12_811, 51, 1_020, 11),  # imagenet_1percent/
    (imagenet_semi, 128_116, 501, 10_020, 116),  # imagenet_10percent/
]


@pytest.mark.parametrize(("benchmark", "images", "per_epoch", "steps", "last"), PUBLISHED)
def test_trainings_have_the_published_length(benchmark, images, per_epoch, steps, last, monkeypatch):
    config = benchmark.Config()
    monkeypatch.setattr(_images.distributed, "world_size", lambda: 8)
    assert _images.steps_per_epoch(images, config) == per_epoch
    assert per_epoch * config.epochs == steps
    assert images - (per_epoch - 1) * config.batch_size == last


def test_labels_outside_the_classes_are_refused():
    samples = Samples(["a.jpg", "b.jpg"], np.array([0, 3]))
    with pytest.raises(BadInput, match=r"mini val: expected labels 0…2, found 3 for b\.jpg"):
        _images.check_labels(samples, 3, "mini val")
    with pytest.raises(BadInput, match="at least one image"):
        _images.check_labels(Samples([], np.array([], int)), 3, "mini val")


def test_another_dataset_is_refused_and_both_are_named():
    dataset = SimpleNamespace(name="imagenet")
    with pytest.raises(BadInput, match="expected the manifest of places205, found that of imagenet"):
        _images.train_and_val(dataset, places205_mhead.Config())

"""The miniature datasets: reproducible to the byte, exact, disjoint, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from simclr import BadInput, datasets, demo


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def again(tmp_path_factory) -> tuple[Path, dict[Path, list[bytes]]]:
    """The miniature made once more, and which digits were painted into which image."""
    folder = tmp_path_factory.mktemp("again") / "data"
    painted: dict[Path, list[bytes]] = {}
    current: list[bytes] = []

    def glyph(digit, size, angle=0.0, original=demo.glyph):
        current.append(digit.tobytes())
        return original(digit, size, angle)

    def save(image, path, **options):
        if "gtFine" not in path.parts:
            # While it is made, the folder bears a temporary name.
            painted[Path(*path.relative_to(folder.parent).parts[1:])] = current.copy()
            current.clear()
        return options["original"](image, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "glyph", glyph)
        for name in ("save_jpeg", "_save_png"):
            patch.setattr(demo, name, partial(save, original=getattr(demo, name)))
        demo.make(folder)
    return folder, painted


def test_the_same_seed_gives_the_same_bytes(demo_data, again):
    assert digests(again[0]) == digests(demo_data)


def test_another_seed_gives_other_images_of_the_same_layout(demo_data, tmp_path):
    demo.cityscapes(tmp_path, demo.load_digits(), np.random.default_rng(1))
    here, there = digests(tmp_path), digests(demo_data / "cityscapes")
    assert here.keys() == there.keys()
    assert all(here[name] != there[name] for name in here)


@pytest.fixture
def one_writer(monkeypatch):
    """`make` fills one small folder only."""
    monkeypatch.setattr(demo, "WRITERS", {"cityscapes": demo.cityscapes})


def test_a_folder_that_failed_half_way_is_not_left_behind(tmp_path, monkeypatch):
    def fail(root, digits, rng):
        root.mkdir()
        (root / "half").write_text("written")
        raise RuntimeError("disk full")

    monkeypatch.setattr(demo, "WRITERS", {"imagenet": fail})
    with pytest.raises(RuntimeError, match="disk full"):
        demo.make(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_folder_says_so_and_is_replaced_as_a_whole(tmp_path, one_writer):
    demo.make(tmp_path / "data", seed=3)
    assert json.loads((tmp_path / "data/demo.json").read_text()) == {"seed": 3, "version": demo.VERSION}
    (tmp_path / "data/cityscapes/stray").write_text("x")
    (tmp_path / "data/demo.json").unlink()
    demo.make(tmp_path / "data")
    assert not (tmp_path / "data/cityscapes/stray").exists()
    assert (tmp_path / "data/demo.json").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


def test_an_empty_folder_is_filled_and_a_foreign_one_is_left_alone(tmp_path, one_writer):
    (tmp_path / "empty").mkdir()
    demo.make(tmp_path / "empty")
    assert (tmp_path / "empty/demo.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(BadInput, match=r"mine: expected no folder, .*choose another folder"):
        demo.make(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").read_text() == "x"
    with pytest.raises(BadInput, match=r"thesis.tex: expected no folder"):
        demo.make(tmp_path / "mine/thesis.tex")


# ---------------------------------------------------------------- what is in it


def test_no_digit_of_a_train_split_is_in_a_test_split(dataset, demo_data, again):
    """Which digits were painted into which file, held against the published lists."""
    _, painted = again
    digits = demo.load_digits()
    pools = [{digit.tobytes() for digits_of in pool for digit in digits_of} for pool in digits]
    assert [len(pool) for pool in pools] == [1400, 397]
    assert not pools[0] & pools[1]
    seen = 0
    for name, reader in datasets.READERS.items():
        opened = dataset(name)
        for split in opened.splits:
            pool = pools[split in ("val", "val2017", "test", "test07")]
            for path in reader.read(opened, split).paths:
                assert set(painted[path.relative_to(demo_data)]) <= pool
                seen += 1
    assert seen > 4900


def test_every_class_is_in_every_split_of_the_classification_sets(dataset):
    for name in ("imagenet", "places205", "inat18"):
        for split in ("train", "val"):
            counts = np.bincount(datasets.samples(dataset(name), split).labels, minlength=10)
            assert counts.min() >= 20
    for percent, count in ((1, 28), (10, 280)):
        labels = datasets.subset(dataset("imagenet"), f"train_{percent}percent").labels
        assert len(labels) == count
        assert np.ptp(np.bincount(labels, minlength=10)) <= 1


def test_voc_has_enough_images_for_the_low_shot_draws(dataset):
    labels = datasets.samples(dataset("voc2007"), "trainval").labels
    assert (labels == 1).sum(0).min() >= 8
    assert (labels == 0).sum(0).min() >= 19 * 8
    assert (datasets.samples(dataset("voc2007"), "test").labels == 1).sum(0).min() >= 8


def test_digits_stand_out_from_their_background():
    rng = np.random.default_rng(0)
    for digit in demo.load_digits().train[3][:20]:
        assert demo.picture(rng, digit).std((0, 1)).max() > 15


# ---------------------------------------------------------------- boxes and masks


def test_voc_boxes_are_the_extents_of_the_masks(demo_data, dataset):
    """On images of one object VOC's own mask has one region; its extent is the box, 1-based and inclusive."""
    entries = {entry["image_id"]: entry for entry in datasets.detection(dataset("voc0712"), "trainval12")}
    images, masks = datasets.segmentation(dataset("voc12aug"), "train")
    checked = 0
    for image, path in zip(images, masks, strict=True):
        annotations = entries[image.stem]["annotations"]
        mask = np.asarray(Image.open(path))
        assert set(np.unique(mask)) - {0, 255} <= {each["category_id"] + 1 for each in annotations}
        assert (mask == 255).any()
        if len(annotations) == 1:
            rows, columns = np.nonzero(mask == annotations[0]["category_id"] + 1)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert annotations[0]["bbox"] == extent
            checked += 1
    assert checked > 5


def test_original_and_sbd_masks_differ_by_the_void_only(demo_data):
    folder = demo_data / "VOCdevkit/VOC2012"
    for name in (folder / "ImageSets/Segmentation/train.txt").read_text().split():
        voc, sbd = (
            np.asarray(Image.open(folder / kind / f"{name}.png"))
            for kind in ("SegmentationClass", "SegmentationClassAug")
        )
        assert 255 not in sbd
        assert np.array_equal(voc[voc != 255], sbd[voc != 255])


def test_voc_palette_has_the_published_colours(demo_data):
    assert demo.voc_palette()[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]
    path = next((demo_data / "VOCdevkit/VOC2012/SegmentationClass").iterdir())
    assert Image.open(path).mode == "P"


def test_every_coco_segmentation_decodes_to_its_area_and_box(demo_data):
    crowds = 0
    for split in ("train2017", "val2017"):
        content = json.loads((demo_data / f"coco/annotations/instances_{split}.json").read_text())
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for annotation in content["annotations"]:
            rle = coco_mask.frPyObjects(annotation["segmentation"], *sizes[annotation["image_id"]])
            mask = coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle)
            assert mask.sum() == annotation["area"]
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [
                x,
                y,
                x + width,
                y + height,
            ]
            crowds += annotation["iscrowd"]
        with_objects = {annotation["image_id"] for annotation in content["annotations"]}
        assert len(with_objects) < len(sizes)
    assert crowds == 8


def test_polygons_of_a_ring_and_a_dot_worked_by_hand():
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], bool)
    ring, dot = demo.polygons(mask)
    assert dot == [3, 3, 4, 3, 4, 4, 3, 4]
    assert ring[:8] == [0, 0, 3, 0, 3, 3, 0, 3]
    assert ring[8:10] == [0, 0]
    assert ring[10:12] == ring[-2:]
    assert {tuple(ring[i : i + 2]) for i in range(10, 20, 2)} == {(1, 1), (2, 1), (2, 2), (1, 2)}


def test_polygons_and_run_lengths_of_any_mask_decode_to_it():
    rng = np.random.default_rng(0)
    for density in (0.3, 0.5, 0.7, 0.95):
        for _ in range(10):
            mask = rng.random((9, 13)) < density
            decoded = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(demo.polygons(mask), 9, 13)))
            assert np.array_equal(decoded, mask)
            decoded = coco_mask.decode(coco_mask.frPyObjects(demo.run_lengths(mask), 9, 13))
            assert np.array_equal(decoded, mask)


def test_cityscapes_train_ids_follow_from_the_label_ids(demo_data):
    published = dict(zip(demo.LABEL_IDS, range(19), strict=True))
    seen = set()
    for path in (demo_data / "cityscapes/gtFine").rglob("*_labelIds.png"):
        label_ids = np.asarray(Image.open(path))
        train_ids = np.asarray(Image.open(str(path).replace("labelIds", "labelTrainIds")))
        expected = np.vectorize(lambda value: published.get(value, 255))(label_ids)
        assert np.array_equal(train_ids, expected)
        seen |= set(np.unique(train_ids).tolist())
    assert seen == {*demo.CITYSCAPES_IDS, demo.SKY, demo.ROAD, 255}

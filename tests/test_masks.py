"""Masks made of SBD's .mat files and of Cityscapes' polygons, while the dataset is verified."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from simclr import BadInput, config, datasets, masks
from simclr.__main__ import main

SBD_TRAIN, SBD_VAL = ["2008_000008", "2008_000015", "2008_000003"], ["2008_000002", "2008_000019"]
VOC = {"train": ["2008_000015"], "val": ["2008_000002", "2008_000009"]}
AUG = ["2008_000003", "2008_000008", "2008_000019"]


def labels_of(name: str) -> np.ndarray:
    """The class numbers `(H, W)` that stand for an image in the tests."""
    return np.random.default_rng(int(name[5:])).integers(0, 21, (6, 9), np.uint8)


def write_mat(path: Path, labels: np.ndarray) -> None:
    """One file as SBD has it: a struct GTcls with the segmentation among other fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = {"Boundaries": np.zeros((20, 1)), "Segmentation": labels, "CategoriesPresent": np.unique(labels)}
    savemat(path, {"GTcls": struct})


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """VOC2012 of four images, and SBD beside it in the layout of its archive."""
    root = tmp_path / "VOCdevkit"
    lists, release = root / "VOC2012/ImageSets/Segmentation", root / "benchmark_RELEASE/dataset"
    for folder, names in ((lists, VOC), (release, {"train": SBD_TRAIN, "val": SBD_VAL})):
        folder.mkdir(parents=True)
        for split, ids in names.items():
            (folder / f"{split}.txt").write_text("".join(f"{each}\n" for each in ids))
    for name in SBD_TRAIN + SBD_VAL:
        write_mat(release / f"cls/{name}.mat", labels_of(name))
    for name in {*SBD_TRAIN, *SBD_VAL, *VOC["train"], *VOC["val"]}:
        for path in (f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png"):
            (root / "VOC2012" / path).parent.mkdir(exist_ok=True)
            Image.new("L", (9, 6)).save(root / "VOC2012" / path)
    return root


def block(root: Path, **images: int) -> config.Dataset:
    return config.Dataset(root=root, images=images)


def test_sbd_becomes_masks_and_the_list_that_adds_to_vocs(devkit, tmp_path):
    datasets.verify("voc12aug", block(devkit, train=1, aug=3, val=2), tmp_path / "manifest.json")
    assert (devkit / "VOC2012/ImageSets/Segmentation/aug.txt").read_text().split() == AUG
    images, made = datasets.segmentation(datasets.Dataset.open(tmp_path / "manifest.json"), "aug")
    assert [path.stem for path in images] == [path.stem for path in made] == AUG
    for path in made:
        assert np.array_equal(np.asarray(Image.open(path)), labels_of(path.stem))
    assert {path.name for path in (devkit / "VOC2012/SegmentationClassAug").iterdir()} == {
        f"{name}.png" for name in AUG
    }


def test_equal_sbd_gives_equal_bytes_and_what_is_there_stays(devkit):
    masks.make_voc12aug(devkit)
    folder = devkit / "VOC2012/SegmentationClassAug"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / f"{AUG[1]}.png").unlink()  # as after a kill
    (devkit / "VOC2012/ImageSets/Segmentation/aug.txt").unlink()
    masks.make_voc12aug(devkit)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    again = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in times if times[name] != again[name]} == {f"{AUG[1]}.png"}
    assert (devkit / "VOC2012/ImageSets/Segmentation/aug.txt").read_text().split() == AUG


def test_the_processes_make_the_same_as_one(devkit, monkeypatch):
    masks.make_voc12aug(devkit)
    folder = devkit / "VOC2012/SegmentationClassAug"
    alone = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    monkeypatch.setattr(masks, "PLENTY", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    masks.make_voc12aug(devkit)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == alone


def test_another_number_of_images_than_published_is_refused(devkit, tmp_path, capsys):
    command = ["datasets", "--name", "voc12aug", "--output", str(tmp_path / "manifest.json")]
    values = block(devkit, train=1, aug=9_118, val=2).model_dump_json(exclude_unset=True)
    assert main([*command, "--config", values]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "expected 9,118 images in aug" in said
    assert "found 3" in said


def test_sbd_that_is_not_whole_is_refused(devkit):
    mat = devkit / f"benchmark_RELEASE/dataset/cls/{AUG[0]}.mat"
    intact = mat.read_bytes()
    for content, words in (
        (intact[:200], "expected a .mat file of SBD"),
        (b"", "expected a .mat file of SBD"),
        (b"version https://git-lfs.github.com/spec/v1\n" * 9, "expected a .mat file of SBD"),
    ):
        mat.write_bytes(content)
        with pytest.raises(BadInput, match=rf"{AUG[0]}\.mat: {words}"):
            masks.make_voc12aug(devkit)
    savemat(mat, {"GTinst": 1})
    with pytest.raises(BadInput, match=r"GTcls.*KeyError"):
        masks.make_voc12aug(devkit)
    mat.unlink()
    with pytest.raises(BadInput, match=rf"{AUG[0]}\.mat: no such file, though SBD's lists name it"):
        masks.make_voc12aug(devkit)
    (devkit / "benchmark_RELEASE/dataset/val.txt").unlink()
    with pytest.raises(BadInput, match=r"dataset/val\.txt: no such list"):
        masks.make_voc12aug(devkit)
    assert not (devkit / "VOC2012/ImageSets/Segmentation/aug.txt").exists()


def test_without_sbd_and_its_masks_the_message_says_what_they_are_made_of(devkit, tmp_path):
    shutil.rmtree(devkit / "benchmark_RELEASE")
    with pytest.raises(BadInput, match=r"aug\.txt: not found; .*are made of benchmark_RELEASE"):
        datasets.verify("voc12aug", block(devkit, train=1, aug=3, val=2), tmp_path / "manifest.json")


def test_a_folder_that_cannot_be_written_to_is_named(devkit, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(BadInput, match=r"SegmentationClassAug: cannot be written to"):
        masks.make_voc12aug(devkit)


# ---------------------------------------------------------------- Cityscapes

# What the polygons below show, by hand: train ids 0 road, 8 vegetation, 13 car, 255 void; a licence plate
# (id −1) is not drawn, "cargroup" is car, and what is deleted is not there.
POLYGONS = [
    ("ego vehicle", [[0, 0], [11, 0], [11, 7], [0, 7]]),
    ("road", [[0, 4], [11, 4], [11, 7], [0, 7]]),
    ("vegetation", [[0, 0], [5, 0], [5, 3], [0, 3]]),
    ("cargroup", [[8, 4], [9, 4], [9, 5], [8, 5]]),
    ("license plate", [[0, 0], [1, 0], [1, 1], [0, 1]]),
    ("deleted", [[0, 0], [1, 0], [1, 1], [0, 1]]),
]


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    root = tmp_path / "cityscapes"
    objects = [{"label": label, "polygon": points} for label, points in POLYGONS]
    objects[-1] |= {"label": "sky", "deleted": 1}
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "frankfurt")):
        stem = f"{split}/{city}/{city}_000000_000019"
        for folder in ("leftImg8bit", "gtFine"):
            (root / folder / split / city).mkdir(parents=True)
        Image.new("RGB", (12, 8)).save(root / f"leftImg8bit/{stem}_leftImg8bit.png")
        content = {"imgHeight": 8, "imgWidth": 12, "objects": objects}
        (root / f"gtFine/{stem}_gtFine_polygons.json").write_text(json.dumps(content))
    return root


def test_train_ids_are_made_of_polygons(cityscapes, tmp_path):
    pytest.importorskip("cityscapesscripts", reason="draws the polygons; `uv sync` installs it")
    datasets.verify("cityscapes", block(cityscapes, train=2, val=1), tmp_path / "manifest.json")
    expected = np.full((8, 12), 255, np.uint8)
    expected[4:] = 0
    expected[:4, :6] = 8
    expected[4:6, 8:10] = 13
    opened = datasets.Dataset.open(tmp_path / "manifest.json")
    for split, count in (("train", 2), ("val", 1)):
        _, made = datasets.segmentation(opened, split)
        assert len(made) == count
        for path in made:
            assert np.array_equal(np.asarray(Image.open(path)), expected)


def test_train_ids_that_are_there_stay(cityscapes):
    pytest.importorskip("cityscapesscripts", reason="draws the polygons; `uv sync` installs it")
    kept = cityscapes / "gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelTrainIds.png"
    kept.write_bytes(b"mine")
    masks.make_cityscapes(cityscapes)
    assert kept.read_bytes() == b"mine"
    assert len(list(cityscapes.rglob("*_labelTrainIds.png"))) == 3


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"imgHeight": 8, "imgWidth": 12, "objects": [1]}', "unknown"]
)
def test_polygons_that_are_none_are_refused(cityscapes, content):
    pytest.importorskip("cityscapesscripts", reason="draws the polygons; `uv sync` installs it")
    path = cityscapes / "gtFine/train/aachen/aachen_000000_000019_gtFine_polygons.json"
    if content == "unknown":
        content = path.read_text().replace('"road"', '"zebra"')
    path.write_text(content)
    with pytest.raises(BadInput, match=r"aachen_000000_000019_gtFine_polygons\.json: expected polygons"):
        masks.make_cityscapes(cityscapes)
    assert not path.with_name("aachen_000000_000019_gtFine_labelTrainIds.png").exists()


def test_without_cityscapesscripts_the_message_says_what_to_install(
    cityscapes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "cityscapesscripts", None)
    monkeypatch.setattr(masks, "find_spec", lambda _: None)
    values = block(cityscapes, train=2, val=1).model_dump_json(exclude_unset=True)
    command = ["datasets", "--name", "cityscapes", "--output", str(tmp_path / "manifest.json")]
    assert main([*command, "--config", values]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "3 masks are to be made of polygons" in said
    assert "`pip install cityscapesscripts`" in said

"""Datasets: what the readers return, and every way in which a dataset on disk can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from simclr import BadInput, config, datasets, layouts
from simclr.__main__ import main, sentence

# ---------------------------------------------------------------- a tiny ImageNet

WNIDS = ("n01440764", "n01443537", "n01484850")


def write_image(path: Path, size: tuple[int, int] = (10, 8), colour: int = 100, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 50, 200)).save(path, "JPEG", **options)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Three classes, two training images and one validation image each, lists as published."""
    root = tmp_path / "imagenet"
    train = [f"{wnid}/{wnid}_{number}.JPEG" for wnid in WNIDS for number in (7, 11)]
    val = [f"{wnid}/ILSVRC2012_val_{3 - label:08d}.JPEG" for label, wnid in enumerate(WNIDS)]
    for name in train:
        write_image(root / "train" / name)
    for name in val:
        write_image(root / "val" / name)
    (root / "meta").mkdir()
    lines = [f"{name} {WNIDS.index(name.split('/')[0])}\n" for name in train]
    (root / "meta/train.txt").write_text("".join(lines))
    # Sorted by file, and without folders: as the list of the validation images is published.
    lines = sorted(f"{name.split('/')[1]} {WNIDS.index(name.split('/')[0])}\n" for name in val)
    (root / "meta/val.txt").write_text("".join(lines))
    return root


def block(root: Path, **values) -> config.Dataset:
    return config.Dataset(**{"root": root, "classes": 3, "images": {"train": 6, "val": 3}, **values})


def verify(name: str, values: config.Dataset, tmp_path: Path) -> datasets.Dataset:
    manifest = tmp_path / "manifest.json"
    datasets.verify(name, values, manifest)
    return datasets.Dataset.open(manifest)


def refused(name: str, values: config.Dataset, tmp_path: Path, *words: object) -> None:
    """The dataset is refused in one sentence with all `words`, and no manifest is left."""
    with pytest.raises(BadInput) as error:
        datasets.verify(name, values, tmp_path / "manifest.json")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    assert not (tmp_path / "manifest.json").exists()


def pairs(samples: datasets.Samples) -> set[tuple[str, int]]:
    return {(path.name, int(label)) for path, label in zip(samples.paths, samples.labels, strict=True)}


# ---------------------------------------------------------------- the miniature


@pytest.mark.parametrize("name", datasets.READERS)
def test_the_miniature_verifies_to_a_stable_manifest(name, demo_block, tmp_path):
    for manifest in ("a.json", "b.json"):
        datasets.verify(name, demo_block(name), tmp_path / manifest)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    dataset = datasets.Dataset.open(tmp_path / "a.json")
    assert dataset.images == demo_block(name).images
    assert dataset.classes == demo_block(name).classes
    assert dataset.root == demo_block(name).root
    assert dataset.dataset.name == name
    assert dataset.dataset == datasets.Dataset.open(tmp_path / "b.json").dataset


def test_imagenet_labels_are_ranks_of_sorted_wnids(dataset):
    opened = dataset("imagenet")
    for split, count in (("train", 2800), ("val", 400)):
        samples = datasets.samples(opened, split)
        wnids = sorted(path.name for path in (opened.root / split).iterdir())
        assert len(samples) == len(samples.paths) == count
        assert samples.labels.dtype == np.int64
        assert [wnids.index(path.parent.name) for path in samples.paths] == samples.labels.tolist()
        assert all(path.is_file() for path in samples.paths)


def test_voc2007_labels_equal_those_counted_in_the_annotations(dataset):
    opened = dataset("voc2007")
    for split in ("trainval", "test"):
        samples = datasets.samples(opened, split)
        assert samples.labels.shape == (opened.images[split], 10)
        assert samples.labels.dtype == np.int8
        for path, row in zip(samples.paths, samples.labels, strict=True):
            tree = ET.parse(path.parent.parent / "Annotations" / f"{path.stem}.xml")
            found = [(each.findtext("name"), each.findtext("difficult")) for each in tree.iter("object")]
            for name, label in zip(opened.class_names, row, strict=True):
                flags = [difficult for each, difficult in found if each == name]
                assert label == (0 if not flags else 1 if "0" in flags else -1)
        assert (samples.labels == -1).any()
    assert opened.class_names == list(layouts.VOC_CLASSES[:10])


def test_detection_of_voc_lowers_the_first_corner_only(dataset):
    opened = dataset("voc0712")
    entries = datasets.detection(opened, "trainval12")
    assert [entry["image_id"] for entry in entries] == sorted(entry["image_id"] for entry in entries)
    objects = 0
    for entry in entries:
        assert Image.open(entry["file_name"]).size == (entry["width"], entry["height"])
        tree = ET.parse(opened.root / f"VOC2012/Annotations/{entry['image_id']}.xml")
        for element, found in zip(tree.iter("object"), entry["annotations"], strict=True):
            corner = [int(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
            assert found["bbox"] == [corner[0] - 1, corner[1] - 1, corner[2], corner[3]]
            assert opened.class_names[found["category_id"]] == element.findtext("name")
            assert found["difficult"] == int(element.findtext("difficult"))
            objects += 1
    assert objects > len(entries)


def test_detection_of_coco_equals_pycocotools(dataset, capsys):
    from pycocotools.coco import COCO

    opened = dataset("coco2017")
    coco = COCO(opened.root / "annotations/instances_val2017.json")
    ids = sorted(coco.getCatIds())
    assert opened.class_names == [coco.cats[each]["name"] for each in ids]
    entries = datasets.detection(opened, "val2017")
    assert [entry["image_id"] for entry in entries] == sorted(coco.imgs)
    for entry in entries:
        expected = coco.imgToAnns[entry["image_id"]]
        for found, annotation in zip(entry["annotations"], expected, strict=True):
            x, y, width, height = annotation["bbox"]
            assert found["bbox"] == [x, y, x + width, y + height]
            assert ids[found["category_id"]] == annotation["category_id"]
            assert found["segmentation"] == annotation["segmentation"]
            assert found["iscrowd"] == annotation["iscrowd"]
    assert any(each["iscrowd"] for entry in entries for each in entry["annotations"])


def test_segmentation_takes_aug_from_its_own_masks(dataset):
    opened = dataset("voc12aug")
    folders = {}
    for split in ("train", "aug", "val"):
        images, masks = datasets.segmentation(opened, split)
        assert [path.stem for path in images] == [path.stem for path in masks]
        folders[split] = {path.parent.name for path in masks}
    assert folders == {
        "train": {"SegmentationClass"},
        "aug": {"SegmentationClassAug"},
        "val": {"SegmentationClass"},
    }
    images, masks = datasets.segmentation(dataset("cityscapes"), "val")
    assert [path.name.replace("_leftImg8bit", "") for path in images] == [
        path.name.replace("_gtFine_labelTrainIds", "") for path in masks
    ]


def test_places_and_inat_labels_are_those_of_their_folders(dataset):
    places, inat = dataset("places205"), dataset("inat18")
    assert "apartment_building/outdoor" in places.class_names
    samples = datasets.samples(places, "train")
    for path, label in zip(samples.paths, samples.labels, strict=True):
        assert places.class_names[label] in str(path.parent)
    samples = datasets.samples(inat, "val")
    assert [int(path.parent.name) for path in samples.paths] == samples.labels.tolist()


def test_readers_refuse_what_a_dataset_does_not_have(dataset):
    with pytest.raises(BadInput, match="imagenet has the splits train, val; found 'test'"):
        datasets.samples(dataset("imagenet"), "test")
    with pytest.raises(BadInput, match="cityscapes has no labels"):
        datasets.samples(dataset("cityscapes"), "val")
    with pytest.raises(BadInput, match="imagenet has no boxes"):
        datasets.detection(dataset("imagenet"), "val")
    with pytest.raises(BadInput, match="coco2017 has no masks"):
        datasets.segmentation(dataset("coco2017"), "val2017")


# ---------------------------------------------------------------- the layouts of ImageNet


def test_folders_lists_and_a_flat_val_give_the_same_labels(imagenet, tmp_path):
    listed = verify("imagenet", block(imagenet), tmp_path)
    expected = {split: pairs(datasets.samples(listed, split)) for split in ("train", "val")}
    assert ("ILSVRC2012_val_00000003.JPEG", 0) in expected["val"]

    flat = shutil.copytree(imagenet, tmp_path / "flat")
    for path in sorted((flat / "val").glob("*/*")):
        path.rename(flat / "val" / path.name)
        path.parent.rmdir()
    shutil.rmtree(imagenet / "meta")
    for root in (imagenet, flat):
        opened = verify("imagenet", block(root), tmp_path)
        assert {split: pairs(datasets.samples(opened, split)) for split in expected} == expected
        assert all(path.is_file() for path in datasets.samples(opened, "val").paths)


def test_a_flat_val_needs_its_list(imagenet, tmp_path):
    for path in sorted((imagenet / "val").glob("*/*")):
        path.rename(imagenet / "val" / path.name)
        path.parent.rmdir()
    (imagenet / "meta/val.txt").unlink()
    refused("imagenet", block(imagenet), tmp_path, imagenet / "meta/val.txt", "is flat", "restore")


@pytest.mark.parametrize("split", ["train", "val"])
def test_wrong_label_order_is_refused(imagenet, tmp_path, split):
    """Labels counted from another order of the classes, as the devkit's own are."""
    path = imagenet / f"meta/{split}.txt"
    entries = [line.split() for line in path.read_text().splitlines()]
    path.write_text("".join(f"{name} {(int(label) + 1) % 3}\n" for name, label in entries))
    refused("imagenet", block(imagenet), tmp_path, path, "sorted order", "found")


def test_wrong_label_order_of_a_flat_val_is_known_from_its_first_images(tmp_path):
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 6)]
    dataset = datasets.Dataset("imagenet", tmp_path, [str(n) for n in range(1000)], {}, {})
    paths = datasets.Paths(tmp_path / "val", names)
    sorted_wnids, devkit = [65, 970, 230, 809, 516], [490, 361, 171, 822, 297]
    layouts._check_imagenet(dataset, "val", layouts.Listing(paths, np.array(sorted_wnids)))
    with pytest.raises(BadInput, match="expected label 65 for ILSVRC2012_val_00000001"):
        layouts._check_imagenet(dataset, "val", layouts.Listing(paths, np.array(devkit)))


def test_a_list_line_without_label_is_refused(imagenet, tmp_path):
    path = imagenet / "meta/train.txt"
    path.write_text(path.read_text() + "n01440764/n01440764_99.JPEG\n")
    refused("imagenet", block(imagenet), tmp_path, path, "line 7", "`relative/path label`", "restore")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("train_1percent", ["n01443537/n01443537_11.JPEG 1", "n01440764/n01440764_7.JPEG 0"]),
        ("1percent", ["n01443537_11.JPEG", "n01440764_7.JPEG"]),
        ("train_1pct", ["n01443537/n01443537_11.JPEG 1", "n01440764/n01440764_7.JPEG 0"]),
    ],
)
def test_subsets_are_read_in_every_published_form(imagenet, tmp_path, name, lines):
    (imagenet / f"meta/{name}.txt").write_text("\n".join(lines))
    samples = datasets.subset(verify("imagenet", block(imagenet), tmp_path), "train_1percent")
    assert [str(path.relative_to(imagenet)) for path in samples.paths] == [
        "train/n01443537/n01443537_11.JPEG",
        "train/n01440764/n01440764_7.JPEG",
    ]
    assert samples.labels.tolist() == [1, 0]


def test_subsets_that_are_missing_or_mislabelled_are_refused(imagenet, tmp_path):
    opened = verify("imagenet", block(imagenet), tmp_path)
    with pytest.raises(BadInput, match=r"train_10percent.txt: no such list; fetch .*10percent.txt"):
        datasets.subset(opened, "train_10percent")
    (imagenet / "meta/train_10percent.txt").write_text("n01443537/n01443537_11.JPEG 2\n")
    with pytest.raises(BadInput, match="expected label 1 for n01443537/n01443537_11"):
        datasets.subset(opened, "train_10percent")
    (imagenet / "meta/train_10percent.txt").write_text("n99999999/n99999999_11.JPEG 2\n")
    with pytest.raises(BadInput, match="n99999999"):
        datasets.subset(opened, "train_10percent")


# ---------------------------------------------------------------- what is refused before any training


def test_a_root_that_is_not_set_or_not_there(tmp_path):
    refused("imagenet", config.Dataset(), tmp_path, "datasets.imagenet.root is not set")
    missing = tmp_path / "nowhere"
    refused("imagenet", block(missing), tmp_path, missing, "no such folder", "datasets.imagenet.root", "wnid")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split(imagenet, tmp_path, split):
    shutil.rmtree(imagenet / split)
    refused("imagenet", block(imagenet), tmp_path, imagenet / split, "not found", "datasets.imagenet.root")


def test_a_wrong_number_of_images(imagenet, tmp_path):
    values = block(imagenet, images={"train": 7, "val": 3})
    refused("imagenet", values, tmp_path, imagenet, "7", "datasets.imagenet.images.train", "found 6")


def test_a_wrong_number_of_classes(imagenet, tmp_path):
    values = block(imagenet, classes=4)
    refused("imagenet", values, tmp_path, imagenet, "expected 4 classes", "found 3")


def test_a_missing_image(imagenet, tmp_path):
    gone = imagenet / "train/n01443537/n01443537_11.JPEG"
    gone.unlink()
    refused("imagenet", block(imagenet), tmp_path, gone, "no such file", "restore")


@pytest.mark.parametrize("decode", [0, 100])
def test_a_truncated_jpeg_even_outside_the_decoded_sample(imagenet, tmp_path, decode):
    damaged = imagenet / "train/n01443537/n01443537_11.JPEG"
    Image.effect_noise((200, 200), 90).convert("RGB").save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    refused("imagenet", block(imagenet, decode=decode), tmp_path, damaged, "truncated", "restore")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_files_that_are_no_images_are_counted(imagenet, tmp_path, content):
    for path in sorted((imagenet / "val").glob("*/*"))[:2]:
        path.write_bytes(content)
    refused("imagenet", block(imagenet), tmp_path, "cannot be read as an image", "1 more of 3 files")


def test_bytes_damaged_in_the_middle_are_found_by_the_sample(imagenet, tmp_path):
    """Only decoding shows this damage: the header and the end of the file are whole."""
    damaged = imagenet / "train/n01443537/n01443537_11.JPEG"
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    image.save(damaged.with_suffix(".png"))
    content = bytearray(damaged.with_suffix(".png").read_bytes())
    damaged.with_suffix(".png").unlink()
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    verify("imagenet", block(imagenet, decode=0), tmp_path)
    (tmp_path / "manifest.json").unlink()
    refused("imagenet", block(imagenet), tmp_path, damaged, "cannot be decoded")


def test_an_intact_jpeg_with_bytes_behind_its_end_passes(imagenet, tmp_path):
    padded = imagenet / "train/n01443537/n01443537_11.JPEG"
    padded.write_bytes(padded.read_bytes() + b"\0" * 30)
    verify("imagenet", block(imagenet), tmp_path)


def test_junk_beside_the_images_does_not_count(imagenet, tmp_path):
    shutil.rmtree(imagenet / "meta")
    (imagenet / "train/.DS_Store").write_bytes(b"x")
    (imagenet / "train/n01443537/._n01443537_11.JPEG").write_bytes(b"x")
    (imagenet / "train/n01443537/Thumbs.db").write_bytes(b"x")
    (imagenet / "train/.cache").mkdir()
    verify("imagenet", block(imagenet), tmp_path)


def test_an_unknown_dataset_or_split(imagenet, tmp_path):
    refused("imagenet21k", block(imagenet), tmp_path, "expected one of imagenet, voc2007", "imagenet21k")
    values = block(imagenet, images={"train": 6, "test": 3})
    refused("imagenet", values, tmp_path, "images", "expected the splits train, val, found train, test")


@pytest.fixture
def copied(demo_data, demo_block, tmp_path):
    """(folder of the miniature, dataset) → a copy of it to damage, and its config block."""

    def copy(folder: str, name: str) -> tuple[Path, config.Dataset]:
        root = shutil.copytree(demo_data / folder, tmp_path / folder)
        return root, demo_block(name).model_copy(update={"root": root})

    return copy


def first(folder: Path, pattern: str) -> Path:
    return min(folder.glob(pattern))


def test_voc_lists_and_annotations_that_do_not_fit(copied, tmp_path):
    root, values = copied("VOCdevkit", "voc2007")
    lists = root / "VOC2007/ImageSets/Main"
    lines = (lists / "bird_test.txt").read_text().splitlines(keepends=True)
    (lists / "bird_test.txt").write_text("".join(lines[1:]))
    expected = f"expected the {values.images['test']} image ids of test.txt"
    refused("voc2007", values, tmp_path, lists / "bird_test.txt", expected)
    (lists / "bird_test.txt").write_text("".join([lines[0].split()[0] + " 7\n", *lines[1:]]))
    refused("voc2007", values, tmp_path, lists / "bird_test.txt", "line 1", "unpack")
    (lists / "bird_test.txt").unlink()
    refused("voc2007", values, tmp_path, lists / "bird_test.txt", "not found")
    (lists / "bird_trainval.txt").unlink()
    refused("voc2007", values, tmp_path, "expected 10 classes", "found 9")


def test_voc_annotations_that_do_not_fit(copied, tmp_path):
    root, values = copied("VOCdevkit", "voc0712")
    ids = (root / "VOC2012/ImageSets/Main/trainval.txt").read_text().split()
    annotation = root / f"VOC2012/Annotations/{ids[0]}.xml"
    text = annotation.read_text()
    name = ET.fromstring(text).findtext("object/name")
    for wrong, word in (
        (text.replace(f"<name>{name}</name>", "<name>zebra</name>", 1), "zebra"),
        (text.replace("<width>", "<breadth>").replace("</width>", "</breadth>"), "size"),
        (text[:200], "ParseError"),
    ):
        annotation.write_text(wrong)
        refused("voc0712", values, tmp_path, annotation, word)
    width = ET.fromstring(text).findtext("size/width")
    annotation.write_text(text.replace(f"<width>{width}</width>", "<width>500</width>"))
    refused("voc0712", values, tmp_path, annotation.stem, "expected 500 ×", f"found {width} ×")
    left, right = (ET.fromstring(text).findtext(f"object/bndbox/{key}") for key in ("xmin", "xmax"))
    annotation.write_text(text.replace(f"<xmax>{right}</xmax>", f"<xmax>{int(width) + 2}</xmax>", 1))
    refused("voc0712", values, tmp_path, annotation, "outside its image", f"of {width} ×")
    annotation.write_text(text.replace(f"<xmax>{right}</xmax>", f"<xmax>{int(left) - 1}</xmax>", 1))
    refused("voc0712", values, tmp_path, annotation, "box without area")
    annotation.unlink()
    listed = root / "VOC2012/ImageSets/Main/trainval.txt"
    refused("voc0712", values, tmp_path, listed, f"names {ids[0]}", f"{annotation} was not found")


def test_masks_that_do_not_fit(copied, tmp_path):
    root, values = copied("VOCdevkit", "voc12aug")
    ids = (root / "VOC2012/ImageSets/Segmentation/aug.txt").read_text().split()
    mask = root / f"VOC2012/SegmentationClassAug/{ids[0]}.png"
    image = Image.open(mask)
    image.load()

    illegal = np.array(image)
    illegal[0, 0] = 21
    Image.fromarray(illegal).save(mask)
    refused("voc12aug", values, tmp_path, mask, "0 to 20 or 255, found 21")
    image.convert("RGB").save(mask)
    refused("voc12aug", values, tmp_path, mask, "found mode RGB")
    image.crop((0, 0, 20, 10)).save(mask)
    refused("voc12aug", values, tmp_path, mask, "the size of its image, found 20 × 10")
    mask.unlink()
    refused("voc12aug", values, tmp_path, mask, "no such file")
    wrong = values.model_copy(update={"classes": 11})
    refused("voc12aug", wrong, tmp_path, "expected 11 classes", "found 21")


def test_a_mask_is_looked_at_even_outside_the_decoded_sample(copied, tmp_path):
    root, values = copied("VOCdevkit", "voc12aug")
    for split, folder in (("aug", "SegmentationClassAug"), ("val", "SegmentationClass")):
        ids = (root / f"VOC2012/ImageSets/Segmentation/{split}.txt").read_text().split()
        mask = root / f"VOC2012/{folder}/{ids[-1]}.png"
        intact = mask.read_bytes()
        pixels = np.array(Image.open(mask))
        pixels[-1, -1] = 254
        Image.fromarray(pixels).save(mask)
        unsampled = values.model_copy(update={"decode": 0})
        refused("voc12aug", unsampled, tmp_path, mask, "0 to 20 or 255, found 254")
        mask.write_bytes(intact)
    damaged = bytearray(intact)
    damaged[-24] ^= 0xFF  # in the last of the compressed pixels
    mask.write_bytes(damaged)
    refused("voc12aug", unsampled, tmp_path, mask, "cannot be decoded", "restore")


def test_cityscapes_without_train_ids_and_polygons_names_both(copied, tmp_path):
    root, values = copied("cityscapes", "cityscapes")
    for path in root.glob("gtFine/val/*/*_labelTrainIds.png"):
        path.unlink()
    refused("cityscapes", values, tmp_path, "labelTrainIds.png", "nor is there", "_polygons.json", "11 more")


def test_coco_files_that_do_not_fit(copied, tmp_path):
    root, values = copied("coco", "coco2017")
    path = root / "annotations/instances_train2017.json"
    text = path.read_text()
    content = json.loads(text)
    content["annotations"][0]["category_id"] = 3
    path.write_text(json.dumps(content))
    refused("coco2017", values, tmp_path, path, "annotation", "3")
    content = json.loads(text)
    box = content["annotations"][0]["bbox"]
    for wrong, word in (
        ([box[0], box[1], box[2], 0.0], "annotation 1 has a box without area"),
        ([box[0], box[1], float("nan"), box[3]], "annotation 1: expected four numbers"),
        ([-1.5, *box[1:]], "outside its image"),
        ([*box[:3], 1000.0], "annotation 1 has a box (x"),
    ):
        content["annotations"][0].update(bbox=wrong, id=1)
        path.write_text(json.dumps(content))
        refused("coco2017", values, tmp_path, path, word, "unpack")
    path.write_text(text[:-100])
    refused("coco2017", values, tmp_path, path, "not valid JSON")
    path.write_text(json.dumps({"images": [], "annotations": []}))
    refused("coco2017", values, tmp_path, path, "expected the keys images, annotations, categories")
    path.write_text(text)
    refused("coco2017", values.model_copy(update={"classes": 80}), tmp_path, "expected 80", "found 10")
    gone = first(root / "train2017", "*.jpg")
    gone.unlink()
    refused("coco2017", values, tmp_path, gone, "no such file")


def test_coco_annotations_that_are_none(copied, tmp_path):
    """Each is refused by its id; what the published files have, short polygons and crowds as RLE, passes."""
    root, values = copied("coco", "coco2017")
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    images, annotations = content["images"], content["annotations"]
    first, others = annotations[0], annotations[1:]
    image = next(each for each in images if each["id"] == first["image_id"])
    size = [image["height"], image["width"]]
    runs = [0, size[0] * size[1]]

    def write(*changed: object, **keys: object) -> None:
        path.write_text(json.dumps({**content, "annotations": [*changed, *others], **keys}))

    for wrong, word in (
        ({"bbox": [1, 2, 3]}, "four numbers x, y, width, height as `bbox`, found [1, 2, 3]"),
        ({"bbox": [1, 2, "3", 4]}, "as `bbox`, found [1, 2, '3', 4]"),
        ({"bbox": [1, 2, True, 4]}, "as `bbox`, found [1, 2, True, 4]"),
        ({"bbox": [1, 2, 10**400, 4]}, "as `bbox`, found [1, 2, 1000"),
        ({"bbox": None}, "as `bbox`, found None"),
        ({"iscrowd": 2}, "0 or 1 as `iscrowd`, found 2"),
        ({"image_id": [7]}, "expected one that the file has as `image_id`, found [7]"),
        ({"category_id": 99}, "expected one that the file has as `category_id`, found 99"),
        ({"segmentation": {"counts": runs, "size": size}}, "polygons, lists of x and y in turn"),
        ({"segmentation": 7}, "as `segmentation`, found 7"),
        ({"segmentation": []}, "as `segmentation`, found []"),
        ({"segmentation": [7]}, "as `segmentation`, found [7]"),
        ({"segmentation": [[]]}, "as `segmentation`, found [[]]"),
        ({"segmentation": [[1, 1, 5, 5, 5, 9, 3]]}, "as `segmentation`, found [[1, 1, 5"),
        ({"segmentation": [[1, 1, 5, 5, 5, "9"]]}, "as `segmentation`, found [[1, 1, 5"),
        ({"segmentation": [[1, 1, 5, 5, 5, float("inf")]]}, "as `segmentation`, found [[1, 1, 5"),
        ({"iscrowd": 1, "segmentation": {"counts": runs, "size": size[:1]}}, f"expected an RLE of {size}"),
        ({"iscrowd": 1, "segmentation": {"counts": [3, 4], "size": size}}, "add up, found {'counts"),
        ({"iscrowd": 1, "segmentation": {"counts": [-1, runs[1] + 1], "size": size}}, "runs that add up"),
        ({"iscrowd": 1, "segmentation": {"counts": "0", "size": size}}, "runs that add up"),
    ):
        write({**first, **wrong})
        refused("coco2017", values, tmp_path, f"{path}: annotation {first['id']}: expected", word, "unpack")
    write(first, first)
    refused("coco2017", values, tmp_path, f"{path}: annotation {first['id']}: expected each id once")
    for wrong in (7, [], {}, {**first, "id": "1"}):
        write(wrong)
        refused("coco2017", values, tmp_path, path, "annotations with a whole number `id`", str(wrong)[:9])
    unsized = {key: value for key, value in image.items() if key != "width"}
    for wrong in (unsized, {**image, "height": "8"}, 7, {**image, "file_name": None}):
        write(first, images=[wrong if each is image else each for each in images])
        refused("coco2017", values, tmp_path, path, "images with whole numbers `id`, `width`", "unpack")
    write(first, images=[*images, image])
    refused("coco2017", values, tmp_path, path, "each id once among its images")
    write(first, images=7)
    refused("coco2017", values, tmp_path, path, "expected a list as `images`, found 7")

    crowd = {"id": 900100, "iscrowd": 1, "segmentation": {"counts": runs, "size": size}}
    short = {"id": 900101, "segmentation": [[1.5, 1, 5, 5], *first["segmentation"]]}
    write(first, first | crowd, first | short)
    verify("coco2017", values, tmp_path)


def test_coco_categories_that_are_not_vals_are_refused(copied, tmp_path):
    """With one missing, a class would have another number in training than in the test."""
    root, values = copied("coco", "coco2017")
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    missing, second = sorted(content["categories"], key=lambda each: each["id"])[:2]
    for wrong, *words in (
        ([each for each in content["categories"] if each != missing], missing["id"], missing["name"], "none"),
        ([*content["categories"], {"id": 99, "name": "zebra"}], "expected none as category 99", "'zebra'"),
        ([{**each, "name": "x"} if each == second else each for each in content["categories"]], "found 'x'"),
        ([*content["categories"], {**second, "name": "x"}], "expected each id once"),
        ([*content["categories"], {"id": "99", "name": "zebra"}], "whole number `id`", "'99'"),
        ([*content["categories"], 7], "whole number `id`", "found 7"),
    ):
        left = [each for each in content["annotations"] if each["category_id"] != missing["id"]]
        path.write_text(json.dumps({**content, "categories": wrong, "annotations": left}))
        refused("coco2017", values, tmp_path, path, *words, "unpack")
    path.write_text(json.dumps({**content, "categories": content["categories"][::-1]}))
    verify("coco2017", values, tmp_path)  # their order is free


def test_the_two_flat_boxes_of_the_published_coco_are_left_out(copied, tmp_path):
    root, values = copied("coco", "coco2017")
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    image = content["annotations"][0]["image_id"]
    count = sum(each["image_id"] == image for each in content["annotations"])
    for number in (918, 2206849):
        content["annotations"].append({**content["annotations"][0], "id": number, "bbox": [5, 5, 9, 0.0]})
    path.write_text(json.dumps(content))
    datasets.verify("coco2017", values, tmp_path / "coco2017.json")
    opened = datasets.Dataset.open(tmp_path / "coco2017.json")
    entries = {entry["image_id"]: entry for entry in datasets.detection(opened, "train2017")}
    assert len(entries[image]["annotations"]) == count


def test_places_lists_that_do_not_fit(copied, tmp_path):
    root, values = copied("places205", "places205")
    path = root / "trainvalsplit_places205/train_places205.csv"
    name, label = path.read_text().split("\n")[0].rsplit(" ", 1)
    rest = path.read_text().split("\n", 1)[1]
    path.write_text(f"{name} {(int(label) + 1) % 10}\n{rest}")
    refused("places205", values, tmp_path, path, "as in the val list", name)
    path.write_text(f"{name} 10\n{rest}")
    refused("places205", values, tmp_path, name, "expected a label of 0 to 9, found 10")


def test_inat_files_that_do_not_fit(copied, tmp_path):
    root, values = copied("inat18", "inat18")
    path = root / "train2018.json"
    content = json.loads(path.read_text())
    removed = content["annotations"].pop()
    path.write_text(json.dumps(content))
    refused("inat18", values, tmp_path, path, "has no annotation")
    content["annotations"].append({**removed, "category_id": 8142})
    path.write_text(json.dumps(content))
    refused("inat18", values, tmp_path, "expected a label of 0 to 9, found 8142")
    other = (removed["category_id"] + 1) % 10
    content["annotations"][-1]["category_id"] = other
    path.write_text(json.dumps(content))
    refused("inat18", values, tmp_path, path, f"/{removed['category_id']}/", f"lies in, found {other};")


# ---------------------------------------------------------------- the manifest


def test_manifests_that_cannot_be_opened(imagenet, tmp_path):
    path = tmp_path / "manifest.json"
    with pytest.raises(BadInput, match="no such manifest; make it with"):
        datasets.Dataset.open(path)
    for found in (b"{", b"\xff\xfe\x80"):  # of JSON only the beginning; no text, as a backbone
        path.write_bytes(found)
        with pytest.raises(BadInput, match="expected a manifest in JSON, found something else"):
            datasets.Dataset.open(path)
    with pytest.raises(BadInput, match="expected a manifest in JSON"):
        datasets.Dataset.open(tmp_path)
    path.write_text("{}")
    with pytest.raises(BadInput, match="not a dataset manifest"):
        datasets.Dataset.open(path)
    path.unlink()
    verify("imagenet", block(imagenet), tmp_path)
    imagenet.rename(tmp_path / "moved")
    with pytest.raises(BadInput, match=r"imagenet: no such folder, though .*manifest.json was made there"):
        datasets.Dataset.open(path)


def test_a_dataset_that_changed_after_it_was_verified_is_refused(imagenet, tmp_path):
    opened = verify("imagenet", block(imagenet), tmp_path)
    path = imagenet / "meta/train.txt"
    text = path.read_text()
    path.write_text("".join(sorted(text.splitlines(keepends=True), reverse=True)))
    with pytest.raises(BadInput, match=r"train.txt: expected the list as when imagenet was verified"):
        datasets.samples(opened, "train")
    path.unlink()
    with pytest.raises(BadInput, match=r"train.txt: expected the list as when imagenet was verified"):
        datasets.samples(opened, "train")

    shutil.rmtree(imagenet / "meta")
    opened = verify("imagenet", block(imagenet), tmp_path)
    write_image(imagenet / "train/n01443537/n01443537_12.JPEG")
    with pytest.raises(BadInput, match="the images or labels of train"):
        datasets.samples(opened, "train")


@pytest.mark.parametrize("place", ["bndbox/xmax", "difficult", "name"])
def test_boxes_that_changed_are_another_manifest_and_are_refused(place, copied, tmp_path):
    root, values = copied("VOCdevkit", "voc0712")
    opened = verify("voc0712", values, tmp_path)
    annotation = first(root / "VOC2007/Annotations", "*.xml")
    tree = ET.parse(annotation)
    listed = annotation.stem in (root / "VOC2007/ImageSets/Main/test.txt").read_text().split()
    element = tree.find(f"object/{place}")
    other = next(name for name in opened.class_names if name != element.text)
    element.text = other if place == "name" else str(abs(int(element.text) - 1))
    tree.write(annotation)
    split = "test07" if listed else "trainval07"
    with pytest.raises(BadInput, match=f"expected the images or boxes of {split} as when voc0712"):
        datasets.detection(opened, split)
    datasets.detection(opened, "trainval12")
    assert verify("voc0712", values, tmp_path).dataset != opened.dataset


def test_coco_boxes_and_polygons_that_changed_are_another_manifest(copied, tmp_path):
    root, values = copied("coco", "coco2017")
    opened = verify("coco2017", values, tmp_path)
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    shape = next(each["segmentation"] for each in content["annotations"] if not each["iscrowd"])
    shape[0][0] += 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"train2017.json: expected the list as when coco2017 was verified"):
        datasets.detection(opened, "train2017")
    assert verify("coco2017", values, tmp_path).dataset != opened.dataset
    assert opened.splits["train2017"] == datasets.Dataset.open(opened.manifest).splits["train2017"]
    content["annotations"][0]["bbox"][2] -= 0.5
    path.write_text(json.dumps(content))
    assert verify("coco2017", values, tmp_path).splits["train2017"] != opened.splits["train2017"]


def test_masks_that_changed_are_another_manifest(copied, tmp_path):
    root, values = copied("VOCdevkit", "voc12aug")
    opened = verify("voc12aug", values, tmp_path)
    ids = (root / "VOC2012/ImageSets/Segmentation/val.txt").read_text().split()
    mask = root / f"VOC2012/SegmentationClass/{ids[-1]}.png"
    pixels = np.array(Image.open(mask))
    pixels[0, 0] = 20 if pixels[0, 0] == 255 else 255
    Image.fromarray(pixels).save(mask)
    changed = verify("voc12aug", values, tmp_path)
    assert changed.splits["val"] != opened.splits["val"]
    assert changed.splits["aug"] == opened.splits["aug"]


def test_the_manifest_follows_the_data_not_the_place_of_the_checkout(imagenet, tmp_path, monkeypatch):
    stamps = []
    for place in ("a", "b"):
        shutil.copytree(imagenet, tmp_path / place / "data/imagenet")
        monkeypatch.chdir(tmp_path / place)
        stamps.append(verify("imagenet", block(Path("data/imagenet")), tmp_path / place).dataset)
    assert stamps[0] == stamps[1]


def test_a_block_takes_what_it_leaves_out_from_the_published_counts(tmp_path):
    completed = config.Dataset(root=tmp_path, version=3).completed("inat18")
    assert completed.classes == 8142
    assert completed.images == {"train": 437_513, "val": 24_426}
    assert (completed.root, completed.version) == (tmp_path, 3)


def test_the_step_on_the_command_line(imagenet, tmp_path, capsys):
    values = {"root": str(imagenet), "classes": 3, "images": {"train": 6, "val": 3}}
    arguments = ["datasets", "--name", "imagenet", "--output", str(tmp_path / "manifest.json"), "--config"]
    assert main([*arguments, json.dumps(values)]) == 0
    assert datasets.Dataset.open(tmp_path / "manifest.json").images == values["images"]
    assert main([*arguments, json.dumps({**values, "classes": 4})]) == 2
    assert "expected 4 classes" in capsys.readouterr().err


# ---------------------------------------------------------------- the index


@pytest.fixture
def settled(monkeypatch) -> None:
    """Let a folder count as settled at once; otherwise every test had to wait two seconds."""
    monkeypatch.setattr(datasets, "SETTLED_NS", 0)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The splits that were read from lists and folders, not opened from an index."""
    splits = []

    def counted(layout: layouts.Layout) -> layouts.Layout:
        def read(dataset, split):
            splits.append(split)
            return layout.read(dataset, split)

        return layout._replace(read=read)

    monkeypatch.setattr(datasets, "READERS", {k: counted(v) for k, v in datasets.READERS.items()})
    return splits


def same(a: datasets.Samples, b: datasets.Samples) -> bool:
    types = a.labels.dtype == b.labels.dtype and a.paths.names.dtype == b.paths.names.dtype
    return types and a.paths == b.paths and np.array_equal(a.labels, b.labels)


@pytest.fixture
def unlisted(imagenet, tmp_path, settled) -> datasets.Dataset:
    """The tiny ImageNet without lists, verified: what its folders hold is all that there is to go by."""
    shutil.rmtree(imagenet / "meta")
    return verify("imagenet", block(imagenet), tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "voc2007", "places205", "inat18"])
def test_the_index_gives_what_lists_and_folders_give(name, dataset, settled, read):
    opened = dataset(name)
    for split in opened.splits:
        read.clear()
        indexed = datasets.samples(opened, split)
        assert read == []
        (opened.manifest.parent / f"{name}.{split}.index").unlink()
        assert same(datasets.samples(opened, split), indexed)
        assert read == [split]


def test_boxes_and_masks_have_no_index(dataset):
    for name in ("voc0712", "coco2017", "voc12aug", "cityscapes"):
        opened = dataset(name)
        assert [path.name for path in opened.manifest.parent.glob(f"{name}.*")] == [f"{name}.json"]


def test_a_manifest_without_index_gets_one_when_it_is_first_used(unlisted, read):
    index = unlisted.manifest.with_name("manifest.train.index")
    index.unlink()
    first = datasets.samples(unlisted, "train")
    assert same(datasets.samples(unlisted, "train"), first)
    assert read == ["train"]


def test_an_index_that_cannot_be_written_is_done_without(unlisted, read, monkeypatch):
    index = unlisted.manifest.with_name("manifest.train.index")
    expected = datasets.samples(unlisted, "train")
    index.unlink()
    monkeypatch.setenv("RANK", "1")  # of several processes, only the first writes it
    assert same(datasets.samples(unlisted, "train"), expected)
    assert not index.exists()
    monkeypatch.delenv("RANK")
    index.mkdir()
    for _ in range(2):
        assert same(datasets.samples(unlisted, "train"), expected)
    assert read == ["train"] * 3
    assert [path.name for path in index.parent.glob(".*")] == []


def test_a_damaged_index_is_not_believed(unlisted, read):
    index = unlisted.manifest.with_name("manifest.train.index")
    expected = datasets.samples(unlisted, "train")
    content = index.read_bytes()
    damaged = [content[:cut] for cut in (0, 1, 31, 32, 33, len(content) // 2, len(content) - 1)]
    damaged.append(content + b"x")
    for position in range(0, len(content), 37):
        one = bytearray(content)
        one[position] ^= 1
        damaged.append(bytes(one))
    for each in damaged:
        index.write_bytes(each)
        assert same(datasets.samples(unlisted, "train"), expected)
    assert read == ["train"] * len(damaged)


def test_the_index_of_another_split_is_not_believed(unlisted, read):
    expected = datasets.samples(unlisted, "val")
    index = unlisted.manifest.with_name("manifest.train.index")
    shutil.copy(index, index.with_name("manifest.val.index"))
    assert same(datasets.samples(unlisted, "val"), expected)
    assert read == ["val"]


def test_the_index_of_another_dataset_is_not_believed(unlisted, imagenet, tmp_path, read):
    other = shutil.copytree(imagenet, tmp_path / "other")
    (other / "train/n01443537/n01443537_11.JPEG").rename(other / "train/n01443537/n01443537_12.JPEG")
    (tmp_path / "b").mkdir()
    found = verify("imagenet", block(other), tmp_path / "b")
    shutil.copy(unlisted.manifest.with_name("manifest.train.index"), tmp_path / "b")
    read.clear()
    assert "n01443537_12.JPEG" in {path.name for path in datasets.samples(found, "train").paths}
    assert read == ["train"]


def add(train: Path) -> None:
    write_image(train / "n01443537/n01443537_12.JPEG")


def remove(train: Path) -> None:
    (train / "n01443537/n01443537_11.JPEG").unlink()


def rename(train: Path) -> None:
    (train / "n01443537/n01443537_11.JPEG").rename(train / "n01443537/n01443537_12.JPEG")


def rename_a_class(train: Path) -> None:
    (train / "n01443537").rename(train / "n01443538")


def add_a_class(train: Path) -> None:
    write_image(train / "n01443538/n01443538_11.JPEG")


def replace_a_class(train: Path) -> None:
    (train / "n01443537").rename(train.parent / "aside")
    shutil.copytree(train.parent / "aside", train / "n01443537")
    remove(train)


def add_a_list(train: Path) -> None:
    (train.parent / "meta").mkdir()
    names = sorted((f"{path.parent.name}/{path.name}" for path in train.glob("*/*")), reverse=True)
    lines = [f"{name} {WNIDS.index(name.split('/')[0])}\n" for name in names]
    (train.parent / "meta/train.txt").write_text("".join(lines))


CHANGES = (add, remove, rename, rename_a_class, add_a_class, replace_a_class, add_a_list)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("times", ["kept", "new"])
def test_a_change_is_refused_in_spite_of_the_index(change, times, unlisted, imagenet):
    """Even where the times of modification are set back, as unpacking an archive over the folders does."""
    folders = [imagenet / "train", *(imagenet / "train").iterdir()]
    before = {folder: folder.stat().st_mtime_ns for folder in folders}
    change(imagenet / "train")
    for folder, mtime in before.items():
        if times == "kept" and folder.exists():
            os.utime(folder, ns=(mtime, mtime))
    for _ in range(2):
        with pytest.raises(BadInput, match=r"the images or labels of train|n01443538' is not one of"):
            datasets.samples(unlisted, "train")
    datasets.samples(unlisted, "val")


def test_a_folder_that_was_only_touched_is_listed_once_more(unlisted, imagenet, read):
    expected = datasets.samples(unlisted, "train")
    assert read == []
    write_image(imagenet / "train/n01443537/n01443537_12.JPEG")
    (imagenet / "train/n01443537/n01443537_12.JPEG").unlink()
    for _ in range(3):
        assert same(datasets.samples(unlisted, "train"), expected)
    assert read == ["train"]


def test_a_folder_that_changed_just_before_it_was_read_is_read_again(imagenet, tmp_path, monkeypatch, read):
    """A change in the same tick of the file system's clock would leave no trace."""
    opened = verify("imagenet", block(imagenet), tmp_path)
    datasets.samples(opened, "train")
    assert read == ["train", "val", "train"]
    monkeypatch.setattr(datasets, "SETTLED_NS", 0)
    datasets.samples(opened, "train")
    datasets.samples(opened, "train")
    assert read == ["train", "val", "train", "train"]


def test_the_manifest_does_not_know_when_the_folders_changed(unlisted, imagenet, tmp_path):
    before = unlisted.manifest.read_bytes()
    os.utime(imagenet / "train/n01443537", (1, 1))
    assert verify("imagenet", block(imagenet), tmp_path).manifest.read_bytes() == before


# ---------------------------------------------------------------- images


def test_decode_applies_the_exif_orientation(tmp_path):
    image = Image.new("RGB", (30, 20), "black")
    image.paste("red", (0, 0, 15, 20))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = np.asarray(datasets.decode(tmp_path / "a.jpg"))
    assert upright.shape == (30, 20, 3)
    assert upright[3, 10, 0] > 200  # what was left is above
    assert upright[27, 10, 0] < 50
    assert datasets.decode(tmp_path / "a.jpg", size=(30, 20)).size == (30, 20)
    assert datasets.decode(tmp_path / "a.jpg", size=(20, 30)).size == (20, 30)


@pytest.mark.parametrize("orientation", range(10))
def test_decode_turns_as_every_orientation_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((30, 20), 90).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(datasets.decode(tmp_path / "a.png"), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about the damage
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_decode_reads_an_image_whatever_is_wrong_with_its_exif(tmp_path, suffix):
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "a maker", 0x011A: 72.0, 0x8769: {0x9003: "2007:01:01"}})
    intact = exif.tobytes()
    image = Image.effect_noise((30, 20), 90)
    image.save(tmp_path / f"a.{suffix}")
    stored = np.asarray(datasets.decode(tmp_path / f"a.{suffix}"))
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(intact)
        for position in rng.integers(6, len(intact), 4):
            damaged[position] = rng.integers(256)
        image.save(tmp_path / f"a.{suffix}", exif=bytes(damaged[: rng.integers(6, 2 * len(intact))]))
        assert np.array_equal(datasets.decode(tmp_path / f"a.{suffix}", size=(30, 20)), stored)
        assert sorted(datasets.decode(tmp_path / f"a.{suffix}").size) == [20, 30]


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_decode_returns_rgb(tmp_path, mode):
    suffix = "jpg" if mode in ("L", "CMYK") else "png"
    Image.new(mode, (6, 4)).save(tmp_path / f"a.{suffix}")
    image = datasets.decode(tmp_path / f"a.{suffix}")
    assert (image.mode, image.size) == ("RGB", (6, 4))


def test_decode_names_the_file_that_it_cannot_read(tmp_path):
    with pytest.raises(BadInput, match=r"a.jpg: no such image"):
        datasets.decode(tmp_path / "a.jpg")
    Image.effect_noise((200, 200), 90).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-2000])
    with pytest.raises(BadInput, match=r"a.jpg: cannot be decoded \(.*truncated"):
        datasets.decode(tmp_path / "a.jpg")


def test_decode_tells_a_missing_image_from_a_missing_dataset(imagenet, tmp_path):
    path = imagenet / "train/n01443537/n01443537_11.JPEG"
    path.unlink()
    with pytest.raises(BadInput, match=rf"{path}: no such image; restore it"):
        datasets.decode(path)
    (imagenet / "train").rename(tmp_path / "aside")
    with pytest.raises(BadInput, match=rf"^{imagenet}/train: this folder .* is gone, and {path} with it"):
        datasets.decode(path)
    imagenet.rename(tmp_path / "unmounted")
    with pytest.raises(BadInput, match=rf"^{imagenet}: this folder .* see that its file system is mounted"):
        datasets.decode(path)
    with pytest.raises(BadInput, match=r"cannot be read \(Is a directory\); see that its file system"):
        datasets.decode(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_vanishes_while_it_is_read_is_named(imagenet, tmp_path, workers):
    listed = datasets.samples(verify("imagenet", block(imagenet), tmp_path), "train")
    images = datasets.Images(listed.paths, listed.labels, lambda image: np.array(image.resize((4, 4))))
    batches = iter(
        DataLoader(images, batch_size=1, num_workers=workers, prefetch_factor=2 if workers else None)
    )
    next(batches)
    imagenet.rename(tmp_path / "unmounted")
    with pytest.raises(BadInput) as error:
        list(batches)
    assert sentence(error.value).startswith(f"{imagenet}: this folder of the dataset is gone")


def test_images_through_a_loader_give_image_label_and_index(dataset):
    opened = dataset("voc2007")
    samples = datasets.samples(opened, "test")
    images = datasets.Images(
        samples.paths, samples.labels, lambda image: np.asarray(image.resize((4, 4)), np.float32)
    )
    assert len(images) == opened.images["test"]
    pixels, labels, indices = next(iter(DataLoader(images, batch_size=5, num_workers=1)))
    assert pixels.shape == (5, 4, 4, 3)
    assert labels.tolist() == samples.labels[:5].tolist()
    assert indices.tolist() == [0, 1, 2, 3, 4]


def test_paths_are_a_sequence_of_paths(tmp_path):
    names = ["a/1.jpg", "b/ß.jpg", "c/333.jpg"]
    paths = datasets.Paths(tmp_path, names)
    assert list(paths) == [tmp_path / name for name in names]
    assert paths == [tmp_path / name for name in names]
    assert paths[1:] == [tmp_path / name for name in names[1:]]
    assert paths[np.array([2, 0])] == [tmp_path / names[2], tmp_path / names[0]]
    assert paths[-1] == tmp_path / "c/333.jpg"
    assert paths != datasets.Paths(tmp_path, names[:2])
    assert len(datasets.Paths(tmp_path, [])) == 0
    with pytest.raises(IndexError):
        paths[3]


def test_config_imports_nothing_heavy():
    """The config knows the datasets' counts; reading them must not import numpy or PIL."""
    code = "import sys, simclr.config; print(*({'numpy', 'PIL', 'torch'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(datasets.__file__).parent.parent)}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert printed.stdout.strip() == ""

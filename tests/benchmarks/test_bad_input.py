"""The command line on bad input: status 2, one sentence that says what to do, no record and no manifest."""

from __future__ import annotations

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from simclr import checkpoint, config, features, files, results
from simclr.__main__ import main
from simclr.benchmarks import imagenet_semi, inat18_mhead, places205_mhead, voc12aug_segmentation
from simclr.model import resnet
from simclr.results import DatasetStamp, Record

SPLITS = {
    "imagenet_knn": ("imagenet", "train", "val"),
    "voc07_svm": ("voc2007", "trainval", "test"),
    "voc07_lowshot": ("voc2007", "trainval", "test"),
}
CONFIGS = {
    "imagenet_knn": {"neighbours": [3, 20]},
    "voc07_svm": {"layers": ["feature4", "feature5"], "costs": [1]},
    "voc07_lowshot": {"layers": ["feature4", "feature5"], "costs": [1], "shots": [1, 4], "negatives": 2},
}
TRANSFORM = {"name": "center_crop", "resize": 64, "crop": 48}
WIDTHS = {"imagenet": {"avgpool": 6}, "voc2007": {"feature4": 6, "feature5": 8}}


def write_features(folder: Path, dataset: str, split: str, seed: int) -> Path:
    """Write the features of thirty images of three classes."""
    random = np.random.default_rng(seed)
    (folder := folder / f"{dataset}-{split}").mkdir()
    for layer, width in WIDTHS[dataset].items():
        np.save(folder / f"{layer}.npy", random.random((30, width), np.float32).astype(np.float16))
    classes = np.arange(30) % 3
    np.save(folder / "labels.npy", classes if dataset == "imagenet" else np.eye(3, dtype=np.int8)[classes])
    manifest = {
        "checkpoint_sha256": "a" * 64,
        "dataset": {"name": dataset, "manifest_sha256": "b" * 64},
        "split": split,
        "classes": 3,
        "dims": WIDTHS[dataset],
        "transform": TRANSFORM,
        "pooling": "adaptive",
        "dtype": "float16",
        "finished": True,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def rewrite(folder: Path, array: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    """Replace an array of a features folder by what `change` makes of it, or returns."""
    values = np.load(folder / f"{array}.npy")
    changed = change(values)
    np.save(folder / f"{array}.npy", values if changed is None else changed)


def say(folder: Path, **changes: object) -> None:
    """Change what the manifest of a features folder says."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put(place: object, value: float) -> Callable[[np.ndarray], None]:
    """Return what writes `value` to a place of an array."""
    return lambda values: values.__setitem__(place, value)


def status(benchmark: str, folder: Path, **options: object) -> int:
    """Evaluate the features in `folder` by the command line; return the exit status."""
    dataset, *splits = SPLITS[benchmark]
    arguments = {
        "model": "m",
        "config": json.dumps(CONFIGS[benchmark]),
        "output": folder / "m" / "record.json",
        **dict(zip(("train", "test"), (folder / f"{dataset}-{split}" for split in splits), strict=True)),
    } | options
    return main([benchmark, *(text for key, value in arguments.items() for text in (f"--{key}", str(value)))])


def refused(capsys: pytest.CaptureFixture, benchmark: str, folder: Path, **options: object) -> str:
    """Return the sentence with which the command line ends, and see that it leaves no record."""
    assert status(benchmark, folder, **options) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("simclr: ")
    assert not list(folder.rglob("*record.json*"))
    return said.removeprefix("simclr: ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Features of both splits of ImageNet and of VOC2007."""
    for seed, (dataset, *splits) in enumerate(dict.fromkeys(SPLITS.values())):
        for number, split in enumerate(splits):
            write_features(tmp_path, dataset, split, 2 * seed + number)
    return tmp_path


@pytest.mark.parametrize("benchmark", SPLITS)
def test_good_features_give_a_record(benchmark, folder):
    assert status(benchmark, folder) == 0
    record = results.read(folder / "m/record.json")
    assert record.benchmark == benchmark
    assert record.details["features"] == {"pooling": "adaptive", "dtype": "float16", "transform": TRANSFORM}
    assert [path.name for path in (folder / "m").iterdir()] == ["record.json"]


@pytest.mark.parametrize("split", [1, 2], ids=["train", "test"])
@pytest.mark.parametrize("benchmark", SPLITS)
@pytest.mark.parametrize(
    ("array", "change", "message"),
    [
        (
            "labels",
            lambda labels: labels[:29],
            "expected one row for each of 29 labels; found an array of shape",
        ),
        ("labels", put(4, 3), "labels: expected .* for 3 classes, found 3 in row 4; verify the dataset"),
        ("layer", put((17, 2), np.nan), "{layer}: row 17 holds NaN or infinity; extract the features again"),
        ("layer", put((29, 0), -np.inf), "{layer}: row 29 holds NaN or infinity; extract the features again"),
    ],
    ids=["fewer labels", "no such class", "NaN", "infinity"],
)
def test_features_that_are_damaged_are_refused(benchmark, split, array, change, message, folder, capsys):
    dataset, layer = SPLITS[benchmark][0], list(WIDTHS[SPLITS[benchmark][0]])[-1]
    damaged = folder / f"{dataset}-{SPLITS[benchmark][split]}"
    rewrite(damaged, layer if array == "layer" else array, change)
    assert re.match(f"{damaged}: .*{message.format(layer=layer)}", refused(capsys, benchmark, folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": [6]}, "dims: expected a mapping, found [6]; delete it and run `snakemake {}`"),
        ({"dataset": None}, "dataset: expected a mapping, found None; delete it and run `snakemake {}`"),
        (
            {"dataset": {"name": "imagenet", "manifest_sha256": "b"}},
            "dataset.manifest_sha256: String should match pattern",
        ),
    ],
)
def test_features_of_a_damaged_manifest_are_refused(change, message, folder, capsys):
    damaged = folder / "imagenet-val"
    manifest = json.loads((damaged / "manifest.json").read_text()) | change
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    assert message.format(damaged) in refused(capsys, "imagenet_knn", folder)


def test_a_folder_as_the_record_is_refused(folder, capsys):
    (folder / "m/record.json").mkdir(parents=True)
    assert status("imagenet_knn", folder) == 2
    assert f"expected a file to write, found the folder {folder}/m/record.json" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", SPLITS)
def test_features_that_are_not_finished_are_refused(benchmark, folder, capsys):
    dataset, _, test = SPLITS[benchmark]
    say(folder / f"{dataset}-{test}", finished=False)
    assert "half-written features (manifest.json does not say finished)" in refused(capsys, benchmark, folder)
    (folder / f"{dataset}-{test}" / "manifest.json").unlink()
    assert "half-written features (no manifest.json); delete it and run" in refused(capsys, benchmark, folder)


@pytest.mark.parametrize("benchmark", SPLITS)
def test_features_of_another_checkpoint_dataset_or_split_are_refused(benchmark, folder, capsys):
    dataset, train, test = SPLITS[benchmark]
    places = [folder / f"{dataset}-{split}" for split in (train, test)]
    swapped = refused(capsys, benchmark, folder, train=places[1], test=places[0])
    assert f"--train: expected the features of {dataset} {train}, found those of {dataset} {test}" in swapped
    twice = refused(capsys, benchmark, folder, test=places[0])
    assert f"--test: expected the features of {dataset} {test}, found those of {dataset} {train}" in twice
    say(places[1], checkpoint_sha256="c" * 64)
    said = refused(capsys, benchmark, folder)
    assert f"one checkpoint, but --train has {'a' * 64}, --test has {'c' * 64}" in said
    say(places[1], checkpoint_sha256="a" * 64, dataset={"name": dataset, "manifest_sha256": "d" * 64})
    said = refused(capsys, benchmark, folder)
    assert f"one dataset, but --train has name='{dataset}' manifest_sha256='bbb" in said
    assert f"--test has name='{dataset}' manifest_sha256='ddd" in said
    for place in places:
        say(place, dataset={"name": "places205", "manifest_sha256": "d" * 64})
    said = refused(capsys, benchmark, folder)
    assert f"expected the features of {dataset} {train}, found those of places205 {train}" in said


@pytest.mark.parametrize(
    ("benchmark", "split", "change", "message"),
    [
        ("voc07_svm", "trainval", put((slice(6, 30), 1), 0), "class 1: 3 folds need .* found 2 and 28"),
        ("voc07_svm", "trainval", put((slice(None), 2), -1), "class 2: 3 folds need .* found 0 and 30"),
        ("voc07_svm", "test", put((slice(None), 0), 0), "class 0: the test split needs .* found 0 positive"),
        ("voc07_svm", "test", put((slice(None), 0), -1), "class 0: the test split needs .* found 0 positive"),
        ("voc07_svm", "test", put((slice(None), 1), 1), "class 1: the test .* found 30 positive and 0 neg"),
        ("voc07_lowshot", "test", put((slice(None), 0), -1), "class 0: the test split needs positives"),
        (
            "voc07_lowshot",
            "trainval",
            put((slice(9, 30), 1), -1),
            "class 1: k = 4 needs 4 .* found 3; remove 4",
        ),
        ("imagenet_knn", "train", lambda labels: np.minimum(labels, 1), "test label 2 is not a label of any"),
    ],
)
def test_a_class_with_too_few_images_is_refused(benchmark, split, change, message, folder, capsys):
    """Also when all its images show only difficult objects."""
    rewrite(folder / f"{SPLITS[benchmark][0]}-{split}", "labels", change)
    options = {"config": json.dumps(CONFIGS[benchmark] | {"layer": "feature5"})} if "low" in benchmark else {}
    assert re.search(message, refused(capsys, benchmark, folder, **options))


def test_more_neighbours_than_training_images_are_refused(folder, capsys):
    said = refused(capsys, "imagenet_knn", folder, config=json.dumps({"neighbours": [10, 31]}))
    assert said == (
        "k = 31 neighbours are more than the 30 training images; lower benchmarks.imagenet_knn.neighbours"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"benchmark": "imagenet_knn"},
            "--svm: expected the record of voc07_svm, found that of imagenet_knn",
        ),
        (
            {"checkpoint_sha256": "c" * 64},
            f"--train has {'a' * 64}, --test has {'a' * 64}, --svm has {'c' * 64}",
        ),
        ({"dataset": DatasetStamp(name="voc2007", manifest_sha256="d" * 64)}, "one dataset, but --train has"),
    ],
)
def test_the_best_layer_of_other_features_is_refused(changes, message, folder, capsys):
    assert status("voc07_svm", folder, output=folder / "svm.json") == 0
    record = Record(**results.read(folder / "svm.json").model_dump() | changes)
    results.write(record, folder / "svm.json")
    assert message in refused(capsys, "voc07_lowshot", folder, svm=folder / "svm.json")


# ---------------------------------------------------------------- trainings


def train(module: ModuleType, backbone: Path, manifest: Path, folder: Path, **config: object) -> list[str]:
    """Return the arguments of a small training by the command line."""
    arguments = {
        "model": "m",
        "backbone": backbone,
        "dataset": manifest,
        "config": json.dumps({"image_size": 32, "resize": 32, "epochs": 1, **config}),
        "work": folder / "work",
        "curve": folder / "m" / "record.csv",
        "output": folder / "m" / "record.json",
    }
    name = module.__name__.rpartition(".")[2]
    return [name, *(text for key, value in arguments.items() for text in (f"--{key}", str(value)))]


@pytest.mark.parametrize("module", [places205_mhead, inat18_mhead])
def test_a_manifest_of_another_dataset_is_refused(module, few_images, small_backbone, tmp_path, capsys):
    manifest = few_images(1, 1).manifest
    assert main(train(module, small_backbone.path, manifest, tmp_path, pooling="adaptive")) == 2
    expected = module.Config.dataset
    said = capsys.readouterr().err
    assert said.startswith(
        f"simclr: --dataset: expected the manifest of {expected}, found that of imagenet; "
    )
    assert not any(tmp_path.iterdir())


def test_labels_that_are_not_balanced_or_not_listed_are_refused(few_images, small_backbone, tmp_path, capsys):
    """The published 1 % list that is not there, and one that forgets a class."""
    dataset = few_images(2, 1)
    command = train(imagenet_semi, small_backbone.path, dataset.manifest, tmp_path)
    assert main(command) == 2
    assert "train_1percent.txt: no such list; fetch imagenet_subsets/1percent.txt" in capsys.readouterr().err
    (dataset.root / "meta").mkdir()
    files = [f"{path.parent.name}/{path.name}" for path in sorted(dataset.root.glob("train/*/*"))]
    (dataset.root / "meta/train_1percent.txt").write_text("\n".join(files[4:]))
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "imagenet 1 % list: expected as many images of each class, or one more, found 0 of class 0" in said
    assert not list(tmp_path.rglob("record.*"))


# ---------------------------------------------------------------- extraction


def test_features_that_do_not_fit_on_the_disk_are_refused(
    few_images, small_backbone, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e9))
    monkeypatch.setattr(features, "_dims", lambda *_: {"avgpool": 10**9})
    arguments = {
        "backbone": small_backbone.path,
        "dataset": few_images(2, 1).manifest,
        "split": "train",
        "config": json.dumps({"layers": ["avgpool"]}),
        "work": tmp_path / "work",
        "output": tmp_path / "imagenet-train",
    }
    assert (
        main(["features", *(text for key, value in arguments.items() for text in (f"--{key}", str(value)))])
        == 2
    )
    said = capsys.readouterr().err
    assert ": 20 images need 80.0 GB (avgpool in float32), but 2.0 GB are free; choose fewer layers" in said
    assert not (tmp_path / "imagenet-train").exists()


# ---------------------------------------------------------------- boxes and masks


def one_sentence(capsys: pytest.CaptureFixture, arguments: dict[str, object], step: str) -> str:
    """Return the sentence with which a step of the command line ends."""
    assert main([step, *(text for key, value in arguments.items() for text in (f"--{key}", str(value)))]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("simclr: ")
    return said.removeprefix("simclr: ")


@pytest.fixture
def verification(demo_block, tmp_path, capsys):
    """(dataset, damage) → the sentence with which a copy that `damage(root)` changed is refused."""

    def refused(name: str, damage: Callable[[Path], None]) -> str:
        root = shutil.copytree(demo_block(name).root, tmp_path / "root")
        values = demo_block(name).model_copy(update={"root": root})
        damage(root)
        arguments = {
            "name": name,
            "config": values.model_dump_json(),
            "output": tmp_path / "manifests/data.json",
        }
        said = one_sentence(capsys, arguments, "datasets")
        assert not list(tmp_path.glob("manifests/*"))
        return said.replace(str(root), "ROOT")

    return refused


def annotate(path: str, value: str) -> Callable[[Path], None]:
    """Return what writes `value` to a place of the first object of a VOC annotation."""

    def damage(root: Path) -> None:
        file = min((root / "VOC2012/Annotations").glob("*.xml"))
        tree = ET.parse(file)
        tree.find(f"object/{path}").text = tree.findtext("object/bndbox/xmin") if value == "xmin" else value
        tree.write(file)

    return damage


def name_one_more(root: Path) -> None:
    """Let a list of VOC name an image that is not there."""
    with (root / "VOC2012/ImageSets/Main/trainval.txt").open("a") as file:
        file.write("2012_999999\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            annotate("bndbox/xmax", "9999"),
            r"\.xml: an object has a box \(.*\) outside its image of .* pixels;",
        ),
        (annotate("bndbox/xmax", "0"), r"\.xml: an object has a box without area \(.*\); unpack"),
        (annotate("name", "zebra"), r"\.xml: expected a VOC annotation .* KeyError: 'zebra'; unpack"),
        (name_one_more, r"trainval.txt: it names 2012_999999, but .*xml was not found; unpack both"),
    ],
    ids=["outside", "no area", "no such class", "no such image"],
)
def test_voc_annotations_that_do_not_fit_are_refused(damage, message, verification):
    assert re.match(f"ROOT/VOC2012/.*{message}", verification("voc0712", damage))


def rewrite_coco(key: str, **values: object) -> Callable[[Path], None]:
    """Return what changes the first of the images or annotations of instances_train2017.json."""

    def damage(root: Path) -> None:
        path = root / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        content[key][0] |= values
        path.write_text(json.dumps(content))

    return damage


def remove_images(root: Path) -> None:
    """Remove two of the training images."""
    for path in sorted((root / "train2017").iterdir())[:2]:
        path.unlink()


RLE = {"counts": [1], "size": [1, 1]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewrite_coco("annotations", bbox=[0, 0, 9999, 5]), r"annotation \d+ has a box \(.*\) outside its"),
        (rewrite_coco("annotations", bbox=[3, 3, 0, 5]), r"annotation \d+ has a box without area"),
        (rewrite_coco("annotations", category_id=99), r"annotation \d+: expected one .* found 99; unpack"),
        (rewrite_coco("annotations", bbox=[1, 2, 3]), r"annotation \d+: expected four numbers"),
        (rewrite_coco("annotations", iscrowd=0, segmentation=RLE), r"annotation \d+: expected polygons"),
        (rewrite_coco("annotations", segmentation=7), r"annotation \d+: expected polygons"),
        (rewrite_coco("images", width=None), r"expected images with whole numbers `id`, `width`"),
        (rewrite_coco("categories", name="zebra"), r"expected .* as category \d+, as in .*, found 'zebra'"),
        (remove_images, r"no such file, though the lists name it \(and 1 more of"),
    ],
)
def test_coco_files_that_do_not_fit_are_refused(damage, message, verification):
    said = verification("coco2017", damage)
    assert re.match(rf"ROOT/(annotations/instances_train2017.json|train2017/\d+.jpg): {message}", said)


def test_a_mask_of_another_size_is_refused(verification):
    def damage(root: Path) -> None:
        ids = (root / "VOC2012/ImageSets/Segmentation/aug.txt").read_text().split()
        mask = root / f"VOC2012/SegmentationClassAug/{ids[0]}.png"
        with Image.open(mask) as image:
            image.crop((0, 0, 20, 10)).save(mask)

    message = r"ROOT/VOC2012/.*png: expected .* pixels, the size of its image, found 20 × 10; restore both"
    assert re.match(message, verification("voc12aug", damage))


@pytest.fixture
def detection(dataset, tmp_path, capsys):
    """(benchmark, backbone, config …) → the sentence with which the detection is refused."""

    def refused(benchmark: str, backbone: Path, **values: object) -> str:
        arguments = {
            "model": "m",
            "backbone": backbone,
            "dataset": dataset(benchmark.removesuffix("_detection")).manifest,
            "config": json.dumps(values),
            "work": tmp_path / "work",
            "output": tmp_path / "m" / "record.json",
        }
        said = one_sentence(capsys, arguments, benchmark)
        assert not list(tmp_path.rglob("record.*"))
        return said

    return refused


@pytest.mark.parametrize("benchmark", ["voc0712_detection", "coco2017_detection"])
def test_a_backbone_of_another_depth_is_refused(benchmark, detection, tmp_path):
    path = tmp_path / "backbone.safetensors"
    torch.manual_seed(0)
    state = {key: value.contiguous() for key, value in resnet("resnet18_w0.125").state_dict().items()}
    save_file(state, path, {"architecture": "resnet50_w0.125"})
    said = detection(benchmark, path, engine="torchvision")
    assert said.startswith(f"{path}: expected exactly the 318 tensors of resnet50_w0.125")
    assert not (tmp_path / "work").exists()


def test_an_unknown_version_of_detectron2_is_refused(detection, tmp_path, monkeypatch):
    backbone = tmp_path / "backbone.safetensors"
    checkpoint.random_init(config.RandomInit(architecture="resnet50"), backbone)
    (tmp_path / "packages/detectron2").mkdir(parents=True)
    (tmp_path / "packages/detectron2/__init__.py").write_text("__version__ = '0.7'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("SIMCLR_DETECTRON2_PYTHON", sys.executable)
    said = detection("voc0712_detection", backbone)
    assert re.match(r"engine: .*expected Detectron2 .*, found 0\.7, .* or set engine: torchvision", said)


def test_the_checkpoint_of_another_segmentation_is_refused(dataset, small_backbone, tmp_path, capsys):
    """Where somebody copied it into the folder of this run; what differs is named."""
    from simclr.benchmarks import _segmentation  # which takes seconds to import

    opened = dataset("voc12aug")
    values = voc12aug_segmentation.Config(iterations=3)
    run = _segmentation.inputs_of(small_backbone, opened, values)
    with files.workplace(tmp_path / "work", run) as folder:
        other = {**run, "config": {**run["config"], "iterations": 2}}
        torch.save({"run": other, "cost": {}, "state_dict": {}, "meta": {}}, folder / "iter_000000002.pth")
    arguments = {
        "model": "m",
        "backbone": small_backbone.path,
        "dataset": opened.manifest,
        "config": values.model_dump_json(),
        "work": tmp_path / "work",
        "output": tmp_path / "m" / "record.json",
    }
    said = one_sentence(capsys, arguments, "voc12aug_segmentation")
    assert re.match(r".*iter_000000002.pth: .* config.iterations is 2 there, 3 here; delete it, or", said)
    assert not list(tmp_path.rglob("record.*"))

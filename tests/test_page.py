"""The page: what it says of records, of what is missing, of published rows; the same bytes every time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from simclr import BadInput, model_zoo, results
from simclr import config as config_file
from simclr.benchmarks import BENCHMARKS, load
from simclr.config import Config, parse

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "results/published.yaml"
ZOO = "resnet50_8xb32-coslr-200e"


def a_config(*models: str, **benchmarks: dict) -> Config:
    chosen = benchmarks or {name: {} for name in BENCHMARKS}
    datasets = {load(name).Config.dataset: {"root": "data"} for name in chosen} | {
        "imagenet": {"root": "data"}
    }
    sources = {name: {"pretrain": {}} if name == ZOO else {"random_init": {}} for name in models}
    return parse(Config, {"datasets": datasets, "models": sources, "benchmarks": chosen}, "-")


def a_record(model: str, name: str, metrics: dict[str, float], **changes) -> results.Record:
    values = {
        "benchmark": name,
        "protocol_version": 1,
        "model": model,
        "metrics": metrics,
        "config": load(name).Config().model_dump(mode="json"),
        "checkpoint_sha256": "ab" * 32,
        "dataset": {"name": load(name).Config.dataset, "manifest_sha256": "cd" * 32},
        "software": {"commit": "0123456789abcdef" * 2 + "01234567"},
        "hardware": {"cores": 2, "gpus": []},
        "seconds": 12.3,
    }
    return results.Record.model_validate(values | changes)


def written(folder: Path, *records: results.Record) -> list[Path]:
    paths = [folder / record.model / f"{record.benchmark}.json" for record in records]
    for path, record in zip(paths, records, strict=True):
        results.write(record, path)
    return paths


def made(folder: Path, config: Config, *records: results.Record, published: Path = PUBLISHED) -> str:
    model_zoo.model_zoo(written(folder, *records), config, published, folder / "model_zoo.md")
    return (folder / "model_zoo.md").read_text()


def section(page: str, heading: str) -> str:
    return page.split(f"## {heading}\n")[1].split("\n## ")[0]


KNN = {"k10": 47.8, "k20": 48.4, "k100": 46.7, "k200": 45.2}
HEADINGS = [
    "Models",
    "VOC SVM / Low-shot SVM",
    "ImageNet Linear Evaluation",
    "Places205 Linear Evaluation",
    "iNaturalist2018 Linear Evaluation",
    "ImageNet Nearest-Neighbor Classification",
    "ImageNet Semi-Supervised Classification",
    "Pascal VOC07+12 Detection",
    "COCO2017 Detection and Instance Segmentation",
    "Pascal VOC12 + Aug Segmentation",
    "Cityscapes Segmentation",
    "Provenance",
]


def test_sections_and_columns_are_those_of_the_published_page(tmp_path):
    page = made(tmp_path, a_config("random_init"))
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == HEADINGS
    svm = section(page, "VOC SVM / Low-shot SVM").splitlines()[1]
    shots = " | ".join(f"k={k}" for k in (1, 2, 4, 8, 16, 32, 64, 96))
    assert svm == f"| Model | Best Layer | SVM | {shots} |"
    linear = section(page, "ImageNet Linear Evaluation").splitlines()[1]
    assert linear == "| Model | Feature1 | Feature2 | Feature3 | Feature4 | Feature5 | AvgPool |"
    assert "| Model | AP50 | AP | AP75 |" in page
    assert "| Model | mAP(Box) | AP50(Box) | AP75(Box) | mAP(Mask) | AP50(Mask) | AP75(Mask) |" in page


def test_one_row_per_model_in_the_order_of_the_config_with_spread(tmp_path):
    config = a_config("zebra", "ant", voc07_svm={}, voc07_lowshot={})
    spread = {"k1": results.Spread(std=1.234, trials=5)}
    page = made(
        tmp_path,
        config,
        a_record("ant", "voc07_svm", {"best_layer": 5, "svm": 79.98}),
        a_record("ant", "voc07_lowshot", {"k1": 35.02}, spread=spread),
        a_record("zebra", "voc07_svm", {"best_layer": 2, "svm": 30.0}),
    )
    rows = [line for line in section(page, HEADINGS[1]).splitlines() if line.startswith("|")][2:]
    assert rows[0] == "| zebra | feature2 | 30.00 | – | – | – | – | – | – | – | – |"
    assert rows[1] == "| ant | feature5 | 79.98 | 35.02 ± 1.23 | – | – | – | – | – | – | – |"
    assert "± over 5 trials" in page
    assert (
        page.count("voc07_lowshot: as published, each k has one cost, the best on the test set, which is opt")
        == 1
    )
    assert "voc07_lowshot: no record yet (zebra)" in page
    assert "voc07_lowshot: the record has no k2, k4, k8, k16, k32, k64, k96 (ant)" in page


def test_a_dash_says_why(tmp_path):
    config = parse(
        Config,
        {
            "datasets": {"imagenet": {"root": "data"}},
            "models": {"a": {"random_init": {}, "benchmarks": ["imagenet_knn"]}, "b": {"random_init": {}}},
            "benchmarks": {"imagenet_knn": {}, "imagenet_linear": {}},
        },
        "-",
    )
    page = made(tmp_path, config)
    assert "imagenet_linear: not among the model's `benchmarks:` (a)" in page
    assert "imagenet_linear: no record yet (b)" in page
    assert "imagenet_mhead: the config leaves it out (a, b)" in page
    tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    assert " 0.00 " not in tables


def test_a_dash_quotes_the_last_line_of_the_log(tmp_path):
    for model, step in (("a", "imagenet_linear"), ("b", "random_init")):
        (tmp_path / model / "logs").mkdir(parents=True)
        (tmp_path / model / f"logs/{step}.log").write_text(f"first\n{os.getcwd()}/x: the {step} broke\n\n")
    (tmp_path / "a/backbone.safetensors").touch()
    page = made(tmp_path, a_config("a", "b", imagenet_linear={}))
    for model, step in (("a", "imagenet_linear"), ("b", "random_init")):
        said = f"imagenet_linear: no record yet; the log of {step} ends: x: the {step} broke ({model})"
        assert said in page


def test_published_rows_stand_beside_the_model_of_that_name_alone(tmp_path):
    record = a_record(ZOO, "imagenet_knn", KNN | {"k10": 48.8})
    page = section(made(tmp_path, a_config(ZOO, "other"), record), HEADINGS[5])
    rows = [line for line in page.splitlines() if line.startswith("|")][2:]
    assert rows[0] == f"| {ZOO} | 48.80 | 48.40 | 46.70 | 45.20 |"
    published = ("47.80 (+1.00)", "48.40 (+0.00)", "46.70 (+0.00)", "45.20 (+0.00)")
    assert rows[1] == r"| *published \[1\]* | " + " | ".join(f"*{value}*" for value in published) + " |"
    assert rows[2].startswith("| other |")
    assert "weights 20220225-97d2abef, not stated explicitly; not like for like: " in page
    assert "mmselfsup v0.11.0" in page


def test_a_published_row_needs_the_same_backbone_and_no_record(tmp_path):
    page = made(tmp_path, a_config("random_init"))
    assert "*30.54*" in section(page, HEADINGS[1])
    small = parse(
        Config,
        {
            "datasets": {"voc2007": {"root": "data"}},
            "models": {"random_init": {"random_init": {"architecture": "resnet18_w0.25"}}},
            "benchmarks": {"voc07_svm": {}},
        },
        "-",
    )
    assert "published [" not in made(tmp_path, small).replace("\\", "")


def test_protocols_are_never_mixed_silently(tmp_path):
    theirs = load("imagenet_knn").Config().model_dump(mode="json")
    other = theirs | {"temperature": 0.1}
    page = made(
        tmp_path,
        a_config("a", "b", imagenet_knn={}),
        a_record("a", "imagenet_knn", KNN),
        a_record("b", "imagenet_knn", KNN, config=other),
    )
    notes = section(page, HEADINGS[5])
    assert (
        "imagenet_knn (a; not comparable with the others): protocol version 1; the protocol's defaults"
        in notes
    )
    assert (
        "imagenet_knn (b; not comparable with the others): protocol version 1; differs from the protocol's "
        "defaults in temperature = 0.1 (protocol 0.07)" in notes
    )


def test_only_a_run_of_that_recipe_protocol_and_data_is_called_like_for_like(tmp_path):
    def footnote(whole: Config, **changes) -> str:
        record = a_record(ZOO, "imagenet_linear", {"avgpool": 62.0}, **changes)
        page = section(made(tmp_path, whole, record), "ImageNet Linear Evaluation")
        return next(line for line in page.splitlines() if "20220428-46ef6bb9" in line)

    def changed(datasets=None, **recipe) -> Config:
        content = {
            "datasets": datasets or {"imagenet": {"root": "data"}},
            "models": {ZOO: {"pretrain": {"gradient_divisor": 8} | recipe}},
            "benchmarks": {"imagenet_linear": {}},
        }
        return parse(Config, content, "-")

    shipped = footnote(changed(seed=3, pipeline="reference"))
    assert "; like for like: weights and protocol of v0.9.0" in shipped
    assert "but this run differs" not in shipped

    config = load("imagenet_linear").Config(epochs=3).model_dump(mode="json")
    fewer = {"imagenet": {"root": "data", "images": {"train": 2800, "val": 400}}}
    for line, where in (
        (footnote(changed(gradient_divisor=1)), "weights (see Models)"),
        (footnote(changed(epochs=800)), "weights (see Models)"),
        (footnote(changed(precision="bfloat16")), "weights (see Models)"),
        (footnote(changed(), config=config), "protocol (see below)"),
        (footnote(changed(fewer)), "data (see the top of the page)"),
    ):
        assert "like for like" not in line
        assert line.endswith(f"; but this run differs from the published one in {where}")


def test_the_zoo_is_like_for_like_with_the_rows_that_say_so():
    shipped = config_file.read(ROOT / "config/config.yaml")
    for reference in model_zoo.read_published(PUBLISHED):
        if reference.like_for_like:
            assert model_zoo._differs(reference, [], shipped) == [], reference.model


def test_models_tell_deviations_from_defaults_and_not_where_weights_lie(tmp_path):
    table = section(made(tmp_path, config_file.read(ROOT / "config/config.yaml")), "Models")
    assert (
        "gradient\\_divisor = 8.0 (default 1.0)" in table or "gradient_divisor = 8.0 (default 1.0)" in table
    )
    assert "| resnet50_torchvision-supervised | resnet50 | import_checkpoint | – |" in table
    assert "(published" not in table


def test_the_engine_is_named(tmp_path):
    record = a_record(
        "a", "voc0712_detection", {"ap50": 1, "ap": 2, "ap75": 3}, details={"engine": "torchvision"}
    )
    assert "engine torchvision" in made(tmp_path, a_config("a", voc0712_detection={}), record)


def test_the_features_are_named(tmp_path):
    transform = {"name": "center_crop", "resize": 256, "crop": 224, "mean": [0] * 3, "std": [1] * 3}
    features = {"transform": transform, "pooling": "specified", "dtype": "float16"}
    page = made(
        tmp_path,
        a_config("a", imagenet_knn={}),
        a_record("a", "imagenet_knn", KNN, details={"features": features}),
    )
    made_so = "features: center_crop 256 px, crop 224, specified pooling, float16"
    assert made_so in page.replace("\\_", "_")
    assert "imagenet_knn: the published features are float32" in page.replace("\\_", "_")


def coco(variant):
    config = load("coco2017_detection").Config(variant=variant).model_dump(mode="json")
    metrics = {"box_ap": 38.0, "box_ap50": 58.0, "box_ap75": 42.0}
    masks = {"mask_ap": 34.0, "mask_ap50": 55.0, "mask_ap75": 37.0}
    return a_record(ZOO, "coco2017_detection", metrics | masks, config=config)


@pytest.mark.parametrize(
    ("variant", "compared"),
    [
        ("fpn_1x", {"39.6": False, "38.7": False}),
        ("c4_2x", {"39.6": False, "38.7": False}),
        ("mmselfsup_c4_2x", {"39.6": True, "38.7": False}),
        ("mmselfsup_fpn_1x", {"39.6": False, "38.7": True}),
    ],
)
def test_a_published_row_is_compared_with_a_run_of_its_variant_only(tmp_path, variant, compared):
    """OpenSelfSup's 39.6 is of Detectron2's C4, long edge 1200; MMSelfSup's 38.7 is MMDetection's."""
    page = made(tmp_path, a_config(ZOO, coco2017_detection={"variant": variant}), coco(variant))
    table = section(page, "COCO2017 Detection and Instance Segmentation")
    for value, expected in compared.items():
        (row,) = (line for line in table.splitlines() if f"*{float(value):.2f}" in line)
        assert (f"{float(value):.2f} (" in row) == expected, row
    assert f"variant {variant}; the protocol's defaults" in table.replace("\\_", "_")
    assert "variant mmselfsup_c4_2x; not like for like" in table.replace("\\_", "_")


def test_records_of_two_variants_never_share_a_table(tmp_path):
    page = made(tmp_path, a_config(ZOO, coco2017_detection={"variant": "c4_1x"}), coco("c4_2x"))
    table = section(page, "COCO2017 Detection and Instance Segmentation").replace("\\_", "_")
    assert "38.00" not in table
    assert "its record is of variant c4_2x, not of the config's" in table


@pytest.mark.parametrize("variants", [{}, {"voc0712_detection": "mocov3"}, {"imagenet_knn": "moco"}])
def test_a_published_row_tells_its_variant(tmp_path, variants):
    row = {"model": "a", "source": "s", "checkpoint": "c", "like_for_like": False, "note": "n"}
    row |= {"values": {"voc0712_detection": {"ap50": 1.0}}, "variants": variants}
    (tmp_path / "published.yaml").write_text(yaml.safe_dump([row]))
    with pytest.raises(BadInput, match="variants: expected for"):
        model_zoo.read_published(tmp_path / "published.yaml")


def test_other_data_than_the_published_is_said_first(tmp_path):
    config = parse(
        Config,
        {
            "datasets": {"imagenet": {"root": "data", "classes": 10, "images": {"train": 28, "val": 4}}},
            "features": {"imagenet": {"crop": 48, "pooling": "adaptive"}},
            "models": {"a": {"random_init": {}}},
            "benchmarks": {"imagenet_knn": {}},
        },
        "-",
    )
    page = made(tmp_path, config)
    assert page.index("not the published datasets") < page.index("## Models")
    assert "imagenet: classes = 10 (published 1000), images.train = 28 (published 1281167)" in page
    assert "features of imagenet: crop = 48 (default 224)" in page
    assert "not the published datasets" not in made(tmp_path, a_config("a", imagenet_knn={}))


def test_the_page_is_the_same_bytes_and_holds_no_place_or_time(tmp_path):
    record = a_record("a", "imagenet_knn", KNN)
    pages = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        (folder / "a").mkdir()
        (folder / "a/pretrain.png").write_bytes(b"\x89PNG")
        made(folder, a_config("a", imagenet_knn={}), record)
        pages.append([(folder / name).read_bytes() for name in ("model_zoo.md", "model_zoo.html")])
    assert pages[0] == pages[1]
    assert str(tmp_path).encode() not in pages[0][0] + pages[0][1]
    assert b"![Pretraining of a](a/pretrain.png)" in pages[0][0]
    assert b'src="data:image/png;base64,' in pages[0][1]


def test_a_learning_curve_beside_a_record_is_shown(tmp_path):
    records = a_record("a", "imagenet_linear", {"avgpool": 1.0}), a_record("a", "imagenet_knn", KNN)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/imagenet_linear.png").write_bytes(b"\x89PNG")
    page = made(tmp_path, a_config("a", imagenet_linear={}, imagenet_knn={}), *records)
    shown = "![imagenet_linear of a](a/imagenet_linear.png)"
    assert shown in section(page, "ImageNet Linear Evaluation")
    assert page.count("![") == 1


def test_provenance_links_every_record(tmp_path):
    page = made(
        tmp_path,
        a_config("a", imagenet_knn={}, imagenet_linear={}),
        a_record("a", "imagenet_knn", KNN),
        a_record("a", "imagenet_linear", {"avgpool": 1.0}, checkpoint_sha256="ef" * 32),
    )
    notes = section(page, "Provenance")
    stamps = "abababababab | imagenet cdcdcdcdcdcd | 0123456789ab | 2 cores | 12"
    assert f"| a | [imagenet_knn](a/imagenet_knn.json) | {stamps} |" in notes
    assert "its records come from 2 different checkpoints" in notes


def test_records_of_one_benchmark_from_two_states_of_a_dataset_are_named(tmp_path):
    def notes(other: str) -> str:
        records = (
            a_record(
                model, "imagenet_knn", KNN, dataset={"name": "imagenet", "manifest_sha256": manifest * 32}
            )
            for model, manifest in (("a", "cd"), ("b", other))
        )
        return section(made(tmp_path, a_config("a", "b", imagenet_knn={}), *records), "Provenance")

    assert (
        "imagenet_knn: its records come from 2 different dataset manifests (cdcdcdcdcdcd: a; efefefefefef: b)"
        in notes("ef")
    )
    assert "different dataset manifests" not in notes("cd")


def test_what_a_name_holds_cannot_break_the_page(tmp_path):
    published = tmp_path / "published.yaml"
    entry = yaml.safe_load(PUBLISHED.read_text())[0] | {
        "model": "a",
        "note": "a | b <script>alert(1)</script>\n[x](y)",
        "values": {"imagenet_knn": {"k10": 1.0}},
    }
    published.write_text(yaml.safe_dump([entry]))
    page = made(tmp_path, a_config("a", imagenet_knn={}), published=published)
    html = (tmp_path / "model_zoo.html").read_text()
    for text in (page, html):
        assert "<script>" not in text
        assert "&lt;script&gt;" in text
    assert r"a \| b" in page
    assert "[x](y)" not in page


# ---------------------------------------------------------------- what is refused


def refuse(folder: Path, config: Config, *paths: Path) -> str:
    with pytest.raises(BadInput) as error:
        model_zoo.model_zoo(list(paths), config, PUBLISHED, folder / "model_zoo.md")
    assert not (folder / "model_zoo.md").exists()
    return str(error.value)


def test_a_record_with_nan_or_of_another_schema_is_refused(tmp_path):
    (path,) = written(tmp_path, a_record("a", "imagenet_knn", KNN))
    text = path.read_text()
    path.write_text(text.replace("47.8", "NaN"))
    assert "metrics.k10: Input should be a finite number" in refuse(tmp_path, a_config("a"), path)
    path.write_text(text.replace('"schema_version": 1', '"schema_version": 2'))
    assert "schema_version" in refuse(tmp_path, a_config("a"), path)
    path.write_text(text[:40])
    assert "not a valid record" in refuse(tmp_path, a_config("a"), path)
    assert "no such record" in refuse(tmp_path, a_config("a"), tmp_path / "a/voc07_svm.json")


def test_a_record_in_the_wrong_place_or_of_no_model_is_refused(tmp_path):
    (path,) = written(tmp_path, a_record("a", "imagenet_knn", KNN))
    assert "is not in the config" in refuse(tmp_path, a_config("b"), path)
    assert "a second record" in refuse(tmp_path, a_config("a"), path, path)
    moved = path.rename(path.with_name("imagenet_linear.json"))
    assert "found that of a and imagenet_knn" in refuse(tmp_path, a_config("a"), moved)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"values": {"imagenet_knn": {"k11": 1.0}}}, "0: Value error, imagenet_knn has no column k11"),
        ({"values": {"imagenet_kn": {"k10": 1.0}}}, "imagenet_kn"),
        ({"like_for_like": "perhaps"}, "0.like_for_like"),
        ({"sorce": "?"}, "0.sorce"),
        ({"like_for_like": True, "recipe": None}, "like_for_like: true needs `recipe`"),
    ],
)
def test_a_wrong_published_row_is_named(tmp_path, change, said):
    entry = yaml.safe_load(PUBLISHED.read_text())[0] | change
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump([entry]))
    with pytest.raises(BadInput) as error:
        model_zoo.read_published(path)
    assert said in str(error.value)


def test_the_published_rows_are_of_models_of_the_zoo():
    zoo = yaml.safe_load((ROOT / "config/config.yaml").read_text())["models"]
    assert {reference.model for reference in model_zoo.read_published(PUBLISHED)} <= set(zoo)


# MMSelfSup v0.11.0, configs/selfsup/simclr/README.md: the SimCLR rows of the page that this one regenerates.
README_V0_11 = {
    (ZOO, "voc07_svm"): (5, 79.98),
    (ZOO, "voc07_lowshot"): (35.02, 42.79, 54.87, 61.91, 67.38, 71.88, 75.56, 77.4),
    (ZOO, "imagenet_mhead"): (16.29, 31.11, 39.99, 55.06, 62.91),
    (ZOO, "imagenet_linear"): (62.56,),
    ("resnet50_16xb256-coslr-200e", "imagenet_mhead"): (15.44, 31.47, 41.83, 59.44, 66.41),
    ("resnet50_16xb256-coslr-200e", "imagenet_linear"): (66.66,),
    (ZOO, "places205_mhead"): (20.60, 33.62, 38.86, 45.25, 50.91),
    (ZOO, "imagenet_knn"): (47.8, 48.4, 46.7, 45.2),
    (ZOO, "voc0712_detection"): (79.38, None, None),
    (ZOO, "coco2017_detection"): (38.7, 58.1, 42.4, 34.9, 55.3, 37.5),
    (ZOO, "voc12aug_segmentation"): (64.03,),
}


def test_the_rows_of_mmselfsup_are_its_figures():
    found = {}
    for reference in model_zoo.read_published(PUBLISHED):
        if reference.source.startswith("open-mmlab/mmselfsup v0.11.0"):
            for name, values in reference.values.items():
                assert (reference.model, name) not in found
                found[reference.model, name] = tuple(values.get(key) for key in load(name).COLUMNS)
    assert found == README_V0_11


MACHINE = {"processes": 8, "device": "NVIDIA X", "precision": "float32", "batch_norm_images": 256}


def a_pretraining(**changes) -> results.Pretraining:
    values = {
        "checkpoint_sha256": "ab" * 32,
        "dataset": {"name": "imagenet", "manifest_sha256": "cd" * 32},
        "recipe": {"batch_size": 256},
        "execution": {},
        "steps": 1_001_000,
        "images_seen": 256_233_400,
        "skipped_steps": 0,
        "skipped_images": [],
        "machines": [{"from_step": 0, **MACHINE}],
        "processes": 8,
        "batch_norm_images": 256,
        "precision": "float32",
        "knn": 48.0,
        "seconds": 3600.0,
        "gpu_hours": 8.04,
        "images_per_second": 2000.4,
        "peak_memory_gb": 12.0,
        "software": {},
        "hardware": {"cores": 64, "gpus": ["NVIDIA X"] * 8},
    }
    return results.Pretraining.model_validate(values | changes)


def test_the_page_says_what_a_pretraining_saw(tmp_path):
    results.write(a_pretraining(), tmp_path / ZOO / "pretrain.json")
    page = made(tmp_path, a_config(ZOO, imagenet_knn={}), a_record(ZOO, "imagenet_knn", KNN))
    row = f"| [{ZOO}]({ZOO}/pretrain.json) | 256,233,400 | 256 | float32 | 8 × NVIDIA X | 8.0 | 2000 |"
    assert row in section(page, "Models")
    assert "were left out" not in page


def test_the_page_says_what_a_pretraining_left_out_and_what_batchnorm_saw(tmp_path):
    changes = {"skipped_steps": 2, "skipped_images": ["a.JPEG"], "batch_norm_images": 64}
    changes["machines"] = [{"from_step": 0, **MACHINE}, {"from_step": 70, **MACHINE, "batch_norm_images": 64}]
    results.write(a_pretraining(**changes, checkpoint_sha256="99" * 32), tmp_path / ZOO / "pretrain.json")
    page = made(tmp_path, a_config(ZOO, imagenet_knn={}), a_record(ZOO, "imagenet_knn", KNN))
    for said in (
        "BatchNorm took its statistics of 64 images at a time, not of all 256 of a step",
        "from step 70 on: 8 × NVIDIA X, float32, BatchNorm over 64 images",
        "2 steps that were not finite were left out",
        "1 images could not be decoded",
        "its records come from other weights than those of this training",
    ):
        assert f"{ZOO}: {said}" in section(page, "Models")


def test_a_pretraining_record_that_is_not_valid_is_named(tmp_path):
    (tmp_path / ZOO).mkdir()
    (tmp_path / ZOO / "pretrain.json").write_text("{}")
    with pytest.raises(BadInput, match=r"pretrain.json: not a valid record: checkpoint_sha256"):
        made(tmp_path, a_config(ZOO, imagenet_knn={}))

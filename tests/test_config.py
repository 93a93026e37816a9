"""The config file: what it refuses and how it says so; what its blocks stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from simclr import BadInput, config, schema
from simclr.benchmarks import BENCHMARKS, load
from simclr.config import Config, FeatureSet, parse

ROOT = Path(__file__).parent.parent
FILES = ["config/config.yaml", "config/demo.yaml"]


def content(**changes) -> dict:
    """Return a small legal config; `changes` replace top-level blocks."""
    return {
        "datasets": {"imagenet": {"root": "data/imagenet"}, "voc2007": {"root": "data/VOCdevkit"}},
        "models": {"a": {"pretrain": {}}, "b": {"random_init": {}}},
        "benchmarks": {"imagenet_knn": {}},
    } | changes


@pytest.mark.parametrize("file", FILES)
def test_both_config_files_are_valid_and_name_every_benchmark(file):
    whole = config.read(ROOT / file)
    assert whole.runs("random_init") == list(BENCHMARKS)


def test_the_defaults_of_every_benchmark_can_be_built():
    for name in BENCHMARKS:
        assert load(name).Config().version >= 1, name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modles": {}}, ["modles: unknown key", "did you mean models?"]),
        ({"benchmarks": {"imagenet_kn": {}}}, ["benchmarks.imagenet_kn", "did you mean imagenet_knn?"]),
        ({"benchmarks": {"imagenet_knn": {"temprature": 1}}}, ["benchmarks.imagenet_knn.temprature"]),
        ({"models": {"a": {"pretrain": {"epocs": 1}}}}, ["models.a.pretrain.epocs", "did you mean epochs?"]),
        (
            {"models": {"a": {"pretrain": {"epochs": "many"}}}},
            ["a.pretrain.epochs", "integer", "'many'"],
        ),
        ({"models": {"a": {"pretrain": {"epochs": 0}}}}, ["epochs", "greater than or equal to 1", "found 0"]),
        ({"models": {"a": {"pretrain": {}, "random_init": {}}}}, ["models.a", "exactly one of pretrain"]),
        ({"models": {"a": {}}}, ["models.a", "exactly one of", "none"]),
        ({"models": {}}, ["models", "at least 1"]),
        (
            {"models": {"a": {"random_init": {}, "benchmarks": ["imagenet_kn"]}}},
            ["models.a.benchmarks.0", "did you mean imagenet_knn?"],
        ),
        ({"models": {"a b": {"random_init": {}}}}, ["models.a b", "pattern"]),
        ({"models": {"datasets": {"random_init": {}}}}, ["cannot be called `datasets`"]),
        ({"models": {"a": {"import_checkpoint": {}}}}, ["import_checkpoint", "exactly one of path and url"]),
        ({"models": {"a": {"import_checkpoint": {"url": "https://x/y"}}}}, ["needs its sha256"]),
        ({"models": {"a": {"random_init": {"architecture": "resnet99"}}}}, ["architecture", "'resnet99'"]),
        ({"benchmarks": {"inat18_mhead": {}}}, ["inat18_mhead needs datasets.inat18.root"]),
        ({"datasets": {"imagenet": {"root": None}}}, ["needs datasets.imagenet.root", "model a"]),
        ({"datasets": {}, "benchmarks": {}}, ["models.a.pretrain needs datasets.imagenet.root"]),
        ({"features": {"imagenet": {"crop": 48}}}, ["features.imagenet", "use adaptive"]),
        (
            {"models": {"a": {"pretrain": {"weight_decay": float("inf")}}}},
            ["a.pretrain.weight_decay", "finite number", "found inf"],
        ),
        ({"benchmarks": {"imagenet_knn": {"temperature": float("nan")}}}, ["temperature", "finite number"]),
        ({"output": "my results"}, ["output: expected", "letters, digits and . _ - /", "'my results'"]),
        ({"output": "r'; touch x"}, ["output: expected"]),
        ({"output": "-r"}, ["output: expected", "not beginning with -"]),
        ({"output": "results/{model}"}, ["output: expected"]),
        ({"demo_data": "$HOME/data"}, ["demo_data: expected", "'$HOME/data'"]),
    ],
)
def test_what_cannot_be_used_is_named(changes, said):
    with pytest.raises(BadInput) as error:
        parse(Config, content(**changes), "my.yaml")
    message = str(error.value)
    assert message.startswith("my.yaml: ")
    assert "\n" not in message
    for part in said:
        assert part in message


def test_a_required_key_that_is_missing_is_named():
    with pytest.raises(BadInput, match="my file: models: this key is required, and missing"):
        parse(Config, {key: value for key, value in content().items() if key != "models"}, "my file")


def test_a_file_that_is_not_there_or_not_yaml(tmp_path):
    with pytest.raises(BadInput, match="no such config file"):
        config.read(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("models: [")
    with pytest.raises(BadInput, match="not valid YAML"):
        config.read(broken)


def written(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


CONTENT = """
datasets: {imagenet: {root: data}}
models:
  a: {pretrain: {weight_decay: %s}}
benchmarks: {imagenet_knn: {}}
"""


def test_infinity_in_yaml_is_refused_and_an_exponent_without_a_point_is_a_number(tmp_path):
    with pytest.raises(BadInput, match=r"models\.a\.pretrain\.weight_decay: input should be a finite number"):
        config.read(written(tmp_path, CONTENT % ".inf"))
    read = config.read(written(tmp_path, CONTENT % "1e-6"))
    assert read.block("models", "a", "pretrain") == {"version": 1, "weight_decay": 1e-6}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (CONTENT % 0 + "models: {b: {random_init: {}}}\n", "models"),
        (CONTENT % "0, weight_decay: 1", "weight_decay"),
    ],
)
def test_a_key_that_stands_twice_is_named(tmp_path, text, key):
    with pytest.raises(BadInput, match=rf"my\.yaml: .*the key {key} stands twice in one block.* line \d"):
        config.read(written(tmp_path, text))


def test_a_key_may_override_a_merged_block(tmp_path):
    recipes = "a: {pretrain: &recipe {epochs: 30, seed: 1}}\n  b: {pretrain: {<<: *recipe, epochs: 40}}"
    whole = config.read(written(tmp_path, CONTENT.replace("a: {pretrain: {weight_decay: %s}}", recipes)))
    assert (whole.models["b"].pretrain.epochs, whole.models["b"].pretrain.seed) == (40, 1)


def test_a_model_may_run_a_part_of_the_benchmarks_in_page_order():
    models = {"a": {"random_init": {}, "benchmarks": ["imagenet_knn", "voc07_svm"]}}
    whole = parse(Config, content(models=models, benchmarks={"imagenet_knn": {}, "voc07_svm": {}}), "-")
    assert whole.pairs() == [("a", "voc07_svm"), ("a", "imagenet_knn")]


def test_a_features_block_keeps_what_it_does_not_set():
    whole = parse(Config, content(features={"voc2007": {"resize": 300}}), "-")
    assert whole.features.voc2007 == FeatureSet(transform="squash", resize=300)
    assert whole.features.imagenet == FeatureSet(layers=["avgpool"], dtype="float16")
    assert whole.block("features", "voc2007") == {"version": 1, "transform": "squash", "resize": 300}
    assert parse(FeatureSet, whole.block("features", "imagenet"), "-") == whole.features.imagenet


def test_a_block_says_what_the_file_says_and_its_version():
    whole = parse(Config, content(models={"a": {"pretrain": {"epochs": 30}}}), "-")
    assert whole.block("models", "a", "pretrain") == {"version": 1, "epochs": 30}
    assert whole.block("benchmarks", "imagenet_knn") == {"version": 1}
    json.dumps(whole.block("models", "a", "pretrain"))


def test_schema_and_readme_are_in_step_with_the_models(tmp_path):
    files = ROOT / "workflow/schemas/config.schema.yaml", ROOT / "config/README.md"
    copy = tmp_path / "README.md"
    copy.write_text(files[1].read_text())
    schema.write(tmp_path / "schema.yaml", copy)
    command = f"python -m simclr schema --output {files[0]} --readme {files[1]}"
    assert (tmp_path / "schema.yaml").read_text() == files[0].read_text(), f"run {command}"
    assert copy.read_text() == files[1].read_text(), f"run {command}"
    assert yaml.safe_load(files[0].read_text())["properties"].keys() == Config.model_fields.keys()


def test_every_key_says_what_it_means():
    empty = [line for line in (ROOT / "config/README.md").read_text().splitlines() if line.endswith("|  |")]
    assert not empty, "give these keys a description: " + "\n".join(empty)


def test_a_readme_without_the_marker_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(BadInput, match="expected the line"):
        schema.write(tmp_path / "schema.yaml", tmp_path / "README.md")

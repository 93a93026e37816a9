"""The environment files, pyproject.toml and each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
ENVS = ("simclr", "detectron2", "mmseg")
SAME = {"pytorch": "torch", "matplotlib-base": "matplotlib", "tensorboard": "tensorboard"}


def required() -> dict[str, Requirement]:
    """Return package → what pyproject.toml asks of it."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {item.name.lower(): item for item in map(Requirement, content["dependencies"])}
    return found | {"python": Requirement(f"python{content['requires-python']}")}


def listed(env: str) -> dict[str, str]:
    """Return package → version text of an environment file, its pip part included."""
    items = yaml.safe_load((ROOT / f"envs/{env}.yaml").read_text())["dependencies"]
    flat = [line for item in items for line in (item["pip"] if isinstance(item, dict) else [item])]
    pairs = (re.fullmatch(r"([\w.-]+)\s*(.*)", line).groups() for line in flat)
    return {SAME.get(name.lower(), name.lower()): version for name, version in pairs}


@pytest.mark.parametrize("env", ENVS)
def test_an_environment_asks_for_nothing_older_than_pyproject(env):
    for name, version in listed(env).items():
        if name in required() and (least := re.search(r"\d[\d.]*\d|\d", version)):
            wanted = required()[name]
            assert wanted.specifier.contains(least[0]), f"envs/{env}.yaml: {name}{version}, but {wanted}"


def test_the_main_environment_has_all_that_the_package_imports():
    not_imported = {"snakemake", "snakemake-executor-plugin-slurm", "pygments"}
    mmseg = {"onedl-mmsegmentation", "onedl-mmcv", "onedl-mmengine"}
    assert set(listed("simclr")) == set(required()) - not_imported - mmseg


def test_the_segmentation_environment_has_the_fork():
    assert {"onedl-mmsegmentation", "onedl-mmcv", "onedl-mmengine"} <= set(listed("mmseg"))


def test_the_detection_environment_has_detectron2():
    assert "detectron2" in listed("detectron2")

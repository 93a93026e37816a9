"""The environment files, pyproject.toml and each other."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
ENVS = ("simclr", "detectron2", "mmseg")
FORK = {"onedl-mmsegmentation", "onedl-mmcv", "onedl-mmengine"}
# Module → the package that brings it, where the names differ.
PACKAGE = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "scipy": "scikit-learn",
    "mmseg": "onedl-mmsegmentation",
    "mmcv": "onedl-mmcv",
    "mmengine": "onedl-mmengine",
}
# What the steps of each environment start from; the main one runs all but the code of the other two.
STARTS = {
    "simclr": sorted(f"simclr.{p.stem}" for p in (ROOT / "simclr").glob("*.py") if p.stem != "__init__")
    + sorted(f"simclr.benchmarks.{p.stem}" for p in (ROOT / "simclr/benchmarks").glob("[!_]*.py"))
    + ["simclr.benchmarks._detection_torchvision"],
    "detectron2": [
        "simclr.__main__",
        "simclr.benchmarks.voc0712_detection",
        "simclr.benchmarks.coco2017_detection",
        "simclr.benchmarks._detection_detectron2",
    ],
    "mmseg": [
        "simclr.__main__",
        "simclr.benchmarks.voc12aug_segmentation",
        "simclr.benchmarks.cityscapes_segmentation",
    ],
}
# Imported inside functions that the other environments never call.
OWN = {
    "detectron2": {"detectron2"},
    "mmseg": FORK,
    "simclr": {"scikit-learn", "cityscapesscripts"},
}
SAME = {
    "pytorch": "torch",
    "matplotlib-base": "matplotlib",
    "py-opencv": "opencv-python-headless",
    "opencv-python": "opencv-python-headless",
}


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


def source(module: str) -> Path | None:
    """Return the file of a module of this package."""
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, inside functions too, but for type checkers alone."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body.clear()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def needed(env: str) -> set[str]:
    """Return the packages that the modules of an environment import, directly or through each other."""
    packages, seen, open_ = set(), set(), list(STARTS[env])
    while open_:
        module = open_.pop()
        if module in seen or source(module) is None:
            continue
        seen.add(module)
        for name in imports(source(module)):
            top = name.partition(".")[0]
            if top == "simclr":
                open_.append(name)
            elif top not in sys.stdlib_module_names:
                packages.add(PACKAGE.get(top, top))
    return packages - set().union(*(own for other, own in OWN.items() if other != env))


@pytest.mark.parametrize("env", ENVS)
def test_an_environment_has_all_that_its_modules_import(env):
    assert needed(env) - set(listed(env)) == set()


@pytest.mark.parametrize("path", sorted((ROOT / "workflow/rules").glob("*.smk")), ids=lambda p: p.stem)
def test_rules_take_the_environment_that_is_held_against_their_modules(path):
    envs = set(re.findall(r'"\.\./\.\./envs/(\w+)\.yaml"', path.read_text()))
    module = f"simclr.benchmarks.{path.stem}"
    special = {env for env in ("detectron2", "mmseg") if module in STARTS[env]}
    assert envs <= (special or {"simclr"})


def test_what_is_imported_is_found_through_modules_and_functions():
    assert {"torch", "pillow", "pycocotools", "detectron2", "safetensors", "tqdm"} <= needed("detectron2")
    assert "scikit-learn" not in needed("mmseg")


@pytest.mark.parametrize("env", ENVS)
def test_an_environment_asks_for_nothing_older_than_pyproject(env):
    for name, version in listed(env).items():
        if name in required() and (least := re.search(r"\d[\d.]*\d|\d", version)):
            wanted = required()[name]
            assert wanted.specifier.contains(least[0]), f"envs/{env}.yaml: {name}{version}, but {wanted}"


def test_the_main_environment_is_that_of_pyproject_without_the_fork():
    not_imported = {"snakemake", "snakemake-executor-plugin-slurm", "pygments"}
    assert set(listed("simclr")) - {"pip"} == set(required()) - not_imported - FORK


def test_the_segmentation_environment_has_the_fork():
    assert {"onedl-mmsegmentation", "onedl-mmcv", "onedl-mmengine"} <= set(listed("mmseg"))


def test_the_detection_environment_has_detectron2():
    assert "detectron2" in listed("detectron2")

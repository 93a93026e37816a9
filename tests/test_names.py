"""One name through every layer: what is missing for a benchmark or a step is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import simclr
from simclr.__main__ import STEPS
from simclr.benchmarks import BENCHMARKS, load
from simclr.model_zoo import sections

ROOT = Path(__file__).parent.parent


def snakefile() -> str:
    return (ROOT / "workflow/Snakefile").read_text()


def rule_file(name: str) -> str:
    return (ROOT / f"workflow/rules/{name}.smk").read_text()


def missing(name: str) -> list[str]:
    """Return where the benchmark `name` should be found, and is not."""
    configs = {f: yaml.safe_load((ROOT / f).read_text()) for f in ("config/config.yaml", "config/demo.yaml")}
    module = load(name) if (ROOT / f"simclr/benchmarks/{name}.py").is_file() else None
    rules = rule_file(name) if (ROOT / f"workflow/rules/{name}.smk").is_file() else ""
    found = {
        f"simclr/benchmarks/{name}.py": module is not None,
        **{f"{name}.{what}": hasattr(module, what) for what in ("TITLE", "COLUMNS", "Config", "evaluate")},
        f"workflow/rules/{name}.smk": bool(rules),
        f"rule {name}": f"rule {name}:" in rules,
        f"rule {name}_record": f"rule {name}_record:" in rules,
        f"record {name}.json": f'record("{name}")' in rules,
        f"log {name}.log": f'"<results>/{{model}}/logs/{name}.log"' in rules,
        f"times/{name}.tsv": f'"<results>/{{model}}/times/{name}.tsv"' in rules,
        f"params of {name}": f'benchmark_block("{name}")' in rules,
        f"command {name}": f" -m simclr {name} " in rules,
        f"include of {name}.smk": f'include: "rules/{name}.smk"' in snakefile(),
        f"step {name}": name in STEPS,
        f"section of {name}": any(name in names for _, names in sections()),
        f"tests/benchmarks/test_{name}.py": (ROOT / f"tests/benchmarks/test_{name}.py").is_file(),
        f"block {name} in config/README.md": f"benchmarks.{name}`" in (ROOT / "config/README.md").read_text(),
        **{f"block {name} in {file}": name in content["benchmarks"] for file, content in configs.items()},
    }
    return [what for what, there in found.items() if not there]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_has_its_name_in_every_layer(name):
    assert missing(name) == []


def test_the_package_says_where_every_module_belongs():
    modules = {path.stem for path in (ROOT / "simclr").glob("*.py")} - {"__init__"}
    assert modules <= set(re.findall(r"`(\w+)`", simclr.__doc__))


def test_a_benchmark_that_is_only_a_name_lacks_everything():
    assert "workflow/rules/imagenet_oracle.smk" in missing("imagenet_oracle")
    assert "simclr/benchmarks/imagenet_oracle.py" in missing("imagenet_oracle")


def test_no_layer_has_a_benchmark_that_the_others_lack():
    modules = {p.stem for p in (ROOT / "simclr/benchmarks").glob("[!_]*.py")}
    rules = {name for p in (ROOT / "workflow/rules").glob("*.smk") for name in _rules(p) if _is_record(name)}
    assert modules == set(BENCHMARKS)
    assert {name.removesuffix("_record") for name in rules} == set(BENCHMARKS)


def _rules(path: Path) -> list[str]:
    return re.findall(r"^ *rule (\w+):", path.read_text(), re.M)


def _is_record(name: str) -> bool:
    return name.endswith("_record")


def test_the_snakefile_reads_in_page_order():
    includes = re.findall(r'^include: "rules/(\w+)\.smk"', snakefile(), re.M)
    assert includes == [
        *("common", "resources", "run", "datasets", "pretrain", "convert", "features"),
        *BENCHMARKS,
        "model_zoo",
    ]


def test_every_other_step_is_a_rule_that_calls_it():
    rules = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    for step in set(STEPS) - set(BENCHMARKS) - {"schema", "shards"}:
        assert re.search(rf"^ *rule {step}:", rules, re.M), f"no rule {step}"
        assert re.search(rf"-m simclr {step}\b", rules), f"no rule calls the step {step}"


@pytest.mark.parametrize("path", sorted((ROOT / "workflow/rules").glob("*.smk")), ids=lambda p: p.stem)
def test_every_rule_that_runs_has_log_time_file_environment_and_docstring(path):
    for body in re.split(r"^ *rule \w+:\n", path.read_text(), flags=re.M)[1:]:
        assert body.lstrip().startswith('"""')
        if "shell:" in body:
            assert "log:" in body
            assert "conda:" in body
            assert re.search(r"^ *benchmark:", body, re.M) or "localrule: True" in body
            assert "resources:" in body or "localrule: True" in body

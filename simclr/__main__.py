"""The command line: `python -m simclr <step>`. Finds steps by name; a step's parameters are its options.

`config: Recipe` in a step's signature reads `--config` as a `Recipe`, and `execution: Execution` likewise;
`train: Features` opens the folder given as `--train`; a `Path`, `str` or `int` is handed on as it is. One
with a default may be left out.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simclr import BadInput
from simclr.benchmarks import BENCHMARKS, load, run

# In page order: step → the function that it is, and what it does.
STEPS = {
    "demo": ("simclr.demo:make", "make the miniature datasets"),
    "datasets": ("simclr.datasets:verify", "verify a dataset's layout and write its manifest"),
    "shards": ("simclr.shards:write", "write a split of ImageNet as tar shards"),
    "pretrain": ("simclr.pretrain:pretrain", "pretrain a backbone with SimCLR"),
    "import_checkpoint": ("simclr.checkpoint:import_checkpoint", "take in an existing checkpoint"),
    "random_init": ("simclr.checkpoint:random_init", "write a backbone of random weights"),
    "convert": ("simclr.convert:convert", "convert a backbone for Detectron2 and MMSegmentation"),
    "features": ("simclr.features:extract", "extract the features of one split of a dataset"),
    **{name: (f"simclr.benchmarks.{name}:evaluate", None) for name in BENCHMARKS},
    "model_zoo": ("simclr.model_zoo:model_zoo", "collate all records into the page"),
    "schema": ("simclr.schema:write", "write the JSON schema of the config file, and its README"),
}

# Parameters that are blocks of the config file.
BLOCKS = ("config", "execution")

# What the annotation of a step's parameter stands for on the command line.
OPENERS = {
    "Path": "pathlib:Path",
    "str": "builtins:str",
    "int": "simclr.__main__:whole_number",
    "list[Path]": "pathlib:Path",
    "Backbone": "simclr.checkpoint:Backbone.open",
    "Dataset": "simclr.datasets:Dataset.open",
    "Features": "simclr.features:Features.open",
    "Record": "simclr.results:read",
}


def main(argv: list[str] | None = None) -> int:
    """Run one step; return the exit status: 0, or 2 after one sentence on standard error for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        step = _steps_parser().parse_args(argv[:1]).step
        function = find(STEPS[step][0])
        options = vars(_parser(step, function).parse_args(argv[1:]))
        values = {name: _open(function, name, value) for name, value in options.items()}
        if step in BENCHMARKS:
            keys = ("model", "config", "output")
            run(step, *(values.pop(key) for key in keys), inputs=values)
        else:
            function(**values)
    except BadInput as error:
        print(f"simclr: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


def sentence(error: Exception) -> str:
    """Return what `error` says, without the traceback that DataLoader puts before it in a worker process."""
    return re.sub(r"^simclr[\w.]*: ", "", str(error).splitlines()[-1])


def find(target: str) -> Callable[..., Any]:
    """Return the object named "package.module:name.name"."""
    module, _, path = target.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _steps_parser() -> argparse.ArgumentParser:
    lines = [f"  {name:<24}{text or load(name).TITLE}" for name, (_, text) in STEPS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m simclr",
        description="Steps, in page order; each has its own --help:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=STEPS, metavar="step", help="one of the above")
    return parser


def _parser(step: str, function: Callable[..., Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m simclr {step}", description=inspect.getdoc(function))
    parameters = dict(inspect.signature(function).parameters)
    if step in BENCHMARKS:
        parser.add_argument("--model", required=True, help="name of the model, for the record")
        parser.add_argument("--output", required=True, type=Path, help="the record to write")
    for name, parameter in parameters.items():
        several = parameter.annotation.startswith("list[")
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            required=parameter.default is parameter.empty,
            nargs="*" if several else None,
            default=argparse.SUPPRESS,
            help=_help(parameter),
        )
    return parser


def _help(parameter: inspect.Parameter) -> str:
    if parameter.name in BLOCKS:
        return "JSON, FILE, or FILE:BLOCK (config/config.yaml:benchmarks.imagenet_knn)"
    return parameter.annotation.split(" |")[0]


def _open(function: Callable[..., Any], name: str, value: Any) -> Any:
    if name in BLOCKS:
        return read_block(value, find(f"{function.__module__}:{_annotation(function, name)}"), f"--{name}")
    annotation = _annotation(function, name)
    if annotation is None:  # --model and --output of a benchmark
        return value
    opener = find(OPENERS[annotation])
    return [opener(item) for item in value] if isinstance(value, list) else opener(value)


def whole_number(text: str) -> int:
    """Return `text` as an integer; raises `BadInput` when it is none."""
    try:
        return int(text)
    except ValueError as error:
        raise BadInput(f"expected a whole number, found {text!r}") from error


def _annotation(function: Callable[..., Any], name: str) -> str | None:
    parameter = inspect.signature(function).parameters.get(name)
    return parameter.annotation.split(" |")[0] if parameter else None


def read_block(text: str, model: type[Any], option: str = "--config") -> Any:
    """Return `text` as a `model`: JSON as it stands, `FILE`, a YAML file, or `FILE:BLOCK`, a block of it.

    Raises `BadInput` when the text is none of these, the file has no such block, or it does not validate.
    """
    from simclr.config import parse, read_yaml

    if text.lstrip().startswith("{"):
        try:
            return parse(model, json.loads(text), option)
        except json.JSONDecodeError as error:
            raise BadInput(f"{option}: expected JSON or FILE:BLOCK, found invalid JSON: {error}") from error
    file, _, keys = text.partition(":")
    if not Path(file).is_file():
        raise BadInput(f"{option}: expected JSON, FILE or FILE:BLOCK; there is no file {file!r}")
    try:
        # YAML would take a JSON file with a comma too many for one that says less.
        block = json.loads(Path(file).read_text()) if file.endswith(".json") else read_yaml(Path(file))
    except json.JSONDecodeError as error:
        raise BadInput(f"{option}: {file} is not valid JSON: {error}") from error
    for key in filter(None, keys.split(".")):
        if not isinstance(block, dict) or key not in block:
            raise BadInput(f"{option}: {file} has no block {keys} (stopped at {key!r})")
        block = block[key]
    return parse(model, block or {}, text)


if __name__ == "__main__":
    sys.exit(main())

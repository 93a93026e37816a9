"""What the config's models say about themselves, written down: the JSON schema and the table of every key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml

from simclr import BadInput, config
from simclr.benchmarks import BENCHMARKS, load
from simclr.files import replacing
from simclr.protocol import Closed, Protocol

BEGIN = "<!-- keys: written by `python -m simclr schema`, not by hand -->"


def write(output: Path, readme: Path) -> None:
    """Write the JSON schema of the config file to `output`, as YAML, and every key into `readme`.

    Of `readme` everything up to the marker line is kept. Raises `BadInput` when it has no marker.
    """
    schema = yaml.safe_dump(config.Config.model_json_schema(), sort_keys=False, width=110)
    with replacing(output) as part:
        part.write_text("# Written by `python -m simclr schema`, not by hand.\n" + schema)
    intro, marker, _ = Path(readme).read_text().partition(BEGIN)
    if not marker:
        raise BadInput(f"{readme}: expected the line {BEGIN}, below which the keys are written")
    with replacing(readme) as part:
        part.write_text(f"{intro}{BEGIN}\n\n{keys()}")


def keys() -> str:
    """Return every key of the config file, block by block, as Markdown."""
    blocks = [
        _block("top level", config.Config.__doc__, config.Config, only=("output", "demo_data")),
        _datasets(),
        _block("features.<voc2007 or imagenet>", _features(), config.FeatureSet),
        _block("models.<name>", config.Model.__doc__, config.Model, only=("benchmarks", "gpus", "nodes")),
        _block("models.<name>.pretrain", config.Recipe.__doc__, config.Recipe),
        _block("models.<name>.execution", config.Execution.__doc__, config.Execution),
        _block("models.<name>.import_checkpoint", config.ImportCheckpoint.__doc__, config.ImportCheckpoint),
        _block("models.<name>.random_init", config.RandomInit.__doc__, config.RandomInit),
        *(_benchmark(name) for name in BENCHMARKS),
    ]
    return "\n\n".join(blocks) + "\n"


def _features() -> str:
    changed = [
        f"of {name}, " + ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in keys.items())
        for name, keys in config.PUBLISHED_FEATURES.items()
    ]
    return f"{config.FeatureSet.__doc__} Other defaults than in the table: {'; '.join(changed)}."


def _datasets() -> str:
    lines = ["| dataset | layout under `root` | classes | images |", "| --- | --- | ---: | --- |"]
    for name, field in config.Datasets.model_fields.items():
        dataset = get_args(field.annotation)[0]()  # the model of `ImageNet | None`
        images = ", ".join(f"{split} {count:,}" for split, count in dataset.images.items())
        lines.append(f"| `{name}` | {_escaped(field.description)} | {dataset.classes:,} | {images} |")
    return _block("datasets.<name>", config.Datasets.__doc__, config.Dataset) + "\n\n" + "\n".join(lines)


def _benchmark(name: str) -> str:
    module = load(name)
    parent = module.Config.__mro__[1]
    text, inherited = f"{module.TITLE}.", {}
    # A private module's keys stand nowhere else: each block that has them lists them all.
    if not parent.__module__.rsplit(".", 1)[1].startswith("_") and parent is not Protocol:
        text += (
            f" The keys of `benchmarks.{parent.__module__.rsplit('.', 1)[1]}`, with other defaults for these:"
        )
        inherited = dict(rows(parent))
    changed = [key for key, row in rows(module.Config) if row != inherited.get(key)]
    return _block(f"benchmarks.{name}", text, module.Config, only=changed)


def _block(heading: str, text: str | None, model: type[Closed], only: Any = None) -> str:
    lines = [
        f"## `{heading}`",
        "",
        " ".join((text or "").split()),
        "",
    ]
    chosen = [(key, row) for key, row in rows(model) if only is None or key in only]
    if chosen:
        lines += ["| key | legal values | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| `{key}` | {' | '.join(map(_escaped, row))} |" for key, row in chosen]
    return "\n".join(lines).strip()


def rows(model: type[Closed]) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Yield (key, (legal values, default, meaning)) of a block; keys of blocks in it are dotted."""
    schema = model.model_json_schema()
    yield from _rows(schema, schema, "")


def _rows(
    node: dict[str, Any], schema: dict[str, Any], prefix: str
) -> Iterator[tuple[str, tuple[str, str, str]]]:
    for key, property_ in node["properties"].items():
        inner = config.resolve(property_, schema)
        if "properties" in inner and "default" in property_ and property_["default"] is not None:
            yield from _rows(inner, schema, f"{prefix}{key}.")
        else:
            default = f"`{json.dumps(property_['default'])}`" if "default" in property_ else "required"
            meaning = property_.get("description") or inner.get("description") or ""
            yield f"{prefix}{key}", (_legal(property_, schema), default, meaning)


def _legal(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return in words what a JSON schema node accepts."""
    if "$ref" in node:
        return "a block"
    if "anyOf" in node:
        return " or ".join(_legal(option, schema) for option in node["anyOf"])
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        items = node.get("prefixItems") or [node.get("items", {})]
        inner = ", ".join(dict.fromkeys(_legal(item, schema) for item in items))
        return f"{len(items)} × {inner}" if "prefixItems" in node else f"list of {inner}"
    if node.get("type") == "object":
        return f"name → {_legal(node.get('additionalProperties') or {}, schema)}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {node[key]:g}" for key, sign in signs.items() if key in node]
    if "pattern" in node:
        bounds.append(f"`{node['pattern']}`")
    return " ".join([node.get("type", "anything"), *bounds])


def _escaped(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")

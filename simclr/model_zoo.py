"""The page: every record in its table, beside the published numbers, with what tells them apart.

The page is a view. It holds no number that is not in a record or in `results/published.yaml`, no time stamp
and no absolute path, so the same records give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

from simclr import BadInput, files, jobs, results
from simclr.benchmarks import BENCHMARKS, load
from simclr.config import Config
from simclr.protocol import Closed, Column
from simclr.render import Block, Cell, Heading, Notes, Picture, Table, Text, to_html, to_markdown

# Benchmarks that share one table, and its heading; every other benchmark has a table under its TITLE.
SHARED = {
    ("voc07_svm", "voc07_lowshot"): "VOC SVM / Low-shot SVM",
    ("imagenet_mhead", "imagenet_linear"): "ImageNet Linear Evaluation",
}
DASH = "–"
LAST_WORDS = 300  # characters


class Reference(Closed):
    """One published row: whose, of which weights, and whether it may be compared with ours."""

    model: str = Field(description="The model beside whose row it stands.")
    architecture: str = Field("resnet50", description="It stands there only if the model has this backbone.")
    source: str = Field(description="Repository, version and file, or paper and table.")
    checkpoint: str = Field(description="The weights that the number was measured on.")
    like_for_like: bool = Field(description="Same recipe, same protocol, same kind of weights.")
    recipe: dict[str, Any] | None = Field(
        None,
        description="What its weights' recipe has other than the defaults of the step that makes ours; "
        "null: not compared.",
    )
    note: str = Field(min_length=1, description="Why it is, or is not, like for like.")
    values: dict[Literal[BENCHMARKS], dict[str, FiniteFloat]] = Field(
        min_length=1, description="Benchmark → metric → value, as COLUMNS names them."
    )
    variants: dict[Literal[BENCHMARKS], str] = Field(
        {}, description="Benchmark → the variant of its protocol, for each that has several."
    )

    @model_validator(mode="after")
    def _columns_exist(self) -> Reference:
        for benchmark, values in self.values.items():
            unknown = set(values) - set(load(benchmark).COLUMNS)
            if unknown:
                raise ValueError(f"{benchmark} has no column {', '.join(sorted(unknown))}")
        return self

    @model_validator(mode="after")
    def _variants_are_told(self) -> Reference:
        for benchmark in {**self.values, **self.variants}:
            found, known = self.variants.get(benchmark), _variants(benchmark)
            if found not in (known or (None,)):
                raise ValueError(
                    f"variants: expected for {benchmark} {' or '.join(known) or 'none'}; {found}"
                )
        return self

    @model_validator(mode="after")
    def _like_for_like_has_a_recipe(self) -> Reference:
        if self.like_for_like and self.recipe is None:
            raise ValueError("like_for_like: true needs `recipe`, with which a model's recipe is compared")
        return self


def _variants(benchmark: str) -> tuple[str, ...]:
    """Return the variants of a benchmark's protocol; none for most."""
    return tuple(getattr(load(benchmark).Config, "variants", ()))


class Row(NamedTuple):
    """A record and where it lies."""

    path: Path
    record: results.Record


Rows = dict[tuple[str, str], Row]  # (model, benchmark) → its record


def model_zoo(records: list[Path], config: Config, published: Path, output: Path) -> None:
    """Write the page `output` (Markdown), and the same as HTML beside it.

    One row per model of `config`, in its order; one table per benchmark, in page order. Raises `BadInput`
    for a record that is not valid, lies in the wrong place, or belongs to no model of the config.
    """
    output = Path(output)
    blocks = page(read_records(records, config), read_published(published), config, output.parent)
    for path, text in (
        (output, to_markdown(blocks)),
        (output.with_suffix(".html"), to_html(blocks, output.parent)),
    ):
        with files.replacing(path) as part:
            part.write_text(text)


def read_records(paths: Iterable[Path], config: Config) -> Rows:
    """Read the records; each must lie at `<model>/<benchmark>.json` and be of a model of the config."""
    rows: Rows = {}
    for path in map(Path, paths):
        record = results.read(path)
        if (record.model, record.benchmark) != (path.parent.name, path.stem):
            raise BadInput(
                f"{path}: expected the record of {path.parent.name} and {path.stem}; found that of "
                f"{record.model} and {record.benchmark}; delete it and run `snakemake {path}`"
            )
        if record.model not in config.models or record.benchmark not in BENCHMARKS:
            raise BadInput(
                f"{path}: {record.model} with {record.benchmark} is not in the config; leave the record out"
            )
        if (record.model, record.benchmark) in rows:
            raise BadInput(f"{path}: a second record of {record.model} and {record.benchmark}; give one")
        rows[record.model, record.benchmark] = Row(path, record)
    return rows


def read_published(path: Path) -> list[Reference]:
    """Read the published rows; raises `BadInput` naming the row and the key that is wrong."""
    try:
        return TypeAdapter(list[Reference]).validate_python(yaml.safe_load(Path(path).read_text()))
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; the repository has results/published.yaml") from error
    except (ValidationError, yaml.YAMLError) as error:
        what = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        key = ".".join(map(str, what["loc"]))
        raise BadInput(f"{path}: {key or 'the file'}: {' '.join(what['msg'].split())}") from error


def sections() -> list[tuple[str, tuple[str, ...]]]:
    """Return (heading, benchmarks) of every table, in page order."""
    found = []
    for name in BENCHMARKS:
        names = next((shared for shared in SHARED if name in shared), (name,))
        if names[0] == name:
            found.append((SHARED.get(names, load(name).TITLE), names))
    return found


def page(rows: Rows, references: list[Reference], config: Config, folder: Path) -> list[Block]:
    """Return the page as blocks; paths on it are relative to `folder`."""
    blocks: list[Block] = [
        Heading(1, "SimCLR model zoo"),
        Text(
            "One row per model. Numbers are percent; ± is the standard deviation over the trials of the "
            "protocol. A dash is a number that is not there, never zero; the reason stands below the table. "
            "A published row shows in brackets our number minus the published one."
        ),
        *_data_notes(config),
        *_models(config, folder),
        *_pretrainings(rows, config, folder),
    ]
    for heading, names in sections():
        blocks += _section(heading, names, rows, references, config, folder)
    return blocks + _provenance(rows, config, folder)


def _data_notes(config: Config) -> list[Block]:
    """Say which datasets and features are not the published ones: their numbers compare with nobody's."""
    notes = []
    for name in type(config.datasets).model_fields:
        dataset = config.dataset(name)
        if dataset is None:
            continue
        if changed := _differences(dataset, type(dataset)(), "published", {"root", "decode", "version"}):
            notes.append(f"{name}: {changed}")
    for name in type(config.features).model_fields:
        ours, theirs = (getattr(c, name) for c in (config.features, type(config.features)()))
        if changed := _differences(ours, theirs, "default", {"batch_size", "version"}):
            notes.append(f"features of {name}: {changed}")
    if not notes:
        return []
    warning = (
        "These are not the published datasets or features. Compare the numbers of this page with each "
        "other, not with published ones:"
    )
    return [Text(warning), Notes(notes)]


def _models(config: Config, folder: Path) -> list[Block]:
    table, pictures = [], []
    for name, model in config.models.items():
        source = getattr(model, model.source)
        place = {"version", "path", "url", "sha256"}  # where weights lie is no deviation
        changed = _differences(source, type(source).model_construct(), "default", place)
        table.append([Cell(name), Cell(source.architecture), Cell(model.source), Cell(changed or DASH)])
        curve = folder / name / "pretrain.png"
        if curve.exists():
            pictures.append(Picture(f"Pretraining of {name}", _relative(curve, folder)))
    header = ["Model", "Backbone", "Weights from", "Differs from the defaults of that step"]
    return [Heading(2, "Models"), Table(header, table), *pictures]


def _pretrainings(rows: Rows, config: Config, folder: Path) -> list[Block]:
    """Say of every backbone pretrained here what its training saw, on what, and what was left out."""
    table, notes = [], []
    for name, model in config.models.items():
        path = folder / name / "pretrain.json"
        if model.pretrain is None or not path.exists():
            continue
        record = results.read(path, results.Pretraining)
        gpus = record.hardware.get("gpus", [])
        table.append(
            [
                Cell(name, href=_relative(path, folder)),
                Cell(f"{record.images_seen:,}"),
                Cell(f"{record.batch_norm_images:,}"),
                Cell(record.precision),
                Cell(f"{record.processes} × {gpus[0] if gpus else 'CPU'}"),
                Cell(f"{record.gpu_hours:.1f}" if gpus else DASH),
                Cell(f"{record.images_per_second:.0f}"),
            ]
        )
        notes += [f"{name}: {note}" for note in _remarks(name, record, rows)]
    if not table:
        return []
    header = ["Pretraining", "Images seen", "Images per BatchNorm", "Precision", "Processes"]
    return [Table([*header, "GPU-hours", "Images/s"], table), Notes(notes)]


def _remarks(name: str, record: results.Pretraining, rows: Rows) -> Iterable[str]:
    """Yield what a reader of the numbers must know of the training behind them."""
    if record.batch_norm_images < record.recipe["batch_size"]:
        yield (
            f"BatchNorm took its statistics of {record.batch_norm_images} images at a time, not of all "
            f"{record.recipe['batch_size']} of a step"
        )
    for machine in record.machines[1:]:
        yield (
            f"from step {machine['from_step']} on: {machine['processes']} × {machine['device']}, "
            f"{machine['precision']}, BatchNorm over {machine['batch_norm_images']} images"
        )
    if record.skipped_steps:
        yield f"{record.skipped_steps} steps that were not finite were left out"
    if record.skipped_images:
        yield f"{len(record.skipped_images)} images could not be decoded and were replaced by the next ones"
    others = {row.record.checkpoint_sha256 for (model, _), row in rows.items() if model == name}
    if others - {record.checkpoint_sha256}:
        yield "its records come from other weights than those of this training; run `snakemake all`"


def _section(
    heading: str,
    names: tuple[str, ...],
    rows: Rows,
    references: list[Reference],
    config: Config,
    folder: Path,
) -> list[Block]:
    columns = [(name, key, column) for name in names for key, column in load(name).COLUMNS.items()]
    table, footnotes, every = [], [], rows
    rows = {pair: row for pair, row in rows.items() if not _other_variant(row.record, config)}
    for model, block in config.models.items():
        ours = {name: rows[model, name].record for name in names if (model, name) in rows}
        table.append([Cell(model), *(Cell(_value(ours.get(name), key, c)) for name, key, c in columns)])
        architecture = getattr(block, block.source).architecture
        for reference in references:
            if (reference.model, reference.architecture) != (model, architecture):
                continue
            if not any(name in reference.values for name in names):
                continue
            differs = _differs(reference, list(ours.values()), config)
            footnotes.append(_footnote(len(footnotes) + 1, reference, names, differs))
            label = Cell(f"published [{len(footnotes)}]", emphasis=True)
            cells = (Cell(_published(reference, ours.get(n), n, k, c), emphasis=True) for n, k, c in columns)
            table.append([label, *cells])
    notes = [*footnotes, *_protocols(names, rows), *_reasons(names, every, config, folder)]
    header = ["Model", *(column.heading for _, _, column in columns)]
    return [Heading(2, heading), Table(header, table), Notes(notes), *_curves(names, rows, folder)]


def _curves(names: tuple[str, ...], rows: Rows, folder: Path) -> list[Block]:
    """Return the learning curve of every record that has one beside it."""
    curves = {pair: row.path.with_suffix(".png") for pair, row in rows.items() if pair[1] in names}
    return [
        Picture(f"{benchmark} of {model}", _relative(path, folder))
        for (model, benchmark), path in curves.items()
        if path.exists()
    ]


def _value(record: results.Record | None, key: str, column: Column) -> str:
    if record is None or key not in record.metrics:
        return DASH
    spread = record.spread.get(key)
    return column.format.format(record.metrics[key]) + (f" ± {spread.std:.2f}" if spread else "")


def _published(reference: Reference, ours: results.Record | None, name: str, key: str, column: Column) -> str:
    value = reference.values.get(name, {}).get(key)
    if value is None:
        return ""
    text = column.format.format(value)
    if ours is None or key not in ours.metrics or not column.unit or not _same_variant(reference, ours):
        return text
    return f"{text} ({ours.metrics[key] - value:+.2f})"


def _same_variant(reference: Reference, ours: results.Record) -> bool:
    return reference.variants.get(ours.benchmark) == ours.config.get("variant")


def _other_variant(record: results.Record, config: Config) -> str | None:
    """Return the variant of a record where the config asks for another: they do not share a table."""
    block = getattr(config.benchmarks, record.benchmark)
    found = record.config.get("variant")
    return None if block is None or found == getattr(block, "variant", found) else str(found)


def _differs(reference: Reference, ours: list[results.Record], config: Config) -> list[str]:
    """Return in what the records beside a published row depart from it, and where the page tells more."""
    said = []
    if _data_notes(config):
        said.append("data (see the top of the page)")
    if reference.recipe is not None and _recipe_differs(reference, config):
        said.append("weights (see Models)")
    if any(
        _deviations(each, exclude={"version", "engine"}) or not _same_variant(reference, each)
        for each in ours
        if each.benchmark in reference.values
    ):
        said.append("protocol (see below)")
    return said


def _recipe_differs(reference: Reference, config: Config) -> str:
    model = config.models[reference.model]
    source = getattr(model, model.source)
    theirs = type(source).model_construct().model_dump(mode="json") | (reference.recipe or {})
    # Another seed is another draw of the same recipe, and both pipelines make the same views of one draw.
    draw = {"version", "path", "url", "seed", "pipeline"}
    return _difference(source.model_dump(mode="json"), theirs, "published", draw)


def _footnote(number: int, reference: Reference, names: tuple[str, ...], differs: list[str]) -> str:
    note = reference.note.strip()
    if not reference.like_for_like:
        note = f"not like for like: {note}"
    elif not differs:
        note = f"like for like: {note}"
    if differs:
        note += f"; but this run differs from the published one in {', '.join(differs)}"
    variants = "".join(f"; variant {reference.variants[n]}" for n in names if n in reference.variants)
    return f"[{number}] {reference.source}; weights {reference.checkpoint}{variants}; {note}"


def _protocols(names: tuple[str, ...], rows: Rows) -> list[str]:
    """Say for each benchmark under which protocol its rows were made, and which row has which."""
    notes = []
    for name in names:
        protocols: dict[str, list[str]] = {}
        for (model, benchmark), row in rows.items():
            if benchmark == name:
                protocols.setdefault(_protocol(row.record), []).append(model)
        for protocol, models in protocols.items():
            whose = "" if len(protocols) == 1 else f" ({', '.join(models)}; not comparable with the others)"
            notes.append(f"{name}{whose}: {protocol}")
        if protocols and hasattr(load(name), "NOTE"):
            notes.append(f"{name}: {load(name).NOTE}")
    return notes


def _protocol(record: results.Record) -> str:
    changed = _deviations(record, exclude={"version"})
    trials = sorted({spread.trials for spread in record.spread.values()})
    said = [f"protocol version {record.protocol_version}"]
    if "variant" in record.config:
        said.append(f"variant {record.config['variant']}")
    if "engine" in record.details:
        said.append(f"engine {record.details['engine']}")
    if "features" in record.details:
        made = record.details["features"]
        cut = "{name} {resize} px, crop {crop}".format(**made["transform"])
        said.append(f"features: {cut}, {made['pooling']} pooling, {made['dtype']}")
    if trials:
        said.append(f"± over {' or '.join(map(str, trials))} trials")
    said.append(
        f"differs from the protocol's defaults in {changed}" if changed else "the protocol's defaults"
    )
    return "; ".join(said)


def _deviations(record: results.Record, exclude: set[str]) -> str:
    """Return in what a record's protocol differs from the defaults of its variant."""
    variant = record.config.get("variant")
    chosen = {"variant": variant} if variant in _variants(record.benchmark) else {}
    defaults = load(record.benchmark).Config(**chosen).model_dump(mode="json")
    return _difference(record.config, defaults, "protocol", exclude)


def _reasons(names: tuple[str, ...], rows: Rows, config: Config, folder: Path) -> list[str]:
    """Say of every dash why it is there."""
    reasons: dict[str, list[str]] = {}
    for name in names:
        for model in config.models:
            if name not in config.runs(model):
                left_out = getattr(config.benchmarks, name) is None
                why = "the config leaves it out" if left_out else "not among the model's `benchmarks:`"
            elif (model, name) not in rows:
                why = "no record yet" + _last_words(folder / model, config.models[model].source, name)
            elif other := _other_variant(rows[model, name].record, config):
                why = f"its record is of variant {other}, not of the config's; run `snakemake all`"
            elif missing := [k for k in load(name).COLUMNS if k not in rows[model, name].record.metrics]:
                why = f"the record has no {', '.join(missing)}"
            else:
                continue
            reasons.setdefault(f"{name}: {why}", []).append(model)
    return [f"{reason} ({', '.join(models)})" for reason, models in reasons.items()]


def _last_words(folder: Path, source: str, benchmark: str) -> str:
    """Return how the log of a benchmark without a record ends; or, without a backbone, that of its source."""
    step = benchmark if (folder / "backbone.safetensors").exists() else source
    log = folder / "logs" / f"{step}.log"
    last = jobs.last_line(log)
    if last is None:
        return ""
    return f"; the log of {step} ends: {last.replace(f'{os.getcwd()}/', '')[:LAST_WORDS]}"


def _provenance(rows: Rows, config: Config, folder: Path) -> list[Block]:
    table, checkpoints, manifests = [], {}, {}
    for pair in ((model, name) for model in config.models for name in BENCHMARKS):
        if pair not in rows:
            continue
        path, record = rows[pair]
        checkpoints.setdefault(record.model, set()).add(record.checkpoint_sha256[:12])
        manifest = record.dataset.manifest_sha256[:12]
        manifests.setdefault(record.benchmark, {}).setdefault(manifest, []).append(record.model)
        table.append(
            [
                Cell(record.model),
                Cell(record.benchmark, href=_relative(path, folder)),
                Cell(record.checkpoint_sha256[:12]),
                Cell(f"{record.dataset.name} {manifest}"),
                Cell(_commit(record)),
                Cell(", ".join(record.hardware.get("gpus", [])) or f"{record.hardware.get('cores')} cores"),
                Cell(f"{record.seconds:.0f}"),
            ]
        )
    mixed = [
        f"{model}: its records come from {len(found)} different checkpoints; run `snakemake all`"
        for model, found in checkpoints.items()
        if len(found) > 1
    ]
    for name, found in manifests.items():
        if len(found) > 1:
            listing = "; ".join(f"{manifest}: {', '.join(models)}" for manifest, models in found.items())
            mixed.append(
                f"{name}: its records come from {len(found)} different dataset manifests ({listing}) and do "
                "not compare; run `snakemake all`"
            )
    header = ["Model", "Record", "Weights (SHA-256)", "Dataset manifest", "Commit", "Hardware", "Seconds"]
    return [Heading(2, "Provenance"), Table(header, table), Notes(mixed)]


def _commit(record: results.Record) -> str:
    commit, _, dirty = record.software.get("commit", "unknown").partition("-")
    return f"{commit[:12]}, edited" if dirty else commit[:12]


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _differences(ours: Closed, theirs: Closed, word: str, exclude: set[str]) -> str:
    return _difference(ours.model_dump(mode="json"), theirs.model_dump(mode="json"), word, exclude)


def _difference(ours: dict[str, Any], theirs: dict[str, Any], word: str, exclude: set[str]) -> str:
    """Return "key = value (word value)" for every key that differs; "" where none does.

    `word` says whose the value in brackets is: published, protocol, default.
    """
    ours, theirs = _flat(ours), _flat(theirs)
    said = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if key.partition(".")[0] in exclude or (key in ours and key in theirs and ours[key] == theirs[key]):
            continue
        value, other = (json.dumps(d[key]) if key in d else "absent" for d in (ours, theirs))
        said.append(f"{key} = {value}" + (f" ({word} {other})" if key in theirs else ""))
    return ", ".join(said)


def _flat(block: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

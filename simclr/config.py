"""The config file: what is benchmarked. Typed, closed, and checked before any job is submitted.

`read(path)` returns a validated `Config`; `python -m simclr schema` writes down what is legal.
Defaults are the published values, with their source in the description; where one is not, it says so.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, Field, ValidationError, create_model, model_validator

from simclr import BadInput
from simclr.benchmarks import BENCHMARKS, load
from simclr.protocol import Closed

# ---------------------------------------------------------------- datasets


class Dataset(Closed):
    """Where a dataset lies and what the verify step must find there."""

    root: Path | None = Field(None, description="Folder of the dataset; null: not on this machine.")
    classes: int | None = Field(None, ge=2, description="Number of classes; null: as published.")
    images: dict[str, int] | None = Field(
        None, description="Split → number of images that must be there; null: as published."
    )
    decode: int = Field(
        100, ge=0, description="Images per split that are decoded in full; of all others the header is read."
    )
    version: int = Field(1, ge=1, description="Raise it to verify again.")

    def completed(self, name: str) -> Dataset:
        """Return this block as that of the dataset `name`, whose published counts fill what is left out."""
        published = get_args(Datasets.model_fields[name].annotation)[0]
        return parse(published, self.model_dump(exclude_unset=True), f"datasets.{name}")


def _dataset(classes: int, **images: int) -> Any:
    """Return a `Dataset` model whose defaults are the published counts."""

    def _all_splits(found: dict[str, int]) -> dict[str, int]:
        if set(found) != set(images):
            raise ValueError(f"expected the splits {', '.join(images)}, found {', '.join(found) or 'none'}")
        return {split: found[split] for split in images}

    counts = Annotated[dict[str, Annotated[int, Field(ge=1)]], AfterValidator(_all_splits)]
    return create_model(
        "Dataset",
        __base__=Dataset,
        classes=(int, Field(classes, ge=2, description="Number of classes.")),
        images=(counts, Field(images, description="Split → number of images that must be there.")),
    )


ImageNet = _dataset(1000, train=1_281_167, val=50_000)
VOC2007 = _dataset(20, trainval=5_011, test=4_952)
VOC0712 = _dataset(20, trainval07=5_011, trainval12=11_540, test07=4_952)
VOC12Aug = _dataset(21, train=1_464, aug=9_118, val=1_449)
COCO2017 = _dataset(80, train2017=118_287, val2017=5_000)
Places205 = _dataset(205, train=2_448_873, val=20_500)
INat18 = _dataset(8_142, train=437_513, val=24_426)
Cityscapes = _dataset(19, train=2_975, val=500)


class Datasets(Closed):
    """One entry per dataset; leave out what this cluster does not have."""

    imagenet: ImageNet | None = Field(
        None, description="ILSVRC2012: train/<wnid>/*.JPEG, val/, meta/*.txt; or its tar shards."
    )
    voc2007: VOC2007 | None = Field(None, description="VOCdevkit with VOC2007, for the SVMs.")
    places205: Places205 | None = Field(None, description="data/vision/… and trainvalsplit_places205/.")
    inat18: INat18 | None = Field(None, description="train_val2018/ and {train,val}2018.json.")
    voc0712: VOC0712 | None = Field(None, description="VOCdevkit with VOC2007 and VOC2012, for detection.")
    coco2017: COCO2017 | None = Field(None, description="train2017/, val2017/, annotations/.")
    voc12aug: VOC12Aug | None = Field(None, description="VOCdevkit with VOC2012, and SBD or its masks.")
    cityscapes: Cityscapes | None = Field(None, description="leftImg8bit/ and gtFine/.")


# ---------------------------------------------------------------- features


class FeatureSet(Closed):
    """How the features of one dataset are extracted."""

    layers: list[Literal["feature1", "feature2", "feature3", "feature4", "feature5", "avgpool"]] = Field(
        ["feature1", "feature2", "feature3", "feature4", "feature5", "avgpool"],
        min_length=1,
        description="Feature maps that are pooled and stored; avgpool is the global average of the last.",
    )
    transform: Literal["squash", "center_crop"] = Field(
        "center_crop",
        description="center_crop: short edge to `resize`, centre crop (MMSelfSup knn_imagenet.py); "
        "squash: short edge to `resize`, then both edges to `crop` (MMSelfSup svm_voc07.py).",
    )
    resize: int = Field(256, ge=8, description="Short edge in pixels after the first resize.")
    crop: int = Field(224, ge=8, description="Edge in pixels of the network's input.")
    pooling: Literal["specified", "adaptive"] = Field(
        "specified",
        description="specified: the five average poolings of MMSelfSup's multi_pooling.py, for 224 pixels; "
        "adaptive: to grids of 12, 6, 4, 3, 2, for any other size.",
    )
    dtype: Literal["float16", "float32"] = Field("float32", description="Type in which features are stored.")
    batch_size: int = Field(256, ge=1, description="Images per forward pass; does not change the result.")
    version: int = Field(1, ge=1, description="Raise it to extract again.")

    @model_validator(mode="after")
    def _specified_needs_224(self) -> FeatureSet:
        if self.pooling == "specified" and self.crop != 224:
            raise ValueError(
                f"pooling: specified is defined for crop: 224; at crop: {self.crop} use adaptive"
            )
        return self

    @model_validator(mode="after")
    def _crop_fits(self) -> FeatureSet:
        if self.transform == "center_crop" and self.crop > self.resize:
            raise ValueError(f"center_crop: expected crop ≤ resize, found {self.crop} > {self.resize}")
        return self

    @model_validator(mode="after")
    def _layers_once(self) -> FeatureSet:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"expected each layer once, found {', '.join(self.layers)}")
        return self


PUBLISHED_FEATURES = {
    "voc2007": {"transform": "squash"},
    "imagenet": {"layers": ["avgpool"], "dtype": "float16"},  # published: float32, of twice the size
}


class FeatureSets(Closed):
    """Which features are extracted of which dataset."""

    voc2007: FeatureSet = Field({}, description="For the SVMs; transform: squash unless it says otherwise.")
    imagenet: FeatureSet = Field(
        {},
        description="For nearest neighbours; layers: [avgpool], dtype: float16 (published: float32) "
        "unless it says otherwise.",
    )

    @model_validator(mode="before")
    @classmethod
    def _start_from_published(cls, content: Any) -> Any:
        """A block that sets `crop` alone keeps the published transform and layers of its dataset."""
        if not isinstance(content, dict):
            return content
        return content | {
            name: published | block
            for name, published in PUBLISHED_FEATURES.items()
            if isinstance(block := content.get(name, {}), dict)
        }


# ---------------------------------------------------------------- models

Architecture = Annotated[
    str,
    Field(
        pattern=r"^resnet(18|34|50)(_w\d+(\.\d+)?)?$",
        description="resnet18, resnet34 or resnet50; `_w2` is the SimCLR paper's width multiplier 2, "
        "`_w0.25` a quarter of the width.",
    ),
]


class Augmentation(Closed):
    """The two SimCLR views (SimCLR paper, appendix A; MMSelfSup configs/selfsup/_base_/datasets)."""

    image_size: int = Field(224, ge=16, description="Edge of a view in pixels.")
    crop_area: tuple[float, float] = Field((0.08, 1.0), description="Least and greatest share of the area.")
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="Least and greatest aspect ratio.")
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    jitter: float = Field(0.8, ge=0, le=1, description="Probability of colour jitter.")
    brightness: float = Field(0.8, ge=0, description="Factor is drawn from 1 ± this.")
    contrast: float = Field(0.8, ge=0, description="Factor is drawn from 1 ± this.")
    saturation: float = Field(0.8, ge=0, description="Factor is drawn from 1 ± this.")
    hue: float = Field(0.2, ge=0, le=0.5, description="Shift is drawn from ± this share of the circle.")
    grayscale: float = Field(0.2, ge=0, le=1, description="Probability of grayscale.")
    blur: float = Field(0.5, ge=0, le=1, description="Probability of Gaussian blur.")
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="Sigma in pixels.")


class Recipe(Closed):
    """A pretraining recipe; the defaults are MMSelfSup's simclr_resnet50_8xb32-coslr-200e_in1k, but for one:
    `gradient_divisor` is 1, the true gradient, where the published rows had 8 or 16.
    """

    dataset: Literal["imagenet"] = Field("imagenet", description="Pretrained on its train split.")
    architecture: Architecture = "resnet50"
    epochs: int = Field(200, ge=1, description="Passes over the train split.")
    batch_size: int = Field(256, ge=2, description="Images per step over all GPUs (two views of each).")
    projector: tuple[int, int] = Field((2048, 128), description="Hidden and output width of the projector.")
    temperature: float = Field(0.1, gt=0, description="Of NT-Xent (SimCLR paper, table 5).")
    zero_init_residual: bool = Field(
        True,
        description="Zero the last BatchNorm weight of every block. The published linear rows were trained "
        "with it, the older SVM, detection and segmentation rows without.",
    )
    optimizer: Literal["lars", "sgd", "adamw"] = Field(
        "lars", description="lars: as published; adamw learns faster at the miniature's batch of 256."
    )
    lr: float = Field(0.3, gt=0, description="Learning rate per 256 images; scaled linearly with batch_size.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Of LARS and SGD; the first beta of AdamW.")
    weight_decay: float = Field(1e-6, ge=0, description="L2 penalty on what `lars_exclude` leaves in.")
    trust_coefficient: float = Field(0.001, gt=0, description="Of LARS.")
    lars_exclude: Literal["bias_and_bn", "bias_and_bn_but_shortcut"] = Field(
        "bias_and_bn_but_shortcut",
        description="What is neither adapted nor decayed. MMSelfSup 0.x missed the shortcuts' BatchNorm "
        "weights (…_but_shortcut); 1.x and the paper exclude every BatchNorm and bias.",
    )
    gradient_divisor: float = Field(
        1.0,
        gt=0,
        description="1: the true gradient. The published code applied 1/world_size of it (its gather keeps "
        "the local slice, then DDP averages): 8 imitates the 8-GPU rows, 16 the 16-GPU rows.",
    )
    warmup_epochs: float = Field(10, ge=0, description="Linear warm-up, per step.")
    cosine: Literal["epoch_from_start", "epoch_after_warmup", "step_after_warmup"] = Field(
        "epoch_from_start",
        description="epoch_from_start: MMSelfSup 0.x (per epoch, phase counted from epoch 0); "
        "epoch_after_warmup: MMSelfSup 1.x; step_after_warmup: google-research/simclr.",
    )
    drop_last: bool = Field(False, description="Drop the last, smaller batch of each epoch.")
    batch_norm: Literal["whole_batch", "micro_batch", "process"] = Field(
        "whole_batch",
        description="Over which images BatchNorm takes its statistics. whole_batch: all of a step, on all "
        "GPUs, as published; a run in micro-batches is refused. micro_batch: those that pass at one time, on "
        "all GPUs. process: those that pass at one time on one GPU.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="float32: as published. bfloat16: autocast on GPUs that have it, float32 elsewhere.",
    )
    pipeline: Literal["device", "reference"] = Field(
        "device",
        description="How views are made; both draw the same ones. device: decoded and cropped by the CPU, "
        "all else batched on the device, without rounding to 8 bits in between. reference: PIL on the CPU, "
        "as published.",
    )
    augmentation: Augmentation = Augmentation()
    seed: int = Field(0, ge=0, description="Of the weights, the order of the images and the views.")
    version: int = Field(1, ge=1, description="Raise it to pretrain again.")

    @model_validator(mode="after")
    def _warmup_ends(self) -> Recipe:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: expected less than the {self.epochs} epochs, found {self.warmup_epochs:g}"
            )
        return self


class Execution(Closed):
    """How a machine runs a recipe. Nothing here changes the recipe, so no edit of it trains again."""

    micro_batch: int | None = Field(
        None,
        ge=1,
        description="Images per GPU that pass through the network at one time; null: a GPU's whole share of "
        "the batch. Where that does not fit, gradient caching (Gao et al. 2021) gives the gradient of the "
        "whole batch in the memory of a micro-batch, for one more forward pass.",
    )
    compile: bool = Field(False, description="Compile the network with torch.compile.")
    knn_every: int = Field(
        10,
        ge=0,
        description="Epochs between two online nearest-neighbour accuracies, of part of the val split; 0: "
        "none. They show in the log and decide nothing.",
    )
    skip_images: int = Field(
        0,
        ge=0,
        description="Images that may be undecodable before the run stops. Each is named, replaced by the "
        "next one, and counted on the page.",
    )
    skip_steps: int = Field(
        0,
        ge=0,
        description="Steps whose loss or gradient may be no finite number before the run stops. Each is "
        "undone, left out, and counted on the page.",
    )


class ImportCheckpoint(Closed):
    """An existing checkpoint, taken in as this model's backbone; every tensor is accounted for."""

    path: Path | None = Field(None, description="The file; give `path` or `url`.")
    url: str | None = Field(None, pattern="^https?://", description="Downloaded once; needs `sha256`.")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{8,64}$", description="Its SHA-256 or a prefix of it.")
    format: Literal["torchvision", "mmselfsup", "moco"] = Field(
        "torchvision", description="Whose key names the file has."
    )
    architecture: Architecture = "resnet50"
    version: int = Field(1, ge=1, description="Raise it to import again.")

    @model_validator(mode="after")
    def _one_source(self) -> ImportCheckpoint:
        if (self.path is None) == (self.url is None):
            raise ValueError("give exactly one of path and url")
        if self.url and not self.sha256:
            raise ValueError("a url needs its sha256")
        return self


class RandomInit(Closed):
    """Random weights: the floor of every benchmark."""

    architecture: Architecture = "resnet50"
    seed: int = Field(0, ge=0, description="The same seed gives the same weights.")
    version: int = Field(1, ge=1, description="Raise it to draw again.")


class Model(Closed):
    """One row of the page: where its backbone comes from, and which benchmarks it runs."""

    pretrain: Recipe | None = Field(None, description="Pretrain it with SimCLR.")
    import_checkpoint: ImportCheckpoint | None = Field(None, description="Import an existing checkpoint.")
    random_init: RandomInit | None = Field(None, description="Leave it at random weights.")
    benchmarks: list[Literal[BENCHMARKS]] | None = Field(
        None, description="Benchmarks this model runs; null: all of `benchmarks:`."
    )
    gpus: int = Field(
        1,
        ge=0,
        description="GPUs for pretraining; the other jobs of the model take one, or up to those of a node "
        "where they divide their work. 0: all on the CPU. Does not change the recipe.",
    )
    nodes: int = Field(
        1,
        ge=1,
        description="Nodes of a Slurm cluster that those GPUs are on, equally many on each. Above 1, one "
        "`srun` starts pretraining with a task per GPU. Does not change the recipe.",
    )
    execution: Execution = Execution()

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if len(self.source_blocks) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(SOURCES)}; found {', '.join(self.source_blocks) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _nodes_share_the_gpus(self) -> Model:
        if self.nodes > 1 and (self.gpus == 0 or self.gpus % self.nodes):
            raise ValueError(f"gpus: expected a multiple of the {self.nodes} nodes, found {self.gpus}")
        return self

    @property
    def source_blocks(self) -> list[str]:
        return [key for key in SOURCES if getattr(self, key) is not None]

    @property
    def source(self) -> str:
        """The step that makes the backbone: `pretrain`, `import_checkpoint` or `random_init`."""
        return self.source_blocks[0]


SOURCES = ("pretrain", "import_checkpoint", "random_init")


def misfit(recipe: Recipe, execution: Execution, processes: int, images: int) -> str | None:
    """Return why the recipe's batch does not fit so many processes or training images; None where it does."""
    batch, wanted = recipe.batch_size, execution.micro_batch
    if images < batch:
        return (
            f"batch_size: expected at most the {images} images of {recipe.dataset}'s train split, found "
            f"{batch}; lower batch_size"
        )
    micro_batch = min(wanted or batch, batch // processes) if batch % processes == 0 else 1
    at_once = processes * micro_batch
    if batch % at_once:
        pieces = f" × execution.micro_batch {micro_batch}" if wanted else ""
        return (
            f"batch_size: expected a multiple of the {processes} processes{pieces}, found {batch}; "
            f"change batch_size or the number of GPUs{' or micro_batch' if wanted else ''}"
        )
    if recipe.batch_norm == "whole_batch" and at_once < batch:
        return (
            f"execution.micro_batch: {processes} × {micro_batch} images pass at a time, but the recipe wants "
            f"BatchNorm's statistics of all {batch}; set micro_batch: null and take more GPUs, "
            "or set batch_norm: micro_batch in the recipe, which makes it another one"
        )
    return None


# ---------------------------------------------------------------- the whole file

Benchmarks = create_model(
    "Benchmarks",
    __base__=Closed,
    __doc__="The benchmarks of the page; leave one out and the page has a dash there.",
    **{name: (load(name).Config | None, Field(None, description=load(name).TITLE)) for name in BENCHMARKS},
)


def _plain(path: Path) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9._/][A-Za-z0-9._/-]*", str(path)):
        raise ValueError(
            "expected a folder's name of letters, digits and . _ - / alone, not beginning with -, as it "
            f"stands in shell commands; found {str(path)!r}"
        )
    return path


# A folder that commands of the workflow name.
Folder = Annotated[Path, AfterValidator(_plain)]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Config(Closed):
    """The config file of the page."""

    output: Folder = Field(
        Path("results"),
        description="Folder of the page and everything it is made from; letters, digits and . _ - / alone.",
    )
    demo_data: Folder | None = Field(
        None, description="Make the miniature datasets in this folder first (config/demo.yaml does)."
    )
    datasets: Datasets
    features: FeatureSets = FeatureSets()
    models: dict[ModelName, Model] = Field(min_length=1, description="The rows of the page.")
    benchmarks: Benchmarks

    @model_validator(mode="after")
    def _names_are_free(self) -> Config:
        if "datasets" in self.models:
            raise ValueError("a model cannot be called `datasets`; that folder of the output holds manifests")
        return self

    @model_validator(mode="after")
    def _datasets_are_here(self) -> Config:
        for model, benchmark in self.pairs():
            name = load(benchmark).Config.dataset
            if self.dataset(name) is None:
                raise ValueError(
                    f"benchmarks.{benchmark} needs datasets.{name}.root, which is not set; set it to the "
                    f"folder of the dataset, or remove {benchmark} from `benchmarks:` (model {model} runs it)"
                )
        for name, model in self.models.items():
            if model.pretrain and self.dataset(model.pretrain.dataset) is None:
                raise ValueError(f"models.{name}.pretrain needs datasets.{model.pretrain.dataset}.root")
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> Config:
        for name, model in self.models.items():
            if model.pretrain:
                images = self.dataset(model.pretrain.dataset).images["train"]
                if fault := misfit(model.pretrain, model.execution, max(1, model.gpus), images):
                    raise ValueError(f"models.{name}: {fault}")
        return self

    def dataset(self, name: str) -> Dataset | None:
        """Return the dataset block, or None when this machine does not have the dataset."""
        block = getattr(self.datasets, name)
        return block if block is not None and block.root is not None else None

    def runs(self, model: str) -> list[str]:
        """Return the benchmarks that `model` runs, in page order."""
        wanted = self.models[model].benchmarks
        return [
            name
            for name in BENCHMARKS
            if getattr(self.benchmarks, name) is not None and (wanted is None or name in wanted)
        ]

    def pairs(self) -> list[tuple[str, str]]:
        """Return every (model, benchmark) of the page, model by model, in page order."""
        return [(model, benchmark) for model in self.models for benchmark in self.runs(model)]

    def block(self, *keys: str) -> dict[str, Any]:
        """Return what the file says under `keys` plus its `version`, as JSON values.

        Defaults stay out, so that a new key with a default does not rerun what is done.
        """
        block: Any = self
        for key in keys:
            block = block[key] if isinstance(block, dict) else getattr(block, key)
        return {"version": block.version, **block.model_dump(mode="json", exclude_unset=True)}


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice in a block is an error; PyYAML would take the last in silence."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands twice in one block", key.start_mark
                )
            seen.add(name)
        return node


def read(path: Path) -> Config:
    """Read and validate a config file; raises `BadInput` naming file, key, expectation and nearest key."""
    return parse(Config, read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """Return what a YAML file says; raises `BadInput` for one that is not valid, or has a key twice."""
    try:
        with Path(path).open("rb") as file:
            return yaml.load(file, _Loader)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BadInput(f"{path}: no such config file; the repository has config/config.yaml") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def parse(model: type[Closed], content: Any, where: str) -> Any:
    """Validate `content` as `model`; raises `BadInput` with one sentence per offending key."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise BadInput("; ".join(_explain(model, e, where) for e in error.errors())) from error


def _explain(model: type[Closed], error: dict[str, Any], where: str) -> str:
    path = ".".join(map(str, error["loc"])) or "the file"
    if error["type"] == "extra_forbidden":
        legal = _fields_at(model, error["loc"][:-1])
        return f"{where}: {path}: unknown key{_nearest(error['loc'][-1], legal)}; legal: {', '.join(legal)}"
    if error["type"] == "value_error":
        place = [where, path] if error["loc"] else [where]
        return ": ".join([*place, str(error["ctx"]["error"])])
    if error["type"] == "missing":
        return f"{where}: {path}: this key is required, and missing"
    found = error["input"]
    if not isinstance(found, str | int | float | None):
        found = f"a {type(found).__name__}"
    hint = ""
    if error["type"] == "literal_error":
        hint = _nearest(found, re.findall("'([^']*)'", error["ctx"]["expected"]))
    return f"{where}: {path}: {error['msg'][0].lower()}{error['msg'][1:]}; found {found!r}{hint}"


def _nearest(found: Any, legal: list[str]) -> str:
    """Return a question after the legal name nearest to `found`."""
    nearest = difflib.get_close_matches(str(found), legal, n=1, cutoff=0)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _fields_at(model: Any, location: tuple[str | int, ...]) -> list[str]:
    """Return the legal keys at `location`, by walking the JSON schema."""
    schema = model.model_json_schema()
    node = schema
    for key in location:
        node = resolve(node, schema)
        freely_named = next(iter(node.get("patternProperties", {}).values()), {})
        node = node.get("properties", {}).get(str(key), freely_named)
    return list(resolve(node, schema).get("properties", {}))


def resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return the block that a node of a JSON schema stands for: through `anyOf` with null, and `$ref`."""
    for option in node.get("anyOf", []):
        if option.get("type") != "null":
            node = option
            break
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node

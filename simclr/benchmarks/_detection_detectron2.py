"""The Detectron2 engine: `python -m simclr.benchmarks._detection_detectron2 SPEC RESULT` (see `_detection`).

The published configs are written out here, so that Detectron2's model zoo, and the setuptools that it needs,
stay out. Datasets are registered from the spec's lists, without Detectron2's environment variable.
Differences to its defaults that cost points when forgotten: RGB images divided by the standard deviation,
the stride in the 3×3 convolution, no frozen stage, the extra norm after res5, Precise-BN.

Checkpoints are those of `rolling`. Detectron2 cannot go on within an order of the images: every start, the
first or after a stop, draws an order and an augmentation of its own, from the seed and the iteration that it
starts from. So a training in many turns sees all images, but does not equal an unbroken one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import multiprocessing
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simclr import BadInput
from simclr.benchmarks import _detection

Json = dict[str, Any]
# The last release, and what its source has called itself ever since.
VERSIONS = ("0.6",)
TRAIN, TEST = "simclr_train", "simclr_test"
# Detectron2 0.6 uses names that numpy 1.24 and Pillow 10 dropped.
for _name, _type in {"bool": bool, "int": int, "float": float, "object": object, "str": str}.items():
    if _name not in vars(np):
        setattr(np, _name, _type)
if not hasattr(Image, "LINEAR"):
    Image.LINEAR = Image.Resampling.BILINEAR


def run(spec: Json) -> Json:
    """Train on the GPUs of `_detection.processes`, or on the CPU, and detect; return the result."""
    known()
    processes = _detection.processes()
    _detection.per_process(spec["protocol"]["batch_size"], processes)
    refuse(spec["architecture"], spec["protocol"]["detector"])
    start(processes, spec)
    detected = Path(spec["folder"]) / "detected.json"
    result = json.loads(detected.read_text())
    detected.unlink()  # the result file has it all
    return result


def known() -> None:
    """Raise `BadInput` unless Detectron2 is of a version with which this engine was run."""
    import detectron2

    if detectron2.__version__ not in VERSIONS:
        raise BadInput(
            f"expected Detectron2 {' or '.join(VERSIONS)}, found {detectron2.__version__}, of which nothing "
            "is known here"
        )


def refuse(architecture: str, detector: str) -> None:
    """Raise `BadInput` for a backbone that Detectron2 cannot build."""
    from simclr.model import parse_architecture

    depth, width = parse_architecture(architecture)
    if depth == "resnet50":
        return
    if detector == "c4":
        raise BadInput(
            f"engine: detectron2 cannot make a C4 detector of {architecture}: its region head is made of "
            "bottleneck blocks; set engine: torchvision, or detector: fpn"
        )
    if width != 1:
        raise BadInput(
            f"engine: detectron2 builds {depth} at width 1 only, found {architecture}; "
            "set engine: torchvision"
        )


def start(processes: int, spec: Json) -> None:
    """Run `worker` in so many processes; several are told of what asks this one to stop."""
    from detectron2.engine import launch
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    from simclr.rolling import STOPPED

    def stop() -> None:
        for process in multiprocessing.active_children():
            process.terminate()

    several = _detection.handing_on(stop) if processes > 1 else contextlib.nullcontext()
    with several as received:
        try:
            launch(worker, processes, dist_url="auto", args=(spec,))
        except ProcessExitedException as error:
            if not received and error.exit_code != STOPPED:
                raise
            sys.exit(STOPPED)
        except ProcessRaisedException:
            if not (Path(spec["folder"]) / _detection.REFUSAL).is_file():
                raise
            sys.exit(2)


def worker(spec: Json) -> None:
    """Do the work of one process; the first one writes `detected.json` in the spec's folder."""
    import torch

    from simclr import devices, distributed

    devices.float32_as_published()
    # It shows the traceback of every exception, which is raised all the same.
    logging.getLogger("detectron2.engine.train_loop").addFilter(lambda record: not record.exc_info)
    if distributed.world_size() > 1:
        # Instead of torch's SIGINT, which Python does not deliver within a call of CUDA or NCCL.
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)
    folder = Path(spec["folder"])
    with _detection.refusing(folder):  # a process that `launch` spawned cannot raise it to its parent
        try:
            _work(spec, folder)
        except FloatingPointError as error:
            said = str(error).splitlines()[0]
            raise BadInput(f"training diverged: {said}; lower lr or warm up longer") from error


def _work(spec: Json, folder: Path) -> None:
    from detectron2.evaluation import inference_on_dataset
    from detectron2.utils import comm
    from detectron2.utils.env import seed_all_rng

    from simclr import rolling

    register(spec)
    state = rolling.newest(folder, spec["run"])
    cfg = configure(spec, start=state["step"] if state else 0)
    seed_all_rng(cfg.SEED + comm.get_rank())
    trainer = make_trainer(cfg, spec["run"])
    load = load_backbone(trainer.model, spec)
    if state is not None:
        trainer.resume(state)
    trainer.train()
    began = time.monotonic()
    found = inference_on_dataset(alone(trainer.model), trainer.build_test_loader(cfg, TEST), make_collector())
    if comm.is_main_process():
        report = {"engine": "detectron2", "software": software(), "load": load, **trainer.checkpoints.report}
        report["usage"]["test_seconds"] = time.monotonic() - began
        _write(folder / "detected.json", {**report, "detections": found["all"]})
        rolling.drop_all(folder)


def _write(path: Path, content: Json) -> None:
    from simclr.files import replacing

    with replacing(path) as part:
        part.write_text(json.dumps(content, allow_nan=False))


def software() -> dict[str, str]:
    """Return the versions that the detections depend on."""
    import detectron2
    import torch
    import torchvision

    packages = {"detectron2": detectron2, "torch": torch, "torchvision": torchvision}
    versions = {name: package.__version__ for name, package in packages.items()}
    return {"python": platform.python_version(), **versions}


def register(spec: Json) -> None:
    """Make the spec's lists known to Detectron2."""
    from detectron2.data import DatasetCatalog
    from detectron2.structures import BoxMode

    def read(path: str) -> list[Json]:
        images = _detection.read_lines(path)
        for image in images:
            for annotation in image.get("annotations", ()):
                annotation["bbox_mode"] = BoxMode.XYXY_ABS
        return images

    for name, key in ((TRAIN, "train"), (TEST, "test")):
        DatasetCatalog.register(name, functools.partial(read, spec[key]))


# ---------------------------------------------------------------- the config


def configure(spec: Json, device: str | None = None, start: int = 0) -> Any:
    """Return Detectron2's config of the spec, for a training that goes on from iteration `start`."""
    import torch
    from detectron2.config import get_cfg

    protocol = spec["protocol"]
    cfg = get_cfg()
    _solver(cfg, protocol)
    _input(cfg, protocol)
    _backbone(cfg.MODEL, spec["architecture"])
    _heads(cfg.MODEL, protocol, spec["classes"])
    (_c4 if protocol["detector"] == "c4" else _fpn)(cfg.MODEL, protocol)
    cfg.MODEL.MASK_ON = spec["masks"]
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.MODEL.DEVICE == "cpu":
        cfg.DATALOADER.NUM_WORKERS = 0  # they would only compete with the training
    cfg.MODEL.WEIGHTS = ""  # `load_backbone` sets and checks them
    cfg.OUTPUT_DIR = spec["folder"]
    cfg.SEED = int(np.random.SeedSequence([spec["seed"], start]).generate_state(1)[0] >> 1)
    cfg.freeze()
    return cfg


def _solver(cfg: Any, protocol: Json) -> None:
    cfg.SOLVER.IMS_PER_BATCH = protocol["batch_size"]
    cfg.SOLVER.BASE_LR = protocol["lr"]
    cfg.SOLVER.MAX_ITER = protocol["iterations"]
    cfg.SOLVER.STEPS = tuple(protocol["steps"])
    cfg.SOLVER.WARMUP_ITERS = protocol["warmup_iterations"]
    cfg.SOLVER.WARMUP_FACTOR = protocol["warmup_factor"]
    cfg.SOLVER.MOMENTUM = protocol["momentum"]
    cfg.SOLVER.WEIGHT_DECAY = protocol["weight_decay"]
    cfg.SOLVER.WEIGHT_DECAY_NORM = protocol["norm_weight_decay"]
    cfg.SOLVER.CHECKPOINT_PERIOD = protocol["checkpoint_every"]
    cfg.TEST.EVAL_PERIOD = 0
    cfg.TEST.DETECTIONS_PER_IMAGE = protocol["detections"]
    cfg.TEST.PRECISE_BN.ENABLED = protocol["precise_bn"] > 0
    cfg.TEST.PRECISE_BN.NUM_ITER = protocol["precise_bn"]


def _input(cfg: Any, protocol: Json) -> None:
    from simclr.transforms import MEAN, STD

    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (TRAIN,), (TEST,)
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [255 * value for value in MEAN]
    cfg.MODEL.PIXEL_STD = [255 * value for value in STD]
    cfg.INPUT.MIN_SIZE_TRAIN = tuple(protocol["train_edges"])
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    cfg.INPUT.MIN_SIZE_TEST = protocol["test_edge"]
    cfg.INPUT.MAX_SIZE_TRAIN = protocol["train_max_edge"] or protocol["max_edge"]
    cfg.INPUT.MAX_SIZE_TEST = protocol["max_edge"]


def _backbone(model: Any, architecture: str) -> None:
    from simclr.model import STAGES, parse_architecture

    depth, width = parse_architecture(architecture)
    channels = round(64 * width)
    model.BACKBONE.FREEZE_AT = 0
    model.RESNETS.DEPTH = int(depth.removeprefix("resnet"))
    model.RESNETS.STEM_OUT_CHANNELS = model.RESNETS.WIDTH_PER_GROUP = channels
    model.RESNETS.RES2_OUT_CHANNELS = channels * STAGES[depth][0].expansion
    model.RESNETS.NORM = "SyncBN"
    model.RESNETS.STRIDE_IN_1X1 = False


def _heads(model: Any, protocol: Json, classes: int) -> None:
    model.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    model.RPN.BOUNDARY_THRESH = -1 if protocol["border_anchors"] else 0
    model.RPN.BATCH_SIZE_PER_IMAGE = protocol["rpn_batch"]
    model.RPN.PRE_NMS_TOPK_TRAIN, model.RPN.PRE_NMS_TOPK_TEST = protocol["rpn_pre_nms"]
    model.RPN.POST_NMS_TOPK_TRAIN, model.RPN.POST_NMS_TOPK_TEST = protocol["rpn_post_nms"]
    model.ROI_HEADS.NUM_CLASSES = classes
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = protocol["roi_batch"]
    model.ROI_HEADS.SCORE_THRESH_TEST = protocol["score_threshold"]
    for head in (model.ROI_BOX_HEAD, model.ROI_MASK_HEAD):
        head.POOLER_TYPE, head.POOLER_SAMPLING_RATIO, head.POOLER_RESOLUTION = "ROIAlignV2", 0, 14
    model.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    model.ROI_MASK_HEAD.CONV_DIM = protocol["head_channels"]


def _c4(model: Any, protocol: Json) -> None:
    model.BACKBONE.NAME = "build_resnet_backbone"
    model.RESNETS.OUT_FEATURES = ["res4"]
    model.ANCHOR_GENERATOR.SIZES = [list(protocol["anchor_sizes"])]
    model.RPN.IN_FEATURES = model.ROI_HEADS.IN_FEATURES = ["res4"]
    model.ROI_HEADS.NAME = extra_norm_heads()
    model.ROI_MASK_HEAD.NUM_CONV = 0


def _fpn(model: Any, protocol: Json) -> None:
    stages = ["res2", "res3", "res4", "res5"]
    model.BACKBONE.NAME = "build_resnet_fpn_backbone"
    model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = stages
    model.FPN.OUT_CHANNELS, model.FPN.NORM = protocol["head_channels"], "SyncBN"
    model.ANCHOR_GENERATOR.SIZES = [[size] for size in protocol["anchor_sizes"]]
    model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    model.ROI_HEADS.NAME = "StandardROIHeads"
    model.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    model.ROI_BOX_HEAD.NAME, model.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 2
    if protocol["box_head"] == "4conv1fc":
        model.ROI_BOX_HEAD.NUM_CONV, model.ROI_BOX_HEAD.NUM_FC = 4, 1
        model.ROI_BOX_HEAD.CONV_DIM = protocol["head_channels"]
        model.ROI_BOX_HEAD.NORM = model.ROI_MASK_HEAD.NORM = "SyncBN"
    model.ROI_BOX_HEAD.FC_DIM, model.ROI_BOX_HEAD.POOLER_RESOLUTION = protocol["fc_channels"], 7
    model.ROI_MASK_HEAD.NUM_CONV = 4


@functools.cache
def extra_norm_heads() -> str:
    """Register the C4 heads that have one more norm after res5 (MoCo, detection/); return their name."""
    from detectron2.layers import get_norm
    from detectron2.modeling import ROI_HEADS_REGISTRY
    from detectron2.modeling.roi_heads import Res5ROIHeads

    class Res5ROIHeadsExtraNorm(Res5ROIHeads):
        @classmethod
        def _build_res5_block(cls, cfg: Any) -> Any:
            stage, channels = super()._build_res5_block(cfg)
            stage.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
            return stage, channels

    ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)
    return Res5ROIHeadsExtraNorm.__name__


# ---------------------------------------------------------------- weights, training, testing


def model_key(key: str, detector: str) -> str:
    """Return where the backbone's tensor `key` lives in Detectron2's model."""
    from simclr.convert import detectron2_key

    if detector == "fpn":
        return f"backbone.bottom_up.{detectron2_key(key)}"
    return f"{'roi_heads' if key.startswith('layer4.') else 'backbone'}.{detectron2_key(key)}"


def alone(model: Any) -> Any:
    """Return the model itself, where it is wrapped to be trained by several processes."""
    return getattr(model, "module", model)


def load_backbone(model: Any, spec: Json) -> Json:
    """Put the backbone's tensors into the model, key by key, and return the report that they are there.

    Detectron2's own loader matches names by suffix and goes on without what it does not find.
    """
    from simclr import checkpoint

    state = checkpoint.load_backbone(Path(spec["backbone"]))
    own = alone(model).state_dict()
    found = {key: own.get(model_key(key, spec["protocol"]["detector"])) for key in state}
    for key, target in found.items():
        if target is not None and target.shape == state[key].shape:
            target.copy_(state[key])
    report = _detection.load_report(found, state, "detectron2")
    return report | _detection.feature_report(functools.partial(features, model), state)


def features(model: Any, images: Any) -> Json:
    """Return the maps of `images` by the model's backbone, named as the source's, on the CPU in float32."""
    import torch

    model = alone(model)
    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    with torch.no_grad():
        maps = copy.deepcopy(bottom_up).cpu().eval()(images)
        if hasattr(model.roi_heads, "res5"):
            stage = copy.deepcopy(model.roi_heads.res5).cpu().eval()
            maps["res5"] = stage[:-1](maps["res4"])  # without the extra norm
    return {f"feature{name.removeprefix('res')}": value for name, value in maps.items()}


def make_trainer(cfg: Any, run: Json) -> Any:
    """Return Detectron2's trainer, without its evaluation, and with the rolling checkpoints of `run`.

    Asked to stop, it saves after the iteration and exits with 75.
    """
    from detectron2.data import build_detection_test_loader, build_detection_train_loader
    from detectron2.engine import DefaultTrainer, hooks
    from detectron2.utils.events import CommonMetricPrinter

    from simclr import rolling

    mapper = make_mapper()

    class Trainer(DefaultTrainer):
        def build_hooks(self) -> list[Any]:
            theirs = (hooks.EvalHook, hooks.PeriodicCheckpointer)
            kept = [hook for hook in super().build_hooks() if not isinstance(hook, theirs)]
            self.checkpoints = make_checkpoints(cfg, run)
            return [*kept, self.checkpoints]

        def build_writers(self) -> list[Any]:
            return [CommonMetricPrinter(self.max_iter)]

        @classmethod
        def build_train_loader(cls, cfg: Any) -> Any:
            loader = build_detection_train_loader(cfg, mapper=mapper(cfg, is_train=True))
            loader.dataset.worker_init_fn = reseeded_and_deaf
            return loader

        @classmethod
        def build_test_loader(cls, cfg: Any, name: str) -> Any:
            return build_detection_test_loader(cfg, name, mapper=mapper(cfg, is_train=False))

        def resume(self, state: Json) -> None:
            alone(self.model).load_state_dict(state["model"])
            self.load_state_dict(state["trainer"])
            self.start_iter = state["step"]

        def train(self) -> None:
            with rolling.stop_signals() as self.signals:
                try:
                    super().train()
                finally:
                    self._trainer._data_loader_iter.close()  # ends the workers

    return Trainer(cfg)


def reseeded_and_deaf(worker: int) -> None:
    """Make a loader's worker draw as Detectron2's, and leave to the training what is done about a signal."""
    from detectron2.data.build import worker_init_reset_seed

    from simclr import loading

    worker_init_reset_seed(worker)
    loading.ignore_signals(worker)


def make_checkpoints(cfg: Any, run: Json) -> Any:
    """Return a hook that saves every so often, after the last iteration, and when a signal asks to stop.

    Its `report` says what the training took, and the last losses: a part of the checkpoints, as after the
    last iteration a resumed training has no others.
    """
    from detectron2.engine import HookBase
    from detectron2.utils import comm

    from simclr import distributed, rolling

    class Checkpoints(HookBase):
        def __init__(self) -> None:
            self.clock, self.report = _detection.Clock(), {}

        def state_dict(self) -> Json:
            return {"clock": self.clock.state_dict(), "report": self.report}

        def load_state_dict(self, state: Json) -> None:
            self.clock.load_state_dict(state["clock"])
            self.report = state["report"]

        def after_step(self) -> None:
            trainer, done = self.trainer, self.trainer.iter + 1
            stopping = distributed.any_rank(bool(trainer.signals), cfg.MODEL.DEVICE)
            due = stopping or done == trainer.max_iter or done % cfg.SOLVER.CHECKPOINT_PERIOD == 0
            if due and comm.is_main_process():
                self.report = training_report(trainer.storage.latest(), self.clock, self.report)
                state = {"model": alone(trainer.model).state_dict(), "trainer": trainer.state_dict()}
                rolling.save(Path(cfg.OUTPUT_DIR), done, run, state)
            if stopping:
                rolling.stop(f"after iteration {done} of {trainer.max_iter}", trainer.signals)

    return Checkpoints()


def training_report(latest: Json, clock: _detection.Clock, before: Json) -> Json:
    """Return what the training took, and the last losses.

    `latest` are Detectron2's scalars, (value, iteration), among which there is no `time` in the first
    iterations after a start; then it is that of the report `before`.
    """
    from detectron2.utils import comm

    known = before["usage"]["seconds_per_iteration"] if before else 0.0
    seconds = float(latest.get("time", (known, 0))[0])
    return {
        "usage": _detection.usage(clock, seconds, comm.get_world_size()),
        "losses": {name: float(value) for name, (value, _) in latest.items() if name.startswith("loss_")},
    }


def make_mapper() -> type:
    """Return Detectron2's mapper of images to inputs that says in one sentence which file it cannot read."""
    from detectron2.data import DatasetMapper

    class Mapper(DatasetMapper):
        def __call__(self, line: Json) -> Json:
            try:
                return super().__call__(line)
            except (OSError, SyntaxError, ValueError) as error:
                _detection.decoded(line)
                said = str(error).splitlines()[0]
                raise BadInput(
                    f"{line['file_name']}: Detectron2 cannot read it ({said}); set engine: torchvision"
                ) from error

    return Mapper


def make_collector() -> Any:
    """Return an evaluator that hands out all detections, `{"all": [...]}`, and computes no metric."""
    from detectron2.evaluation import DatasetEvaluator
    from detectron2.utils import comm

    class Collector(DatasetEvaluator):
        def reset(self) -> None:
            self.found: list[Json] = []

        def process(self, inputs: list[Json], outputs: list[Json]) -> None:
            for image, output in zip(inputs, outputs, strict=True):
                for entry in entries(output["instances"].to("cpu")):
                    self.found.append({"image_id": image["image_id"], **entry})

        def evaluate(self) -> Json | None:
            parts = comm.gather(self.found)
            return {"all": [entry for part in parts for entry in part]} if comm.is_main_process() else None

    return Collector()


def entries(instances: Any) -> list[Json]:
    """Return each detection of one image as the result file has it."""
    columns = (instances.pred_classes, instances.pred_boxes.tensor, instances.scores)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    found = [{"category_id": label, "bbox": box, "score": score} for label, box, score in rows]
    if instances.has("pred_masks"):
        for entry, mask in zip(found, instances.pred_masks.numpy(), strict=True):
            entry["segmentation"] = _detection.rle(mask)
    return found


if __name__ == "__main__":
    sys.exit(_detection.main(run, sys.argv[1:]))

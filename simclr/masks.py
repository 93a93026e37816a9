"""Masks that the archives of a dataset do not hold as they are read: made once, of what the archives do hold.

`make_voc12aug` makes the masks of the Semantic Boundaries Dataset (SBD) of its .mat files, `make_cityscapes`
the train ids of Cityscapes of its polygons. Both write beside the images, each file whole or not at all; what
is there already stays, so that after a kill the same call makes the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from simclr import BadInput
from simclr.files import replacing

SBD_FOLDERS = ("benchmark_RELEASE", "VOCaug")  # as its archive names it, and as MMSegmentation does
PLENTY = 32  # masks from which on it pays to start processes


# ---------------------------------------------------------------- SBD


def make_voc12aug(root: Path) -> None:
    """Make `VOC2012/SegmentationClassAug` and `VOC2012/ImageSets/Segmentation/aug.txt` of SBD under `root`.

    Nothing is done where no SBD is. The list is SBD's train and val without VOC2012's, sorted: 9,118 of the
    published images (MMSegmentation, tools/dataset_converters/voc_aug.py), which with the 1,464 of VOC2012's
    train are the 10,582 of "trainaug". It is written last; one that is there stays.
    Raises `BadInput` for a list or a .mat file that is missing or is none.
    """
    lists, folder = root / "VOC2012/ImageSets/Segmentation", root / "VOC2012/SegmentationClassAug"
    release = next((root / name / "dataset" for name in SBD_FOLDERS if (root / name).is_dir()), None)
    if release is None:
        return
    listed = {name for split in ("train", "val") for name in _ids(release / f"{split}.txt")}
    aug = sorted(listed - {name for split in ("train", "val") for name in _ids(lists / f"{split}.txt")})
    jobs = [(release / f"cls/{name}.mat", folder / f"{name}.png") for name in aug]
    _make_all(write_sbd_mask, jobs, "masks of SBD")
    if not (lists / "aug.txt").is_file():
        with replacing(lists / "aug.txt") as part:
            part.write_text("".join(f"{name}\n" for name in aug))


def _ids(path: Path) -> list[str]:
    if not path.is_file():
        raise BadInput(f"{path}: no such list, of which those of SBD's masks are chosen; unpack it there")
    return path.read_text().split()


def write_sbd_mask(source: Path, output: Path) -> None:
    """Write the class numbers of one .mat file of SBD, `GTcls.Segmentation`, as PNG."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        labels = loadmat(BytesIO(source.read_bytes()))["GTcls"][0, 0]["Segmentation"]
    except FileNotFoundError as error:
        raise BadInput(f"{source}: no such file, though SBD's lists name it; unpack SBD again") from error
    except (MatReadError, KeyError, IndexError, ValueError, TypeError, OSError) as error:
        raise BadInput(
            f"{source}: expected a .mat file of SBD with GTcls.Segmentation, found {type(error).__name__}: "
            f"{error}; unpack SBD again"
        ) from error
    with replacing(output) as part:
        Image.fromarray(np.asarray(labels, np.uint8)).save(part, "PNG")


# ---------------------------------------------------------------- Cityscapes


def make_cityscapes(root: Path) -> None:
    """Make every missing `gtFine/{train,val}/<city>/*_labelTrainIds.png` of the polygons beside it.

    As the dataset's own csCreateTrainIdLabelImgs does. Raises `BadInput` for a file that has no polygons, and
    where that package is missing.
    """
    jobs = [
        (source, source.with_name(source.name.replace("_polygons.json", "_labelTrainIds.png")))
        for split in ("train", "val")
        for source in sorted((root / "gtFine" / split).glob("*/*_gtFine_polygons.json"))
    ]
    missing = [output for _, output in jobs if not output.exists()]
    if missing and find_spec("cityscapesscripts") is None:
        raise BadInput(
            f"{missing[0]}: {len(missing):,} masks are to be made of polygons, for which cityscapesscripts "
            "is not installed; run `pip install cityscapesscripts` and verify the dataset again"
        )
    _make_all(write_train_ids, jobs, "masks of Cityscapes")


def write_train_ids(source: Path, output: Path) -> None:
    """Write the train ids that cityscapesScripts draws of one file of polygons, as PNG."""
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    annotation = Annotation()
    try:
        annotation.fromJsonText(source.read_text())
        labels = createLabelImage(annotation, "trainIds")
    except (ValueError, KeyError, TypeError, SystemExit) as error:  # it exits for an unknown label
        raise BadInput(
            f"{source}: expected polygons of Cityscapes' labels, found {type(error).__name__}: {error}; "
            "restore it from the archive"
        ) from error
    with replacing(output) as part:
        labels.save(part, "PNG")


# ---------------------------------------------------------------- both


def _make_all(make: Callable[[Path, Path], None], jobs: list[tuple[Path, Path]], what: str) -> None:
    """Call `make(source, output)` for every output that is not there, on all cores of the job.

    Raises `BadInput` where the dataset's folder cannot be written to.
    """
    jobs = [(source, output) for source, output in jobs if not output.exists()]
    if not jobs:
        return
    for folder in sorted({output.parent for _, output in jobs}):
        _check_writable(folder)
    cores = len(os.sched_getaffinity(0)) if len(jobs) >= PLENTY else 1
    with tqdm(total=len(jobs), desc=what, unit=" masks", mininterval=1) as bar:
        if cores == 1:
            for source, output in jobs:
                make(source, output)
                bar.update()
            return
        with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
            for _ in pool.map(make, *zip(*jobs, strict=True), chunksize=8):
                bar.update()


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        writable = False
    else:
        writable = os.access(folder, os.W_OK)
    if not writable:
        raise BadInput(
            f"{folder}: cannot be written to, and masks that belong there are missing; verify the dataset "
            "once with the right to write, or make them elsewhere and link the folder"
        )

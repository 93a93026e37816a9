"""Tar shards: their layout, reading them as the folders they were made of, and all that can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from simclr import BadInput, config, datasets, layouts, paths, pretrain, shards
from simclr.__main__ import main, sentence
from simclr.benchmarks import _semi

WNIDS = ("n01440764", "n01443537", "n01484850")
COUNTS = {"train": 15, "val": 6}
SMALL = 20_480  # bytes of a shard: two or three of these images, which take some 7,000 each


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of noise: suffixes of every kind, a dot within a name, a flat val with its list."""
    rng = np.random.default_rng(0)
    kinds = [".JPEG", ".jpg", ".PNG"]
    for i in range(COUNTS["train"]):
        wnid = WNIDS[i % 3]
        name = f"{wnid}/{wnid}_{i}{'.x' if i == 4 else ''}{kinds[i // 3 % 3]}"
        write_image(tmp_path / "folders/train" / name, rng)
    lines = []
    for i in range(COUNTS["val"]):
        write_image(tmp_path / f"folders/val/ILSVRC2012_val_{i + 1:08d}.JPEG", rng)
        lines.append(f"ILSVRC2012_val_{i + 1:08d}.JPEG {(5 * i + 1) % 3}\n")
    (tmp_path / "folders/meta").mkdir()
    (tmp_path / "folders/meta/val.txt").write_text("".join(lines))
    (tmp_path / "folders/meta/train_1percent.txt").write_text(f"{WNIDS[1]}_4.x.jpg\n{WNIDS[0]}_0.JPEG\n")
    return tmp_path / "folders"


def write_image(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (*rng.integers(36, 44, 2), 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG" if path.suffix == ".PNG" else "JPEG", quality=95)


@pytest.fixture
def verified(tmp_path: Path) -> Callable[..., datasets.Dataset]:
    """Root → the dataset there, verified and opened."""

    def verify(root: Path) -> datasets.Dataset:
        manifest = tmp_path / "manifests" / f"{root.name}.json"
        datasets.verify("imagenet", config.Dataset(root=root, classes=3, images=COUNTS), manifest)
        return datasets.Dataset.open(manifest)

    return verify


@pytest.fixture
def sharded(root: Path, verified: Callable[..., datasets.Dataset], tmp_path: Path) -> Path:
    """The same images in shards of two or three."""
    for split in COUNTS:
        shards.write(verified(root), split, tmp_path / "shards", SMALL)
    return tmp_path / "shards"


def groups(tar: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Group members by key as webdataset's `base_plus_ext` and `group_by_keys` do."""
    with tarfile.open(tar) as file:
        found = []
        for member in file:
            key, suffix = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name).groups()
            found.append((key, suffix, file.extractfile(member).read()))
    grouped = groupby(found, key=lambda row: row[0])
    return [(key, {suffix: content for _, suffix, content in rows}) for key, rows in grouped]


# ---------------------------------------------------------------- the layout


def test_the_shards_have_webdatasets_layout_and_the_bytes_of_the_images(root, verified, sharded):
    listed = datasets.samples(verified(root), "train")
    tars = sorted((sharded / "train").glob("*.tar"))
    assert [tar.name for tar in tars] == [f"train-{number:06d}.tar" for number in range(len(tars))]
    assert len(tars) > 3
    found = [group for tar in tars for group in groups(tar)]
    assert len({key for key, _ in found}) == len(found) == COUNTS["train"]
    for path, label, (key, sample) in zip(listed.paths, listed.labels, found, strict=True):
        assert key == f"{path.parent.name}/{path.stem.replace('.', '_')}"
        assert sample == {path.suffix[1:].lower(): path.read_bytes(), "cls": str(label).encode()}


def test_the_shards_are_the_same_bytes_wherever_and_whenever_they_are_made(root, verified, sharded, tmp_path):
    os.utime(root / "train/n01440764/n01440764_0.JPEG", (1, 1))
    for split in COUNTS:
        shards.write(verified(root), split, tmp_path / "b", SMALL)
    files = [path.relative_to(sharded) for path in sharded.rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        assert (tmp_path / "b" / file).read_bytes() == (sharded / file).read_bytes()
    with tarfile.open(sharded / "train/train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


@pytest.mark.parametrize("longest", [20, 100, 101, 140, 600])
def test_no_shard_is_larger_than_it_may_be_nor_smaller_than_it_must(tmp_path, longest):
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 3000, 60)
    names = [f"a/{i:0{longest - 6}d}.jpg" for i in range(60)]
    for limit in (1, 10_240, 20_480, 30_000, 51_200, 10**9):
        bounds = shards.divide(sizes, names, limit)
        assert (bounds[0], bounds[-1]) == (0, 60)

        def bytes_of(start: int, stop: int) -> int:
            with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
                for name, size in zip(names[start:stop], sizes[start:stop], strict=True):
                    shards._add(tar, name, bytes(size))
                    shards._add(tar, name.replace(".jpg", ".cls"), b"1")
            return (tmp_path / "a.tar").stat().st_size

        for start, stop in pairwise(bounds):
            assert stop - start == 1 or bytes_of(start, stop) <= limit
            assert stop == 60 or bytes_of(start, stop + 1) > limit


def test_a_shard_holds_one_gigabyte_unless_told_otherwise(root, verified, tmp_path):
    shards.write(verified(root), "train", tmp_path / "one")
    assert [path.name for path in (tmp_path / "one/train").glob("*.tar")] == ["train-000000.tar"]
    assert shards.divide(np.full(30_000, 99_000), ["a"] * 30_000, 10**9)[1] == 9_914


# ---------------------------------------------------------------- reading them


def pixels(source: Path | paths.Member) -> tuple[tuple[int, int], bytes]:
    image = datasets.decode(source)
    return image.size, image.tobytes()


@pytest.mark.parametrize("split", COUNTS)
def test_shards_are_read_as_the_folders_they_were_made_of(split, root, verified, sharded):
    folders, tars = verified(root), verified(sharded)
    expected, found = datasets.samples(folders, split), datasets.samples(tars, split)
    assert found.paths.names.dtype == expected.paths.names.dtype
    assert np.array_equal(found.paths.names, expected.paths.names)
    assert np.array_equal(found.labels, expected.labels)
    assert found.labels.dtype == expected.labels.dtype
    assert [pixels(each) for each in found.paths] == [pixels(each) for each in expected.paths]
    assert [paths.encoded(each) for each in found.paths] == [path.read_bytes() for path in expected.paths]
    assert tars.class_names == folders.class_names
    assert tars.splits == folders.splits


def test_shards_made_of_folders_with_lists_keep_the_lists_order(root, verified, tmp_path):
    lines = [f"{p.parent.name}/{p.name} {WNIDS.index(p.parent.name)}\n" for p in root.glob("train/*/*")]
    rng = np.random.default_rng(1)
    (root / "meta/train.txt").write_text("".join(rng.permutation(lines)))
    expected = datasets.samples(verified(root), "train")
    for split in COUNTS:
        shards.write(verified(root), split, tmp_path / "shards", SMALL)
    found = datasets.samples(verified(tmp_path / "shards"), "train")
    assert np.array_equal(found.paths.names, expected.paths.names)
    assert [pixels(each) for each in found.paths] == [pixels(each) for each in expected.paths]


def test_one_split_may_be_in_shards_and_the_other_in_folders(root, verified, sharded):
    shutil.rmtree(sharded / "val")
    shutil.copytree(root / "val", sharded / "val")
    assert [path.name for path in datasets.samples(verified(sharded), "val").paths] == sorted(
        path.name for path in (root / "val").iterdir()
    )


def test_shards_can_be_made_of_shards(verified, sharded, tmp_path):
    for split in COUNTS:
        shards.write(verified(sharded), split, tmp_path / "again", 2 * SMALL)
    expected = datasets.samples(verified(sharded), "train").paths
    found = datasets.samples(verified(tmp_path / "again"), "train").paths
    assert len(found.tars) < len(expected.tars)
    assert [paths.encoded(each) for each in found] == [paths.encoded(each) for each in expected]


def test_slices_and_arrays_of_members_are_members(verified, sharded):
    found = datasets.samples(verified(sharded), "train").paths
    every = [paths.encoded(each) for each in found]
    assert [paths.encoded(each) for each in found[3:9:2]] == every[3:9:2]
    assert [paths.encoded(each) for each in found[np.array([7, 0, 7])]] == [every[7], every[0], every[7]]
    assert paths.encoded(found[-1]) == every[-1]
    assert len(found[:0]) == 0
    assert str(found[0]) == f"{sharded}/train/train-000000.tar: n01440764/n01440764_0.JPEG"
    with pytest.raises(IndexError):
        found[len(found)]


def test_members_survive_pickling_after_they_were_read(verified, sharded):
    found = datasets.samples(verified(sharded), "train").paths
    expected = [paths.encoded(each) for each in found]
    assert [paths.encoded(each) for each in pickle.loads(pickle.dumps(found))] == expected
    assert paths.encoded(pickle.loads(pickle.dumps(found[5]))) == expected[5]


def sum_of(image: Image.Image) -> int:
    return int(np.asarray(image, np.int64).sum())


@pytest.mark.parametrize("start", ["fork", "spawn", "threads"])
def test_members_are_read_by_several_at_once(start, root, verified, sharded):
    """After some were read here, so that forked workers inherit open files."""
    listed = datasets.samples(verified(sharded), "train")
    images = datasets.Images(listed.paths, listed.labels, sum_of)
    expected = [sum_of(datasets.decode(path)) for path in datasets.samples(verified(root), "train").paths]
    assert [images[i][0] for i in range(3)] == expected[:3]
    if start == "threads":
        with ThreadPoolExecutor(8) as pool:
            rows = list(pool.map(lambda i: images[i % len(images)], range(20 * len(images))))
        assert [row[0] for row in rows] == expected * 20
    else:
        options = {"num_workers": 2 if start == "fork" else 1, "persistent_workers": True}
        loader = DataLoader(images, batch_size=1, multiprocessing_context=start, **options)
        for _ in range(2):
            assert [int(total) for total, _, _ in loader] == expected


def test_few_files_are_open_and_they_are_closed_with_the_images(verified, sharded):
    def opened() -> int:
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).endswith(".tar") for link in links if os.path.islink(link))

    found = datasets.samples(verified(sharded), "train").paths
    assert opened() == 0
    for _ in range(3):
        for each in found[::-1]:
            paths.encoded(each)
    assert opened() == len(found.tars)
    del found, each
    assert opened() == 0


def test_labelled_subsets_come_from_the_shards(root, verified, sharded):
    expected = datasets.subset(verified(root), "train_1percent")
    found = datasets.subset(verified(sharded), "train_1percent")
    assert found.labels.tolist() == expected.labels.tolist() == [1, 0]
    assert [paths.encoded(each) for each in found.paths] == [path.read_bytes() for path in expected.paths]
    assert _semi.digest(found, sharded) == _semi.digest(expected, root)
    (sharded / "meta/train_10percent.txt").write_text("n01440764_99.JPEG\n")
    with pytest.raises(
        BadInput, match=r"shards/train: expected n01440764/n01440764_99.JPEG in the tar files"
    ):
        datasets.subset(verified(sharded), "train_10percent")


def test_pretraining_from_shards_is_pretraining_from_the_folders(root, verified, sharded, tmp_path):
    recipe = config.Recipe(
        architecture="resnet18_w0.125",
        epochs=1,
        batch_size=5,
        projector=(16, 8),
        warmup_epochs=0,
        augmentation=config.Augmentation(image_size=32),
    )
    for name in ("folders", "shards"):
        output = tmp_path / name / "backbone.safetensors"
        pretrain.pretrain(recipe, verified(tmp_path / name), output, tmp_path / "work" / name)
    states = [
        {key: value for key, value in _tensors(tmp_path / name).items()} for name in ("folders", "shards")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from simclr.checkpoint import load_backbone

    return load_backbone(folder / "backbone.safetensors")


# ---------------------------------------------------------------- the index


def test_shards_open_from_the_index_without_being_scanned(verified, sharded, monkeypatch):
    monkeypatch.setattr(datasets, "SETTLED_NS", 0)
    opened = verified(sharded)
    scanned = []
    monkeypatch.setattr(layouts, "scan", lambda tars: scanned.append(len(tars)) or paths.scan(tars))
    indexed = datasets.samples(opened, "train")
    assert scanned == []
    os.utime(sharded / "train/train-000001.tar")
    found = datasets.samples(opened, "train")
    assert scanned == [len(indexed.paths.tars)]
    datasets.samples(opened, "train")
    assert len(scanned) == 1
    assert found.paths == indexed.paths
    assert np.array_equal(found.paths.where, indexed.paths.where)
    assert [tar.path for tar in found.paths.tars] == [tar.path for tar in indexed.paths.tars]
    assert [paths.encoded(each) for each in found.paths] == [paths.encoded(each) for each in indexed.paths]


def test_shards_of_another_size_may_take_their_place(root, verified, sharded, tmp_path, monkeypatch):
    """Names and labels are the same, the offsets of the old index are not."""
    monkeypatch.setattr(datasets, "SETTLED_NS", 0)
    opened = verified(sharded)
    expected = [paths.encoded(each) for each in datasets.samples(opened, "train").paths]
    shutil.rmtree(sharded / "train")
    shards.write(verified(root), "train", sharded, 2 * SMALL)
    assert [paths.encoded(each) for each in datasets.samples(opened, "train").paths] == expected


# ---------------------------------------------------------------- making them again


def test_the_same_command_makes_only_what_is_missing(root, verified, sharded):
    tars = sorted((sharded / "train").glob("*.tar"))
    before = {tar: (tar.stat().st_mtime_ns, tar.read_bytes()) for tar in tars}
    tars[1].unlink()
    tars[-1].unlink()
    (sharded / "train/.train-000001.tar.7.part").write_bytes(b"of a run that was killed")
    shards.write(verified(root), "train", sharded, SMALL)
    assert sorted(path.name for path in (sharded / "train").iterdir()) == ["lock", *(t.name for t in tars)]
    assert all(tar.read_bytes() == content for tar, (_, content) in before.items())
    assert {tar for tar, (time, _) in before.items() if tar.stat().st_mtime_ns != time} == {tars[1], tars[-1]}


def test_an_image_that_vanishes_while_shards_are_made_leaves_no_part(root, verified, tmp_path, monkeypatch):
    opened = verified(root)
    gone = datasets.samples(opened, "train").paths[9]
    monkeypatch.setattr(shards, "_lists", lambda *_: gone.unlink() or {})
    with pytest.raises(BadInput, match=rf"{gone}: no such image"):
        shards.write(opened, "train", tmp_path / "shards", SMALL)
    names = sorted(path.name for path in (tmp_path / "shards/train").iterdir())
    assert names == ["lock", *(f"train-{number:06d}.tar" for number in range(len(names) - 1))]
    assert 2 < len(names) < 8


def not_written(dataset: datasets.Dataset, output: Path, *words: object, size: int = SMALL) -> None:
    """The shards are refused in one sentence with all `words`, and nothing in `output` changes."""
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.*")}
    with pytest.raises(BadInput) as error:
        shards.write(dataset, "train", output, size)
    assert "\n" not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.*")} == before


def test_a_folder_of_something_else_is_refused(root, verified, sharded, tmp_path):
    opened = verified(root)
    not_written(opened, root, root / "train/n01440764", "expected nothing in this folder", "--output")
    not_written(opened, sharded, "train-000001.tar: expected nothing", "--shard-bytes", size=10**9)
    not_written(opened, sharded, "train-000000.tar: expected 1 images", "--shard-bytes", size=1)

    other = shutil.copytree(root, tmp_path / "other")
    (other / "train/n01440764/n01440764_0.JPEG").rename(other / "train/n01440764/n01440764_00.JPEG")
    not_written(verified(other), sharded, sharded / "meta/train.txt", "expected the list of this dataset")
    shutil.copytree(root, tmp_path / "swapped")
    first, second = sorted((tmp_path / "swapped/train/n01440764").iterdir())[:2]
    first.rename(first.with_suffix(".aside"))
    second.rename(first)
    first.with_suffix(".aside").rename(second)
    not_written(verified(tmp_path / "swapped"), sharded, "train-000000.tar: expected", "found others")


def test_what_shards_cannot_be_made_of_is_refused(root, verified, tmp_path, monkeypatch):
    opened, output = verified(root), tmp_path / "shards"
    other = replace(opened, name="places205")
    not_written(other, output, "expected a manifest of imagenet, found one of places205")
    monkeypatch.setattr(shards, "MAX_SHARDS", 3)
    not_written(opened, output, "at most 3 tar files", "--shard-bytes")
    monkeypatch.undo()
    folder = root / "train/n01440764"
    (folder / "n01440764_3.jpg").rename(folder / "n01440764_0.jpg")
    not_written(verified(root), output, "n01440764_0.jpg: expected a key of its own", "n01440764_0.JPEG")


def test_a_disk_too_small_is_refused_before_anything_is_copied(root, verified, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        BadInput, match=r"train: the images need [0-9,]{6} bytes, found 1,000 bytes free; make room"
    ):
        shards.write(verified(root), "train", tmp_path / "shards", SMALL)
    assert not list((tmp_path / "shards").rglob("*.tar"))


def test_names_that_no_list_can_hold_are_refused():
    for name in ("a/ b.jpg ", "a/b\n.jpg", os.fsdecode(b"a/\xff.jpg")):
        with pytest.raises(BadInput, match="a line of a list can hold; rename"):
            shards.member_names([name])


def test_the_step_on_the_command_line(root, verified, tmp_path, capsys):
    manifest = str(verified(root).manifest)
    arguments = ["shards", "--dataset", manifest, "--split", "train", "--output", str(tmp_path / "shards")]
    assert main([*arguments, "--shard-bytes", str(SMALL)]) == 0
    assert len(list((tmp_path / "shards/train").glob("*.tar"))) > 3
    assert main(["shards", "--dataset", manifest, "--split", "test", "--output", str(tmp_path / "t")]) == 2
    assert "imagenet has the splits train, val; found 'test'" in capsys.readouterr().err


# ---------------------------------------------------------------- shards that are not whole


def refused(root: Path, tmp_path: Path, *words: object) -> None:
    """The shards are refused in one sentence with all `words`, and no manifest is left."""
    manifest = tmp_path / "refused.json"
    with pytest.raises(BadInput) as error:
        datasets.verify("imagenet", config.Dataset(root=root, classes=3, images=COUNTS), manifest)
    assert "\n" not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)
    assert not manifest.exists()


def test_a_shard_that_is_missing_is_named(sharded, tmp_path):
    tars = sorted((sharded / "train").glob("*.tar"))
    tars[-1].rename(tmp_path / "aside")
    refused(sharded, tmp_path, sharded / "train", "expected the 15 images of", "python -m simclr shards")
    (tmp_path / "aside").rename(tars[-1])
    tars[1].unlink()
    refused(sharded, tmp_path, f"{tars[1]}: no such file, but train-000002.tar is there", "make it again")
    (sharded / "meta/classes.txt").unlink()
    refused(sharded, tmp_path, sharded / "meta/classes.txt", "not found")


def test_a_shard_cut_anywhere_is_refused_or_whole(sharded, tmp_path):
    tar = sharded / "val/val-000000.tar"
    content = tar.read_bytes()
    expected = paths.scan([tar])
    whole = 0
    for cut in range(0, len(content), 256):
        tar.write_bytes(content[:cut])
        try:
            keys, labels, where = paths.scan([tar])
        except BadInput as error:
            assert str(error).startswith(f"{tar}: ")  # noqa: PT017
            assert "delete val-000000.tar and make it again" in str(error)  # noqa: PT017
        else:
            whole += 1
            assert keys == expected[0]
            assert np.array_equal(labels, expected[1])
            assert np.array_equal(where, expected[2])
            assert content[cut - 512 :].strip(b"\0") == b""
    assert 0 < whole < len(content) // 512


def test_a_damaged_header_is_refused(sharded, tmp_path):
    """Python's tarfile takes one for the end of the file."""
    tar = sharded / "train/train-000001.tar"
    content = tar.read_bytes()
    with tarfile.open(tar) as file:
        headers = [member.offset for member in file]
    for offset in headers:
        for byte in (0, 100, 124, 150, 156):
            damaged = bytearray(content)
            damaged[offset + byte] ^= 0x11
            tar.write_bytes(damaged)
            refused(sharded, tmp_path, f"{tar}: ", "delete train-000001.tar and make it again")


def change(tar: Path, edit: Callable[[list[tuple[str, bytes]]], None]) -> None:
    """Write a tar file again after `edit` of its list of (name, content)."""
    with tarfile.open(tar) as file:
        members = [(member.name, file.extractfile(member).read()) for member in file]
    edit(members)
    with tarfile.open(tar, "w") as file:
        for name, content in members:
            shards._add(file, name, content)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m.__setitem__(1, (m[1][0], b"2")), ["expected label 0 for n01440764/", "found 2"]),
        (lambda m: m.__setitem__(1, (m[1][0], b"cat")), ["expected a class number, found b'cat'"]),
        (lambda m: m.__setitem__(slice(2, 4), m[0:2]), ["expected n01440764/", "found n01440764/", "second"]),
        (lambda m: m.extend(m[0:2]), ["expected ", "found n01440764/n01440764_0 a second time"]),
        (lambda m: m.pop(1), ["expected an image and then its label", "and then n01440764/"]),
        (lambda m: m.pop(), ["expected an image and then its label", "and then nothing"]),
        (lambda m: m.__delitem__(slice(0, 2)), ["expected n01440764/n01440764_0, as in", "train.txt, found"]),
        (lambda m: m.clear(), ["expected n01440764/n01440764_0, as in"]),
        (lambda m: m.reverse(), ["expected an image and then its label"]),
        (lambda m: m.__setitem__(0, (m[0][0], m[0][1][:-99])), ["n01440764_0.JPEG: cannot be read as an im"]),
        (lambda m: m.__setitem__(0, (m[0][0], b"")), ["n01440764_0.JPEG: cannot be read as an image"]),
    ],
)
def test_shards_that_are_not_those_of_the_list_are_refused(edit, words, sharded, tmp_path):
    change(sharded / "train/train-000000.tar", edit)
    refused(sharded, tmp_path, sharded / "train/train-00000", *words)


def test_one_image_more_at_the_end_is_refused(sharded, tmp_path):
    last = max((sharded / "train").glob("*.tar"))
    change(last, lambda m: m.extend([("n01484850/more.jpeg", m[0][1]), ("n01484850/more.cls", b"2")]))
    refused(sharded, tmp_path, last, "expected nothing more, as in", "found n01484850/more; delete")


def test_a_label_out_of_range_is_refused(sharded, tmp_path):
    listed = sharded / "meta/val.txt"
    listed.write_text(listed.read_text().replace(" 1\n", " 3\n", 1))
    change(sharded / "val/val-000000.tar", lambda m: m.__setitem__(1, (m[1][0], b"3")))
    refused(sharded, tmp_path, "val-000000.tar", "expected a label of 0 to 2, found 3")


def test_shards_that_changed_after_they_were_verified_are_refused(verified, sharded, monkeypatch):
    monkeypatch.setattr(datasets, "SETTLED_NS", 0)
    opened = verified(sharded)
    datasets.samples(opened, "train")
    change(sharded / "train/train-000000.tar", lambda m: m.__delitem__(slice(0, 2)))
    with pytest.raises(BadInput, match=r"train-000000.tar: expected n01440764/n01440764_0, as in"):
        datasets.samples(opened, "train")
    (sharded / "meta/classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(BadInput, match=r"classes.txt: expected the list as when imagenet was verified"):
        datasets.samples(opened, "train")


def test_shards_that_vanish_or_shrink_while_they_are_read_are_named(verified, sharded, tmp_path):
    found = datasets.samples(verified(sharded), "train").paths
    os.truncate(found.tars[0].path, 3000)
    with pytest.raises(
        BadInput, match=r"000000.tar: n01440764/n01440764_0.JPEG: cannot be read \(the tar file"
    ):
        datasets.decode(found[0])
    found.tars[1].path.unlink()
    member = next(each for each in found if each.tar is found.tars[1])
    with pytest.raises(BadInput, match=r"train-000001.tar: .*: no such image; restore it"):
        datasets.decode(member)
    sharded.rename(tmp_path / "unmounted")
    with pytest.raises(BadInput, match=rf"^{sharded}: this folder of the dataset is gone, and {found[-1]}"):
        datasets.decode(found[-1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_in_a_shard_is_named(workers, verified, sharded):
    listed = datasets.samples(verified(sharded), "train")
    bad = listed.paths[6]
    with bad.tar.path.open("r+b") as file:
        file.seek(bad.offset)
        file.write(bytes(bad.size))
    images = datasets.Images(listed.paths, listed.labels, sum_of)
    with pytest.raises(BadInput) as error:
        list(DataLoader(images, batch_size=1, num_workers=workers))
    assert sentence(error.value).startswith(f"{bad}: cannot be decoded (")


def test_the_manifest_of_shards_is_stable(verified, sharded):
    before = verified(sharded).manifest.read_bytes()
    os.utime(sharded / "train/train-000000.tar", (1, 1))
    assert verified(sharded).manifest.read_bytes() == before
    assert json.loads(before)["splits"]["train"]["images"] == COUNTS["train"]

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from simclr import datasets, features, online_knn
from simclr.benchmarks import imagenet_knn
from simclr.checkpoint import Backbone, random_init
from simclr.config import FeatureSet, RandomInit
from simclr.datasets import Samples
from simclr.features import Features


@pytest.fixture
def backbone(tmp_path) -> Backbone:
    random_init(RandomInit(architecture="resnet18_w0.125"), tmp_path / "backbone.safetensors")
    return Backbone.open(tmp_path / "backbone.safetensors")


def test_it_is_the_benchmark_on_evenly_spaced_images(dataset, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(online_knn, "BANK", 300)
    monkeypatch.setattr(online_knn, "QUERIES", 50)
    imagenet = dataset("imagenet")
    config = FeatureSet(layers=["avgpool"], resize=37, crop=32, pooling="adaptive")
    parts = {}
    for split, count in (("train", 300), ("val", 50)):
        features.extract(backbone, imagenet, split, config, tmp_path / "work", tmp_path / split)
        whole = Features.open(tmp_path / split)
        chosen = np.linspace(0, len(whole.labels) - 1, count).round().astype(int)
        parts[split] = Features({"avgpool": whole.layers["avgpool"][chosen]}, whole.labels[chosen])
    expected = imagenet_knn.evaluate(*parts.values(), imagenet_knn.Config(neighbours=[20]))
    assert online_knn.accuracy(backbone.model(), imagenet, 32, 0) == pytest.approx(expected["k20"])


def test_a_network_in_training_stays_as_it_was(dataset, backbone, monkeypatch):
    monkeypatch.setattr(online_knn, "BANK", 40)
    network = backbone.model().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    random = torch.get_rng_state()
    online_knn.accuracy(network, dataset("imagenet"), 32, 0)
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_an_image_that_cannot_be_decoded_is_left_out(dataset, backbone, tmp_path):
    samples = online_knn.evenly(datasets.samples(dataset("imagenet"), "val"), 5)
    broken = tmp_path / "broken.JPEG"
    broken.write_bytes(samples.paths[2].read_bytes())
    os.truncate(broken, 100)
    whole = online_knn.encode(backbone.model(), samples, 32, 0)
    paths = [*samples.paths[:2], broken, *samples.paths[3:]]
    found = online_knn.encode(backbone.model(), Samples(_Indexed(paths), samples.labels), 32, 0)
    assert found[1].tolist() == np.delete(samples.labels, 2).tolist()
    torch.testing.assert_close(found[0], whole[0][[0, 1, 3, 4]], rtol=1e-5, atol=1e-6)


class _Indexed(list):
    """A list that, as `Paths` does, gives several items for an array of indices."""

    def __getitem__(self, index):
        return [list.__getitem__(self, i) for i in index] if isinstance(index, np.ndarray) else super()[index]


def test_ranks_encode_shares_of_the_same_rows(dataset, backbone, monkeypatch):
    samples = online_knn.evenly(datasets.samples(dataset("imagenet"), "val"), 7)
    alone = online_knn.encode(backbone.model(), samples, 32, 0)
    shares = []

    def share(rows):
        """Keep this rank's rows; return some for both, as the other's are not known here."""
        shares.append(rows)
        return [rows[[0, 1, 2, -1]], rows[:3]]

    monkeypatch.setattr(online_knn.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(online_knn.distributed, "gather", share)
    for rank in range(2):
        monkeypatch.setattr(online_knn.distributed, "rank", lambda rank=rank: rank)
        online_knn.encode(backbone.model(), samples, 32, 0)
    assert [len(rows) for rows in shares] == [4, 3]
    monkeypatch.setattr(online_knn.distributed, "gather", lambda rows: shares)
    together = online_knn.encode(backbone.model(), samples, 32, 0)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)

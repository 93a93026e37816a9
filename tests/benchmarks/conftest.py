"""What the tests of trained classifiers share: a small backbone."""

from __future__ import annotations

import pytest

from simclr import config
from simclr.checkpoint import Backbone, random_init


@pytest.fixture(scope="session")
def small_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """An eighth of a ResNet-18, at random weights."""
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    random_init(config.RandomInit(architecture="resnet18_w0.125"), path)
    return Backbone.open(path)

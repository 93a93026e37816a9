from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from simclr import BadInput
from simclr.model import GRID, pool, projector, resnet


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34", "resnet50"])
def test_keys_and_shapes_are_torchvisions_without_fc(architecture):
    with torch.device("meta"):
        ours = resnet(architecture).state_dict()
        theirs = torchvision.models.get_model(architecture).state_dict()
    theirs = {key: value for key, value in theirs.items() if not key.startswith("fc.")}
    assert list(ours) == list(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in ours)


def test_output_is_torchvisions_for_the_same_weights():
    ours, theirs = resnet("resnet50").eval(), torchvision.models.resnet50().eval()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        assert torch.equal(ours(images), ours.forward_features(images)["avgpool"])
        torch.testing.assert_close(ours(images), expected)


def test_simclr_resnet50_has_the_published_number_of_parameters():
    """27,968,832 = 23,508,032 + 4,460,800, as MMPretrain publishes it."""
    with torch.device("meta"):
        backbone, head = resnet("resnet50"), projector(2048, 2048, 128)
    count = [sum(p.numel() for p in module.parameters()) for module in (backbone, head)]
    assert count == [23_508_032, 4_460_800]


@pytest.mark.parametrize(
    ("architecture", "stem", "end"),
    [("resnet18_w0.25", 16, 128), ("resnet50_w0.25", 16, 512), ("resnet50_w2", 128, 4096)],
)
def test_width_multiplies_every_layer(architecture, stem, end):
    with torch.device("meta"):
        model = resnet(architecture)
        features = model.forward_features(torch.empty(2, 3, 64, 64))
    assert model.channels["feature1"] == stem
    assert model.channels["avgpool"] == end
    assert {name: x.shape[1] for name, x in features.items()} == model.channels


@pytest.mark.parametrize("architecture", ["resnet101", "resnet50_w", "resnet50_w0", "resnet18_w0.3", ""])
def test_another_architecture_is_refused(architecture):
    with pytest.raises(BadInput, match="expected an architecture among resnet18, resnet34, resnet50"):
        resnet(architecture)


def test_initialisation():
    model = resnet("resnet50_w0.25")
    conv = model.layer4[0].conv2.weight
    assert conv.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.01)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    zeroed = resnet("resnet50_w0.25", zero_init_residual=True)
    zeros = {n for n, p in zeroed.named_parameters() if (p == 0).all() and n.endswith("weight")}
    assert zeros == {n for n, _ in model.named_parameters() if n.endswith("bn3.weight")}
    assert len(zeros) == 16


def test_feature1_is_before_the_max_pool():
    with torch.device("meta"):
        features = resnet("resnet50").forward_features(torch.empty(1, 3, 224, 224))
    assert {name: tuple(x.shape[1:]) for name, x in features.items()} == {
        "feature1": (64, 112, 112),
        "feature2": (256, 56, 56),
        "feature3": (512, 28, 28),
        "feature4": (1024, 14, 14),
        "feature5": (2048, 7, 7),
        "avgpool": (2048,),
    }


@pytest.mark.parametrize("pooling", ["specified", "adaptive"])
def test_pooled_dimensions_are_the_published_ones(pooling):
    with torch.device("meta"):
        pooled = pool(resnet("resnet50").forward_features(torch.empty(2, 3, 224, 224)), pooling)
    assert [x.shape[1] for x in pooled.values()] == [9216, 9216, 8192, 9216, 8192, 2048]


def test_specified_pooling_counts_padded_zeros():
    pooled = pool({"feature1": torch.ones(1, 1, 112, 112)}, "specified")["feature1"].reshape(12, 12)
    assert pooled[0, 0].item() == pytest.approx(0.36)  # 6 × 6 of 10 × 10 pixels are image
    assert pooled[5, 5].item() == 1


def test_adaptive_pooling_serves_any_size():
    pooled = pool(resnet("resnet18_w0.25").forward_features(torch.randn(1, 3, 48, 48)), "adaptive")
    channels = resnet("resnet18_w0.25").channels
    assert {n: x.shape[1] for n, x in pooled.items()} == {
        n: channels[n] * GRID.get(n, 1) ** 2 for n in channels
    }


def test_specified_pooling_refuses_another_size():
    with pytest.raises(BadInput, match=r"224 × 224 pixels.*use pooling: adaptive"):
        pool({"feature5": torch.ones(1, 1, 2, 2)}, "specified")

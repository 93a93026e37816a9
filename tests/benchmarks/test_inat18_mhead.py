from __future__ import annotations

from simclr import config
from simclr.benchmarks import imagenet_mhead, inat18_mhead


def test_what_differs_from_imagenet_is_resnet50_mhead_8xb32_steplr_84e_inat18():
    """MMSelfSup v0.11.0, configs/benchmarks/classification/inaturalist2018/ and its bases."""
    ours, imagenet = (module.Config().model_dump() for module in (inat18_mhead, imagenet_mhead))
    assert {key: value for key, value in ours.items() if value != imagenet[key]} == {
        "jitter": 0,
        "lighting": 0,
        "epochs": 84,
        "milestones": (24, 48, 72),
    }
    assert inat18_mhead.Config.dataset == "inat18"
    published = config.INat18(root=".")
    assert (published.classes, published.images) == (8_142, {"train": 437_513, "val": 24_426})


def test_the_miniature_runs(dataset, small_backbone, tmp_path):
    miniature = inat18_mhead.Config(image_size=32, resize=36, pooling="adaptive", epochs=1, lr=0.05)
    metrics = inat18_mhead.evaluate(small_backbone, dataset("inat18"), miniature, tmp_path)
    assert set(inat18_mhead.COLUMNS) <= set(metrics)
    assert all(0 <= value <= 100 for value in metrics.values())

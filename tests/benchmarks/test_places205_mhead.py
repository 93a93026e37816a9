from __future__ import annotations

from simclr import config
from simclr.benchmarks import imagenet_mhead, places205_mhead


def test_what_differs_from_imagenet_is_resnet50_mhead_8xb32_steplr_28e_places205():
    """MMSelfSup v0.11.0, configs/benchmarks/classification/places205/ and _base_/datasets/places205.py."""
    ours, imagenet = (module.Config().model_dump() for module in (places205_mhead, imagenet_mhead))
    assert {key: value for key, value in ours.items() if value != imagenet[key]} == {
        "crop": "shifted",
        "jitter": 0,
        "lighting": 0,
        "epochs": 28,
        "milestones": (7, 14, 21),
    }
    assert places205_mhead.Config.dataset == "places205"
    published = config.Places205(root=".")
    assert (published.classes, published.images) == (205, {"train": 2_448_873, "val": 20_500})


def test_the_miniature_runs(dataset, small_backbone, tmp_path):
    miniature = places205_mhead.Config(image_size=32, resize=36, pooling="adaptive", epochs=1, lr=0.05)
    metrics = places205_mhead.evaluate(small_backbone, dataset("places205"), miniature, tmp_path)
    assert set(places205_mhead.COLUMNS) <= set(metrics)
    assert all(0 <= value <= 100 for value in metrics.values())

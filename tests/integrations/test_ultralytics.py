"""Ultralytics trains a tiny classifier on made-up pictures, with the callbacks."""

import pytest
import torch
from torch import nn

from integrations.networks import library

library("torchvision")
ultralytics = library("ultralytics")

from normkit.integrations.ultralytics import add_callbacks  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes, of dark and of light squares."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for split in ("train", "val"):
        for name, grey in (("dark", 60), ("light", 190)):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (32, 32), (grey + i, grey, grey)).save(
                    place / f"{i}.png"
                )
    return folder


def trained(pictures, tmp_path, *, epochs: int = 2, **options):
    yolo = ultralytics.YOLO("yolov8n-cls.yaml")
    schedule = add_callbacks(yolo, **options)
    yolo.train(
        data=str(pictures), epochs=epochs, imgsz=32, batch=8, workers=0, device="cpu",
        project=str(tmp_path), plots=False, verbose=False, amp=False,
    )  # fmt: skip
    return yolo, schedule


def test_the_average_is_calibrated_before_each_validation(pictures, tmp_path) -> None:
    yolo, schedule = trained(pictures, tmp_path, calibrate="validation")
    assert len(schedule.calibrations) == 2
    report = schedule.calibrations[-1]
    assert report.batches == 2
    average = yolo.trainer.ema.ema
    layer = average.get_submodule(report.layers[0].name)
    # What is saved, in half precision, and validated is what was measured.
    torch.testing.assert_close(
        layer.running_mean.double(), report.layers[0].mean, atol=1e-3, rtol=1e-3
    )


def test_frozen_layers_stay_and_the_record_is_kept(pictures, tmp_path) -> None:
    yolo, schedule = trained(pictures, tmp_path, freeze_after=0, watch_every=1)
    assert schedule.is_frozen
    assert schedule.watch.steps == 4
    norms = [m for m in yolo.trainer.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(int(m.num_batches_tracked) == 0 for m in norms)

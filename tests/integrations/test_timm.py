"""timm's own pieces of a training loop, and its average of the weights."""

import pytest
import torch
from torch.nn import functional as F

import normkit
from integrations.networks import library

timm = library("timm")
for part in ("utils", "optim", "scheduler", "loss", "layers"):
    library(f"timm.{part}")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def images(count: int = 4, size: int = 8) -> list:
    source = torch.Generator().manual_seed(0)
    x = 1 + 2 * torch.randn(count, size, 3, 32, 32, generator=source)
    return [(part, torch.arange(size) % 10) for part in x]


def trained(model, average=None, epochs: int = 1):
    """Train as timm's train.py does: its optimizer, its loss, its average."""
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.05)
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=0
    )
    loss = timm.loss.LabelSmoothingCrossEntropy()
    for epoch in range(epochs):
        model.train()
        for x, y in images():
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            if average is not None:
                average.update(model)
        scheduler.step(epoch + 1)
    return optimizer


@pytest.mark.parametrize("name", ["ModelEmaV2", "ModelEmaV3"])
def test_an_average_of_weights_is_calibrated_inside_its_wrapper(name: str) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    average = getattr(timm.utils, name)(model, decay=0.5)
    trained(model, average)
    before = [p.clone() for p in average.parameters()]
    report = normkit.calibrate(average, images())
    assert not report.layers[0].name.startswith("module.")
    after = average.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # What its first norm gets over these data has the statistics that it now has.
    seen = []
    norm = average.module.get_submodule(report.layers[0].name)
    hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    average.eval()
    with torch.no_grad():
        average(torch.cat([x for x, _ in images()]))
    hook.remove()
    mean = seen[0].double().mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), mean, atol=1e-4, rtol=1e-4)


def test_frozen_batch_norm_of_timm_is_left_alone() -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    model = timm.layers.freeze_batch_norm_2d(model)
    with pytest.raises(normkit.errors.ArgumentError, match="holds constants"):
        normkit.calibrate(model, images())


def test_a_training_of_timm_is_watched() -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3)
    with normkit.watch(model, optimizer, every=2) as seen:
        model.train()
        for x, y in images():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert seen.history["steps"] == [0, 2]
    assert any(
        "BatchNorm" in layer["kind"] for layer in seen.history["layers"].values()
    )

"""Objects that accelerate prepared are taken by the verbs as they are."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import normkit
from integrations.networks import library, network, population, samples

accelerate = library("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=["no", "bf16"])
def prepared(request: pytest.FixtureRequest):
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=request.param, gradient_accumulation_steps=2
    )
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loader = DataLoader(TensorDataset(*samples()), batch_size=16, shuffle=True)
    yield accelerator, *accelerator.prepare(model, optimizer, loader)
    accelerator.free_memory()
    accelerate.state.AcceleratorState._reset_state(True)


def train(accelerator, model, optimizer, loader, epochs: int = 1) -> None:
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()


def test_a_watch_counts_the_updates_of_an_accelerated_optimizer(prepared) -> None:
    accelerator, model, optimizer, loader = prepared
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    with normkit.watch(model, optimizer) as seen:
        train(accelerator, model, optimizer, loader)
    assert seen.steps == 6
    # Every second step updates.
    assert seen.statistics().training.updates == 3
    ratios = seen.history["layers"]["0"]["update_ratio"]
    assert [r is not None for r in ratios] == [False, True] * 3


def test_calibration_takes_its_model_and_loader(prepared) -> None:
    accelerator, model, optimizer, loader = prepared
    train(accelerator, model, optimizer, loader)
    report = normkit.calibrate(model, loader, max_batches=6)
    assert [layer.name for layer in report.layers] == ["1", "5"]
    x, _ = samples()
    # The first layer's input does not depend on how the data are cut.
    mean, var = population(accelerator.unwrap_model(model), "1", x)
    tolerance = 1e-5 if accelerator.mixed_precision == "no" else 0.05
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(model[1].running_mean, mean.float(), **close)
    torch.testing.assert_close(model[1].running_var, var.float(), **close)


def test_training_goes_on_after_a_calibration_that_stopped_early(prepared) -> None:
    accelerator, model, optimizer, loader = prepared
    normkit.calibrate(model, loader, max_batches=2)
    updates = []
    inner = optimizer.optimizer
    inner.register_step_post_hook(lambda *_: updates.append(1))
    train(accelerator, model, optimizer, loader, epochs=2)
    assert len(updates) == 6


def test_a_diagnosis_takes_its_model_and_loader(prepared) -> None:
    accelerator, model, optimizer, loader = prepared
    train(accelerator, model, optimizer, loader, epochs=3)
    diagnosis = normkit.diagnose(model, loader, F.cross_entropy)
    assert diagnosis.statistics.samples == 96
    assert {layer.name for layer in diagnosis.statistics.layers} >= {"1", "5"}

"""Lightning's Trainer with the callback: what is measured, frozen, logged."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from integrations.networks import library, network, population, samples
from normkit.errors import ArgumentError

pl = library("lightning.pytorch")

from normkit.integrations.lightning import NormCallback  # noqa: E402


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, _):
        self.seen.append(self.net[1].running_mean.clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class WithoutForward(Classifier):
    forward = pl.LightningModule.forward

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def loader(size: int = 96, **options) -> DataLoader:
    return DataLoader(TensorDataset(*samples()), batch_size=size, **options)


def fitted(*callbacks, module=None, data=None, **options):
    module = Classifier() if module is None else module
    options = {"max_epochs": 2, "logger": False, **options}
    trainer = pl.Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    data = loader(32) if data is None else data
    trainer.fit(module, data, loader())
    return module


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def test_a_validation_uses_statistics_of_the_training_data() -> None:
    callback = NormCallback(calibrate="validation")
    module = fitted(callback)
    # One of the sanity check, which is not calibrated, and one of each epoch.
    assert len(module.seen) == 3
    assert len(callback.schedule.calibrations) == 2
    last = callback.schedule.calibrations[-1]
    mean, _ = population(module.net, "1", samples()[0])
    torch.testing.assert_close(module.seen[-1], mean.float(), atol=1e-5, rtol=1e-5)
    assert [layer.name for layer in last.layers] == ["net.1", "net.5"]
    assert last.batches == 3
    assert module.training


def test_the_last_statistics_are_those_of_the_last_weights() -> None:
    callback = NormCallback(calibrate="end")
    module = fitted(callback)
    assert len(callback.schedule.calibrations) == 1
    mean, var = population(module.net, "1", samples()[0])
    torch.testing.assert_close(module.net[1].running_mean, mean.float())
    torch.testing.assert_close(module.net[1].running_var, var.float())


def test_the_training_is_the_same_with_calibration_and_without() -> None:
    weights = []
    for callbacks in ([], [NormCallback(calibrate="validation", watch_every=1)]):
        pl.seed_everything(3, verbose=False)
        data = loader(32, shuffle=True)
        weights.append(fitted(*callbacks, data=data).net[0].weight)
    assert torch.equal(*weights)


def test_frozen_layers_stay_from_their_epoch_on() -> None:
    callback = NormCallback(freeze_after=1)
    module = fitted(callback, max_epochs=3)
    # After the sanity check, and after epochs 0, 1 and 2.
    start, first, second, third = module.seen
    assert not torch.equal(start, first)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_averaged_weights_get_statistics_of_their_own() -> None:
    averaging = getattr(pl.callbacks, "WeightAveraging", None)
    if averaging is None:
        pytest.skip("this Lightning has no WeightAveraging")
    from torch.optim.swa_utils import get_ema_avg_fn

    callback = NormCallback(calibrate="end")
    average = averaging(avg_fn=get_ema_avg_fn(0.5))
    module = fitted(average, callback)
    weights = module.net[0].weight
    assert torch.equal(weights, average._average_model.module.net[0].weight)
    mean, _ = population(module.net, "1", samples()[0])
    torch.testing.assert_close(module.net[1].running_mean, mean.float())


def test_stochastic_weight_averaging_gets_statistics_of_its_own() -> None:
    averaging = pl.callbacks.StochasticWeightAveraging
    callback = NormCallback(calibrate="end")
    average = averaging(swa_lrs=0.01, swa_epoch_start=1)
    module = fitted(average, callback, max_epochs=4)
    assert torch.equal(module.net[0].weight, average._average_model.net[0].weight)
    mean, _ = population(module.net, "1", samples()[0])
    torch.testing.assert_close(module.net[1].running_mean, mean.float())


def test_an_average_after_the_callback_is_refused() -> None:
    average = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01)
    with pytest.raises(ArgumentError, match="stands after NormCallback"):
        fitted(NormCallback(calibrate="end"), average)


def test_a_module_without_forward_says_what_to_pass() -> None:
    with pytest.raises(ArgumentError, match="defines no forward"):
        fitted(NormCallback(calibrate="end"), module=WithoutForward())
    callback = NormCallback(
        calibrate="end", forward=lambda module, batch: module.net(batch[0])
    )
    fitted(callback, module=WithoutForward())
    assert len(callback.schedule.calibrations) == 1


def test_the_record_goes_to_the_loggers(tmp_path) -> None:
    logger = pl.loggers.CSVLogger(str(tmp_path))
    callback = NormCallback(watch_every=2)
    module = fitted(callback, logger=logger)
    history = callback.schedule.watch.history
    assert history["steps"] == [0, 2, 4]
    assert "net.1" in history["layers"]
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "normkit/weight_norm/net.0" in text
    assert not any(m._forward_hooks for m in module.modules())


def test_hooks_are_gone_after_an_exception() -> None:
    class Failing(Classifier):
        def training_step(self, batch, index):
            if index == 1:
                raise ZeroDivisionError
            return super().training_step(batch, index)

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        fitted(NormCallback(watch_every=1), module=module)
    hooks = (m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    assert not any(hooks)


def test_half_precision_of_the_trainer_is_that_of_the_calibration() -> None:
    callback = NormCallback(calibrate="end")
    fitted(callback, precision="bf16-mixed")
    assert len(callback.schedule.calibrations) == 1
    # In bf16-true the module takes bfloat16, and the loader gives float32.
    callback = NormCallback(calibrate="end")
    fitted(callback, precision="bf16-true")
    assert len(callback.schedule.calibrations) == 1

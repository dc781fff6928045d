"""Hugging Face's Trainer with the callback, on a tiny convolutional model."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from integrations.networks import library, network, population, samples

transformers = library("transformers")
library("accelerate")

from normkit.integrations.transformers import NormCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Classifier(nn.Module):
    """As the models of transformers: called by name, returns a dict with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.seen: list[torch.Tensor] = []

    def forward(self, x, labels=None):
        if not self.training:
            self.seen.append(self.net[1].running_mean.clone())
        scores = self.net(x)
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


class Digits(Dataset):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int):
        x, y = samples()
        return {"x": x[index], "labels": y[index]}


def trained(tmp_path, *callbacks, model=None, **options):
    model = Classifier() if model is None else model
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=96,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_strategy="no",
        **{"num_train_epochs": 2, "eval_strategy": "epoch", **options},
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Digits(),
        eval_dataset=Digits(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("when", ["epoch", "steps"])
def test_an_evaluation_uses_statistics_of_the_training_data(tmp_path, when) -> None:
    callback = NormCallback(calibrate="validation")
    options = {"eval_strategy": when, "eval_steps": 3}
    model = trained(tmp_path, callback, **options).model
    assert len(callback.schedule.calibrations) == 2
    mean, _ = population(model.net, "1", samples()[0])
    torch.testing.assert_close(model.seen[-1], mean.float(), atol=1e-5, rtol=1e-5)


def test_the_last_statistics_are_those_of_the_last_weights(tmp_path) -> None:
    callback = NormCallback(calibrate="end")
    model = trained(tmp_path, callback).model
    assert len(callback.schedule.calibrations) == 1
    mean, var = population(model.net, "1", samples()[0])
    torch.testing.assert_close(model.net[1].running_mean, mean.float())
    torch.testing.assert_close(model.net[1].running_var, var.float())


def test_the_training_is_the_same_with_calibration_and_without(tmp_path) -> None:
    weights = []
    for callbacks in ([], [NormCallback(calibrate="validation", watch_every=1)]):
        transformers.set_seed(3)
        model = trained(tmp_path, *callbacks, gradient_accumulation_steps=2).model
        weights.append(model.net[0].weight)
    assert torch.equal(*weights)


def test_frozen_layers_stay_though_every_step_calls_train(tmp_path) -> None:
    callback = NormCallback(freeze_after=1)
    model = trained(tmp_path, callback, num_train_epochs=3).model
    first, second, third = model.seen
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(first, torch.zeros(8))


def test_every_watched_step_and_update_is_recorded(tmp_path) -> None:
    callback = NormCallback(watch_every=2)
    trained(tmp_path, callback)
    watch = callback.schedule.watch
    assert watch.history["steps"] == [0, 2, 4]
    assert all(v is not None for v in watch.history["layers"]["net.0"]["update_ratio"])

"""The part of the callbacks that no framework has a part in."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from integrations.networks import network, population, samples
from normkit.errors import ArgumentError
from normkit.integrations.schedule import Schedule


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x, lengths):
        return self.norm(x)


def loader(**options) -> DataLoader:
    return DataLoader(TensorDataset(*samples()), batch_size=96, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "does nothing; give one of them"),
        ({"calibrate": "always"}, "must be 'validation', 'end' or None"),
        ({"watch_every": 0}, "watch_every=0 must be at least 1"),
        ({"freeze_after": -1}, "freeze_after=-1 must be at least 0"),
        ({"calibrate": "end", "batches": 0}, "batches=0 must be at least 1"),
    ],
)
def test_options_without_a_meaning_are_refused(options, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        Schedule(**options)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3)), "nothing to calibrate"),
        (TwoInputs(), r"forward=lambda model, batch: model\(batch\[0\], batch\[1\]\)"),
    ],
    ids=["no statistics", "two inputs"],
)
def test_what_cannot_be_calibrated_is_told_as_training_begins(model, told) -> None:
    with pytest.raises(ArgumentError, match=told):
        Schedule(calibrate="end").begin(model, None, loader())


def test_an_iterator_is_refused_as_training_begins() -> None:
    with pytest.raises(ArgumentError, match="an iterator, which ends after one pass"):
        Schedule(calibrate="end").begin(network(), None, iter(loader()))


def test_the_trial_of_a_batch_changes_nothing() -> None:
    model, data = network(), loader(shuffle=True, generator=torch.Generator())
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), data.generator.get_state()
    Schedule(calibrate="end").begin(model, None, data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(data.generator.get_state(), states[1])
    assert model.training


def test_calibration_measures_the_data_and_draws_no_number() -> None:
    model, data = network(), loader(shuffle=True)
    schedule = Schedule(calibrate="validation")
    schedule.begin(model, None, data)
    state = torch.get_rng_state()
    schedule.before_validation(model, data)
    assert torch.equal(torch.get_rng_state(), state)
    (report,) = schedule.calibrations
    mean, var = population(model, "4", samples()[0])
    assert [layer.name for layer in report.layers] == ["1", "5"]
    mean, var = population(model, "5", samples()[0])
    torch.testing.assert_close(model[5].running_mean, mean.float())
    torch.testing.assert_close(model[5].running_var, var.float())


def test_a_layer_that_the_user_froze_is_left_alone_in_a_validation() -> None:
    model, data = network(), loader()
    model[1].eval()
    before = model[1].running_mean.clone()
    schedule = Schedule(calibrate="validation")
    schedule.begin(model, None, data)
    model.eval()
    schedule.before_validation(model, data)
    assert [layer.name for layer in schedule.calibrations[0].layers] == ["5"]
    assert torch.equal(model[1].running_mean, before)


def test_frozen_statistics_stay_under_every_call_of_train() -> None:
    model, (x, y) = network(), samples()
    schedule = Schedule(freeze_after=1)
    schedule.begin(model)
    for epoch in range(3):
        schedule.begin_epoch(model, epoch, None)
        before = model[1].running_mean.clone(), model[0].weight.clone()
        model.train()
        F.cross_entropy(model(x), y).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        moved = not torch.equal(model[1].running_mean, before[0])
        assert moved == (epoch < 1)
        assert not torch.equal(model[0].weight, before[1])
    model.train()(x)
    assert not model[1].training
    # A copy, as an average of the weights is, and a pickle are free.
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.train()[1].training
        assert "train" not in copied[1].__dict__ or copied[1].train().training
    assert not model.train()[1].training
    schedule.end(model, None)
    assert schedule.is_frozen
    # The caller has the model again.
    model.train()(x)
    assert model[1].training


def test_a_compiled_model_stays_frozen() -> None:
    model, (x, _) = network(), samples()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    schedule = Schedule(freeze_after=0)
    schedule.begin(compiled)
    schedule.begin_epoch(compiled, 0, None)
    before = model[1].running_mean.clone()
    for _ in range(2):
        compiled.train()
        compiled(x)
    assert torch.equal(model[1].running_mean, before)
    schedule.close()


def test_freezing_calibrates_a_last_time_and_never_after() -> None:
    model, data = network(), loader()
    schedule = Schedule(calibrate="validation", freeze_after=1)
    schedule.begin(model, None, data)
    schedule.begin_epoch(model, 0, data)
    schedule.before_validation(model, data)
    schedule.begin_epoch(model, 1, data)
    assert len(schedule.calibrations) == 2
    schedule.before_validation(model, data)
    schedule.end(model, data)
    assert len(schedule.calibrations) == 2


@pytest.mark.slow
def test_workers_that_persist_go_on_where_they_were() -> None:
    model, data = network(), DataLoader(
        TensorDataset(*samples()), batch_size=16, num_workers=1, persistent_workers=True
    )  # fmt: skip
    schedule = Schedule(calibrate="validation", batches=1)
    schedule.begin(model, None, data)
    seen = []
    for index, (x, _) in enumerate(data):
        seen.append(x)
        if index == 2:
            schedule.before_validation(model, data)
    assert torch.equal(torch.cat(seen), samples()[0])
    assert schedule.calibrations[0].batches == 1


def test_the_record_of_the_training_is_kept_and_alarms_are_logged(caplog) -> None:
    model, (x, y) = network(), samples()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=1e-2)
    schedule = Schedule(watch_every=2)
    schedule.begin(model, optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with caplog.at_level(logging.WARNING):
        schedule.end(model, None)
    assert schedule.watch is not None
    assert schedule.watch.history["steps"] == [0, 2, 4, 6]
    assert "D14 decayed_scale" in caplog.text
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)

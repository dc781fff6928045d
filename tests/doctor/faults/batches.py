"""What a batch holds: D05, D06, D11 to D13, D30, D33."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from doctor.faults.planting import OFF, STEPS, Program, data, fault, usual
from doctor.models import SEQUENCES, batches, build, digits, norms, train

__all__ = []


@fault("D05", brings=OFF)
def small_batches(net: str, is_bad: bool) -> Program:
    """Batches of four."""
    size = 4 if is_bad else 64
    model = usual(net, size=size)
    made = batches(size)[: 80 if is_bad else 24]
    return Program(model, made, at=frozenset(norms(model)))


_POSITIONS = "a sample has many values per channel, so a batch of one is normalized"


@fault("D06", without=dict.fromkeys(("cnn", "residual", "transformer"), _POSITIONS))
def last_of_one(net: str, is_bad: bool) -> Program:
    """An epoch of 1,345 samples in batches of 64."""
    whole = TensorDataset(*map(torch.cat, zip(*batches(), strict=True)))
    loader = DataLoader(Subset(whole, range(21 * 64 + 1)), 64, drop_last=not is_bad)
    model = usual(net)
    return Program(model, loader, at=frozenset(norms(model)))


@fault("D11", brings=OFF)
def dropout_before(net: str, is_bad: bool) -> Program:
    """Dropout before batch norm."""
    model = usual(net, dropout=0.6 if is_bad else 0.0)
    behind = list(norms(model))[0 if net in SEQUENCES else 1 :]
    return Program(model, data(), at=frozenset(behind))


@fault(
    "D12",
    without={
        "mlp": "a vector has no end that could be padded",
        "residual": "it reads whole images, which are not padded",
        "gru": "its state moves on through padding, so nothing behind it is constant",
    },
)
def padded(net: str, is_bad: bool) -> Program:
    """Sequences of which half is padding, one with convolutions, one with attention."""
    if net == "transformer":
        model = build(net)
        # A position that is told makes the padding differ from place to place.
        nn.init.zeros_(model.position).requires_grad_(False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(
                *(nn.Unflatten(1, (8, 8)), nn.Conv1d(8, 24, 1), nn.BatchNorm1d(24)),
                *(nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 10)),
            )
    made = []
    for x, y in data():
        rows = x.view(-1, 8, 8).clone()
        if is_bad and net == "transformer":
            rows[:, 4:] = 0
        elif is_bad:
            rows[..., 4:] = 0
        made.append((rows.flatten(1), y))
    train(model, 72, data=made)
    return Program(model, made, at=frozenset(norms(model)))


@fault("D13", brings={"D02": "the statistics of such a batch give its classes away"})
def by_class(net: str, is_bad: bool) -> Program:
    """Batches in the order of the classes."""
    x, y = digits()
    parts = y.argsort(stable=True).split(64)
    ordered = [(x[i], y[i]) for i in parts if len(i) == 64]
    model = usual(net)
    return Program(model, ordered if is_bad else data(), at=frozenset(norms(model)))


@fault("D30", brings={**OFF, "D05": "batches of four are small on any rank"})
def ranks_apart(net: str, is_bad: bool) -> Program:
    """Two ranks with four samples each."""

    def two_ranks() -> AbstractContextManager[Any]:
        return mock.patch(
            "normkit.doctor.examination.examine._world_size", return_value=2
        )

    made = small_batches(net, is_bad)
    return Program(made.model, made.data, meanwhile=two_ranks, at=made.at)


class TwoDomains(nn.Module):
    """One network for a sample, and for the same in another light."""

    def __init__(self, model: nn.Module, shift: float) -> None:
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.model(x + self.shift)


@fault(
    "D33",
    brings={
        "D02": "eval mode has one average for what training normalizes apart",
        "D01": "the average of two domains is that of neither",
    },
)
def one_norm_for_two_domains(net: str, is_bad: bool) -> Program:
    """Two domains through the same layers."""
    model = TwoDomains(build(net), 4.0 if is_bad else 0.0)
    train(model, 2 * STEPS[net])
    return Program(model, data(), at=frozenset(norms(model)))

"""Common parts of the healthy programs of still_runs.py: register, tables, decay."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from calm_base import Data
from quiet_base import Training, digits
from torch import Tensor, nn

__all__ = ["PROGRAMS", "decayed", "dense", "program", "scaled_digits", "table"]

PROGRAMS: dict[str, Callable[[], Training]] = {}


def program(build: Callable[[], Training]) -> Callable[[], Training]:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build


def scaled_digits() -> tuple[Data, Data]:
    """Return the digits with the mean 0 and variance 1 of the training images."""
    train, test = digits()
    mean, std = train[0].mean(), train[0].std()
    return ((train[0] - mean) / std, train[1]), ((test[0] - mean) / std, test[1])


def table(load: Callable[..., Any], train: int) -> tuple[Data, Data]:
    """Return a data set of sklearn in random order, columns standardized."""
    x, y = load(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(5))
    x, y = torch.tensor(x, dtype=torch.float32)[order], torch.tensor(y)[order]
    x = (x - x[:train].mean(0)) / x[:train].std(0)
    return (x[:train], y[:train]), (x[train:], y[train:])


def dense(*widths: int, act: Callable[[], nn.Module]) -> list[nn.Module]:
    """Return linear layers, each followed by an activation."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), act()]
    return layers


def decayed(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return groups of parameters: weights are decayed, vectors are not."""
    weights: list[Tensor] = [p for p in model.parameters() if p.ndim > 1]
    vectors: list[Tensor] = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]

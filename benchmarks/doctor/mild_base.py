"""Common parts of the healthy programs of mild_runs.py: register, ranking, views."""

from __future__ import annotations

from collections.abc import Callable

import torch
from quiet_base import Training
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PROGRAMS", "auc", "program", "shifted"]

PROGRAMS: dict[str, Callable[[], Training]] = {}


def program(build: Callable[[], Training]) -> Callable[[], Training]:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build


def auc(score: Tensor, is_positive: Tensor) -> float:
    """Return the area under the ROC curve."""
    rank = torch.empty(len(score))
    rank[score.argsort()] = torch.arange(1.0, len(score) + 1)
    p = int(is_positive.sum())
    n = len(score) - p
    return float((rank[is_positive].sum() - p * (p + 1) / 2) / (p * n))


def shifted(x: Tensor, most: int) -> Tensor:
    """Return images `(N, C, H, W)`, each moved by up to `most` pixels on its own."""
    n, _, height, width = x.shape
    padded = F.pad(x, (most, most, most, most))
    rows = torch.randint(2 * most + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * most + 1, (n, 1)) + torch.arange(width)
    which = torch.arange(n)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]]
    return moved.permute(0, 3, 1, 2)

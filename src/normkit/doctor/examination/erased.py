"""Mean and size of samples: taken away by a norm, though the targets depend on them.

Instance, layer and group norm right behind the input remove the mean of a sample, and
its size. That is no fault where the targets do not depend on them, and none where the
answers get them back. So two facts are asked for together: the answers stay where they
are when all inputs are shifted, or scaled; and the mean of a sample, or the logarithm
of its standard deviation, explains its target far better than the answers do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from normkit.doctor.measurements import Erased
from normkit.modeling.batch import num_samples

__all__ = ["erased"]

# Of 32 samples a square of a correlation is above .5 by chance in 6 of a million cases.
MIN_SIZE, EXPLAINED = 32, 0.5
# Share of the error of the answers that may be left beside it, or their share in what
# it explains: a regression of one number then does twice as well.
HALF = 0.5
# Columns of targets that are looked at.
MAX_COLUMNS = 64


def erased(
    answers: Callable[[Any], Tensor | None], batch: Any, whole: Tensor, targets: Any
) -> Erased | None:
    """Return the mean or the size of the samples, where it explains a target.

    Of the two the one whose change moves the answers less.

    Args:
        answers: The model in eval mode, from a batch to its answers.
        batch: A batch.
        whole: The answers to it.
        targets: Its targets.
    """
    size = num_samples(batch)
    x = next((v for v in tree_leaves(batch) if isinstance(v, Tensor)), None)
    if x is None or not x.is_floating_point() or x.dim() < 2 or x is targets:
        return None
    if not len(x) == len(whole) == size >= MIN_SIZE or x[0].numel() < 2:
        return None
    pairs = _columns(whole, targets)
    if pairs is None:
        return None
    told, wanted = pairs
    values = x.double().flatten(1)
    mean, size_of = values.mean(1), values.std(1).clamp(min=1e-300).log()
    step = float(mean.std())
    found: list[Erased] = []
    for what, known, change in (
        ("mean", mean, lambda v: v + step),
        ("size", size_of, lambda v: 2 * v),
    ):
        by_it, by_answers = _explained(known[:, None], wanted), _explained(told, wanted)
        column = int((by_it - by_answers).argmax())
        own, other = float(by_it[column]), float(by_answers[column])
        is_twice = other < HALF * own or 1 - own < HALF * (1 - other)
        if not (own > EXPLAINED and is_twice):
            continue
        moved = answers(tree_map(lambda v, c=change: c(v) if v is x else v, batch))
        if moved is None or moved.shape != whole.shape:
            continue
        spread = (whole.double() - whole.double().mean(0)).square().mean().sqrt()
        away = (moved.double() - whole.double()).square().mean().sqrt()
        if spread > 0:
            found.append(Erased(what, float(away / spread), own, other))
    return min(found, key=lambda each: each.change, default=None)


def _columns(whole: Tensor, targets: Any) -> tuple[Tensor, Tensor] | None:
    """Return answers and targets `(N, K)`, each column beside its own."""
    if not isinstance(targets, Tensor) or len(targets) != len(whole):
        return None
    if targets.is_floating_point():
        if targets.numel() != whole.numel():
            return None
        wanted = targets
    else:
        if targets.dim() != 1 or whole.dim() != 2 or int(targets.min()) < 0:
            return None
        if int(targets.max()) >= whole.shape[1]:
            return None
        wanted = F.one_hot(targets.long(), whole.shape[1])
    told = whole.double().reshape(len(whole), -1)[:, :MAX_COLUMNS]
    return told, wanted.double().reshape(len(whole), -1)[:, :MAX_COLUMNS]


def _explained(known: Tensor, wanted: Tensor) -> Tensor:
    """Return the squares of the correlations of columns; 0 where one is constant."""
    a, b = known - known.mean(0), wanted - wanted.mean(0)
    square = (a * b).mean(0).square() / (a.square().mean(0) * b.square().mean(0))
    return torch.where(square.isfinite(), square, 0.0)

"""The learning rate of each step, and the second moments in an optimizer's state.

The rates are numbers that a step reads anyway. The state is read once, when a record is
judged: its averages stand for the last steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normkit.doctor.optimizer_statistics import OptimizerStatistics

__all__ = ["Rates", "optimizer_statistics"]

# Part of the largest rate below which a step is none beside those at it.
GONE = 1e-3
# The first rate over the largest of a warm-up.
RISEN = 0.1
# √v̂ / eps below which a step is less than a tenth of what it is without eps.
DAMPED = 0.1


class Rates:
    """The largest learning rate of each step, summed."""

    def __init__(self) -> None:
        self.total = 0.0
        self.largest = 0.0
        self.gone = 0
        self.made = 0
        self.first: float | None = None
        self.largest_at = 0
        self.planned: float | None = None
        self.changes = 0
        self._last: float | None = None

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the rate of a step: that of the group with the largest."""
        rate = 0.0
        for group in optimizer.param_groups:
            found = group.get("lr", 0.0)
            # On a GPU it would be waited for.
            if isinstance(found, Tensor) and not found.is_cpu:
                return
            rate = max(rate, float(found))
            planned = group.get("max_lr")  # of OneCycleLR and CyclicLR
            if isinstance(planned, float | int):
                self.planned = max(self.planned or 0.0, float(planned))
        self.changes += self._last not in (None, rate)
        self._last = rate
        self.made += 1
        self.first = rate if self.first is None else self.first
        self.total += rate
        if rate > self.largest:
            self.largest, self.gone, self.largest_at = rate, 0, self.made
        elif rate < GONE * self.largest:
            self.gone += 1

    @property
    def is_rising(self) -> bool:
        """True where the last rate is the largest, and far above the first."""
        is_last = 0 < self.largest_at == self.made
        return is_last and (self.first or 0.0) < RISEN * self.largest

    @property
    def full_steps(self) -> float:
        """The steps at the largest rate that go as far as all together."""
        return self.total / self.largest if self.largest else 0.0


@torch.no_grad()
def optimizer_statistics(
    optimizer: torch.optim.Optimizer, rates: Rates
) -> OptimizerStatistics:
    """Return the statistics of an optimizer after the steps whose rates are given."""
    damped = elements = 0
    largest = None
    for eps, unit, square in _second_moments(optimizer):
        largest = max(eps, largest or 0.0)
        has_gradient = square > 0
        elements += int(has_gradient.sum())
        damped += int((has_gradient & (square < (DAMPED * eps * unit) ** 2)).sum())
    return OptimizerStatistics(
        rates.full_steps,
        rates.gone,
        largest,
        damped / elements if elements else 0.0,
        is_rising=rates.is_rising,
        planned=rates.planned / rates.largest
        if rates.planned and rates.largest
        else None,
        changes=rates.changes,
    )


def _second_moments(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[float, float, Tensor]]:
    """Yield eps, its unit and the mean squared gradients of each parameter.

    Adam divides the average by 1 − β₂ⁿ: a young one is smaller than what the step uses,
    in the unit √(1 − β₂ⁿ).
    """
    for group in optimizer.param_groups:
        eps, betas = group.get("eps"), group.get("betas")
        if not isinstance(eps, float | int):
            continue
        for parameter in group["params"]:
            held: dict[str, Any] = optimizer.state.get(parameter, {})
            key = "exp_avg_sq" if betas is not None else "square_avg"
            square, step = held.get(key), held.get("step", 0)
            # Those that are sharded would need the other ranks.
            if type(square) is not Tensor or not square.is_floating_point():
                continue
            unit = 1.0
            if betas is not None:
                unit = math.sqrt(1 - float(betas[1]) ** max(float(step), 1.0))
            yield float(eps), unit, square

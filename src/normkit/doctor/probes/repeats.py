"""Count the different samples that the first calls of a training get."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from normkit.doctor.probes.tensor_statistics import is_traced

__all__ = ["Repeats"]

# Calls whose inputs are told apart, and the values of each that are read.
MOST, MAX_VALUES = 200, 4096
# Calls whose values are looked at for whole numbers.
LOOKED_AT = 10
# Values of a sample that are read where a batch has very many samples.
LEAST_VALUES = 16
# Samples of a batch and batches from which their order is judged.
LEAST_SAMPLES, LEAST_BATCHES = 4, 50
# How often a batch comes that comes again and again, and the values of a sample from
# which few different ones in other batches are few data.
TIMES, LEAST_WIDTH = 20, 16
# Added to squares, whose logarithm is taken.
TINY = 1e-12


class Repeats:
    """One weighted sum over each row of the first tensor of the first calls.

    Attributes:
        dims: Dimensions of that tensor.
        width: Values of a sample.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._counts: list[Tensor] = []
        self.dims = self.width = 0

    @property
    def are_counts(self) -> bool:
        """True where all values are whole numbers, as tokens or states of a game."""
        return bool(self._counts) and all(map(bool, self._counts))

    @property
    def batches(self) -> int:
        """Number of different batches that were read."""
        return len({tuple(sums.float().tolist()) for sums in self._sums})

    @property
    def calls(self) -> int:
        """Number of calls whose inputs were read."""
        return len(self._sums)

    @property
    def samples(self) -> int:
        """Number of samples that were read."""
        return sum(map(len, self._sums))

    @property
    def different(self) -> int:
        """Number of different samples among them."""
        if not self._sums:
            return 0
        # Sums of equal rows may differ in the last digits of float64.
        return len(torch.cat([sums.float().cpu() for sums in self._sums]).unique())

    @property
    def repeated(self) -> int:
        """Number of samples that come again and again; 0 where that tells nothing.

        Those of whole batches, or drawn in others. Samples of few numbers, or of whole
        ones, may be few by nature, as the states of a game are.
        """
        batches = self.batches
        if not batches:
            return 0
        if batches * TIMES <= self.calls:
            return round(batches * self.samples / self.calls)
        is_of_states = self.are_counts or self.width < LEAST_WIDTH
        return 0 if is_of_states else self.different

    def order(self) -> tuple[float, float]:
        """Return how the batches differ, by a weighted sum of each sample or its size.

        Signals of any phase, such as sound, have sums of zero mean, and differ in size.

        The variance between batch means over that of random batches (F), and the
        correlation of each batch's mean with the one before, of the two where F is
        larger; nan without enough calls.
        """
        found = [_order(self._sums), _order(self._sizes)]
        known = [pair for pair in found if not math.isnan(pair[0])]
        return max(known, default=found[0])

    @torch.no_grad()
    def add(self, args: Any, kwargs: Any) -> None:
        """Read the inputs of a call."""
        if len(self._sums) == MOST:
            return
        given = args[0] if args and isinstance(args[0], Tensor) else None
        if given is None:
            leaves = tree_leaves((args, kwargs))
            given = next((x for x in leaves if isinstance(x, Tensor)), None)
        if given is None or type(given) is not Tensor or not given.numel():
            return
        if is_traced(given) or given.is_complex() or given.layout != torch.strided:
            return
        self.dims = given.dim()
        rows = given.flatten(1) if given.dim() > 1 else given.reshape(-1, 1)
        self.width = rows.shape[1]
        most = max(MAX_VALUES // len(rows), LEAST_VALUES)
        rows = rows[:, :: math.ceil(rows.shape[1] / most)].to(_dtype(rows))
        if len(self._counts) < LOOKED_AT:
            self._counts.append((rows == rows.round()).all())
        weights = _weights(rows.shape[1], rows.device, rows.dtype)
        self._sums.append(rows @ weights)
        self._sizes.append(rows.square().sum(1).add(TINY).log())


def _order(numbers: list[Tensor]) -> tuple[float, float]:
    """Return F of one number for each sample, and how each batch follows the last."""
    batches = [s.double().cpu() for s in numbers if len(s) >= LEAST_SAMPLES]
    if len(batches) < LEAST_BATCHES:
        return math.nan, math.nan
    means = torch.stack([b.mean() for b in batches])
    within = torch.stack([b.var() / len(b) for b in batches]).mean()
    if not within > 0 or not means.var() > 0:
        return math.nan, math.nan
    pairs = torch.stack([means[1:], means[:-1]])
    return float(means.var() / within), float(torch.corrcoef(pairs)[0, 1])


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


@functools.lru_cache(maxsize=8)
def _weights(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers that tell values in another order apart."""
    return torch.arange(1, count + 1, device=device, dtype=dtype).sin()

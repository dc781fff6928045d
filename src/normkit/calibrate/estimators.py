"""Three estimates of the statistics of the whole data from those of its batches.

With n_b values in batch b, of mean μ_b and unbiased variance σ²_b,

    exact     the merge of all batches: every value counts the same
    average   mean_b μ_b and mean_b σ²_b: every batch counts the same   (BN paper)
    running   r ← (1 − momentum)·r + momentum·batch, batch after batch  (torch)

Only `exact` includes the variance between batch means and weights a short batch by
its size. Standard errors take batches, not values, as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.calibrate.layers import Layer, Seen
from normkit.moments import Moments
from normkit.sync import merge_all_over, sum_over
from normkit.sync.groups import Group

__all__ = ["Average", "Estimate", "Estimator", "Exact", "Running", "merge_estimators"]


@dataclass(frozen=True)
class Estimate:
    """Statistics of a population, in float64, shape `(C,)`.

    Attributes:
        mean: The estimated mean.
        var: The estimated unbiased variance.
        count: Values per channel that it rests on.
        mean_error: Standard error of `mean`; None where it is not defined.
        var_error: Standard error of `var`; likewise.
    """

    mean: Tensor
    var: Tensor
    count: Tensor
    mean_error: Tensor | None = None
    var_error: Tensor | None = None


class _Spread:
    """Sums that give the sampling error of weighted batch statistics.

    For batch b of weight w, a = μ_b − pivot and s = its second moment (or variance),
    the sums of w, [w > 0] and w²·(1, a, a², s, a·s, s²) give the sampling error of
    Σwa/Σw and of any combination of a and s, without keeping batches.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.sums = torch.zeros(8, channels, dtype=torch.float64, device=device)

    def add(self, w: Tensor, a: Tensor, s: Tensor) -> None:
        has_weight = (w > 0).to(torch.float64)
        w2 = w * w
        # Where the weight is 0 the statistics may be nan: they do not exist.
        a = torch.where(w > 0, a, torch.zeros_like(a))
        s = torch.where(w > 0, s, torch.zeros_like(s))
        terms = (w, has_weight, w2, w2 * a, w2 * a * a, w2 * s, w2 * a * s, w2 * s * s)
        self.sums += torch.stack([term.expand(a.shape) for term in terms])

    def residuals(self, a0: Tensor, s0: Tensor, k: Tensor) -> Tensor:
        """Return Σ[w > 0], Σw²(a − a0)², Σw²((s − s0) − k(a − a0))², shape `(3, C)`."""
        _, batches, w2, wa, waa, ws, was, wss = self.sums
        aa = waa - 2 * a0 * wa + a0 * a0 * w2
        ss = wss - 2 * s0 * ws + s0 * s0 * w2
        cross = was - a0 * ws - s0 * wa + a0 * s0 * w2
        both = ss - 2 * k * cross + k * k * aa
        return torch.stack([batches, aa.clamp(min=0), both.clamp(min=0)])


class Estimator:
    """Base of the three estimators: takes the calls of one layer, batch by batch."""

    def __init__(self, layer: Layer) -> None:
        mean = layer.module.running_mean
        assert isinstance(mean, Tensor)
        self.layer = layer
        self.batches = 0
        self.total = Moments.empty(
            (mean.numel(),), dtype=torch.float64, device=mean.device
        )
        self._pivot: Tensor | None = None
        self._spread = _Spread(mean.numel(), mean.device)

    def add(self, calls: Sequence[Seen]) -> None:
        """Add what a layer saw in one batch, in the order of its calls."""
        self.batches += 1
        batch = calls[0].moments
        for call in calls[1:]:
            batch = batch.merge(call.moments)
        self.total = self.total.merge(batch)
        if self._pivot is None:
            self._pivot = calls[0].mean.clone()
        self._add(calls, batch, self._pivot)

    def _add(self, calls: Sequence[Seen], batch: Moments, pivot: Tensor) -> None:
        raise NotImplementedError

    def estimate(self) -> Estimate:
        """Return the estimate from all batches so far."""
        raise NotImplementedError

    def _errors(self, residuals: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        batches, aa, ss = residuals
        # Fewer than two batches say nothing of their spread.
        factor = torch.where(batches > 1, batches / (batches - 1), math.nan)
        total = total.clamp(min=1e-300)
        return (factor * aa).sqrt() / total, (factor * ss).sqrt() / total


class Exact(Estimator):
    """The merged moments of all values, independent of the cut into batches."""

    residuals: Tensor | None = None

    def _add(self, calls: Sequence[Seen], batch: Moments, pivot: Tensor) -> None:
        a = batch.mean - pivot
        self._spread.add(batch.count.to(torch.float64), a, batch.var + a * a)

    def local_residuals(self) -> Tensor:
        """Return this rank's residuals around the totals, which may be of all ranks."""
        pivot = self.total.mean if self._pivot is None else self._pivot
        a0 = self.total.mean - pivot
        return self._spread.residuals(a0, self.total.var + a0 * a0, 2 * a0)

    def estimate(self) -> Estimate:
        """Return the merged moments, with the unbiased variance m2/(n − 1)."""
        residuals = self.residuals
        if residuals is None:
            residuals = self.local_residuals()
        total = self.total.count.to(torch.float64)
        mean_error, var_error = self._errors(residuals, total)
        count = self.total.count.expand(self.total.mean.shape)
        return Estimate(
            self.total.mean, self.total.unbiased_var, count, mean_error, var_error
        )


class Average(Estimator):
    """The plain average of the batches' means and unbiased variances.

    Weighted by the number of instances when `by_weight`: the exact statistics of
    instance norm, which has a mean and a variance per instance.
    """

    def __init__(self, layer: Layer, *, by_weight: bool) -> None:
        super().__init__(layer)
        zeros = torch.zeros_like(self.total.mean)
        self.by_weight = by_weight
        # Σw·μ, Σw·σ², Σw and Σw where there is a variance
        self.sums = [zeros, zeros, zeros, zeros]
        self.residuals: Tensor | None = None

    def _add(self, calls: Sequence[Seen], batch: Moments, pivot: Tensor) -> None:
        weight = sum((call.weight for call in calls), torch.zeros_like(batch.mean))
        share = weight.clamp(min=1e-300)
        if self.layer.is_instance:
            mean = sum(
                (call.mean * call.weight / share for call in calls),
                torch.zeros_like(batch.mean),
            )
            var = sum(
                (call.var * call.weight / share for call in calls),
                torch.zeros_like(batch.mean),
            )
        else:
            mean, var = batch.mean, batch.unbiased_var
        w = weight if self.by_weight else (weight > 0).to(torch.float64)
        has_var = torch.where(var.isnan(), torch.zeros_like(w), w)
        known = torch.nan_to_num(var, nan=0.0)
        new = (w * mean, has_var * known, w, has_var)
        self.sums = [old + term for old, term in zip(self.sums, new, strict=True)]
        self._spread.add(has_var, mean - pivot, known)

    def local_residuals(self) -> Tensor:
        """Return this rank's residuals around the averages, maybe of all ranks."""
        mean, var = self._averages()
        pivot = mean if self._pivot is None else self._pivot
        return self._spread.residuals(mean - pivot, var, torch.zeros_like(var))

    def _averages(self) -> tuple[Tensor, Tensor]:
        mean, var, weight, with_var = self.sums
        return mean / weight, var / with_var

    def estimate(self) -> Estimate:
        """Return the averages; batches of one value per channel add no variance."""
        residuals = self.residuals
        if residuals is None:
            residuals = self.local_residuals()
        mean, var = self._averages()
        mean_error, var_error = self._errors(residuals, self.sums[3])
        count = self.total.count.expand(mean.shape)
        return Estimate(mean, var, count, mean_error, var_error)


class Running(Estimator):
    """torch's exponential moving average, from the statistics that are there.

    One update per call, as in training. momentum=None averages all calls so far, those
    counted in `num_batches_tracked` included.
    """

    def __init__(self, layer: Layer, momentum: float | None) -> None:
        super().__init__(layer)
        module = layer.module
        assert isinstance(module.running_mean, Tensor)
        assert isinstance(module.running_var, Tensor)
        self.momentum = momentum
        self.mean = module.running_mean.detach().to(torch.float64).reshape(-1).clone()
        self.var = module.running_var.detach().to(torch.float64).reshape(-1).clone()
        tracked = module.num_batches_tracked
        self.tracked = 0 if tracked is None else int(tracked)
        self.calls = 0

    def _add(self, calls: Sequence[Seen], batch: Moments, pivot: Tensor) -> None:
        for call in calls:
            self.calls += 1
            rate = self.momentum
            if rate is None:
                rate = 1.0 / (self.tracked + self.calls)
            has_value = call.weight > 0
            moved = (1 - rate) * self.mean + rate * call.mean
            self.mean = torch.where(has_value, moved, self.mean)
            moved = (1 - rate) * self.var + rate * call.var
            self.var = torch.where(has_value & ~call.var.isnan(), moved, self.var)

    def estimate(self) -> Estimate:
        """Return the current averages."""
        return Estimate(self.mean, self.var, self.total.count.expand(self.mean.shape))


def merge_estimators(estimators: Sequence[Estimator], group: Group) -> None:
    """Merge the estimators over the ranks, in place, so that all hold all batches.

    Four collectives, for any number of layers and ranks: the merge, the same around
    the merged means (so that offsets cancel nothing), the plain sums, the residuals.
    """
    if not estimators:
        return
    device = estimators[0].total.mean.device
    # A count per channel on every rank: one rank's mask may make it so on that alone.
    parts = [
        Moments(t.count.expand(t.mean.shape).to(torch.float64), t.mean, t.m2)
        for t in (estimator.total.to(device=device) for estimator in estimators)
    ]
    pivots = [part.mean for part in merge_all_over(parts, group)]
    totals = merge_all_over(parts, group, pivots=pivots)
    batches = torch.tensor([float(e.batches) for e in estimators], device=device)
    averages = [e for e in estimators if isinstance(e, Average)]
    sums = [term.to(device) for e in averages for term in e.sums]
    batches, *sums = sum_over([batches, *sums], group)
    for i, (estimator, total) in enumerate(zip(estimators, totals, strict=True)):
        estimator.batches = round(float(batches[i]))
        is_whole = not estimator.total.count.is_floating_point()
        home = estimator.total.mean.device
        count = total.count.round().long() if is_whole else total.count
        estimator.total = Moments(count, total.mean, total.m2).to(device=home)
    for i, estimator in enumerate(averages):
        home = estimator.total.mean.device
        estimator.sums = [term.to(home) for term in sums[4 * i : 4 * i + 4]]
    errors = [e for e in estimators if isinstance(e, Exact | Average)]
    residuals = [e.local_residuals().to(device) for e in errors]
    for estimator, residual in zip(errors, sum_over(residuals, group), strict=True):
        estimator.residuals = residual.to(estimator.total.mean.device)

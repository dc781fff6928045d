"""Per-channel statistics of a layer's inputs, a histogram, the effect of padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.moments import Moments

__all__ = [
    "MIN_EFFECTIVE_BATCHES",
    "ChannelStatistics",
    "Histogram",
    "Padding",
]

# The variance of the means of 8 batches is known to √(2/7) = 53 %: enough to tell one
# independent value per batch from many.
MIN_EFFECTIVE_BATCHES = 8


@dataclass(frozen=True)
class ChannelStatistics:
    """Per-channel statistics of one batch norm's inputs, merged over batches.

    The spread within batches is kept apart from the spread of all values, because
    n_eff = var / Var(batch mean) is the number of independent values in a batch.

    Attributes:
        pooled: Moments of all values per channel, shape `(C,)`, float64.
        within: Σ over batches of the m2 inside each batch, shape `(C,)`.
        batch_means: Moments of the batch means; its count is the number of batches.
        sample_means: Moments of the per-sample means over all samples.
        sample_within: Σ over batches of the m2 of the sample means inside each batch.
        values: Fewest values per channel in one batch.
        samples: Fewest samples in one batch.
        lengths: Fewest and most positions per sample, of inputs `(N, C, L)`; (0, 0)
            for other inputs.
    """

    pooled: Moments
    within: Tensor
    batch_means: Moments
    sample_means: Moments
    sample_within: Tensor
    values: int
    samples: int
    lengths: tuple[int, int] = (0, 0)

    @property
    def values_per_sample(self) -> float:
        """Values per channel and sample: the positions, for a convolution."""
        samples = float(self.sample_means.count.max())
        return float(self.pooled.count.max()) / samples if samples else 0.0

    @property
    def samples_per_batch(self) -> float:
        """Mean number of samples in a batch."""
        return float(self.sample_means.count.max()) / self.batches

    @property
    def batches(self) -> int:
        """Number of batches."""
        return int(self.batch_means.count.max())

    @classmethod
    def of_batch(
        cls,
        values: Moments,
        sample_means: Moments,
        length: int = 0,
    ) -> ChannelStatistics:
        """Return the statistics of one batch from the moments of its values."""
        values = values.to(dtype=torch.float64)
        sample_means = sample_means.to(dtype=torch.float64)
        one = torch.ones((), dtype=torch.int64, device=values.mean.device)
        return cls(
            pooled=values,
            within=values.m2,
            batch_means=Moments(one, values.mean, torch.zeros_like(values.m2)),
            sample_means=sample_means,
            sample_within=sample_means.m2,
            values=int(values.count.min()),
            samples=int(sample_means.count.min()),
            lengths=(length, length),
        )

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Return the statistics of both sets of batches together."""
        return ChannelStatistics.merge_all([self, other])

    @classmethod
    def merge_all(cls, parts: Sequence[ChannelStatistics]) -> ChannelStatistics:
        """Return the statistics of all batches together, in one step."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            pooled=Moments.merge_all(p.pooled for p in parts),
            within=torch.stack([p.within for p in parts]).sum(0),
            batch_means=Moments.merge_all(p.batch_means for p in parts),
            sample_means=Moments.merge_all(p.sample_means for p in parts),
            sample_within=torch.stack([p.sample_within for p in parts]).sum(0),
            values=min(p.values for p in parts),
            samples=min(p.samples for p in parts),
            lengths=(
                min(p.lengths[0] for p in parts),
                max(p.lengths[1] for p in parts),
            ),
        )

    def to(self, device: torch.device | str) -> ChannelStatistics:
        """Return a copy on `device`."""
        return ChannelStatistics(
            self.pooled.to(device=device),
            self.within.to(device),
            self.batch_means.to(device=device),
            self.sample_means.to(device=device),
            self.sample_within.to(device),
            self.values,
            self.samples,
            self.lengths,
        )


@dataclass(frozen=True)
class Histogram:
    """Counts of values per bin; values beyond an end count in the last bin.

    Attributes:
        low: Lower edge of the first bin.
        high: Upper edge of the last bin.
        counts: Values per bin, all of one width, shape `(bins,)`.
    """

    low: float
    high: float
    counts: Tensor

    @property
    def edges(self) -> list[float]:
        """Edges of the bins, one more than there are bins."""
        step = (self.high - self.low) / len(self.counts)
        return [self.low + i * step for i in range(len(self.counts) + 1)]


@dataclass(frozen=True)
class Padding:
    """The effect of the constant ends of sequences on one batch norm's statistics.

    Attributes:
        share: Share of positions in a constant end.
        shift: |mean with them − mean without| / sd without, mean over channels.
        var_ratio: var with them / var without, geometric mean over channels.
    """

    share: float
    shift: float
    var_ratio: float

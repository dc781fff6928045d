"""The values that the checks read: what was measured, and nothing of the model.

A `Statistics` is made by `diagnose` (frozen weights, several passes over the same
batches), by `watch` (while the weights move), or by hand in a test. What was not
measured is None, and a check that needs it answers "not judged".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from normkit.moments import Moments

__all__ = [
    "ChannelStream",
    "Evaluation",
    "LayerStatistics",
    "NormStatistics",
    "Role",
    "Statistics",
    "WeightStatistics",
]

Role = Literal["weight", "norm", "activation", "other"]


@dataclass(frozen=True)
class ChannelStream:
    """What one batch norm saw, batch by batch, merged.

    Keeping the spread within batches apart from the whole tells how well one batch
    speaks for all: n_eff = var / Var(batch mean) is the number of independent values
    that a batch of this layer amounts to.

    Attributes:
        pooled: Moments of all values per channel, shape `(C,)`, float64.
        within: Σ over batches of the m2 inside each batch, shape `(C,)`.
        batch_means: Moments of the batch means; its count is the number of batches.
        sample_means: Moments of the per-sample means over all samples.
        sample_within: Σ over batches of the m2 of the sample means inside each batch.
        values: Fewest values per channel that one batch held.
        samples: Fewest samples that one batch held.
    """

    pooled: Moments
    within: Tensor
    batch_means: Moments
    sample_means: Moments
    sample_within: Tensor
    values: int
    samples: int

    @property
    def batches(self) -> int:
        """Number of batches seen."""
        return int(self.batch_means.count)

    @classmethod
    def of_batch(
        cls,
        values: Moments,
        sample_means: Moments,
    ) -> ChannelStream:
        """The stream after one batch: its values' and its sample means' moments."""
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
        )

    def merge(self, other: ChannelStream) -> ChannelStream:
        """Both streams, as one after the other."""
        return ChannelStream(
            pooled=self.pooled.merge(other.pooled),
            within=self.within + other.within,
            batch_means=self.batch_means.merge(other.batch_means),
            sample_means=self.sample_means.merge(other.sample_means),
            sample_within=self.sample_within + other.sample_within,
            values=min(self.values, other.values),
            samples=min(self.samples, other.samples),
        )

    def to(self, device: torch.device | str) -> ChannelStream:
        """The same on `device`."""
        return ChannelStream(
            self.pooled.to(device=device),
            self.within.to(device),
            self.batch_means.to(device=device),
            self.sample_means.to(device=device),
            self.sample_within.to(device),
            self.values,
            self.samples,
        )


@dataclass(frozen=True)
class NormStatistics:
    """A normalization layer that keeps running statistics.

    Attributes:
        momentum: Rate of the running average; None for the cumulative average.
        eps: Added to the variance.
        tracked: Batches that entered the running statistics; None when unknown.
        frozen: The layer keeps its statistics on purpose, so they cannot be stale.
        running_mean: Shape `(C,)`, float64.
        running_var: Shape `(C,)`, float64.
        stream: Inputs under batch statistics, everything else as in training.
        quiet: The same with dropout off; None when there is no difference.
        evaluated: Inputs in eval mode.
    """

    momentum: float | None
    eps: float
    tracked: int | None
    frozen: bool
    running_mean: Tensor
    running_var: Tensor
    stream: ChannelStream | None = None
    quiet: ChannelStream | None = None
    evaluated: ChannelStream | None = None


@dataclass(frozen=True)
class WeightStatistics:
    """A layer's weight, its gradient and its last updates.

    Attributes:
        norm: ‖w‖.
        gradient_norm: ‖dL/dw‖ per batch, in order; empty when never seen.
        update_ratio: ‖Δw‖ / ‖w‖ per optimizer step, in order; empty when never seen.
    """

    norm: float
    gradient_norm: tuple[float, ...] = ()
    update_ratio: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerStatistics:
    """One layer, in the order of execution.

    Attributes:
        name: Dotted name.
        kind: Name of its class.
        role: What it is for: "weight", "norm", "activation" or "other".
        is_output: What it returns is what the model returns.
        samples: Samples seen.
        input: Moments of all input values, scalars.
        output: Moments of all output values, scalars.
        gradient_norm: ‖dL/d output‖ per batch, in order; empty when never seen.
        saturated: Share of values where the slope is below 5 % of its greatest,
            per observation, in order; empty where saturation has no meaning.
        norm: Set for layers that keep running statistics.
        weight: Set for layers with a weight matrix.
    """

    name: str
    kind: str
    role: Role
    is_output: bool = False
    samples: int = 0
    input: Moments | None = None
    output: Moments | None = None
    gradient_norm: tuple[float, ...] = ()
    saturated: tuple[float, ...] = ()
    norm: NormStatistics | None = None
    weight: WeightStatistics | None = None

    @property
    def output_rms(self) -> float:
        """√ of the mean square of the outputs; nan when never seen."""
        if self.output is None:
            return float("nan")
        return float(self.output.mean_square.sqrt())


@dataclass(frozen=True)
class Evaluation:
    """Loss and metric of the same batches under two sets of statistics.

    Attributes:
        samples: Samples per batch.
        batch_loss: Loss per batch under batch statistics, dropout off.
        running_loss: Loss per batch in eval mode.
        batch_metric: Metric per batch under batch statistics; empty without a metric.
        running_metric: Metric per batch in eval mode.
    """

    samples: tuple[int, ...]
    batch_loss: tuple[float, ...]
    running_loss: tuple[float, ...]
    batch_metric: tuple[float, ...] = ()
    running_metric: tuple[float, ...] = ()

    def mean(self, values: tuple[float, ...]) -> float:
        """Mean over samples of a per-batch series; nan when it is empty."""
        if not values:
            return float("nan")
        pairs = zip(self.samples, values, strict=True)
        return sum(n * v for n, v in pairs) / sum(self.samples)


@dataclass(frozen=True)
class Statistics:
    """Everything that was measured on one model.

    Attributes:
        layers: In order of execution.
        evaluation: Loss and metric in both modes; None without a loss.
        samples: Samples seen in all.
        batches: Batches seen in all.
        while_training: The weights moved between the measurements.
    """

    layers: tuple[LayerStatistics, ...] = ()
    evaluation: Evaluation | None = None
    samples: int = 0
    batches: int = 0
    while_training: bool = False
    notes: tuple[str, ...] = field(default=())

    def of_role(self, role: Role) -> list[LayerStatistics]:
        """The layers of one role, in order of execution."""
        return [layer for layer in self.layers if layer.role == role]

    @property
    def norms(self) -> list[tuple[LayerStatistics, NormStatistics]]:
        """The layers that keep running statistics, with these."""
        return [(layer, layer.norm) for layer in self.layers if layer.norm is not None]

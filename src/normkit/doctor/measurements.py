"""The measurements that the checks read; they hold no reference to the model.

A `Statistics` comes from `diagnose` (weights held still, several passes over the same
batches), from `watch` (while the weights move), or is built by hand in a test. A value
that was not measured is None, and a check that needs it reports "not_judged". What is
measured of one layer is in `layer_statistics.py`, of channels, blocks and attention in
`channel_statistics.py` and `transformer_statistics.py`, of outputs and targets in
`answer_statistics.py`; here, what is measured of the data and of evaluation, and the
whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from normkit.doctor.answer_statistics import (
    DependenceStatistics,
    Erased,
    OutputStatistics,
    Renumbered,
    TargetStatistics,
)
from normkit.doctor.channel_statistics import ChannelStatistics
from normkit.doctor.layer_statistics import (
    LayerStatistics,
    NormStatistics,
    NotFinite,
    Role,
    WeightStatistics,
)
from normkit.doctor.optimizer_statistics import OptimizerStatistics
from normkit.doctor.training_statistics import TrainingStatistics
from normkit.doctor.transformer_statistics import AttentionStatistics, BlockStatistics
from normkit.moments import Moments
from normkit.results import Result, counted

__all__ = [
    "DataStatistics",
    "DependenceStatistics",
    "Erased",
    "Evaluation",
    "FarValue",
    "LayerStatistics",
    "NormStatistics",
    "NotFinite",
    "OptimizerStatistics",
    "OutputStatistics",
    "Renumbered",
    "Role",
    "Statistics",
    "TargetStatistics",
    "TrainingStatistics",
    "WeightStatistics",
    "mean_over_samples",
    "standard_error",
]


def mean_over_samples(values: Sequence[float], samples: Sequence[int]) -> float:
    """Return the mean of per-batch values, weighted by the samples of each batch."""
    return sum(n * v for n, v in zip(samples, values, strict=True)) / sum(samples)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of per-batch values; nan for one."""
    n, mean = len(values), sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan


@dataclass(frozen=True)
class Evaluation:
    """Loss and metric of the same batches under two sets of statistics.

    Attributes:
        samples: Samples per batch.
        batch_loss: Loss per batch under batch statistics, dropout off.
        running_loss: Loss per batch in eval mode.
        batch_metric: Metric per batch under batch statistics; empty without a metric.
        running_metric: Metric per batch in eval mode.
        shuffled_loss: Loss per batch under batch statistics, with each answer given to
            another sample of the batch; empty where answers are not per sample.
        common_loss: Loss per batch under batch statistics, with the mean of the answers
            given to every sample; empty where answers are not per sample.
        has_targets: The targets take part in the loss; False where neither it nor its
            gradient changes with them, as that of a density.
    """

    samples: tuple[int, ...]
    batch_loss: tuple[float, ...]
    running_loss: tuple[float, ...]
    batch_metric: tuple[float, ...] = ()
    running_metric: tuple[float, ...] = ()
    shuffled_loss: tuple[float, ...] = ()
    common_loss: tuple[float, ...] = ()
    has_targets: bool = True

    def mean(self, values: tuple[float, ...]) -> float:
        """Return the mean over samples of a per-batch series; nan when it is empty."""
        return mean_over_samples(values, self.samples) if values else math.nan


@dataclass(frozen=True)
class FarValue:
    """A value that several entries of the inputs have, far from all others.

    Attributes:
        value: The value.
        share: The share of the entries that have it.
        low: The least of the others.
        high: The largest of the others.
    """

    value: float
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class DataStatistics:
    """The batches of the loader: their size and their input values.

    Attributes:
        input: Moments of all values of the first floating input; None without one.
        batch_size: Samples per full batch.
        last: Samples in the last, incomplete batch of an epoch; 0 when there is none,
            None when unknown.
        columns: Statistics of some of the inputs' columns; None for sizes that vary.
        is_table: The inputs are `(N, F)`.
        are_shares: Each row of such a table sums to one, or is empty.
        far: A value far from all others; None without one.
        are_ids: All inputs are whole numbers, and the model has embeddings for them.
        others: Moments of the further floating inputs with one number or one row a
            sample.
    """

    input: Moments | None = None
    batch_size: int = 0
    last: int | None = None
    columns: ChannelStatistics | None = None
    is_table: bool = False
    are_shares: bool = False
    far: FarValue | None = None
    are_ids: bool = False
    others: tuple[Moments, ...] = ()


@dataclass(frozen=True)
class Trimmed:
    """Losses in eval mode, per batch, with and without padding that all samples share.

    Attributes:
        whole: Of batches as they are.
        cut: Of batches without the positions behind their longest sample.
        places: The number of those positions, on average.
    """

    whole: tuple[float, ...]
    cut: tuple[float, ...]
    places: float


@dataclass(frozen=True, repr=False)
class Statistics(Result):
    """All measurements of one model.

    Attributes:
        layers: In order of execution.
        evaluation: Loss and metric in both modes; None without a loss.
        samples: Number of samples.
        batches: Number of batches.
        while_training: The weights moved between the measurements.
        began_trained: The weights had moved before the first observed step of a watch.
        data: The loader's batches; None without a loader.
        output: The model's outputs; None when not measured.
        targets: The targets of the loss; None when not measured.
        dependence: On what the answers depend; None when not measured.
        detached: Layers that the loss depends on, and that get no gradient.
        has_moved_detached: What one of these holds cannot be a start.
        trimmed: The loss without padding that no sample needs; None when not measured.
        has_one_length: Sequences of no other length are taken; measured where they are
            padded.
        has_moved: The weights show that they were trained; False where they can be
            those of a start, None when not measured.
        flat_tables: Embeddings whose rows are one number each, and differ by row.
        came_in_eval: The model was handed over in eval mode.
        has_dropout: The model has a layer that drops something.
        has_just_begun: The weights and the batches counted are those of a few steps.
        training: The training loop; None when it was not watched.
        world_size: Ranks that train together.
        is_averaged: The weights are an average over training (SWA, EMA).
        single_value: Name of a batch norm that cannot train because its batches have
            one value per channel, so that nothing else was measured; None without.
        blocks: The blocks of stacks, in order of execution.
        attention: Each attention.
    """

    layers: tuple[LayerStatistics, ...] = ()
    evaluation: Evaluation | None = None
    samples: int = 0
    batches: int = 0
    while_training: bool = False
    began_trained: bool = False
    data: DataStatistics | None = None
    output: OutputStatistics | None = None
    targets: TargetStatistics | None = None
    dependence: DependenceStatistics | None = None
    detached: tuple[str, ...] = ()
    has_moved_detached: bool = False
    trimmed: Trimmed | None = None
    has_one_length: bool = False
    has_moved: bool | None = None
    flat_tables: tuple[str, ...] = ()
    came_in_eval: bool = False
    has_dropout: bool = True
    has_just_begun: bool = False
    training: TrainingStatistics | None = None
    world_size: int = 1
    is_averaged: bool = False
    single_value: str | None = None
    blocks: tuple[BlockStatistics, ...] = ()
    attention: tuple[AttentionStatistics, ...] = ()

    def to_text(self) -> str:
        """Return the size of the data, then the layers, one per line."""
        seen = (
            f"{counted(len(self.layers), 'layer')}, {counted(self.samples, 'sample')} "
            f"in {counted(self.batches, 'batch', plural='batches')}"
        )
        lines = [
            f"{layer.where}  {layer.kind}, {counted(layer.units, 'unit')}, output of "
            f"rms {layer.output_rms:.3g}"
            for layer in self.layers
        ]
        return "\n".join([seen, *lines])

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per layer."""
        return [
            {
                "layer": layer.where,
                "kind": layer.kind,
                "role": layer.role,
                "units": layer.units,
                "output rms": layer.output_rms,
            }
            for layer in self.layers
        ]

    def of_role(self, role: Role) -> list[LayerStatistics]:
        """Return the layers of one role, in order of execution."""
        return [layer for layer in self.layers if layer.role == role]

    @property
    def is_before_branches(self) -> bool:
        """True where a branch starts at a scale of zero, before any training."""
        is_new = all(norm.is_new for _, norm in self.norms)
        return is_new and any(layer.has_zero_scale for layer in self.of_role("norm"))

    @property
    def norms(self) -> list[tuple[LayerStatistics, NormStatistics]]:
        """The layers that keep running statistics, each with its statistics."""
        return [(layer, layer.norm) for layer in self.layers if layer.norm is not None]

"""The measurements that the checks read; they hold no reference to the model.

A `Statistics` comes from `diagnose` (weights held still, several passes over the same
batches), from `watch` (while the weights move), or is built by hand in a test. A value
that was not measured is None, and a check that needs it reports "not_judged". What is
measured of one layer is in `layer_statistics.py`, of channels, blocks and attention in
`channel_statistics.py` and `transformer_statistics.py`; here, what is measured of the
whole: data, outputs, targets, evaluation and training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    far: FarValue | None = None
    are_ids: bool = False
    others: tuple[Moments, ...] = ()


@dataclass(frozen=True)
class TargetStatistics:
    """The targets of the loss.

    Attributes:
        low: The least value, or class number.
        high: The largest.
        classes: Number of classes; None unless they are class numbers.
        most_frequent: Share of the most frequent class; None without classes.
        spread: Standard deviation of all values; 0 for class numbers.
        mean: Mean of all values; 0 for class numbers.
        labels_per_sample: Ones per row of targets `(N, K)` of zeros and ones; None for
            other targets.
        sums_to_one: Every row of targets `(N, K)` is a distribution over K > 1 classes.
        kurtosis: Mean fourth power of the standardized values of a column, the largest
            of few columns; nan for others.
        channels: Statistics of the labels as one-hot vectors, or of the values.
        beyond: A class number without a unit in the output, and the units; None where
            every label has one.
    """

    low: float
    high: float
    classes: int | None = None
    most_frequent: float | None = None
    spread: float = 0.0
    mean: float = 0.0
    labels_per_sample: float | None = None
    sums_to_one: bool = False
    kurtosis: float = math.nan
    channels: ChannelStatistics | None = None
    beyond: tuple[int, int] | None = None


@dataclass(frozen=True)
class Renumbered:
    """Answers that give most classes another number than the targets do.

    Attributes:
        right: Share of the samples whose answer is right.
        explained: Share whose answer is the one that their class gets most often.
        label: A class with another answer, and
        answer: that answer.
    """

    right: float
    explained: float
    label: int
    answer: int


@dataclass(frozen=True)
class OutputStatistics:
    """The outputs of the model.

    Attributes:
        spread: Standard deviation over the samples, rms over the units.
        scale: rms of the values.
        units: Size of the last dimension.
        sums_to_one: Every row is a probability distribution.
        classes: Number of classes in the targets; None unless they are class numbers.
        loss_kind: Name of the loss's class or function.
        softmax: Name of the `nn.Softmax` whose output is the model's; "" for none.
        activation: The operation of autograd that gives the output, such as "Sigmoid";
            "" when no gradient was measured.
        operations: Those between the output and the loss, such as "NllLoss".
        squashed_by: The function inside the loss whose values it takes for logits, such
            as "Softmax"; "" for none.
        most_chosen: Share of the samples whose largest score is that of the class
            chosen most often; None without scores.
        are_cosines: They are products of vectors that were divided, as by their norms.
        largest: The largest size of a value.
        right: Share of the labels whose score is the largest; None without scores.
        softmax_dim: The dimension of the softmax that gives the output; None where
            none does.
        class_dim: The dimension of the scores that class numbers lack; None where
            several could be it.
        unregistered: Parameters that the output depends on and that the model does not
            own, as those of layers in a plain list.
        has_critic: The loss computes with parameters that the model does not own, as
            those of a critic.
        broadcast: The shapes of output and targets, where they hold as many values and
            a loss that takes them as they are would compare each with all the others.
        compared: The range and spread of the values that the loss itself makes of the
            targets, in one batch; None where it compares with the targets.
        class_weights: The weight of each class in the loss; of a binary cross-entropy
            those of zeros and of ones. Empty without.
        renumbered: The numbering of the answers, where it is another than that of the
            targets.
        same: Share of the samples whose answer is exactly the one given most often,
            less that of the inputs; 0 where answers are no rows of scores.
    """

    spread: float
    scale: float
    units: int
    sums_to_one: bool
    classes: int | None = None
    loss_kind: str = ""
    softmax: str = ""
    activation: str = ""
    operations: frozenset[str] = frozenset()
    squashed_by: str = ""
    most_chosen: float | None = None
    are_cosines: bool = False
    largest: float = math.nan
    right: float | None = None
    softmax_dim: int | None = None
    class_dim: int | None = None
    unregistered: tuple[str, ...] = ()
    has_critic: bool = False
    broadcast: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    compared: TargetStatistics | None = None
    class_weights: tuple[float, ...] = ()
    renumbered: Renumbered | None = None
    same: float = 0.0


@dataclass(frozen=True)
class Erased:
    """A property of samples that explains a target, and does not reach the answers.

    Attributes:
        what: The "mean" of a sample, or its "size": the log of its deviation.
        change: rms change of the answers when all inputs are shifted by the deviation
            of the means, or doubled; as a share of the answers' spread.
        by_it: Share of a target's variance that it explains: a squared correlation.
        by_answers: Share that the answers explain.
    """

    what: str
    change: float
    by_it: float
    by_answers: float


@dataclass(frozen=True)
class DependenceStatistics:
    """On what the answers of one batch depend in eval mode, beyond their own samples.

    Each change is the rms of the difference over the spread of all answers; None where
    it was not measured.

    Attributes:
        dropout: Name of a dropout function that is on in eval mode; "" for none.
        is_switched_on: It is that of modules which were in eval mode before the call,
            so that the model's own forward has switched them on.
        on_chance: Change from one call to the next; measured where there is such a
            dropout, or where something else changes the answers.
        on_others: Change of the answers to two samples without the rest of the batch.
        on_future: Change of the answers before the last token when that is another,
            where the targets are the tokens that follow.
        is_elsewhere: The target of a pixel acts on the scores of other pixels, and not
            on its own.
        dropped: The share of the answers that is dropped in training mode: they are the
            output of a dropout; 0 where they are not.
        dropped_by: Name of its module; "" for a function.
        most_dropped: The largest share that a dropout takes away in training mode.
        most_dropped_by: Name of its module; "" for a function.
        erased: The mean or the size of the samples, where it explains a target far
            better than the answers do; None where neither does.
        made_norms: Calls of a batch norm that take the statistics of the batch in eval
            mode and belong to no module of the model.
    """

    dropout: str = ""
    dropped: float = 0.0
    dropped_by: str = ""
    most_dropped: float = 0.0
    most_dropped_by: str = ""
    made_norms: int = 0
    erased: Erased | None = None
    is_switched_on: bool = False
    on_chance: float | None = None
    on_others: float | None = None
    on_future: float | None = None
    is_elsewhere: bool = False
    ignored: tuple[int, ...] = ()


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

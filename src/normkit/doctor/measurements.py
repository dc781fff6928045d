"""The measurements that the checks read; they hold no reference to the model.

A `Statistics` comes from `diagnose` (weights held still, several passes over the same
batches), from `watch` (while the weights move), or is built by hand in a test. A value
that was not measured is None, and a check that needs it reports "not_judged".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from normkit.doctor.channel_statistics import ChannelStatistics, Histogram, Padding
from normkit.doctor.transformer_statistics import (
    AttentionStatistics,
    BlockStatistics,
    GainStatistics,
)
from normkit.moments import Moments

__all__ = [
    "DataStatistics",
    "Evaluation",
    "LayerStatistics",
    "NormStatistics",
    "OutputStatistics",
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


Role = Literal["weight", "norm", "activation", "recurrent", "other"]


@dataclass(frozen=True)
class NormStatistics:
    """A normalization layer that keeps running statistics.

    Attributes:
        momentum: Rate of the running average; None for the cumulative average.
        eps: Added to the variance.
        tracked: Batches that entered the running statistics; None when unknown.
        frozen: The layer is in eval mode on purpose, so its statistics are not stale.
        running_mean: Shape `(C,)`, float64.
        running_var: Shape `(C,)`, float64.
        in_training: Inputs under batch statistics, all other modules in training mode.
        without_dropout: Inputs under batch statistics, all other modules in eval mode.
        in_eval: Inputs in eval mode.
        weight: The learned scale, shape `(C,)`, float64; None without.
        bias: The learned shift; None without.
        is_trainable: Some of its own parameters require gradients.
        dtype: Name of the dtype of the running statistics, such as "float32".
        calls: The channel statistics of each call within a forward, in order.
        padding: Set where inputs `(N, C, L)` have constant ends.
        had_mask: The layer was called with `mask=`.
        eval_steps: Observed training steps with the layer in eval mode.
        train_steps: Observed training steps with the layer in training mode.
        takes_one_value: The layer accepts one value per channel (`on_small_batch`).
        is_read_in_eval: A call of the model in eval mode ran the layer; None when no
            such call was observed.
    """

    momentum: float | None
    eps: float
    tracked: int | None
    frozen: bool
    running_mean: Tensor
    running_var: Tensor
    in_training: ChannelStatistics | None = None
    without_dropout: ChannelStatistics | None = None
    in_eval: ChannelStatistics | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    is_trainable: bool = True
    dtype: str = "float32"
    calls: tuple[ChannelStatistics, ...] = ()
    padding: Padding | None = None
    had_mask: bool = False
    eval_steps: int = 0
    train_steps: int = 0
    takes_one_value: bool = False
    is_read_in_eval: bool | None = None

    @property
    def has_default_buffers(self) -> bool:
        """True where the running statistics are mean 0 and variance 1."""
        zero, one = (self.running_mean == 0).all(), (self.running_var == 1).all()
        return bool(zero and one)

    @property
    def is_new(self) -> bool:
        """True where nothing suggests that the layer was ever trained.

        Scales of one value are a start, such as 0 in a residual branch; training makes
        them differ. torch counts a batch before it fails on it.
        """
        weight, bias = self.weight, self.bias
        return (
            (self.tracked or 0) <= 1
            and self.has_default_buffers
            and (weight is None or _is_a_start(weight))
            and (bias is None or bool((bias == 0).all()))
        )


def _is_a_start(scale: Tensor) -> bool:
    """Return True for scales of one value; a single scale must be 1 or 0."""
    if scale.numel() == 1:
        return float(scale) in (0.0, 1.0)
    return bool((scale == scale.flatten()[0]).all())


@dataclass(frozen=True)
class WeightStatistics:
    """A layer's weight, its gradient and its last updates.

    Attributes:
        norm: ‖w‖.
        gradient_norm: ‖dL/dw‖ per batch, in order; empty when not measured.
        update_ratio: ‖Δw‖ / ‖w‖ per optimizer step, in order; empty when not measured.
        bias_gradient_norm: ‖dL/db‖ per batch; empty when not measured or without bias.
        equal_rows: Share of rows equal to another row; 0 for one output unit.
        equal_gradients: Share of rows equal to another row in weight and gradient;
            None when no gradient was measured.
        norm_at_start: ‖w‖ in the first observed step; nan when not watched.
        usual_norm: ‖w‖ of a weight whose entries have variance 1/fan_in; nan when not
            watched.
    """

    norm: float
    gradient_norm: tuple[float, ...] = ()
    update_ratio: tuple[float, ...] = ()
    bias_gradient_norm: tuple[float, ...] = ()
    equal_rows: float = 0.0
    equal_gradients: float | None = None
    norm_at_start: float = math.nan
    usual_norm: float = math.nan


@dataclass(frozen=True)
class LayerStatistics:
    """One layer, in the order of execution.

    Attributes:
        name: Dotted name.
        kind: Name of its class.
        role: "weight", "norm", "activation", "recurrent" or "other".
        is_output: Its output is the model's output.
        samples: Number of samples.
        units: Features or channels of the output.
        input: Moments of all input values, scalars.
        output: Moments of all output values, scalars.
        gradient_norm: ‖dL/d output‖ per batch, in order; empty when not measured.
        saturated: Share of values where the slope is below 5 % of its maximum,
            per observation, in order; empty where saturation has no meaning.
        dead: Share of units whose output was zero on every one of the last
            `dead_samples` samples; None where that has no meaning.
        fed_by: The layer whose unchanged output is this one's input; "" for none.
        is_normalized: A norm took its output, or a view of it, as its input.
        is_factor: Its weight is one number per output, as in a depthwise convolution
            of one pixel.
        beside: The first of the layers with weights that were called one after another
            on this one's input, as query, key and value; "" for none.
        had_gradients: It was called with gradients enabled; None when not observed.
        has_zero_scale: Its weight is zero, as at the start of a residual branch.
        dead_at_start: `dead` on the first observed batch of a training; None where that
            was not observed.
        features: Inputs and outputs of a linear layer.
        norm: Set for layers that keep running statistics.
        weight: Set for layers with a weight matrix.
        before: Histogram of a normalization's inputs; None where not counted.
        after: Histogram of its outputs.
        gains: The scales of a norm; None without.
    """

    name: str
    kind: str
    role: Role
    is_output: bool = False
    samples: int = 0
    units: int = 1
    input: Moments | None = None
    output: Moments | None = None
    gradient_norm: tuple[float, ...] = ()
    saturated: tuple[float, ...] = ()
    dead: float | None = None
    dead_samples: int = 0
    fed_by: str = ""
    is_normalized: bool = False
    is_factor: bool = False
    beside: str = ""
    had_gradients: bool | None = None
    has_zero_scale: bool = False
    dead_at_start: float | None = None
    features: tuple[int, int] | None = None
    norm: NormStatistics | None = None
    weight: WeightStatistics | None = None
    before: Histogram | None = None
    after: Histogram | None = None
    gains: GainStatistics | None = None

    @property
    def positions(self) -> float:
        """Output values per sample and unit; 0 when not measured."""
        if self.output is None or not self.samples:
            return 0.0
        return float(self.output.count) / self.samples / self.units

    @property
    def where(self) -> str:
        """The layer's name, or "(model)" for a model that is one layer."""
        return self.name or "(model)"

    @property
    def output_rms(self) -> float:
        """Root mean square of the outputs; nan when not measured."""
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
        shuffled_loss: Loss per batch under batch statistics, with each answer given to
            another sample of the batch; empty where answers are not per sample.
    """

    samples: tuple[int, ...]
    batch_loss: tuple[float, ...]
    running_loss: tuple[float, ...]
    batch_metric: tuple[float, ...] = ()
    running_metric: tuple[float, ...] = ()
    shuffled_loss: tuple[float, ...] = ()

    def mean(self, values: tuple[float, ...]) -> float:
        """Return the mean over samples of a per-batch series; nan when it is empty."""
        return mean_over_samples(values, self.samples) if values else math.nan


@dataclass(frozen=True)
class DataStatistics:
    """The batches of the loader: their size and their input values.

    Attributes:
        input: Moments of all values of the first floating input; None without one.
        batch_size: Samples per full batch.
        last: Samples in the last, incomplete batch of an epoch; 0 when there is none,
            None when unknown.
        columns: Statistics of some of the inputs' columns; None for sizes that vary.
    """

    input: Moments | None = None
    batch_size: int = 0
    last: int | None = None
    columns: ChannelStatistics | None = None


@dataclass(frozen=True)
class TargetStatistics:
    """The targets of the loss.

    Attributes:
        low: The least value, or class number.
        high: The largest.
        classes: Number of classes; None unless they are class numbers.
        most_frequent: Share of the most frequent class; None without classes.
        spread: Standard deviation of all values; 0 for class numbers.
        labels_per_sample: Ones per row of targets `(N, K)` of zeros and ones; None for
            other targets.
        channels: Statistics of the labels as one-hot vectors, or of the values.
        beyond: A class number without a unit in the output, and the units; None where
            every label has one.
    """

    low: float
    high: float
    classes: int | None = None
    most_frequent: float | None = None
    spread: float = 0.0
    labels_per_sample: float | None = None
    channels: ChannelStatistics | None = None
    beyond: tuple[int, int] | None = None


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
        most_chosen: Share of the samples whose largest score is that of the class
            chosen most often; None without scores.
        softmax_dim: The dimension of the softmax that gives the output; None where
            none does.
        unregistered: Parameters that the output depends on and that the model does not
            own, as those of layers in a plain list.
        broadcast: The shapes of output and targets, where they hold as many values and
            a loss that takes them as they are would compare each with all the others.
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
    most_chosen: float | None = None
    softmax_dim: int | None = None
    unregistered: tuple[str, ...] = ()
    broadcast: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class TrainingStatistics:
    """The calls and steps of the training loop.

    Attributes:
        forwards: Calls in training mode with gradients.
        updates: Steps of the optimizer; None without one.
        updates_in_eval: Steps of the optimizer after calls in eval mode only.
        updates_before_eval: Steps of the optimizer before the first of these.
        idle_bursts: Number of runs of two or more calls in training mode without
            gradients.
        samples: Samples per forward.
        weight_decay: The largest decay on a normalization layer's parameters; None
            without an optimizer.
        is_decoupled: The decay is multiplied by the learning rate alone (AdamW).
        is_trial: The loop was a trial on a copy, not the program's own.
        losses: Step and value of each loss given to `log`.
        steps: The observed steps.
    """

    forwards: int = 0
    updates: int | None = None
    updates_in_eval: int = 0
    updates_before_eval: int = 0
    idle_bursts: int = 0
    samples: float = 0.0
    weight_decay: float | None = None
    is_decoupled: bool = False
    is_trial: bool = False
    losses: tuple[tuple[int, float], ...] = ()
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Statistics:
    """All measurements of one model.

    Attributes:
        layers: In order of execution.
        evaluation: Loss and metric in both modes; None without a loss.
        samples: Number of samples.
        batches: Number of batches.
        while_training: The weights moved between the measurements.
        data: The loader's batches; None without a loader.
        output: The model's outputs; None when not measured.
        targets: The targets of the loss; None when not measured.
        has_moved: The weights show that they were trained; False where they can be
            those of a start, None when not measured.
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
    data: DataStatistics | None = None
    output: OutputStatistics | None = None
    targets: TargetStatistics | None = None
    has_moved: bool | None = None
    training: TrainingStatistics | None = None
    world_size: int = 1
    is_averaged: bool = False
    single_value: str | None = None
    blocks: tuple[BlockStatistics, ...] = ()
    attention: tuple[AttentionStatistics, ...] = ()

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

"""The measurements of one layer: its values, its weight, its running statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from normkit.doctor.channel_statistics import ChannelStatistics, Histogram, Padding
from normkit.doctor.transformer_statistics import GainStatistics
from normkit.moments import Moments

__all__ = [
    "LayerStatistics",
    "NormStatistics",
    "NotFinite",
    "Role",
    "Rows",
    "WeightStatistics",
]

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
        is_constant: Its class never changes the running statistics, nor scale and
            shift, as a frozen batch norm's.
        constant: Share of the channels whose inputs were one value, per observed
            forward of a training.
        ignores_eval: It is in training mode after `eval()` of the model.
        tracks: Training mode updates the running statistics (`track_running_stats`).
        is_switched_on: In eval mode before a call of the model, and in training mode
            when it was called within.
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
    is_constant: bool = False
    constant: tuple[float, ...] = ()
    is_switched_on: bool = False
    tracks: bool = True
    ignores_eval: bool = False

    @property
    def has_default_buffers(self) -> bool:
        """True where the running statistics are mean 0 and variance 1."""
        zero, one = (self.running_mean == 0).all(), (self.running_var == 1).all()
        return bool(zero and one)

    @property
    def is_identity(self) -> bool:
        """True where its class keeps it at mean 0, variance 1, scale 1 and shift 0."""
        # detectron2's has 1 - eps.
        is_one = ((self.running_var - 1).abs() <= 2 * self.eps).all()
        weight, bias = self.weight, self.bias
        return (
            self.is_constant
            and bool(is_one and (self.running_mean == 0).all())
            and (weight is None or bool((weight == 1).all()))
            and (bias is None or bool((bias == 0).all()))
        )

    @property
    def is_new(self) -> bool:
        """True where nothing suggests that the layer was ever trained.

        Scales of one value are a start, such as 0 in a residual branch; training makes
        them differ. torch counts a batch before it fails on it.
        """
        is_fresh = (self.tracked or 0) <= 1 and self.has_default_buffers
        return is_fresh and self.is_at_start

    @property
    def is_at_start(self) -> bool:
        """True where scale and shift are those of a new layer."""
        weight, bias = self.weight, self.bias
        is_one = weight is None or _is_a_start(weight)
        return is_one and (bias is None or bool((bias == 0).all()))


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
        update_ratio: ‖Δw‖ / ‖w‖ per observed optimizer step, in order; empty when not
            measured.
        bias_gradient_norm: ‖dL/db‖ per batch; empty when not measured or without bias.
        equal_rows: Share of rows equal to another row; 0 for one output unit.
        equal_gradients: Share of rows equal to another row in weight and gradient;
            None when no gradient was measured.
        norm_at_start: ‖w‖ in the first observed step; nan when not watched.
        usual_norm: ‖w‖ of a weight whose entries have variance 1/fan_in; nan when not
            known.
        size: Number of its entries; 0 when not known.
        parameter: A number that tells the weight from others, and that tied weights
            share; 0 when not known.
        lost: Share of the updates that rounded to nothing, of those of elements with a
            gradient, per optimizer step, in order; of weights in half precision under
            an optimizer of torch.
        is_left_out: It is in no parameter group of the watched optimizer; None when
            not watched.
        updated_at: The training step of each entry of `update_ratio`; empty when not
            known.
        has_bias: The layer adds a bias; None when not observed.
        began_constant: All its entries were one value, and not zero, when a watched
            training began.
        rate: The last learning rate of its group; None when not known.
    """

    norm: float
    gradient_norm: tuple[float, ...] = ()
    update_ratio: tuple[float, ...] = ()
    bias_gradient_norm: tuple[float, ...] = ()
    equal_rows: float = 0.0
    equal_gradients: float | None = None
    norm_at_start: float = math.nan
    usual_norm: float = math.nan
    size: int = 0
    parameter: int = 0
    lost: tuple[float, ...] = ()
    is_left_out: bool | None = None
    updated_at: tuple[int, ...] = ()
    has_bias: bool | None = None
    began_constant: bool = False
    rate: float | None = None


@dataclass(frozen=True)
class NotFinite:
    """The observation, counted from 0, in which values were first not finite.

    A diagnosis, whose weights are held still, is one observation.

    Attributes:
        input: That of the inputs; None where all were finite.
        output: That of the outputs.
        weight: That of the weight.
    """

    input: int | None = None
    output: int | None = None
    weight: int | None = None


@dataclass(frozen=True)
class Rows:
    """The rows that went through a norm over the last dimension, of a class of its own.

    Attributes:
        large: Rows of finite values whose sum of squares is above 65,504, the largest
            number of float16.
        large_lost: Those of them whose output is zero throughout.
        small: Rows whose sum is below it and not zero.
        small_lost: Those of them whose output is zero throughout.
    """

    large: int
    large_lost: int
    small: int
    small_lost: int


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
        reached: Calls in one forward whose output has a graph, and those of them whose
            output gets a gradient.
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
        rms_at_start: rms of its outputs in the first observed step of a training; nan
            where that was not observed.
        features: Inputs and outputs of a linear layer.
        norm: Set for layers that keep running statistics.
        weight: Set for layers with a weight matrix.
        before: Histogram of a normalization's inputs; None where not counted.
        after: Histogram of its outputs.
        gains: The scales of a norm; None without.
        shift_spread: Standard deviation of a norm's shift over its channels.
        eps: What a norm adds to the variance; None for others.
        crossed: The dimension of its input that the layer before gives its features in,
            and the one that this norm takes for them, where they differ.
        own_batches: The inputs of a batch norm without running statistics, which takes
            those of each batch in eval mode, too.
        rows: Set for norms of a class of their own, over the last dimension.
        not_finite: Where inputs, outputs and weight were first not finite.
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
    reached: tuple[int, int] = (0, 0)
    fed_by: str = ""
    is_normalized: bool = False
    is_factor: bool = False
    beside: str = ""
    had_gradients: bool | None = None
    has_zero_scale: bool = False
    dead_at_start: float | None = None
    rms_at_start: float = math.nan
    features: tuple[int, int] | None = None
    norm: NormStatistics | None = None
    weight: WeightStatistics | None = None
    before: Histogram | None = None
    after: Histogram | None = None
    gains: GainStatistics | None = None
    shift_spread: float = 0.0
    eps: float | None = None
    crossed: tuple[int, int] | None = None
    own_batches: ChannelStatistics | None = None
    rows: Rows | None = None
    not_finite: NotFinite = NotFinite()

    @property
    def positions(self) -> float:
        """Output values per sample and unit; 0 when not measured."""
        if self.output is None or not self.samples:
            return 0.0
        return float(self.output.count) / self.samples / self.units

    @property
    def gets_gradients(self) -> bool:
        """True for a layer whose weight gets gradients, which may be zeros."""
        return self.weight is not None and bool(self.weight.gradient_norm)

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

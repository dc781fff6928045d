"""Measurements of one layer: Moments, counts and norms, merged over all its calls."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normkit.doctor.channel_statistics import ChannelStatistics
from normkit.doctor.layer_statistics import Role, Rows
from normkit.doctor.probes.roles import slope_limits
from normkit.doctor.probes.tensor_statistics import (
    RunningHistogram,
    alive_units,
    dim_within,
    norm_of,
    unit_values,
)
from normkit.doctor.transformer_statistics import GainStatistics
from normkit.errors import ArgumentError
from normkit.kernels.cpu import CpuBackend
from normkit.masks import broadcast_mask
from normkit.modeling.norm_types import is_batch_norm
from normkit.moments import Moments, moments

__all__ = ["LayerProbe", "constant_ends", "merged"]

# Positions of a sample that show whether a channel is constant.
MAX_POSITIONS = 32
MAX_HALF = torch.finfo(torch.float16).max
# Values of a sample and channel from which the kernels are the faster way.
MIN_MAP = 16

_kernels = CpuBackend()


class LayerProbe:
    """Measurements of one layer since the last `reset`, merged over all its calls.

    Attributes:
        name: Dotted name of the layer.
        module: The layer.
        role: Weight, norm, activation or recurrent.
        is_batch_norm: Whether the layer normalizes channels by statistics of batches.
        order: Position in the order of execution; None before the first call.
        is_output: The layer's output was the model's output.
        input: Moments of all input values (scalars); None before the first call.
        output: Moments of all output values.
        gradient_norm: ‖dL/d output‖ over all calls.
        saturated: Number of values beyond `slope_limits`; None where undefined.
        alive: Which units had an output other than zero; None for other roles.
        units: Features or channels of the output.
        unpadded: Moments per channel without the constant ends of sequences; None
            where inputs are no sequences.
        num_padded: Positions in such ends.
        calls: The channel statistics of the input of each call since the last `reset`,
            in order, where requested.
        is_running: A call has begun and given no output.
        had_mask: It was called with `mask=`; `reset` keeps it.
        had_gradients: It was called with gradients enabled; `reset` keeps it.
        was_training: It was called in training mode; `reset` keeps it.
        takes_sum: A norm, whose input is a sum of two tensors; `reset` keeps it.
        is_normalized: A norm took its output, or a view of it, as its input.
        beside: Name of the layer that was called before on the same input.
        fed_by: Name of the layer whose unchanged output was this one's input.
        crossed: The dimension of the features of that layer, and the one that this norm
            takes for them, where they differ.
        unit_values: Values of one unit of the last input, where requested.
        constant: Share of a batch norm's channels whose last input was one value.
        samples: Number of samples.
        graph_calls: Calls whose output has a graph.
        gradient_calls: Those whose output got a gradient.
        lost_rows: What `Rows` holds, over all calls; `reset` keeps it.
        before: Histogram of all inputs, where requested; `reset` keeps it.
        after: Histogram of all outputs.
    """

    def __init__(self, name: str, module: nn.Module, role: Role) -> None:
        self.name = name
        self.module = module
        self.role: Role = role
        self.is_batch_norm = role == "norm" and is_batch_norm(module)
        self.order: float | None = None
        self.is_output = False
        self.is_running = False
        self.had_gradients = False
        self.was_training = False
        self.had_mask = False
        self.takes_sum = False
        self.units = 1
        self.limits = slope_limits(module)
        self.before: RunningHistogram | None = None
        self.after: RunningHistogram | None = None
        self.lost_rows: Tensor | None = None
        self._sums: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Clear the measurements; the order of execution stays."""
        self.samples = 0
        self.graph_calls = 0
        self.gradient_calls = 0
        self.input: Moments | None = None
        self.output: Moments | None = None
        self.gradient_norm: Tensor | None = None
        self.saturated: Tensor | None = None
        self.alive: Tensor | None = None
        self.unpadded: Moments | None = None
        self.num_padded = 0
        self.calls: list[ChannelStatistics] = []
        self.fed_by = ""
        self.crossed: tuple[int, int] | None = None
        self.is_normalized = False
        self.beside = ""
        self.unit_values: Tensor | None = None
        self.constant: Tensor | None = None

    @property
    def kind(self) -> str:
        """Name of the layer's class."""
        return type(self.module).__name__

    @property
    def has_zero_scale(self) -> bool:
        """True for a weight of zeros, as at the start of a residual branch."""
        weight = self.module._parameters.get("weight")
        return weight is not None and not weight.is_meta and not bool(weight.any())

    @property
    def is_factor(self) -> bool:
        """True for a weight of one number per output."""
        weight = self.module._parameters.get("weight")
        is_matrix = self.role == "weight" and weight is not None and weight.dim() > 1
        return is_matrix and weight is not None and weight.numel() == len(weight)

    @property
    def usual_norm(self) -> float:
        """‖w‖ of a weight whose entries have variance 1/fan_in; nan without weight."""
        weight = self.module._parameters.get("weight")
        return math.nan if weight is None or not weight.dim() else len(weight) ** 0.5

    @property
    def weight_size(self) -> int:
        """Number of the weight's entries; 0 without one."""
        weight = self.module._parameters.get("weight")
        return 0 if weight is None else weight.numel()

    @property
    def gains(self) -> GainStatistics | None:
        """The scales of a norm; None for other layers and without scales."""
        held = self.module._parameters
        gain = held.get("weight")
        if self.role != "norm" or gain is None or gain.is_meta or not gain.numel():
            return None
        return GainStatistics.of(gain, held.get("bias"))

    @property
    def eps(self) -> float | None:
        """The eps of a norm; None where it does not say."""
        eps = getattr(self.module, "eps", None) if self.role == "norm" else None
        return float(eps) if isinstance(eps, float | int) else None

    @property
    def has_single_value(self) -> bool:
        """True where the last call had one value per channel and gave no output."""
        return bool(self.calls) and self.calls[-1].values == 1 and self.is_running

    @property
    def overall(self) -> Moments:
        """Moments of all values of the last input that was measured by channel."""
        found = self.calls[-1].pooled
        mean = found.mean.mean()
        between = (found.mean - mean).square().sum() * found.count
        count = found.count * found.mean.numel()
        return Moments(count, mean, found.m2.sum() + between)

    @property
    def saturated_share(self) -> Tensor | None:
        """Share of input values where the slope is below 5 % of its maximum."""
        if self.saturated is None or self.input is None:
            return None
        return self.saturated / self.input.count

    def add_input(
        self, x: Tensor, overall: Moments, unit_dim: int, unit: int | None
    ) -> None:
        """Merge one input, whose moments over all values are `overall`."""
        self.add_samples(x)
        self.input = merged(self.input, overall)
        if self.limits is not None:
            low, high = self.limits
            # `not inside` rather than `outside`: a NaN is no healthy slope.
            saturated = x.numel() - ((x >= low) & (x <= high)).sum()
            self.saturated = _added(self.saturated, saturated)
        if unit is not None:
            self.unit_values = unit_values(x, unit_dim, unit)

    def add_samples(self, x: Tensor) -> None:
        """Count the samples of one input or output."""
        self.samples += x.shape[0] if x.dim() > 1 else 1

    @property
    def rows(self) -> Rows | None:
        """The rows that went through a norm of another library."""
        if self.lost_rows is None:
            return None
        return Rows(*(int(count) for count in self.lost_rows.tolist()))

    def add_sums(self, x: Tensor) -> None:
        """Keep the sums of squares over the last dimension, until the output comes."""
        self._sums = None
        # Those that are sharded would need the other ranks.
        if x.dim() > 1 and x.is_floating_point() and type(x) is Tensor:
            x = x if x.dtype == torch.float64 else x.float()
            self._sums = torch.linalg.vector_norm(x, dim=-1).square()

    def add_lost_rows(self, y: Tensor) -> None:
        """Count the rows whose output is zero throughout, by the size of the input."""
        sums, self._sums = self._sums, None
        if sums is None or y.shape[:-1] != sums.shape:
            return
        lost = (y == 0).all(-1)
        # A sum that half precision has rounded may lie on either side in between.
        large = (sums > MAX_HALF * 1.01) & sums.isfinite()
        small = (sums < MAX_HALF * 0.99) & (sums > 0)
        kinds = (large, large & lost, small, small & lost)
        self.lost_rows = _added(self.lost_rows, torch.stack([k.sum() for k in kinds]))

    def add_constant(self, x: Tensor) -> None:
        """Set the share of the channels of one input that hold one value."""
        if x.dim() < 2 or not x.numel() or type(x) is not Tensor:
            return
        rows = x.movedim(getattr(self.module, "channel_dim", 1), 0)
        if rows.dim() == 2:
            # 28 µs for (128, 256), where the comparison below takes 80.
            same = rows.amin(1) == rows.amax(1)
        else:
            rows = rows.flatten(2)
            rows = rows[..., :: max(1, rows.shape[2] // MAX_POSITIONS)].flatten(1)
            same = (rows == rows[:, :1]).all(1)
        self.constant = same.float().mean()

    def add_channels(self, x: Tensor, mask: Tensor | None, samples: int = 0) -> None:
        """Add one input channel by channel, as a batch norm normalizes it.

        Args:
            x: The input.
            mask: The values that count; None for all.
            samples: Samples of the batch; rows `(N·L, C)` of N samples are sequences
                that were flattened. 0 where it is not known.
        """
        dim = getattr(self.module, "channel_dim", 1)
        mask = None if mask is None else _expanded(mask, x)
        mask = None if mask is None else mask.movedim(dim, 1)
        x = x.movedim(dim, 1)
        length = x.shape[2] if x.dim() == 3 else 0
        if mask is None and x.dim() == 2 and _holds_sequences(len(x), samples):
            x = _unflattened(x, samples)
        others = tuple(range(2, x.dim()))
        if not others:
            values = sample_means = moments(x, 0, mask)
        elif mask is None:
            values, sample_means = _by_sample(x, others)
        else:
            per_sample = moments(x, others, mask)
            values = per_sample.to(dtype=torch.float64).merge_dim(0)
            sample_means = moments(per_sample.mean, 0, per_sample.count > 0)
        self.calls.append(ChannelStatistics.of_batch(values, sample_means, length))
        if x.dim() == 3 and x.shape[2] > 1 and mask is None:
            self._add_unpadded(x, values)

    def _add_unpadded(self, x: Tensor, values: Moments) -> None:
        """Merge a batch of sequences `(N, C, L)` without their constant ends."""
        ends = constant_ends(x)
        padded = int(ends.sum())
        found = moments(x, (0, 2), ~ends[:, None].expand(x.shape)) if padded else values
        self.unpadded = merged(self.unpadded, found.to(dtype=torch.float64))
        self.num_padded += padded

    def add_output(self, y: Tensor, overall: Moments, unit_dim: int) -> None:
        """Merge one output, whose moments over all values are `overall`."""
        self.output = merged(self.output, overall)
        unit_dim = dim_within(y, unit_dim)
        self.units = y.shape[unit_dim] if y.dim() else 1
        if self.role == "activation" and y.dim() > 1:
            alive = alive_units(y, unit_dim)
            if self.alive is None or self.alive.shape != alive.shape:
                self.alive = alive
            else:
                self.alive = self.alive | alive.to(self.alive.device)

    def add_gradient(self, gradient: Tensor) -> None:
        """Merge one gradient with respect to an output."""
        self.gradient_calls += 1
        norm = norm_of(gradient)
        if self.gradient_norm is None:
            self.gradient_norm = norm
        else:
            self.gradient_norm = torch.hypot(
                self.gradient_norm, norm.to(self.gradient_norm.device)
            )


def constant_ends(x: Tensor) -> Tensor:
    """Return a mask `(N, L)` of the constant ends of sequences `(N, C, L)`.

    A constant end is a run of positions that equal the last one in every channel.
    """
    last = x[..., -1:]
    same = ((x - last).abs() <= 1e-5 * last.abs()).all(1)
    ends = same.flip(1).long().cumprod(1).flip(1).bool()
    # The last position equals itself: a run of one is no padding.
    return ends & (ends.sum(1, keepdim=True) > 1)


def _by_sample(x: Tensor, others: tuple[int, ...]) -> tuple[Moments, Moments]:
    """Return the moments of all values and of the sample means, `(C,)`.

    All samples have one count, so merging them takes a mean and two sums. The kernels
    for CPUs read x once: 0.45 of the time of the torch operations on 64 maps of 32 by
    32, 0.22 with channels last, and as much on maps of 4 by 4.
    """
    size, count = x[0, 0].numel(), x.shape[0]
    is_fit = x.is_cpu and size >= MIN_MAP and not _kernels.reasons_against(x, others)
    if is_fit:
        found = _kernels.moments(x, others)
        means, inside = found.mean.squeeze(others), found.m2.squeeze(others)
    else:
        x = x if x.dtype == torch.float64 else x.float()
        kept = x.mean(others, keepdim=True)
        inside = torch.linalg.vector_norm(x - kept, dim=others).double().square()
        means = kept.squeeze(others).double()
    mean = means.mean(0)
    between = (means - mean).square().sum(0)
    counts = (torch.full((), n, device=x.device) for n in (count * size, count))
    whole = Moments(next(counts), mean, inside.sum(0) + size * between)
    return whole, Moments(next(counts), mean, between)


def _holds_sequences(rows: int, samples: int) -> bool:
    return samples > 1 and rows > samples and rows % samples == 0


def _unflattened(x: Tensor, samples: int) -> Tensor:
    """Return rows `(N·L, C)` as sequences `(N, C, L)`.

    The rows of a sample lie together, or those of a position where that shows more
    padding.
    """
    by_sample = x.unflatten(0, (samples, -1)).movedim(1, 2)
    by_position = x.unflatten(0, (-1, samples)).permute(1, 2, 0)
    ends = [int(constant_ends(each).sum()) for each in (by_sample, by_position)]
    return by_position if ends[1] > ends[0] else by_sample


def _expanded(mask: Tensor, x: Tensor) -> Tensor | None:
    """Return the mask in the shape of x; None where it has another meaning."""
    try:
        return broadcast_mask(mask, x)
    except ArgumentError:
        return None


def merged(old: Moments | None, new: Moments) -> Moments:
    """Merge two Moments; `old` may be None."""
    return new if old is None else old.merge(new.to(device=old.mean.device))


def _added(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else old + new.to(old.device)

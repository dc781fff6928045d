"""Measurements of one layer: Moments, counts and norms, merged over all its calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normkit.doctor.channel_statistics import ChannelStatistics
from normkit.doctor.measurements import Role
from normkit.doctor.probes.roles import slope_limits
from normkit.doctor.probes.tensor_statistics import (
    RunningHistogram,
    band_of,
    dim_within,
    norm_of,
)
from normkit.errors import ArgumentError
from normkit.masks import broadcast_mask
from normkit.moments import Moments, moments

__all__ = ["LayerProbe", "constant_ends", "merged"]


class LayerProbe:
    """Measurements of one layer since the last `reset`, merged over all its calls.

    Attributes:
        name: Dotted name of the layer.
        module: The layer.
        role: Weight, norm, activation or recurrent.
        order: Position in the order of execution; None before the first call.
        is_output: The layer's output was the model's output.
        input: Moments of all input values (scalars); None before the first call.
        output: Moments of all output values.
        gradient_norm: ‖dL/d output‖ over all calls.
        saturated: Number of values beyond `slope_limits`; None where undefined.
        alive: Which units had an output other than zero; None for other roles.
        units: Features or channels of the output.
        channels: Per-channel statistics of the input, where requested.
        unpadded: Moments per channel without the constant ends of sequences; None
            where inputs are no sequences.
        num_padded: Positions in such ends.
        calls: The channel statistics of each call since the last `reset`, in order.
        fed_by: Name of the layer whose unchanged output was this one's input.
        band: The {15, 50, 85} percentiles of one unit's input, where requested.
        samples: Number of samples.
        before: Histogram of all inputs, where requested; `reset` keeps it.
        after: Histogram of all outputs.
    """

    def __init__(self, name: str, module: nn.Module, role: Role) -> None:
        self.name = name
        self.module = module
        self.role: Role = role
        self.order: int | None = None
        self.is_output = False
        self.units = 1
        self.limits = slope_limits(module)
        self.before: RunningHistogram | None = None
        self.after: RunningHistogram | None = None
        self.reset()

    def reset(self) -> None:
        """Clear the measurements; the order of execution stays."""
        self.samples = 0
        self.input: Moments | None = None
        self.output: Moments | None = None
        self.gradient_norm: Tensor | None = None
        self.saturated: Tensor | None = None
        self.alive: Tensor | None = None
        self.channels: ChannelStatistics | None = None
        self.unpadded: Moments | None = None
        self.num_padded = 0
        self.calls: list[ChannelStatistics] = []
        self.fed_by = ""
        self.band: Tensor | None = None

    @property
    def kind(self) -> str:
        """Name of the layer's class."""
        return type(self.module).__name__

    @property
    def has_single_value(self) -> bool:
        """True where the last call had one value per channel and gave no output."""
        calls = self.calls
        return bool(calls) and calls[-1].values == 1 and self.output is None

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
        self.samples += x.shape[0] if x.dim() > 1 else 1
        self.input = merged(self.input, overall)
        if self.limits is not None:
            low, high = self.limits
            # `not inside` rather than `outside`: a NaN is no healthy slope.
            saturated = x.numel() - ((x >= low) & (x <= high)).sum()
            self.saturated = _added(self.saturated, saturated)
        if unit is not None:
            self.band = band_of(x, unit_dim, unit)

    def add_channels(self, x: Tensor, mask: Tensor | None) -> None:
        """Merge one input channel by channel, as a batch norm normalizes it."""
        dim = getattr(self.module, "channel_dim", 1)
        mask = None if mask is None else _expanded(mask, x)
        mask = None if mask is None else mask.movedim(dim, 1)
        x = x.movedim(dim, 1)
        others = tuple(range(2, x.dim()))
        values = moments(x, (0, *others), mask)
        if others:
            per_sample = moments(x, others, mask)
            has_values = None if mask is None else per_sample.count > 0
            sample_means = moments(per_sample.mean, 0, has_values)
        else:
            sample_means = values
        length = x.shape[2] if x.dim() == 3 else 0
        batch = ChannelStatistics.of_batch(values, sample_means, length)
        self.calls.append(batch)
        if self.channels is None:
            self.channels = batch
        else:
            self.channels = self.channels.merge(batch.to(self.channels.within.device))
        if length > 1 and mask is None:
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
            others = tuple(d for d in range(y.dim()) if d != unit_dim)
            alive = (y != 0).any(dim=others) if others else y != 0
            if self.alive is None or self.alive.shape != alive.shape:
                self.alive = alive
            else:
                self.alive = self.alive | alive.to(self.alive.device)

    def add_gradient(self, gradient: Tensor) -> None:
        """Merge one gradient with respect to an output."""
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

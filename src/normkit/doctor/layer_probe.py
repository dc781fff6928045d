"""What one layer saw: Moments, counts and norms, merged over all its calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normkit.doctor.measure import Tally, band_of, dim_within, norm_of
from normkit.doctor.roles import slope_limits
from normkit.doctor.statistics import Role
from normkit.doctor.streams import ChannelStream
from normkit.errors import ArgumentError
from normkit.moments import Moments, broadcast_mask, moments

__all__ = ["LayerProbe", "constant_ends", "merged"]


class LayerProbe:
    """What one layer saw since the last `reset`, merged over all its calls.

    Attributes:
        name: Dotted name of the layer.
        module: The layer.
        role: What the layer is for.
        order: Place in the order of execution; None before the first call.
        is_output: Whether the layer's output was the model's output.
        input: Moments of all input values (scalars); None before the first call.
        output: Moments of all output values.
        gradient_norm: ‖dL/d output‖ over everything seen.
        saturated: Number of values beyond `slope_limits`; None where undefined.
        alive: Which units had an output other than zero; None for other roles.
        units: Features or channels of the output.
        stream: Per-channel statistics of the input, when asked for.
        kept: Moments per channel without the constant ends of sequences; None where
            inputs are no sequences.
        num_padded: Positions in such ends.
        calls: The stream of each call by itself since the last `reset`, in order.
        fed_by: Name of the layer whose output was given to this one as it was.
        band: The {15, 50, 85} percentiles of one unit's input, when asked for.
        samples: Samples seen.
        before: Tally of all inputs, when asked for; `reset` keeps it.
        after: Tally of all outputs.
    """

    def __init__(self, name: str, module: nn.Module, role: Role) -> None:
        self.name = name
        self.module = module
        self.role: Role = role
        self.order: int | None = None
        self.is_output = False
        self.units = 1
        self.limits = slope_limits(module)
        self.before: Tally | None = None
        self.after: Tally | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was seen; the order of execution stays."""
        self.samples = 0
        self.input: Moments | None = None
        self.output: Moments | None = None
        self.gradient_norm: Tensor | None = None
        self.saturated: Tensor | None = None
        self.alive: Tensor | None = None
        self.stream: ChannelStream | None = None
        self.kept: Moments | None = None
        self.num_padded = 0
        self.calls: list[ChannelStream] = []
        self.fed_by = ""
        self.band: Tensor | None = None

    @property
    def kind(self) -> str:
        """Name of the layer's class."""
        return type(self.module).__name__

    @property
    def saturated_share(self) -> Tensor | None:
        """Share of input values where the slope is below 5 % of its greatest."""
        if self.saturated is None or self.input is None:
            return None
        return self.saturated / self.input.count

    def see_input(
        self, x: Tensor, overall: Moments, unit_dim: int, unit: int | None
    ) -> None:
        """Merge one input, whose moments over everything are `overall`."""
        self.samples += x.shape[0] if x.dim() > 1 else 1
        self.input = merged(self.input, overall)
        if self.limits is not None:
            low, high = self.limits
            # `not inside` rather than `outside`: a NaN is no healthy slope.
            saturated = x.numel() - ((x >= low) & (x <= high)).sum()
            self.saturated = _added(self.saturated, saturated)
        if unit is not None:
            self.band = band_of(x, unit_dim, unit)

    def see_channels(self, x: Tensor, mask: Tensor | None) -> None:
        """Merge one input channel by channel, as a batch norm sees it."""
        dim = getattr(self.module, "channel_dim", 1)
        mask = None if mask is None else _expanded(mask, x)
        mask = None if mask is None else mask.movedim(dim, 1)
        x = x.movedim(dim, 1)
        others = tuple(range(2, x.dim()))
        values = moments(x, (0, *others), mask)
        if others:
            per_sample = moments(x, others, mask)
            held = None if mask is None else per_sample.count > 0
            sample_means = moments(per_sample.mean, 0, held)
        else:
            sample_means = values
        length = x.shape[2] if x.dim() == 3 else 0
        batch = ChannelStream.of_batch(values, sample_means, length)
        self.calls.append(batch)
        if self.stream is None:
            self.stream = batch
        else:
            self.stream = self.stream.merge(batch.to(self.stream.within.device))
        if length > 1 and mask is None:
            self._see_ends(x, values)

    def _see_ends(self, x: Tensor, values: Moments) -> None:
        """Merge a batch of sequences `(N, C, L)` without their constant ends."""
        ends = constant_ends(x)
        padded = int(ends.sum())
        kept = moments(x, (0, 2), ~ends[:, None].expand(x.shape)) if padded else values
        kept = kept.to(dtype=torch.float64)
        self.kept = merged(self.kept, kept)
        self.num_padded += padded

    def see_output(self, y: Tensor, overall: Moments, unit_dim: int) -> None:
        """Merge one output, whose moments over everything are `overall`."""
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

    def see_gradient(self, gradient: Tensor) -> None:
        """Merge one gradient with respect to an output."""
        norm = norm_of(gradient)
        if self.gradient_norm is None:
            self.gradient_norm = norm
        else:
            self.gradient_norm = torch.hypot(
                self.gradient_norm, norm.to(self.gradient_norm.device)
            )


def constant_ends(x: Tensor) -> Tensor:
    """Which positions of sequences `(N, C, L)` lie in a constant end; shape `(N, L)`.

    A run of positions that all equal the last one, in every channel.
    """
    last = x[..., -1:]
    same = ((x - last).abs() <= 1e-5 * last.abs()).all(1)
    ends = same.flip(1).long().cumprod(1).flip(1).bool()
    # The last position equals itself: a run of one is no padding.
    return ends & (ends.sum(1, keepdim=True) > 1)


def _expanded(mask: Tensor, x: Tensor) -> Tensor | None:
    """The mask in the shape of x; None for what another's layer calls a mask."""
    try:
        return broadcast_mask(mask, x)
    except ArgumentError:
        return None


def merged(old: Moments | None, new: Moments) -> Moments:
    """Both Moments where the old ones are; the new ones where there are no old."""
    return new if old is None else old.merge(new.to(device=old.mean.device))


def _added(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else old + new.to(old.device)

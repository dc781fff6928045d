"""Batch norm in a recurrence: each time step has its own statistics.

    y_t = (x_t − mean_t)/√(var_t + eps)·weight + bias

The statistics of early steps differ from those of late ones, where few sequences are
left; weight and bias are shared. A step beyond all training sequences uses the
statistics of the last step that was trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.errors import ArgumentError, ShapeError
from normkit.functional import normalize, standardize
from normkit.functional.arguments import (
    check_constants,
    check_eps,
    check_floating,
)
from normkit.functional.ema import ema_
from normkit.masks import broadcast_mask
from normkit.moments import Moments
from normkit.nn.tracing import recorded_call
from normkit.nn.tracked_layer import TrackedLayer

__all__ = ["RecurrentBatchNorm"]


class RecurrentBatchNorm(TrackedLayer):
    """Normalize each feature of each time step over the batch.

    Called with `step=t` on `(N, C)` inside a recurrence; or without a step on
    `(T, N, C)`, where all steps are known at once.

    Args:
        num_features: Number of features C.
        max_steps: Number of time steps with statistics of their own; later steps share
            those of the last.
        eps: Added to the variance, inside the root.
        momentum: Share of the batch in the new running statistics, in [0, 1]; None
            gives all batches the same share.
        affine: Learn `weight` and `bias`, shape `(C,)`, from `first_weight` and 0.
        track_running_stats: Keep `running_mean` and the unbiased `running_var`, shape
            `(max_steps, C)`, and `num_batches_tracked`, shape `(max_steps,)`, for
            eval. False uses the batch in eval, too.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers; float32 also serves half inputs.
        bias: Learn a bias when `affine`.
        first_weight: The weight to start from. The paper's 0.1 keeps the tanh of a
            recurrence where its slope is near 1; 1 makes gradients vanish there.
        process_group: Take the statistics over these ranks, as `SyncBatchNorm` does;
            None is this rank alone.

    Raises:
        ArgumentError: max_steps below 1, momentum outside [0, 1]; in forward, a
            negative step, one sample in training without a mask.
        ShapeError: In forward, another number of features or dimensions.
        DtypeError: An input that is not floating point.

    Numerics:
        As `BatchNorm1d`. A step at which a mask leaves one sample has no variance: its
        output is `bias`, and it updates the running mean alone.

    Example:
        >>> layer = RecurrentBatchNorm(3, max_steps=5, affine=False)
        >>> x = torch.randn(5, 8, 3)
        >>> whole = layer(x)
        >>> torch.allclose(layer(x[2], step=2), whole[2])
        True

    References:
        Cooijmans, Ballas, Laurent, Gülçehre & Courville, "Recurrent Batch
        Normalization", ICLR 2017.
    """

    running_var: Tensor | None
    shown = ("max_steps", "eps", "momentum", "affine", "track_running_stats")

    def __init__(
        self,
        num_features: int,
        max_steps: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        first_weight: float = 0.1,
        process_group: Any = None,
    ) -> None:
        if max_steps < 1:
            raise ArgumentError(
                f"RecurrentBatchNorm needs max_steps of at least 1, got {max_steps}; "
                "take the length of a usual sequence"
            )
        super().__init__(
            (num_features,),
            dict.fromkeys(("running_mean", "running_var"), (max_steps, num_features)),
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            bias=bias,
            device=device,
            dtype=dtype,
            counter=(max_steps,),
            process_group=process_group,
        )
        self.num_features, self.max_steps = num_features, max_steps
        self.first_weight = first_weight
        self.reset_parameters()

    def forward(
        self,
        input: Tensor,  # noqa: A002
        step: int | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalize one step, or a whole sequence; in training, update its statistics.

        Args:
            input: Values, any floating dtype: shape `(N, C)` with a `step`, and
                `(T, N, C)` without.
            step: Index of the step, from 0.
            mask: Which values count: bool or weights ≥ 0, broadcastable to `input`;
                `(N, 1)` or `(T, N, 1)` for sequences of several lengths. The output
                is 0 elsewhere.
        """
        if (node := recorded_call(self, input, step=step, mask=mask)) is not None:
            return node
        name = type(self).__name__
        check_floating(input, name)
        check_eps(self.eps, name, "positive")
        dims = 3 if step is None else 2
        if input.dim() != dims or input.shape[-1] != self.num_features:
            wanted = "(N, C) with a step, or (T, N, C) without"
            raise ShapeError(
                f"{name} takes {wanted}, C = {self.num_features}; got "
                f"{tuple(input.shape)} with step={step}"
            )
        if step is not None and step < 0:
            raise ArgumentError(f"step={step} must not be negative; steps start at 0")
        x = input if step is None else input.unsqueeze(0)
        if mask is not None:
            mask = broadcast_mask(mask, input).view(x.shape)
        y = self._steps(x, 0 if step is None else step, mask)
        return y if step is None else y.squeeze(0)

    def _steps(self, x: Tensor, first: int, mask: Tensor | None) -> Tensor:
        weight = None if self.weight is None else self.weight.view(1, 1, -1)
        bias = None if self.bias is None else self.bias.view(1, 1, -1)
        if self.uses_running:
            return self._by_running(x, first, mask, weight, bias)
        group = self.ranks()
        if self.training and x.shape[1] == 1 and mask is None and group is None:
            raise ArgumentError(
                f"{type(self).__name__} needs more than one sample to train, got "
                f"{tuple(x.shape)}; use eval() or a larger batch"
            )
        y, measured = normalize(
            *(x, (1,), weight, bias, self.eps), mask=mask, group=group
        )
        if self.updates_running():
            self._track(measured, first, x.shape[0])
        return y

    @torch.no_grad()
    def _track(self, measured: Moments, first: int, steps: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        shape = (steps, self.num_features)
        mean, var = measured.mean.view(shape), measured.unbiased_var.view(shape)
        count = measured.count.expand(measured.mean.shape).reshape(shape)
        m2 = measured.m2.view(shape)
        # Each step by itself: a NaN at one must not skip the others.
        is_finite = (mean.isfinite() & m2.isfinite()).all(1, keepdim=True)
        # Steps that share the last statistics update them one after the other.
        for begin, end in _runs(first, steps, self.max_steps):
            at = slice(begin, end) if end <= self.max_steps else slice(-1, None)
            here = slice(begin - first, end - first)
            counter = self.num_batches_tracked[at]
            rate: Any = self.momentum
            if rate is None:
                rate = (counter + 1).to(mean.dtype).reciprocal().unsqueeze(1)
            allowed = is_finite[here] & (count[here] > 0)
            ema_(self.running_mean[at], mean[here], rate, allowed)
            has_spread = is_finite[here] & (count[here] > 1)
            ema_(self.running_var[at], var[here], rate, has_spread)
            ema_(counter, counter + 1, 1, allowed.any(1))

    def _by_running(
        self,
        x: Tensor,
        first: int,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        check_constants(type(self).__name__, self.running_mean, self.running_var)
        places = torch.arange(first, first + x.shape[0], device=x.device)
        seen = self.num_batches_tracked > 0
        numbers = torch.arange(self.max_steps, device=x.device)
        last = (numbers * seen).amax()
        # All counts are 0 before training: each step then uses its own statistics.
        last = torch.where(seen.any(), last, self.max_steps - 1)
        places = torch.minimum(places, last)
        mean = self.running_mean[places].unsqueeze(1)
        var = self.running_var[places].unsqueeze(1)
        return standardize(x, mean, var, weight, bias, self.eps, mask=mask)

    def extra_repr(self) -> str:
        """Return the arguments that differ between layers."""
        return f"{self.num_features}, {super().extra_repr()}"


def _runs(first: int, steps: int, max_steps: int) -> list[tuple[int, int]]:
    """Split into runs: first the steps with own statistics, then single steps."""
    end = first + steps
    own = [(first, min(end, max_steps))] if first < max_steps else []
    return own + [(t, t + 1) for t in range(max(first, max_steps), end)]

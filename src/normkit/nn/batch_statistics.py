"""Choice of a batch norm's statistics in training, and the running statistics.

Statistics of the batch, of each ghost batch, of all ranks, or of an `Observer`. A
channel with a single value has none; `on_small_batch` is its policy.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from normkit.errors import ArgumentError, ShapeError
from normkit.functional import normalize, standardize, update_running
from normkit.functional.arguments import (
    check_constants,
    check_eps,
    check_floating,
    check_length,
)
from normkit.functional.ema import check_buffers
from normkit.functional.ghost import normalize_ghosts
from normkit.kernels.epilogue import Epilogue, activate
from normkit.masks import broadcast_mask, zero_where
from normkit.moments import Moments, statistics_dtype
from normkit.nn.layer_ranks import is_over_ranks, ranks_of
from normkit.nn.opaque_clone import opaque_clone
from normkit.nn.running_state import (
    RunningStateLayer,
    check_not_recomputed,
    is_recomputing,
)
from normkit.sync import merge_over
from normkit.torch_state import (
    PLAIN,
    has_mode_or_tracer,
    has_transforms,
    is_compiling,
    is_jit_tracing,
)

__all__ = ["ESTIMATORS", "SMALL_BATCH_POLICIES", "BatchStatisticsLayer", "Observer"]

ESTIMATORS = ("unbiased", "biased")
SMALL_BATCH_POLICIES = ("raise", "running", "renorm", "skip")


class Observer(Protocol):
    """Observer that takes over a layer's statistics for a while: `nn.accumulation`."""

    def normalize(
        self, layer: BatchStatisticsLayer, x: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Moments] | None:
        """Normalize in place of the layer; None leaves it to the layer."""
        ...

    def take(self, layer: BatchStatisticsLayer, measured: Moments) -> None:
        """Take the statistics of a batch that would update the running ones."""
        ...

    @property
    def merges_ghosts(self) -> bool:
        """True to take each rank's own statistics, where ghost batches allow it."""
        ...


class BatchStatisticsLayer(RunningStateLayer, torch.nn.modules.batchnorm._BatchNorm):
    """Base that chooses a batch norm's statistics; use the classes named for the rank.

    A subclass's forward asks `_has_extras` and `is_over_ranks`, and calls
    `_forward_with_extras` if so.
    """

    process_group: Any = None
    ghost_size: int | None = None
    estimator: str = "unbiased"
    debias: bool = False
    on_small_batch: str = "raise"
    activation: str = "none"
    negative_slope: float = 0.01
    # True when an `Observer` can take over the statistics.
    is_observable: ClassVar[bool] = True
    _observer: Observer | None = None

    # No buffer: code that pairs the buffers of two models, or hands a state_dict to
    # functional_call, relies on those of torch.
    _skipped: Tensor | None = None

    @property
    def skipped(self) -> int:
        """Number of batches that a NaN or Inf kept out of the running statistics.

        Of the calls that no compiler, function transform or dispatch mode observes;
        in the others such batches are kept out, too, and not counted.
        """
        return 0 if self._skipped is None else int(self._skipped)

    def skip_counter(self) -> Tensor | None:
        """Return the int64 scalar that counts `skipped` batches, on the device.

        None where a tracer would take it for a constant.
        """
        # First: a compiler would guard on the counter, and compile again for the next.
        if is_compiling() or has_transforms() or has_mode_or_tracer():
            return None
        mean, counter = self._buffers["running_mean"], self._skipped
        if mean is None or mean.is_meta or type(mean) not in PLAIN:
            return None
        if counter is None or counter.device != mean.device:
            # In inference mode, the tensor could not be changed outside.
            with torch.inference_mode(mode=False):
                if counter is None:
                    counter = torch.zeros((), dtype=torch.int64, device=mean.device)
                self._skipped = counter = counter.to(mean.device)
        return counter

    def reset_running_stats(self) -> None:
        """Reset to mean 0, variance 1, no batch counted and none skipped."""
        super().reset_running_stats()
        self._skipped = None

    @property
    def is_synchronized(self) -> bool:
        """True when the statistics are those of all ranks of `process_group`."""
        return self.process_group is not None

    def is_over_ranks(self) -> bool:
        """Return whether the statistics of a batch are those of several ranks."""
        return self.is_synchronized and is_over_ranks(self)

    @property
    def merges_later(self) -> bool:
        """True when only the running statistics need those of other ranks."""
        return self.ghost_size is not None and self.on_small_batch == "raise"

    def update_running(self, measured: Moments) -> None:
        """Update the running statistics by those of a batch, once.

        Args:
            measured: Statistics of C channels, of any shape.
        """
        if self.estimator == "biased":
            # The update divides by n − 1; m2 is scaled to cancel that.
            n = measured.count.to(measured.m2.dtype)
            m2 = measured.m2 * (n - 1).clamp(min=0) / n.clamp(min=1)
            measured = Moments(measured.count, measured.mean, m2)
        update_running(
            *(self.running_mean, self.running_var, measured, self._rate()),
            num_batches_tracked=self.num_batches_tracked,
            num_batches_skipped=self.skip_counter(),
        )

    def _rate(self) -> float | Tensor | None:
        if not self.debias or not self.momentum:
            return self.momentum
        # Shares m·(1 − m)^k of the last batches, divided by their sum: the first
        # batch replaces the initial 0 and 1, and eval needs no correction.
        assert self.num_batches_tracked is not None
        batches = (self.num_batches_tracked + 1).to(torch.float64)
        # Rounded, the first share may exceed 1: a variance of 0 would become negative.
        share = self.momentum / (1 - (1 - self.momentum) ** batches)
        return share.clamp(max=1.0)

    def _has_extras(self) -> bool:
        """Return whether the statistics are not simply those of the batch."""
        return (
            self.ghost_size is not None
            or self.on_small_batch != "raise"
            or self.debias
            or self.estimator != "unbiased"
            or self._observer is not None
        )

    def _forward_with_extras(
        self,
        x: Tensor,
        mask: Tensor | None,
        residual: Tensor | None,
        is_tracking: bool,
    ) -> Tensor:
        check_floating(x, "batch_norm")
        check_eps(self.eps, "batch_norm", "positive")
        if not -x.dim() <= self.channel_dim < x.dim():
            raise ShapeError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)}, which "
                f"has no dimension {self.channel_dim} for channels to lie along"
            )
        channels = x.shape[self.channel_dim]
        check_length("weight", self.weight, channels)
        check_length("running_mean", self.running_mean, channels)
        check_buffers(self.running_mean, self.running_var, self.num_batches_tracked)
        over_ranks = self.is_over_ranks()
        if is_jit_tracing() and (self.ghost_size is not None or over_ranks):
            what = "other ranks" if over_ranks else f"ghost_size={self.ghost_size}"
            raise ArgumentError(
                f"{type(self).__name__} with {what} cannot be recorded in training by "
                "torch.jit.trace, which knows no collectives and no sizes but those of "
                "the example; trace it in eval(), or use torch.compile"
            )
        # With a mask or other ranks the count is on the device, which cannot raise.
        is_small = x.numel() == channels and not over_ranks
        if is_small and channels and self.on_small_batch == "raise":
            raise ArgumentError(
                f"{type(self).__name__} needs more than one value per channel to train "
                "(expected more than 1 value per channel when training), got shape "
                f"{tuple(x.shape)}; use a larger batch, eval(), or on_small_batch="
                "'running', 'renorm' or 'skip'"
            )
        replaces = self.on_small_batch in ("running", "renorm")
        is_apart = replaces or self._observer is not None
        epilogue = Epilogue(self.activation, self.negative_slope, residual)
        dtype = x.dtype
        if is_apart and epilogue:
            # Halves are rounded once, after the activation.
            x = x.to(statistics_dtype(dtype))
        y, measured = self._normalized(
            x, mask, Epilogue() if is_apart else epilogue, over_ranks
        )
        reads_moved = self.on_small_batch == "renorm" and self.running_mean is not None
        # Larger channels did not read the running statistics. Reading the counts waits
        # for the device, in a repeated forward alone.
        if reads_moved and is_recomputing() and bool((measured.count <= 1).any()):
            check_not_recomputed(self)
        if replaces:
            y = self._unless_small(x, y, measured, mask)
        if is_apart:
            y = with_epilogue(y, epilogue, mask).to(dtype)
        if not is_tracking or self.running_mean is None:
            return y
        if self.on_small_batch in ("running", "skip"):
            # Such a channel keeps its running statistics, including the mean.
            measured = _only(measured, measured.count > 1)
        if self._observer is not None:
            self._observer.take(self, measured)
        else:
            self.update_running(measured)
        return y

    def _normalized(
        self, x: Tensor, mask: Tensor | None, epilogue: Epilogue, over_ranks: bool
    ) -> tuple[Tensor, Moments]:
        if self._observer is not None:
            done = self._observer.normalize(self, x, mask)
            if done is not None:
                return done
        group = ranks_of(self) if over_ranks else None
        if self.ghost_size is None:
            channel_dim = self.channel_dim % x.dim()
            return normalize(
                *(x, tuple(d for d in range(x.dim()) if d != channel_dim)),
                *(self.weight, self.bias, self.eps),
                mask=mask,
                epilogue=epilogue,
                group=group,
                vector=tuple(
                    size if d == channel_dim else 1 for d, size in enumerate(x.shape)
                ),
            )
        y, measured = normalize_ghosts(
            *(x, *self._along(x), self.eps),
            ghost_size=self.ghost_size,
            mask=mask,
            epilogue=epilogue,
        )
        later = self._observer is not None and self._observer.merges_ghosts
        if over_ranks and not (later and self.merges_later):
            measured = merge_over(measured, group, eps=self.eps)
        return y, measured

    def _along(self, x: Tensor) -> tuple[tuple[int, ...], Tensor | None, Tensor | None]:
        """Return the reduced dimensions of x; weight and bias, broadcastable to it."""
        channel_dim = self.channel_dim % x.dim()
        dims = tuple(d for d in range(x.dim()) if d != channel_dim)
        weight, bias = (
            None if v is None else self._shaped(v, x) for v in (self.weight, self.bias)
        )
        return dims, weight, bias

    def _shaped(self, vector: Tensor, x: Tensor) -> Tensor:
        dim = self.channel_dim % x.dim()
        return vector.view([-1 if d == dim else 1 for d in range(x.dim())])

    def _unless_small(
        self, x: Tensor, y: Tensor, measured: Moments, mask: Tensor | None
    ) -> Tensor:
        """Return `y` if each channel has two values, else use running statistics."""
        if self.running_mean is None or self.running_var is None:
            return y
        _, weight, bias = self._along(x)
        mean = self._shaped(opaque_clone(self.running_mean), x)
        var = self._shaped(opaque_clone(self.running_var), x)
        hidden = None
        if mask is not None:
            valid = broadcast_mask(mask, x)
            hidden = ~valid if valid.dtype == torch.bool else valid <= 0
            x = zero_where(hidden, x)
        if self.on_small_batch == "running":
            check_constants(type(self).__name__, self.running_mean, self.running_var)
            other = standardize(x, mean, var, weight, bias, self.eps)
        else:
            # One value is its own mean: batch renorm reduces to its shift d. Halves
            # are rounded at the end alone.
            wide = x.detach().to(statistics_dtype(x.dtype))
            d = standardize(wide, mean, var, None, None, self.eps).clamp(-5, 5)
            other = d if weight is None else d * weight.to(d.dtype)
            other = other if bias is None else other + bias.to(other.dtype)
        if hidden is not None:
            other = zero_where(hidden, other)
        return torch.where(measured.count > 1, y, other.to(y.dtype))


def with_epilogue(y: Tensor, epilogue: Epilogue, mask: Tensor | None) -> Tensor:
    """Apply residual, activation and mask where no kernel has done so."""
    residual = epilogue.residual
    if not epilogue:
        return y
    if residual is not None:
        if residual.shape != y.shape:
            raise ShapeError(
                f"residual of shape {tuple(residual.shape)} must have the shape of x, "
                f"{tuple(y.shape)}; use expand()"
            )
        y = y + residual
    y = activate(epilogue.activation, y, epilogue.slope)
    if mask is None:
        return y
    valid = broadcast_mask(mask, y)
    return zero_where(~valid if valid.dtype == torch.bool else valid <= 0, y)


def _only(measured: Moments, kept: Tensor) -> Moments:
    """Return the statistics of the kept channels, with count 0 for the others."""
    count = torch.where(kept, measured.count, torch.zeros_like(measured.count))
    return Moments(count, measured.mean, measured.m2)

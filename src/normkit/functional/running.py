"""Exponential moving averages of statistics: new = (1 − rate)·old + rate·batch.

`rate` is torch's momentum, the share of the new value. The articles' decay α = 0.9 is
rate = 1 − α = 0.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.kernels.choose import asked_for, backend_named
from normkit.kernels.cpu import CpuBackend
from normkit.moments import Moments

__all__ = ["ema_", "update_running"]


def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    moments: Moments,
    rate: float | Tensor | None,
    *,
    on_nonfinite: str = "skip",
    num_batches_tracked: Tensor | None = None,
    num_batches_skipped: Tensor | None = None,
) -> Tensor:
    """Move running statistics towards those of a batch, in place, without a host sync.

    Args:
        running_mean: Shape `(C,)`, or None.
        running_var: Shape `(C,)`, or None; takes the unbiased variance, as torch does.
        moments: Statistics of the batch, of C values in any shape. A channel with no
            value keeps its average; one with a single value keeps its variance.
        rate: Share of the new value, 0 to 1; a float or a 0-d tensor. None gives every
            batch the same share: 1/(num_batches_tracked + 1).
        on_nonfinite: `"skip"`: a batch with a NaN or Inf in any channel changes
            nothing. `"update"`: it enters the averages, as in torch.
        num_batches_tracked: Int64 scalar, or None; counts in place the batches that
            entered the averages. A batch without a value does not.
        num_batches_skipped: Int64 scalar, or None; counts in place the batches that
            were kept out because of a NaN or Inf.

    Returns:
        A bool scalar tensor: whether every statistic of the batch was finite.

    Raises:
        ArgumentError: `on_nonfinite` is neither of the two, or `rate` is None and
            nothing counts the batches.
    """
    if on_nonfinite not in ("skip", "update"):
        raise ArgumentError(f"on_nonfinite={on_nonfinite!r} must be 'skip' or 'update'")
    if rate is None and num_batches_tracked is None:
        raise ArgumentError(
            "momentum=None averages over all batches and needs num_batches_tracked "
            "to count them, got None; give it a counter or choose a momentum"
        )
    # One call instead of twenty small operations, where nothing watches them.
    if moments.mean.is_cpu and (kernels := _native()) is not None:
        is_finite = kernels.move_running(
            *(running_mean, running_var, moments),
            rate.item() if isinstance(rate, Tensor) else rate,
            skips_nonfinite=on_nonfinite == "skip",
            num_batches_tracked=num_batches_tracked,
        )
        if is_finite is not None:
            if num_batches_skipped is not None and on_nonfinite == "skip":
                num_batches_skipped.add_(~is_finite)
            return is_finite
    if rate is None:
        assert num_batches_tracked is not None
        rate = (num_batches_tracked + 1).to(moments.mean.dtype).reciprocal()
    with torch.no_grad():
        is_finite = moments.mean.isfinite().all() & moments.m2.isfinite().all()
        allowed = is_finite if on_nonfinite == "skip" else torch.ones_like(is_finite)
        if running_mean is not None:
            has_value = allowed & (moments.count > 0)
            ema_(running_mean, moments.mean, rate, has_value)
        if running_var is not None:
            has_spread = allowed & (moments.count > 1)
            ema_(running_var, moments.unbiased_var, rate, has_spread)
        if num_batches_tracked is not None:
            counted = allowed & (moments.count > 0).any()
            _writable(num_batches_tracked).add_(counted)
        if num_batches_skipped is not None:
            _writable(num_batches_skipped).add_(~allowed)
    return is_finite


def _native() -> CpuBackend | None:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    kernels = backend_named("cpu") if asked_for() in (None, "cpu") else None
    return kernels if isinstance(kernels, CpuBackend) else None


def ema_(running: Tensor, new: Tensor, rate: float | Tensor, allowed: Tensor) -> None:
    """Move `running` in place to (1 − rate)·running + rate·new where `allowed`."""
    new = new.reshape(running.shape)
    allowed = (
        allowed.expand_as(new) if allowed.dim() == 0 else allowed.reshape(new.shape)
    )
    old = running.to(new.dtype)
    if isinstance(rate, Tensor):
        rate = rate.to(device=new.device, dtype=new.dtype)
    _writable(running).copy_(torch.where(allowed, (1 - rate) * old + rate * new, old))


def _writable(buffer: Tensor) -> Tensor:
    """`buffer`, or under a transform of torch.func an alias that it lets us write to.

    The transforms refuse to change a tensor that they captured: a gradient could be
    lost. Here none can be: what is written is detached.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return buffer
    return torch.ops.aten.alias(buffer)

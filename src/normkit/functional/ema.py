"""Exponential moving averages of statistics: new = (1 − rate)·old + rate·batch.

`rate` is torch's momentum, the share of the new value. A decay α = 0.9 is
rate = 1 − α = 0.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.errors import ArgumentError, DtypeError, ShapeError
from normkit.functional.dtensor import is_dtensor, local_running
from normkit.kernels.asked_for import asked_for
from normkit.kernels.choose import backend_named
from normkit.kernels.cpu import CpuBackend
from normkit.kernels.spec import Running
from normkit.moments import Moments
from normkit.torch_state import has_transforms, is_compiling, is_observed

__all__ = [
    "check_buffers",
    "check_update",
    "ema",
    "ema_",
    "update",
    "update_running",
]


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
    """Update running statistics by those of a batch, in place, without a host sync.

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
        DtypeError: A running statistic that is not floating point, a counter that is
            not int64.
    """
    check_update(rate, num_batches_tracked, on_nonfinite)
    check_buffers(running_mean, running_var, num_batches_tracked, num_batches_skipped)
    running = Running(
        *(running_mean, running_var, rate, num_batches_tracked, num_batches_skipped),
        on_nonfinite == "skip",
    )
    return update(running, moments)


def check_update(
    rate: float | Tensor | None, batches: Tensor | None, on_nonfinite: str
) -> None:
    """Require a known `on_nonfinite`, and a counter with equal shares of batches."""
    if on_nonfinite not in ("skip", "update"):
        raise ArgumentError(f"on_nonfinite={on_nonfinite!r} must be 'skip' or 'update'")
    if rate is None and batches is None:
        raise ArgumentError(
            "momentum=None averages over all batches and needs num_batches_tracked "
            "to count them, got None; give it a counter or choose a momentum"
        )


def check_buffers(
    running_mean: Tensor | None, running_var: Tensor | None, *counters: Tensor | None
) -> None:
    """Require running statistics in floating point and counters in int64."""
    named = ("running_mean", running_mean), ("running_var", running_var)
    for name, statistic in named:
        if statistic is not None and not statistic.is_floating_point():
            raise DtypeError(
                f"{name} must be floating point, got {statistic.dtype}, which cannot "
                f"hold an average; convert it, e.g. {name}.float()"
            )
    # A narrower one would overflow.
    for counter in counters:
        if counter is not None and counter.dtype != torch.int64:
            raise DtypeError(
                f"num_batches_tracked counts in torch.int64, got {counter.dtype}; "
                "convert it, e.g. counter.long()"
            )


def update(running: Running, moments: Moments) -> Tensor:
    """Update `running` by the statistics of a batch; see `update_running`."""
    if not is_dtensor(moments.mean):
        running = local_running(running) or running
    # One call instead of twenty small operations, where no mode or tracer sees them.
    if not is_observed() and moments.mean.is_cpu and asked_for() in (None, "cpu"):
        kernels = backend_named("cpu")
        found = isinstance(kernels, CpuBackend) and kernels.update_running(
            running, moments
        )
        if found is not None:
            return torch.scalar_tensor(found, dtype=torch.bool, device="cpu")
    mean, var, rate, batches, skipped, skips_nonfinite = running
    if mean is not None and mean.numel() != moments.mean.numel():
        raise ShapeError(
            f"running statistics of {mean.numel()} channels cannot take those of a "
            f"batch of {moments.mean.numel()}; where channels are sharded, shard the "
            "running statistics, too: distribute_tensor(buffer, mesh, [Shard(0)])"
        )
    if rate is None:
        assert batches is not None
        rate = (batches + 1).to(moments.mean.dtype).reciprocal()
    with torch.no_grad():
        is_finite = moments.mean.isfinite().all() & moments.m2.isfinite().all()
        allowed = is_finite if skips_nonfinite else torch.ones_like(is_finite)
        if mean is not None:
            ema_(mean, moments.mean, rate, allowed & (moments.count > 0))
        if var is not None:
            ema_(var, moments.unbiased_var, rate, allowed & (moments.count > 1))
        if batches is not None:
            _writable(batches).add_(allowed & (moments.count > 0).any())
        if skipped is not None:
            _writable(skipped).add_(~allowed)
    return is_finite


def ema_(running: Tensor, new: Tensor, rate: float | Tensor, allowed: Tensor) -> None:
    """Set `running` to (1 − rate)·running + rate·new in place where `allowed`."""
    _writable(running).copy_(ema(running, new, rate, allowed))


def ema(running: Tensor, new: Tensor, rate: float | Tensor, allowed: Tensor) -> Tensor:
    """Return (1 − rate)·running + rate·new where `allowed`, in the dtype of `new`."""
    new = new.reshape(running.shape)
    allowed = (
        allowed.expand_as(new) if allowed.dim() == 0 else allowed.reshape(new.shape)
    )
    old = running.detach().to(new.dtype)
    if isinstance(rate, Tensor):
        rate = rate.to(device=new.device, dtype=new.dtype)
    return torch.where(allowed, (1 - rate) * old + rate * new, old)


def _writable(buffer: Tensor) -> Tensor:
    """Return `buffer`, or under a transform of torch.func an alias that may be written.

    The transforms refuse to change a captured tensor, because a gradient could be lost.
    Here none can be: the values written are detached.
    """
    if is_compiling() or not has_transforms():
        return buffer
    return torch.ops.aten.alias(buffer)

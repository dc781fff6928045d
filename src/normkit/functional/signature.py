"""Cache of calls by signature.

A signature is everything about a call but the values: the operation and its options,
shape, strides and dtype of x, the dtypes and shapes of the vectors, the number of
threads. A cached call has been checked, its route chosen, its geometry found. None
stands for a call that cannot be cached: a mode or tracer observes torch operations, or
a tensor does not hold its values at its address.

Signatures in CPU memory are made by the native library (`kernels/cpu/native/
entries.cpp`), those on a GPU here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from normkit.kernels.asked_for import asked_for_name
from normkit.kernels.cpu.loading import library
from normkit.kernels.spec import Operands, Running
from normkit.torch_state import PLAIN, is_wrapped

__all__ = [
    "calls",
    "find",
    "on_cpu",
    "remember",
    "signature",
]

# More than the layers of a network at several batch sizes; then the cache is cleared.
MAX_CALLS = 4096
calls: dict[Hashable, Any] = {}
_asked_for = asked_for_name.get


def find(key: Hashable | None) -> Any:
    """Return the cached call of a signature, or None."""
    return None if key is None else calls.get(key)


def remember(key: Hashable, call: Any) -> None:
    """Cache the call of a signature."""
    if len(calls) >= MAX_CALLS:
        calls.clear()
    calls[key] = call
    if on_cpu.find is None and (native := library()) is not None:
        on_cpu.find = native.find


class _OnCpu:
    # `Library.find`, set with the first entry; before it there is nothing to be found.
    find: Callable[..., Any] | None = None


on_cpu = _OnCpu()


def signature(
    operation: Hashable, operands: Operands, running: Running | None = None
) -> Hashable | None:
    """Return the signature of a call, or None if it cannot be cached.

    The caller has made sure that `is_observed()` is False.
    """
    x, weight, bias, residual, mask = operands
    if type(x) not in PLAIN:
        return None
    if not x.is_cuda:
        native = library() if x.is_cpu else None
        return native and native.signature(operation, *operands, running)
    if x.is_neg() or is_wrapped(x):
        return None
    device = x.get_device()
    try:
        shape, strides = x.shape, x.stride()
    except RuntimeError:  # a sparse layout, or a nested tensor
        return None
    mean = var = batches = skipped = None
    if running is not None:
        mean, var, _, batches, skipped, _ = running
        if mean is not None and mean.requires_grad:
            return None
        if var is not None and var.requires_grad:
            return None
    key: list[Hashable] = [operation, shape, strides, x.dtype, device, _asked_for()]
    for t in (weight, bias, mean, var, batches, skipped, residual, mask):
        if t is None:
            key.append(None)
            continue
        if type(t) not in PLAIN or t.get_device() != device or t.is_neg():
            return None
        if t is not residual and t is not mask and not t.is_contiguous():
            return None
        key += t.dtype, t.shape
    if (
        (mean is None) != (var is None)
        or (residual is not None and residual.shape != shape)
        or (mask is not None and mask.dtype is not torch.bool)
    ):
        return None
    for counter in (batches, skipped):
        if counter is not None and (
            counter.dtype is not torch.int64 or counter.numel() != 1
        ):
            return None
    return tuple(key)

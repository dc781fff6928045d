"""Cache of calls by signature.

A signature is everything about a call but the values: the operation and its options,
shape, strides and dtype of x, the dtypes and shapes of the vectors, the number of
threads. A cached call has been checked, its route chosen, its geometry found. None
stands for a call that cannot be cached: a mode or tracer observes torch operations, or
a tensor does not hold its values at its address.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from normkit.kernels.choose import asked_for_name
from normkit.torch_state import PLAIN, is_observed, is_wrapped

__all__ = ["find", "remember", "signature", "with_running"]

# More than the layers of a network at several batch sizes; then the cache is cleared.
MAX_CALLS = 4096
_calls: dict[Hashable, Any] = {}
_threads, _asked_for = torch.get_num_threads, asked_for_name.get


def find(key: Hashable | None) -> Any:
    """Return the cached call of a signature, or None."""
    return None if key is None else _calls.get(key)


def signature(
    operation: Hashable,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Hashable | None:
    """Return the signature of a call, or None if it cannot be cached."""
    on_cpu = x.is_cpu
    if (
        is_observed()
        or type(x) not in PLAIN
        or not (on_cpu or x.is_cuda)
        or x.is_neg()
        or is_wrapped(x)
    ):
        return None
    device = -1 if on_cpu else x.get_device()
    of_weight = of_bias = None
    if weight is not None:
        if (
            type(weight) not in PLAIN
            or not (weight.is_cpu if on_cpu else weight.get_device() == device)
            or not weight.is_contiguous()
            or (type(weight) is Tensor and weight.is_neg())
        ):
            return None
        of_weight = weight.dtype, weight.shape
    if bias is not None:
        if (
            type(bias) not in PLAIN
            or not (bias.is_cpu if on_cpu else bias.get_device() == device)
            or not bias.is_contiguous()
            or (type(bias) is Tensor and bias.is_neg())
        ):
            return None
        of_bias = bias.dtype, bias.shape
    try:
        shape, strides = x.shape, x.stride()
    except RuntimeError:  # a sparse layout, or a nested tensor
        return None
    if residual is not None and (
        type(residual) not in PLAIN
        or not (residual.is_cpu if on_cpu else residual.get_device() == device)
        or residual.is_neg()
        or residual.shape != shape
    ):
        return None
    if mask is not None and (
        type(mask) is not Tensor
        or not (mask.is_cpu if on_cpu else mask.get_device() == device)
        or mask.dtype is not torch.bool
    ):
        return None
    return (
        *(operation, shape, strides, x.dtype, of_weight, of_bias),
        *(residual is None, None if mask is None else mask.shape),
        *(device, _threads(), _asked_for()),
    )


def with_running(
    key: Any,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None = None,
    skipped: Tensor | None = None,
) -> Hashable | None:
    """Return the signature with running statistics and counters, or None."""
    if key is None:
        return None
    device, of_running = key[-3], None
    on_cpu = device < 0
    if mean is not None and var is not None:
        if not (
            type(mean) is type(var) is Tensor
            and (mean.is_cpu if on_cpu else mean.get_device() == device)
            and (var.is_cpu if on_cpu else var.get_device() == device)
            and mean.is_contiguous()
            and var.is_contiguous()
            and not (mean.is_neg() or var.is_neg())
            and not (mean.requires_grad or var.requires_grad)
        ):
            return None
        of_running = mean.dtype, mean.shape, var.dtype, var.shape
    elif mean is not var:
        return None
    for counter in (batches, skipped):
        if counter is not None and not (
            type(counter) is Tensor
            and (counter.is_cpu if on_cpu else counter.get_device() == device)
            and counter.dtype is torch.int64
            and counter.numel() == 1
        ):
            return None
    return key, of_running, batches is None, skipped is None


def remember(key: Hashable, call: Any) -> None:
    """Cache the call of a signature."""
    if len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[key] = call

"""Small inputs: torch's own operator, where what it saved shows that it was exact.

Below some ten thousand values the time of a layer is that of calling it, and torch's
operators are called from C++. They compute x·scale + shift, which loses digits as
|mean|/std grows. So the operator runs, and the statistics that it keeps for its
backward are judged: up to |mean| = 4 std its error is within normkit's bound, and the
result is taken. Beyond, or where a value was not finite, None tells the caller to go on
as usual. Only float32 on a CPU is tried, where nothing watches and no backend is asked
for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from normkit.functional.memory import memory_mode
from normkit.kernels.choose import asked_for
from normkit.kernels.cpu.loading import SAVED, Library, library
from normkit.kernels.cpu.plain import is_watched
from normkit.kernels.epilogue import activate

__all__ = ["batch_norm", "group_norm", "layer_norm", "rms_norm"]

# Measured: up to this size calling our kernels costs more than they save.
MOST_VALUES = 16_384
# x·scale + shift errs by about 1e-7·|mean|/std; the bound for all of y is 2e-6.
MOST_OFFSET = 4.0
# Down a column (rows of channels, channels_last) torch adds one value after the other.
_MOST_IN_COLUMN, _MOST_OFFSET_OF_COLUMN = 512, 1.0

_FLOAT, _PLAIN = torch.float32, (Tensor, torch.nn.Parameter)
_EQUAL_SHARES = 4
# Activations of torch that keep their output.
_KEPT_FOR_BACKWARD = ("sigmoid", "tanh")
# Newer torch has it.
_rms_norm: Any = getattr(torch, "_fused_rms_norm", None)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    num_batches_tracked: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.01,
) -> Tensor | None:
    """`normkit.functional.batch_norm` of a small input; None leaves it to that.

    Args:
        x: Values, `(N, C, *)`.
        running_mean: Moved in training, used otherwise; shape `(C,)`.
        running_var: Likewise.
        weight: Per channel, or None.
        bias: Per channel, or None.
        training: Use the statistics of the batch.
        momentum: Share of the batch in the new running value; None gives every batch
            the same share.
        eps: Added to the variance.
        num_batches_tracked: Counts the batch if the running statistics moved.
        activation: Applied last.
        slope: Of leaky_relu.
    """
    if activation in _KEPT_FOR_BACKWARD:
        return None
    if type(x) is not Tensor or (rank := x.dim()) < 2:
        return None
    channels = x.shape[1]
    native = _library_for(x, (channels,), weight, bias, eps)
    if native is None:
        return None
    if running_mean is None or running_var is None:
        if not training or running_mean is not running_var:
            return None
        buffers = (0, 0, 0)
    else:
        if not (
            type(running_mean) is type(running_var) is Tensor
            and running_mean.dtype is running_var.dtype is _FLOAT
            and running_mean.shape == running_var.shape == (channels,)
            and running_mean.is_contiguous()
            and running_var.is_contiguous()
        ):
            return None
        buffers = (running_mean.data_ptr(), running_var.data_ptr(), 0)
    if not training:
        packed = SAVED.pack(
            *(channels, 2, 0, 0, 0, MOST_OFFSET, eps, 0.0),
            *(buffers[0], 0, buffers[1], 0, 0, 0),
        )
        if not native.settle(packed):
            return None
        y = torch.batch_norm(
            x, weight, bias, running_mean, running_var, False, 0.0, eps, False
        )
        return y if activation == "none" else _activated(activation, y, slope)
    count = x.numel() // channels
    in_columns = rank == 2 or not x.is_contiguous()
    if count < 2 or (in_columns and count > _MOST_IN_COLUMN):
        return None
    most = _MOST_OFFSET_OF_COLUMN if in_columns else MOST_OFFSET
    flags, rate = 0, momentum
    if momentum is None:
        if num_batches_tracked is None:
            return None
        flags, rate = _EQUAL_SHARES, 0.0
    elif isinstance(momentum, Tensor):
        return None
    y, mean, inv_std = torch.native_batch_norm(
        x, weight, bias, None, None, True, 0.0, eps
    )
    packed = SAVED.pack(
        *(channels, count, 0, 0, flags, most, eps, rate),
        *(mean.data_ptr(), inv_std.data_ptr(), 0, *buffers[:2]),
        0 if num_batches_tracked is None else num_batches_tracked.data_ptr(),
    )
    if not native.settle(packed):
        return None
    if running_mean is not None and running_var is not None:
        # Whoever saved a buffer for a backward has to notice, as with any change.
        increment_version((running_mean, running_var))
    return y if activation == "none" else _activated(activation, y, slope)


def _activated(name: str, y: Tensor, slope: float) -> Tensor:
    # torch's relu keeps its output, which then could not be changed in place; ours can.
    return F.threshold(y, 0.0, 0.0) if name == "relu" else activate(name, y, slope)


def layer_norm(
    x: Tensor,
    sizes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | None:
    """`normkit.functional.layer_norm` of a small input; None leaves it to that."""
    if type(x) is not Tensor or not sizes or x.shape[-len(sizes) :] != sizes:
        return None
    native = _library_for(x, sizes, weight, bias, eps)
    if native is None or not x.is_contiguous():
        return None
    y, mean, inv_std = torch.native_layer_norm(x, sizes, weight, bias, eps)
    return y if _are_fit(native, mean, inv_std, eps) else None


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | None:
    """`normkit.functional.group_norm` of a small input; None leaves it to that."""
    if type(x) is not Tensor or x.dim() < 2 or num_groups < 1:
        return None
    samples, channels = x.shape[0], x.shape[1]
    native = _library_for(x, (channels,), weight, bias, eps)
    if native is None or not x.is_contiguous():
        return None
    if channels % num_groups or x.numel() == samples * num_groups:
        return None
    positions = x.numel() // (samples * channels)
    y, mean, inv_std = torch.native_group_norm(
        x, weight, bias, samples, channels, positions, num_groups, eps
    )
    return y if _are_fit(native, mean, inv_std, eps) else None


def rms_norm(
    x: Tensor, sizes: tuple[int, ...], weight: Tensor | None, eps: float
) -> Tensor | None:
    """`normkit.functional.rms_norm` of a small input; None leaves it to that."""
    if type(x) is not Tensor or _rms_norm is None:
        return None
    if not sizes or x.shape[-len(sizes) :] != sizes:
        return None
    native = _library_for(x, sizes, weight, None, eps)
    if native is None or not x.is_contiguous():
        return None
    y, inv_rms = _rms_norm(x, sizes, weight, eps)
    return y if _are_fit(native, None, inv_rms, eps) else None


def _are_fit(native: Library, mean: Tensor | None, inv_std: Tensor, eps: float) -> bool:
    packed = SAVED.pack(
        *(inv_std.numel(), 2, 0, 0, 0, MOST_OFFSET, eps, 0.0),
        *(0 if mean is None else mean.data_ptr(), inv_std.data_ptr(), 0, 0, 0, 0),
    )
    return native.settle(packed)


def _library_for(
    x: Tensor,
    sizes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Library | None:
    """The library that judges, if `x` may be given to torch's operator at all."""
    if (
        torch.compiler.is_compiling()
        or x.dtype is not _FLOAT
        or not 0 < x.numel() <= MOST_VALUES
        or not 0.0 < eps < 1.0
        or not x.is_cpu
        or is_watched()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or asked_for() is not None
        or memory_mode() is not None
    ):
        return None
    for vector in (weight, bias):
        if vector is not None and (
            vector.dtype is not _FLOAT
            or vector.shape != sizes
            or type(vector) not in _PLAIN
        ):
            return None
    if not (x.is_contiguous() or _is_channels_last(x)):
        return None
    return library()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)

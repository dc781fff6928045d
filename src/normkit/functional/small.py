"""Small inputs: torch's own operator, where it is exact or can be made so.

Below some ten thousand values the time of a layer is that of calling it, and torch's
operators are called from C++. They compute x·scale + shift, which loses digits as
|mean|/std grows. So the operator runs, and the statistics that it keeps for its
backward are judged:

    |mean| ≤ 4 std      its error is within normkit's bound: the result is taken
    |mean| ≤ 32 std     our kernel writes the values and the statistics that it should
                        have given; its graph stays
    beyond, or where a value is not finite: None, and the caller goes on as usual

The call that judges, or mends, also moves the running statistics and counts the batch.
Only float32 on a CPU is tried, where nothing watches and no backend is asked for.
"""

# torch says who is watching in private names only.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.functional.judging import (
    FLOAT,
    UNFIT,
    JudgingLibrary,
    are_plain_vectors,
    are_transforms_active,
    fits,
    is_mended,
    is_ours,
    judging,
)
from normkit.kernels.cpu.loading import SAVED
from normkit.kernels.epilogue import activate

__all__ = [
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
]

# The backward of torch's RMS norm and its group norm of vectors are slower than those
# of other layers up to `MOST_VALUES`.
_MOST_OF_RMS, _MOST_OF_VECTORS = 16_384, 65_536
# x·scale + shift errs by about 1e-7·|mean|/std; the bound for all of y is 2e-6.
MOST_OFFSET = 4.0
# The backward of torch takes x − mean in float32, or x·scale − mean·scale: off by
# 6e-8·|mean|/std, and the bound for gradients is 1e-5.
MOST_MENDED = 32.0
# In eval the mean is given, and x − mean exact where it is small.
_ANY_OFFSET = 1e150
# Down a column (rows of channels, channels_last) torch adds one value after the other
# in float32. So many values and so far a mean give errors up to 1.4e-6 (measured).
_COLUMNS = ((16, 4.0), (128, 2.0), (512, 1.0))

_IS_VAR, _IS_INPUT, _EQUAL_SHARES = 1, 2, 4
_PER_RUN, _PER_ELEMENT = 0, 1
# Up to this size the input itself is judged, so that torch need not hand out what it
# saved: two tensors cost a microsecond.
_FEW = 512
# Activations of torch that keep their output.
_KEPT_FOR_BACKWARD = ("sigmoid", "tanh")
# Newer torch has it.
_rms_norm: Any = getattr(torch, "_fused_rms_norm", None)

_pack = SAVED.pack


def _one_by_one(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


_increment_version: Any = torch._C._increment_version
try:
    _increment_version((torch.empty(0),))
except TypeError:  # older ones take a tensor
    _increment_version = _one_by_one


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
    native = judging(x)
    if (
        native is None
        or activation in _KEPT_FOR_BACKWARD
        or (rank := x.dim()) < 2
        # Running statistics may be a transform's, and have no address.
        or are_transforms_active()
    ):
        return None
    channels, size = x.size(1), x.numel()
    mean_at = var_at = 0
    if running_mean is not None and running_var is not None:
        if not (
            type(running_mean) is type(running_var) is Tensor
            and running_mean.dtype is running_var.dtype is FLOAT
            and running_mean.numel() == running_var.numel() == channels
            and running_mean.is_contiguous()
            and running_var.is_contiguous()
            and running_mean.is_cpu
            and running_var.is_cpu
        ):
            return None
        mean_at, var_at = running_mean.data_ptr(), running_var.data_ptr()
    elif not training or running_mean is not running_var:
        return None
    count = over = size // channels
    inner = 1
    if x.is_contiguous():
        if rank > 2:
            over = x.size(0)
            inner = count // over
    elif rank != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    sizes = (1, over, channels, 1, inner, channels, _PER_RUN)
    if not training:
        if not are_plain_vectors(weight, bias):
            return None
        saved = _pack(
            *(channels, count, _IS_VAR, MOST_OFFSET, _ANY_OFFSET, eps, 0.0),
            *(mean_at, var_at, 0, 0, 0),
        )
        verdict = native.judge(saved)
        if verdict and not (
            verdict != UNFIT
            and is_ours(x, weight, bias)
            and fits(weight, channels)
            and fits(bias, channels)
        ):
            return None
        try:  # torch compares the shapes; what does not fit is the caller's to name
            y = torch.batch_norm(
                x, weight, bias, running_mean, running_var, False, 0.0, eps, False
            )
        except RuntimeError:
            return None
        if verdict:
            is_mended(native, x, sizes, weight, bias, eps, y, saved)
        return y if activation == "none" else _activated(activation, y, slope)
    if count < 2 or isinstance(momentum, Tensor):
        return None
    if not (fits(weight, channels) and fits(bias, channels)):
        return None
    bound = MOST_OFFSET
    if inner == 1:
        for most, bound in _COLUMNS:  # noqa: B007
            if count <= most:
                break
        else:
            bound = 0.0
    flags, rate = 0, momentum
    if momentum is None:
        if num_batches_tracked is None:
            return None
        flags, rate = _EQUAL_SHARES, 0.0
    y, mean, inv_std = torch.native_batch_norm(
        x, weight, bias, None, None, True, 0.0, eps
    )
    saved = _pack(
        *(channels, count, flags, bound, MOST_MENDED, eps, rate),
        *(mean.data_ptr(), inv_std.data_ptr(), mean_at, var_at),
        0 if num_batches_tracked is None else num_batches_tracked.data_ptr(),
    )
    verdict = native.judge(saved)
    if verdict and (
        verdict == UNFIT
        or not is_ours(x, weight, bias)
        or not is_mended(native, x, sizes, weight, bias, eps, y, saved)
    ):
        return None
    if mean_at:
        # Whoever saved a buffer for a backward has to notice, as with any change.
        _increment_version((running_mean, running_var))
    return y if activation == "none" else _activated(activation, y, slope)


def layer_norm(
    x: Tensor,
    sizes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | None:
    """`normkit.functional.layer_norm` of a small input; None leaves it to that."""
    native = judging(x)
    if native is None or not are_plain_vectors(weight, bias):
        return None
    size = x.numel()
    width = sizes[0] if len(sizes) == 1 else prod(sizes) if sizes else 0
    if width < 1:
        return None
    rows = size // width
    try:  # torch compares the shapes; what does not fit is the caller's to name
        if not x.is_contiguous():
            return None
        if size <= _FEW and _is_near(native, x, rows, width, eps):
            return torch.layer_norm(x, sizes, weight, bias, eps, False)
        y, mean, inv_std = torch.native_layer_norm(x, sizes, weight, bias, eps)
    except RuntimeError:
        return None
    geometry = (1, 1, rows, 1, width, 1, _PER_ELEMENT)
    is_good = _is_good(native, x, geometry, width, weight, bias, eps, y, mean, inv_std)
    return y if is_good else None


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | None:
    """`normkit.functional.group_norm` of a small input; None leaves it to that."""
    native = judging(x)
    if native is None or x.dim() < 2 or not are_plain_vectors(weight, bias):
        return None
    samples, channels, size = x.size(0), x.size(1), x.numel()
    if num_groups < 1 or channels % num_groups:
        return None
    rows = samples * num_groups
    width = size // rows
    if width == 1:
        return None
    share = channels // num_groups
    positions = width // share
    if positions == 1 and size > _MOST_OF_VECTORS:
        return None
    try:  # torch compares the shapes; what does not fit is the caller's to name
        if not x.is_contiguous():
            return None
        if size <= _FEW and _is_near(native, x, rows, width, eps):
            return torch.group_norm(x, num_groups, weight, bias, eps, False)
        if not (fits(weight, channels) and fits(bias, channels)):
            return None
        y, mean, inv_std = torch.native_group_norm(
            x, weight, bias, samples, channels, positions, num_groups, eps
        )
    except RuntimeError:
        return None
    geometry = (1, 1, rows, share, positions, num_groups, _PER_RUN)
    is_good = _is_good(native, x, geometry, width, weight, bias, eps, y, mean, inv_std)
    return y if is_good else None


def instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """`normkit.functional.instance_norm` of a small input; None leaves it to that."""
    # A group of one channel is an instance; without positions it is no input for it.
    is_batch = type(x) is Tensor and x.dim() > 2
    return group_norm(x, x.size(1), weight, bias, eps) if is_batch else None


def rms_norm(
    x: Tensor, sizes: tuple[int, ...], weight: Tensor | None, eps: float
) -> Tensor | None:
    """`normkit.functional.rms_norm` of a small input; None leaves it to that."""
    native = judging(x)
    if native is None or _rms_norm is None or not are_plain_vectors(weight, None):
        return None
    if not sizes or x.shape[-len(sizes) :] != sizes:
        return None
    if x.numel() > _MOST_OF_RMS and torch.is_grad_enabled():
        return None  # it is the backward of torch that is slow
    if weight is not None and not (weight.dtype is FLOAT and weight.shape == sizes):
        return None
    try:
        if not x.is_contiguous():
            return None
        y, inv_rms = _rms_norm(x, sizes, weight, eps)
        # Without a mean nothing cancels; but squares may be too large to be summed.
        verdict = native.judge(
            _pack(
                *(inv_rms.numel(), 2, 0, MOST_OFFSET, MOST_MENDED, eps, 0.0),
                *(0, inv_rms.data_ptr(), 0, 0, 0),
            )
        )
    except RuntimeError:
        return None
    return None if verdict else y


def _is_near(
    native: JudgingLibrary, x: Tensor, rows: int, width: int, eps: float
) -> bool:
    """Whether every row of `x` has its mean near enough, by its values."""
    return not native.judge(
        _pack(
            *(rows, width, _IS_INPUT, MOST_OFFSET, 0.0, eps, 0.0),
            *(x.data_ptr(), 0, 0, 0, 0),
        )
    )


def _is_good(
    native: JudgingLibrary,
    x: Tensor,
    geometry: tuple[int, ...],
    width: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    mean: Tensor,
    inv_std: Tensor,
) -> bool:
    """Whether what torch gave is exact, or now is; of rows of `width` values."""
    saved = _pack(
        *(x.numel() // width, width, 0, MOST_OFFSET, MOST_MENDED, eps, 0.0),
        *(mean.data_ptr(), inv_std.data_ptr(), 0, 0, 0),
    )
    verdict = native.judge(saved)
    return not verdict or (
        verdict != UNFIT
        and is_ours(x, weight, bias)
        and is_mended(native, x, geometry, weight, bias, eps, y, saved)
    )


def _activated(name: str, y: Tensor, slope: float) -> Tensor:
    # torch's relu keeps its output, which then could not be changed in place; ours can.
    return F.threshold(y, 0.0, 0.0) if name == "relu" else activate(name, y, slope)

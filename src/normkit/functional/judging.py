"""Who may judge and mend what torch's operators give for a small input.

`functional.small` says where that is done and why.
"""

# torch says who is watching in private names only.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from normkit.functional.memory import _state as _memory
from normkit.kernels.choose import _asked_for
from normkit.kernels.cpu.loading import CALL, Library, library
from normkit.kernels.cpu.packing import CENTERED, threads_for
from normkit.kernels.cpu.plain import are_plain

__all__ = [
    "FLOAT",
    "MOST_VALUES",
    "UNFIT",
    "JudgingLibrary",
    "are_plain_vectors",
    "are_transforms_active",
    "fits",
    "is_mended",
    "is_ours",
    "judging",
    "judging_library",
    "reasons_against",
]

# Measured: up to this size calling our kernels costs more than they save.
MOST_VALUES = 131_072
FLOAT, _PLAIN = torch.float32, (torch.nn.Parameter, Tensor)
# What the library answers where it can neither take a result nor mend it.
UNFIT = 2

# Every call of a small layer asks these, so each is the shortest way to ask. What
# torch's operators themselves answer to (torch.func, forward mode) is asked about only
# where our own code writes values.
_is_traced = torch.compiler.is_dynamo_compiling
_modes = torch._C._len_torch_dispatch_stack
_tracer = torch._C._get_tracing_state
are_transforms_active = torch._C._are_functorch_transforms_active


class JudgingLibrary(Library):
    """A library that has both entries."""

    judge: Any
    mend: Any


def judging(x: Tensor) -> JudgingLibrary | None:
    """The library, if `x` is of a kind that is tried and nobody asks for other ways."""
    if (
        _is_traced()
        or type(x) is not Tensor
        or x.dtype is not FLOAT
        or not x.is_cpu
        or not 0 < x.numel() <= MOST_VALUES
        or _asked_for.get() is not None
        or _memory.watches
        or _modes()
        or _tracer()
    ):
        return None
    return judging_library()


def reasons_against(x: Tensor) -> list[str]:
    """Why torch's operator is not tried on `x`, in words; empty when it is."""
    if type(x) is not Tensor:
        return [f"x is a {type(x).__name__}, not a plain tensor"]
    found: list[str] = []
    if x.dtype is not FLOAT:
        found.append(f"x is {x.dtype}, not torch.float32")
    if not x.is_cpu:
        found.append(f"x is on {x.device.type}")
    if not 0 < x.numel() <= MOST_VALUES:
        kind = "more than " + f"{MOST_VALUES:,}" if x.numel() else "too few"
        found.append(f"x has {x.numel():,} values, {kind}")
    if not _is_dense(x):
        found.append("x is neither contiguous nor channels_last")
    if _asked_for.get() is not None:
        found.append(f"backend {_asked_for.get()!r} is asked for")
    if _memory.watches:
        found.append("less is kept for the backward, or what is kept is counted")
    if _is_traced() or _modes() or _tracer():
        found.append("a compiler, a dispatch mode or a tracer watches")
    if judging_library() is None:
        found.append("there is no native library that judges its result")
    return found


def _is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and (
        x.is_contiguous()
        or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    )


@cache
def judging_library() -> JudgingLibrary | None:
    """The library, if it has both entries."""
    found: Any = library()
    return None if found is None or found.judge is None or not found.mend else found


def is_ours(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether our code may read the values and write what torch's operator gives."""
    return not (
        torch._C._len_torch_function_stack()
        or are_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or not are_plain(x, weight, bias)
    )


def fits(vector: Tensor | None, channels: int) -> bool:
    """Whether the operators may be given it without looking at it again."""
    return vector is None or (
        type(vector) in _PLAIN
        and vector.dtype is FLOAT
        and vector.dim() == 1
        and vector.numel() == channels
    )


def are_plain_vectors(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether they are absent or tensors of torch's own classes."""
    return (weight is None or type(weight) in _PLAIN) and (
        bias is None or type(bias) in _PLAIN
    )


def is_mended(
    native: JudgingLibrary,
    x: Tensor,
    geometry: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    saved: bytes,
) -> bool:
    """Let our kernel write `y` and what was saved; False if that cannot help."""
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    call = CALL.pack(
        *geometry,
        *(0, 0, 0, 0, CENTERED, threads_for(x), eps, 0.0),
        *(x.data_ptr(), 0, 0),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        *(0, 0, y.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    )
    return native.mend(call + saved) != UNFIT

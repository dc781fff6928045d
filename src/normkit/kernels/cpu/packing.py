"""Packing of a kernel call: tensors in the kernel's layout, in one struct."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import overload

import torch
from torch import Tensor

from normkit.kernels.cpu.geometry import Geometry
from normkit.kernels.cpu.loading import FIXED, POINTERS, STREAM
from normkit.kernels.epilogue import Epilogue

__all__ = [
    "ACTIVATION_CODES",
    "DTYPES",
    "Doubles",
    "as_learned",
    "as_mask",
    "as_statistic",
    "count_of",
    "doubles",
    "flags_of",
    "joint_shape",
    "kept_shape",
    "laid_like",
    "one_like",
    "packed_call",
    "threads_for",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# As in native/call.hpp; a number without a kernel there gives NaN.
ACTIVATION_CODES = {
    "none": 0,
    "relu": 1,
    "leaky_relu": 2,
    "silu": 3,
    "gelu": 4,
    "sigmoid": 5,
    "tanh": 6,
}

# Below this many values a second thread costs more than it saves.
_SERIAL = 32_768
# Larger outputs go past the caches, which saves reading the lines that they replace.
# From 4 to 8 MB a call in a loop takes 0.6 to 0.9 of the time so. In a step of a
# ResNet-50, whose next layer then reads them from memory, it is 0.98 in NCHW and no
# difference in channels_last, where from 2 MB on it is 1.03 (an EPYC with 512 KB of L2
# and 32 MB of shared L3).
_STREAM_BYTES = 4 << 20

_NONE = Epilogue()


def flags_of(x: Tensor, flags: int) -> int:
    """Return `flags`, plus streaming where outputs are too large for the cache."""
    is_large = x.numel() * x.element_size() > _STREAM_BYTES
    return flags | STREAM if is_large else flags


def threads_for(x: Tensor) -> int:
    """Return the number of threads that a call on `x` is worth."""
    return torch.get_num_threads() if x.numel() > _SERIAL else 1


@lru_cache(maxsize=4096)
def kept_shape(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` with `dims` of size 1."""
    return tuple(1 if d in dims else size for d, size in enumerate(shape))


def joint_shape(*vectors: Tensor | None) -> tuple[int, ...] | None:
    """Return the shape that the vectors broadcast to; None without any."""
    shape: tuple[int, ...] | None = None
    for v in vectors:
        if v is not None:
            if shape is None:
                shape = v.shape
            elif v.shape != shape:
                shape = _broadcast(shape, v.shape)
    return shape


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


def doubles(shape: tuple[int, ...]) -> Tensor:
    """Allocate float64 statistics."""
    return torch.empty(shape, dtype=torch.float64, device="cpu")


_empty_like = torch.empty_like

# By shape. A tensor for each cached call would lie on the heap among the activations of
# its first run and hold it: 1,000 batches of growing size left 970 MB to the process.
_templates: dict[tuple[int, ...], Tensor] = {}
MAX_TEMPLATES, MAX_TEMPLATE = 64, 4096


class Doubles:
    """Allocates float64 tensors of one shape.

    By a template that all calls share, in half the time of `doubles`; by the shape
    where that is large, or where there are many.
    """

    __slots__ = ("_like", "_shape")

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape, self._like = shape, _templates.get(shape)
        is_small = math.prod(shape) <= MAX_TEMPLATE
        if self._like is None and is_small and len(_templates) < MAX_TEMPLATES:
            self._like = _templates[shape] = doubles(shape)

    def __call__(self) -> Tensor:
        """Return an empty tensor."""
        return doubles(self._shape) if self._like is None else _empty_like(self._like)


def one_like(like: Tensor) -> Tensor:
    """Return a scale of ones with as many dimensions as `like`."""
    return torch.ones((1,) * like.dim(), dtype=torch.float64)


def count_of(geometry: Geometry, shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """Return the count of a statistic; under a mask, memory for the kernel to fill."""
    if mask is not None:
        return torch.empty(shape, dtype=torch.int64)
    _, over, _, sub_runs, inner, *_ = geometry.sizes
    return torch.scalar_tensor(over * sub_runs * inner, dtype=torch.int64)


def as_statistic(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return `v` as the kernels read statistics: float64, expanded to `shape`."""
    if v.dtype == torch.float64 and v.shape == shape and v.is_contiguous():
        return v
    return v.detach().to(torch.float64).expand(shape).contiguous()


def as_learned(v: Tensor | None, shape: tuple[int, ...] | None) -> Tensor | None:
    """Return `v` as the kernels read learned vectors: any floating dtype, expanded."""
    if v is None or shape is None:
        return None
    if v.dtype not in DTYPES:
        v = v.to(torch.float64)
    if v.shape == shape and v.is_contiguous():
        return v
    return v.expand(shape).contiguous()


def as_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return one byte for each value of x, in its layout."""
    return torch.empty_like(x, dtype=torch.bool).copy_(mask)


@overload
def laid_like(t: Tensor, x: Tensor) -> Tensor: ...
@overload
def laid_like(t: Tensor | None, x: Tensor) -> Tensor | None: ...
def laid_like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """Return `t` with the dtype and layout of x."""
    if t is None or (
        t.dtype == x.dtype and t.stride() == x.stride() and t.shape == x.shape
    ):
        return t
    return torch.empty_like(x).copy_(t)


# In the order of the native struct, after x.
_POINTERS = (
    *("residual", "mask", "weight", "bias", "dy", "gate", "dsum"),
    *("y", "dx", "dresidual", "sum", "dweight", "dbias"),
    *("center", "scale", "m2", "count", "sum_dy", "sum_dyx", "b", "c"),
)


def packed_call(
    geometry: Geometry,
    x: Tensor,
    flags: int,
    epilogue: Epilogue = _NONE,
    eps: float = 0.0,
    **tensors: Tensor | None,
) -> bytes:
    """Pack the struct of a call; `tensors` have the names of its fields."""
    given = [tensors.get(pointer) for pointer in _POINTERS]
    weight, bias = given[2], given[3]
    weight = given[11] if weight is None else weight
    bias = given[12] if bias is None else bias
    fixed = FIXED.pack(
        *geometry.sizes,
        DTYPES[x.dtype],
        0 if weight is None else DTYPES[weight.dtype],
        0 if bias is None else DTYPES[bias.dtype],
        *(0, 0),
        ACTIVATION_CODES[epilogue.activation],
        flags_of(x, flags),
        threads_for(x),
        eps,
        epilogue.slope,
    )
    return fixed + POINTERS.pack(
        0.0,
        x.data_ptr(),
        *[0 if t is None else t.data_ptr() for t in given],
        *(0, 0, 0, 0),
    )

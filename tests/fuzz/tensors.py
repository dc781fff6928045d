"""Tensors that are hard to read: their values, and how they lie in memory."""

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from strategies import filled

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# "far" (1e6 standard deviations) is what the suite's own bounds are about.
FILLS = ("normal", "offset", "constant", "outlier", "tiny")
SIZES = (1, 2, 3, 5, 8, 17)


def _in_order(x: Tensor, order: list[int]) -> Tensor:
    """Return the same values, with the dimensions of `order` from outer to inner."""
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(order).contiguous().permute(back)


def _channels_last(x: Tensor) -> Tensor:
    return _in_order(x, [0, *range(2, x.dim()), 1]) if x.dim() > 2 else x


def _turned(x: Tensor) -> Tensor:
    return _in_order(x, [*range(x.dim() - 2), x.dim() - 1, x.dim() - 2])


def _strided(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _cropped(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def _unaligned(x: Tensor) -> Tensor:
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return flat.view(x.shape).copy_(x)


def _odd_strides(x: Tensor) -> Tensor:
    """Return it with strides of 7 wherever a size of 1 allows any."""
    x = x.contiguous()
    pairs = zip(x.shape, x.stride(), strict=True)
    return x.as_strided(x.shape, [7 if n == 1 else s for n, s in pairs])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": _channels_last,
    "turned": _turned,
    "reversed": lambda x: _in_order(x, list(range(x.dim()))[::-1]),
    "batch inside": lambda x: _in_order(x, [*range(1, x.dim()), 0]),
    "strided": _strided,
    "cropped": _cropped,
    "unaligned": _unaligned,
    "odd strides": _odd_strides,
    # The values of the first sample, of the first position, everywhere.
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded inside": lambda x: x[..., :1].expand(x.shape),
    "negated": lambda x: torch._neg_view(-x),
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return `x` in the named layout; expanded ones repeat a part of it."""
    return LAYOUTS[layout](x)


def drawn(shape: tuple[int, ...], fill: str, seed: int, dtype: str) -> Tensor:
    """Return values of a fill that are representable in `dtype`."""
    return filled(shape, fill, seed, DTYPES[dtype])


MASKS = ("none", "positions", "samples", "each value", "weights", "all")


def mask_of(
    kind: str, shape: tuple[int, ...], channel: int, seed: int
) -> Tensor | None:
    """Return a mask of `shape` or broadcastable to it; None for "none"."""
    g = torch.Generator().manual_seed(seed)
    along = [1 if d == channel else n for d, n in enumerate(shape)]
    if kind == "none":
        return None
    if kind == "all":
        return torch.ones(along, dtype=torch.bool)
    if kind == "samples":
        along = [shape[0]] + [1] * (len(shape) - 1)
    if kind == "each value":
        along = list(shape)
    kept = torch.rand(along, generator=g) < 0.7
    if kind == "weights":
        return kept * torch.rand(along, generator=g).add(0.1)
    return kept


seeds = st.integers(0, 2**20)
layouts = st.sampled_from(sorted(LAYOUTS, key=lambda name: name != "contiguous"))

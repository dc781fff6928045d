"""Masks: which values of a tensor count."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.torch_state import has_transforms, is_compiling

__all__ = ["broadcast_mask", "check_mask", "zero_where"]


def check_mask(mask: object) -> None:
    """Refuse a mask that is no tensor.

    Raises:
        ArgumentError: It is a list, an array or the like.
    """
    if not isinstance(mask, Tensor):
        raise ArgumentError(
            f"mask is a {type(mask).__name__}, but must be a tensor; use "
            "torch.as_tensor(mask, dtype=torch.bool)"
        )


def broadcast_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return `mask` expanded to the shape of `x`.

    Raises:
        ArgumentError: It is no tensor, does not broadcast, is neither bool nor floating
            point, has a NaN, an Inf or a negative value, as the additive masks of
            transformers have, or lacks a dimension and fits samples and channels alike.
    """
    check_mask(mask)
    if mask.dtype != torch.bool:
        _check_weights(mask, x)
    lacks_one = 1 < mask.dim() == x.dim() - 1
    if lacks_one and mask.shape[0] == x.shape[0] == x.shape[1] > 1:
        n, *rest = mask.shape
        raise ArgumentError(
            f"mask of shape {tuple(mask.shape)} can be read in two ways beside x of "
            f"shape {tuple(x.shape)}; use mask[:, None], of shape {(n, 1, *rest)}, for "
            f"one of each sample, or mask[None], of shape {(1, n, *rest)}"
        )
    try:
        return mask.expand(x.shape)
    except RuntimeError:
        raise ArgumentError(
            f"mask of shape {tuple(mask.shape)} must broadcast to x, which has shape "
            f"{tuple(x.shape)}; add dimensions of size 1 where they are missing"
        ) from None


def _check_weights(mask: Tensor, x: Tensor) -> None:
    if not mask.dtype.is_floating_point:
        way_out = "use mask.bool()"
        if mask.dim() == 1 and x.dim() > 1 and mask.shape[0] == x.shape[0]:
            way_out = (
                "if these are the lengths of sequences, make a mask of them, e.g. "
                "(torch.arange(L) < lengths[:, None])[:, None, :] for (N, C, L); if "
                "they are zeros and ones, use mask.bool()"
            )
        raise ArgumentError(
            f"mask must be bool or floating-point weights, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}; {way_out}"
        )
    # Under a compiler or transform there are no values; nor in a meta tensor.
    if is_compiling() or has_transforms() or mask.is_meta:
        return
    # NaN is not ≥ 0.
    if bool(((mask >= 0) & (mask < math.inf)).all()):
        return
    if bool(mask.isinf().any()) and not bool((mask < 0).any()):
        raise ArgumentError(
            "mask has infinite values, but weights are finite; a value of infinite "
            "weight would leave the others nothing"
        )
    if bool(mask.isnan().any()):
        raise ArgumentError(
            "mask has NaN values, but weights are ≥ 0; give 0 to what does not count"
        )
    raise ArgumentError(
        f"mask has negative values (the least is {float(mask.min()):.4g}), but "
        "weights are ≥ 0; a transformer's additive mask is 0 where a value counts: "
        "pass mask == 0"
    )


def zero_where(hidden: Tensor, x: Tensor) -> Tensor:
    """Return `x` with 0 where `hidden`, in the memory format of `x`.

    `Tensor.masked_fill` always returns row-major order, so every later pass of a
    channels_last network would have mixed formats.
    """
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).masked_fill(hidden.permute(order), 0).permute(back)

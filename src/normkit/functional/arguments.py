"""Checks of arguments that all normalizations share, and their error messages."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from normkit.errors import ArgumentError, DerivativeError, DtypeError, ShapeError
from normkit.torch_state import has_tangent

__all__ = [
    "check_constants",
    "check_eps",
    "check_floating",
    "check_length",
    "check_trailing",
]


def check_floating(x: Tensor, name: str) -> None:
    """Require floating-point values, in sequences of one length."""
    if x.is_nested:
        raise ArgumentError(
            f"{name} takes statistics over positions and has no rule for a nested "
            "tensor; pad it (torch.nested.to_padded_tensor) and pass mask= for the "
            "padding"
        )
    if not x.dtype.is_floating_point:
        raise DtypeError(
            f"{name} needs floating-point values, got {x.dtype} (it is not implemented "
            "for it); convert first, e.g. x.float()"
        )


def check_eps(
    eps: float, name: str, required: Literal["positive", "non-negative", "finite"]
) -> None:
    """Require a finite eps; batch norm, as in torch, also one of the right sign."""
    fits = {"positive": eps > 0, "non-negative": eps >= 0, "finite": True}[required]
    # Comparisons, not math.isfinite: a compiler for dynamic shapes follows them.
    if not (-math.inf < eps < math.inf and fits):
        when = " during training" if required == "positive" else ""
        finite = "" if required == "finite" else " and finite"
        raise ArgumentError(
            f"{name} eps must be {required}{when}{finite}, but got {eps}; it is added "
            "to a variance, 1e-5 is usual"
        )


def check_length(name: str, vector: Tensor | None, channels: int) -> None:
    """Require one element per channel."""
    if vector is not None and vector.numel() != channels:
        raise ShapeError(
            f"{name} should contain {channels} elements, one per channel of the "
            f"input, not {vector.numel()}"
        )


def check_trailing(
    x: Tensor, normalized_shape: tuple[int, ...], name: str, **vectors: Tensor | None
) -> None:
    """Require that x ends in `normalized_shape`, and that the vectors have it."""
    if not normalized_shape:
        raise ShapeError(
            f"{name} needs normalized_shape to be at least 1-dimensional (Expected "
            "normalized_shape to be at least 1-dimensional), got ()"
        )
    for label, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != normalized_shape:
            raise ShapeError(
                f"Expected {label} to be of same shape as normalized_shape, but got "
                f"{label} of shape {list(vector.shape)} and normalized_shape = "
                f"{list(normalized_shape)}"
            )
    if tuple(x.shape[-len(normalized_shape) :]) != normalized_shape:
        raise ShapeError(
            f"Given normalized_shape={list(normalized_shape)}, expected input with "
            f"shape [*, {', '.join(map(str, normalized_shape))}], but got input of "
            f"size{list(x.shape)}"
        )


def check_constants(name: str, *running: Tensor | None) -> None:
    """Refuse running statistics with a derivative where the output reads them.

    They are constants to every kernel: without the error their share would be missing.
    """
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in running
    )
    if needs_grad or has_tangent(*running):
        what = "require a gradient" if needs_grad else "have forward grad defined"
        raise DerivativeError(
            f"{name} is not differentiable wrt running_mean and running_var, they "
            f"cannot {what}: they are constants; detach them (in forward mode, pass "
            "their primals), or take the derivative by the parameters alone"
        )

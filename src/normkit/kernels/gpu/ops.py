"""The GPU layers as operators of torch, so that torch.compile and export keep them.

    normkit::batch_norm             normkit::batch_norm_backward
    normkit::standardize_rows       normkit::standardize_rows_backward

Each is opaque to the compiler, declares the strides of its results and may be captured
in a CUDA graph. The running statistics are updated inside `batch_norm`, by its first
launch. Optional results that are not wanted are empty: operators return tensors.
Derivatives are registered by `normkit.functional.gpu_operators`.
"""
# torch.library's own annotations are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.kernels.gpu import launchers, layers
from normkit.kernels.gpu.geometry import Runs, flat, laid_out_as, matrix_of, runs_of
from normkit.kernels.spec import Running
from normkit.views import View, view_of

__all__ = ["FUNCTIONS", "LIBRARY"]

LIBRARY = torch.library.Library("normkit", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

LIBRARY.define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor(d!)? num_batches_skipped, "
    "float? momentum, float eps, bool skips_nonfinite, int channel_dim, "
    "str activation, float slope) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor bits, Tensor mean, Tensor inv_std, Tensor scale, "
    "int channel_dim, str activation, float slope, bool[4] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define(
    "standardize_rows(Tensor x, Tensor? weight, Tensor? bias, int[] dims, float eps, "
    "bool centered) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define(
    "standardize_rows_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, "
    "int[] dims, Tensor mean, Tensor inv_std, bool centered, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_batches_skipped: Tensor | None,
    momentum: float | None,
    eps: float,
    skips_nonfinite: bool,
    channel_dim: int,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dense, view = _dense(x, _all_but(x, channel_dim))
    weight, bias = _contiguous(weight), _contiguous(bias)
    running = None
    if running_mean is not None and running_var is not None:
        running = Running(
            *(running_mean, running_var, momentum),
            *(num_batches_tracked, num_batches_skipped, skips_nonfinite),
        )
    y, found, bits = layers.channels_forward(
        *(dense, layers.channels_of(view), weight, bias, residual),
        *(eps, activation, slope),
        running=running,
    )
    assert found.inv_std is not None
    assert found.scale is not None
    if bits is None:
        bits = _nothing(x, torch.uint8)
    return laid_out_as(x, y), found.mean, found.m2, found.inv_std, found.scale, bits


def _batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    scale: Tensor,
    channel_dim: int,
    activation: str,
    slope: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dense, view = _dense(x, _all_but(x, channel_dim))
    weight, bias = _contiguous(weight), _contiguous(bias)
    gate = launchers.Gate(
        activation,
        slope,
        bits=bits if bits.numel() else None,
        shift=bias,
        residual=None if residual is None else laid_out_as(dense, residual),
    )
    asked = (wanted[0], wanted[1], wanted[2], wanted[3])
    dx, dweight, dbias, dresidual = layers.channels_backward(
        *(dy, dense, layers.channels_of(view), weight, bias),
        *(mean, inv_std, scale, gate, asked),
    )
    return (
        _nothing(x) if dx is None else laid_out_as(x, dx),
        _nothing(x) if dweight is None else dweight,
        _nothing(x) if dbias is None else dbias,
        _nothing(x) if dresidual is None else laid_out_as(x, dresidual),
    )


def _standardize_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: list[int],
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dense, view = _dense(x, tuple(dims))
    matrix = matrix_of(view)
    affine = weight if weight is not None else bias
    y, found = launchers.rows_forward(
        *(dense, matrix),
        eps=eps,
        weight=None if weight is None else flat(weight, dense),
        bias=None if bias is None else flat(bias, dense),
        runs=None if affine is None else _runs(affine, dense, dims),
        centered=centered,
    )
    assert y is not None
    assert found.inv_std is not None
    return laid_out_as(x, y), found.mean, found.m2, found.inv_std


def _standardize_rows_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: list[int],
    mean: Tensor,
    inv_std: Tensor,
    centered: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dense, view = _dense(x, tuple(dims))
    affine = weight if weight is not None else bias
    dx, dweight, dbias = layers.rows_backward(
        *(dy, dense, matrix_of(view)),
        None if weight is None else flat(weight, dense),
        None if bias is None else flat(bias, dense),
        *(mean, inv_std),
        None if affine is None else _runs(affine, dense, dims),
        (wanted[0], wanted[1], wanted[2]),
        centered=centered,
    )
    return (
        _nothing(x) if dx is None else laid_out_as(x, dx),
        _nothing(x) if dweight is None or weight is None else dweight.view_as(weight),
        _nothing(x) if dbias is None or bias is None else dbias.view_as(bias),
    )


def _runs(affine: Tensor, x: Tensor, dims: list[int]) -> Runs | None:
    """Return how the affine lies; None for one weight per element of the row."""
    varies = [d for d in range(x.dim()) if affine.shape[d] != 1]
    if varies == [d for d in dims if x.shape[d] != 1]:
        return None
    return runs_of(affine, x, matrix_of(view_of(x, tuple(dims))))


def _dense(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, View]:
    """Return `x` and its view; a copy where a compiler passed a tensor with gaps."""
    view = view_of(x, dims)
    if view.kind != "strided":
        return x, view
    x = x.contiguous()
    return x, view_of(x, dims)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _all_but(x: Tensor, dim: int) -> tuple[int, ...]:
    return tuple(d for d in range(x.dim()) if d != dim)


def _nothing(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(0, dtype=dtype or x.dtype, device=x.device)


def _fake_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, channel_dim, activation, _ = others
    wide = [x.new_empty(x.shape[channel_dim], dtype=torch.float64) for _ in range(3)]
    scale = x.new_empty(x.shape[channel_dim], dtype=torch.float32)
    bits = _nothing(x, torch.uint8)
    if layers.saves_bits(activation, residual):
        _, view = _dense(x, _all_but(x, channel_dim))
        bits = launchers.bits_like(x, matrix_of(view))
    mean, m2, inv_std = wide
    return torch.empty_like(x), mean, m2, inv_std, scale, bits


def _fake_standardize_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: list[int],
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = 1
    for d in range(x.dim()):
        rows = rows if d in dims else rows * x.shape[d]
    mean, m2 = (x.new_empty(rows, dtype=torch.float64) for _ in range(2))
    return torch.empty_like(x), mean, m2, x.new_empty(rows, dtype=torch.float32)


def _fake_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    """Return tensors like x, weight and bias, and for a fourth `wanted` like x."""
    *_, wanted = others
    of = (x, weight, bias, x)[: len(wanted)]
    return tuple(
        torch.empty_like(t) if wants and t is not None else _nothing(x)
        for t, wants in zip(of, wanted, strict=True)
    )


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "batch_norm": _batch_norm,
    "batch_norm_backward": _batch_norm_backward,
    "standardize_rows": _standardize_rows,
    "standardize_rows_backward": _standardize_rows_backward,
}
_FAKES: dict[str, Callable[..., Any]] = {
    "batch_norm": _fake_batch_norm,
    "batch_norm_backward": _fake_gradients,
    "standardize_rows": _fake_standardize_rows,
    "standardize_rows_backward": _fake_gradients,
}
for _name, _function in FUNCTIONS.items():
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normkit::{_name}", _FAKES[_name], lib=LIBRARY)

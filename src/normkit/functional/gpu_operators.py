"""Layers of a GPU as operators that a compiler leaves whole, with derivatives.

    batch norm   statistics, running statistics, affine, sum and activation in two
                 launches
    rows         one launch

Eager calls run the same kernels by `kernels/gpu/call.py`. A second derivative
differentiates the formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normkit.functional import differentiable
from normkit.kernels.asked_for import asked_for
from normkit.kernels.choose import backend_named, choose
from normkit.kernels.gpu import GpuBackend
from normkit.kernels.gpu.call import GpuCall, unpacked
from normkit.kernels.gpu.config import FORWARD_ROW
from normkit.kernels.spec import Operands, Running, Spec
from normkit.torch_state import (
    below_autograd,
    is_compiling,
    is_exporting,
)

__all__ = ["call_for", "normalize", "serves"]


def serves(spec: Spec, operands: Operands, running: Running | None) -> bool:
    """Return whether `normalize` below runs this call."""
    x, weight, bias, residual, mask = operands
    if mask is not None or not is_compiling() or not _is_on_device(x) or spec.given:
        return False
    if spec.group is not None:
        return False
    if _channel_of(spec, x) is not None:
        buffers = () if running is None else (running.mean, running.var)
        return (
            not (running is not None and isinstance(running.rate, Tensor))
            and all(b is None or b.is_contiguous() for b in buffers)
            and _serves(x, spec.along(weight), spec.along(bias), residual)
        )
    seen, weight, bias = spec.seen(x), spec.along(weight), spec.along(bias)
    # An exported program holds torch operations only: other runtimes must read it.
    return (
        not is_exporting()
        and residual is None
        and running is None
        and spec.activation == "none"
        and _serves(seen, weight, bias)
        and _fits_rows(seen, spec.dims, weight if weight is not None else bias)
    )


def call_for(spec: Spec, operands: Operands, running: Running | None) -> GpuCall | None:
    """Return the eager call of this signature on a GPU, without a mask, or None."""
    x = operands[0]
    if not _is_on_device(x) or asked_for() not in (None, "gpu") or x.numel() == 0:
        return None
    kernels = choose(spec.seen(x), spec.dims)
    if not isinstance(kernels, GpuBackend):
        return None
    return kernels.call_for(spec, operands, running)


def _channel_of(spec: Spec, x: Tensor) -> int | None:
    """Return the dimension of channels, if all others share a statistic."""
    if spec.shape is not None or not spec.centered or len(spec.dims) != x.dim() - 1:
        return None
    channel = x.dim() * (x.dim() - 1) // 2 - sum(spec.dims)
    per_channel = spec.kept(x.shape)
    return channel if spec.vector == per_channel else None


def normalize(spec: Spec, operands: Operands, running: Running | None) -> Tensor:
    """Run a call for which `serves` is True."""
    _register()
    x, weight, bias, residual, _ = operands
    channel = _channel_of(spec, x)
    if channel is None:
        y, *_ = torch.ops.normkit.standardize_rows(
            *(spec.seen(x), spec.along(weight), spec.along(bias)),
            *(list(spec.dims), spec.eps, spec.centered),
        )
        return y.view(x.shape)
    mean, var, rate, batches, skipped, skips_nonfinite = (
        Running(None, None, 0.0) if running is None else running
    )
    y, *_ = torch.ops.normkit.batch_norm(
        *(x, weight, bias, residual, mean, var, batches, skipped),
        *(None if rate is None else float(rate), spec.eps, skips_nonfinite, channel),
        *(spec.activation, spec.slope),
    )
    return y


def _is_on_device(x: Tensor) -> bool:
    """Return whether `x` is on a GPU: checked first, so that CPU calls pay little."""
    kernels = backend_named("gpu")
    return isinstance(kernels, GpuBackend) and x.device.type in kernels.device_types


def _constant_for_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Act as torch.compiler.assume_constant_result, without loading the compiler."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def _serves(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the operators take these tensors; they accept any strides."""
    if not _may_serve(x.device.type, x.device.index):
        return False
    served = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    for t in others:
        if t is not None and t.shape == x.shape and t.dtype != x.dtype:
            served = False
    return served and x.numel() > 0


@_constant_for_compilers
def _may_serve(device_type: str, index: int | None) -> bool:
    """Return whether the device has the kernels and no other backend was asked for."""
    if asked_for() not in (None, "gpu"):
        return False
    kernels = backend_named("gpu")
    device = torch.device(device_type if index is None else f"{device_type}:{index}")
    return isinstance(kernels, GpuBackend) and not kernels.device_reasons(device)


def _fits_rows(x: Tensor, dims: tuple[int, ...], affine: Tensor | None) -> bool:
    """Return whether whole rows fit on the chip, with the affine as in a layer.

    torch.compile traces it: loops, and contiguity instead of strides.
    """
    width, first = 1, x.dim() - len(dims)
    for position, d in enumerate(dims):
        if d != first + position:
            return False
        width *= x.shape[d]
    if not x.is_contiguous() or width > FORWARD_ROW:
        return False
    if affine is None:
        return True
    # One weight per element of the row, or per channel before the positions.
    is_per_element, run = True, width
    for d in range(x.dim()):
        if d >= first and affine.shape[d] != x.shape[d]:
            is_per_element = False
        if d < first and affine.shape[d] != 1:
            is_per_element = False
    if is_per_element:
        return True
    for d in range(1, x.dim()):
        is_channel = d <= max(first, 1) and affine.shape[d] == x.shape[d]
        if not is_channel and affine.shape[d] != 1:
            return False
        if is_channel and d >= first:
            run //= x.shape[d]
    return affine.shape[0] == 1 and run > 1


@_constant_for_compilers
def _register() -> bool:
    """Define the operators and their derivatives, once."""
    return _register_once()


@functools.cache
def _register_once() -> bool:
    from normkit.kernels.gpu.ops import LIBRARY

    for name, function in (
        ("batch_norm", _BatchNorm),
        ("standardize_rows", _StandardizeRows),
    ):
        LIBRARY.impl(name, function.apply, "Autograd")
    return True


class _BatchNorm(torch.autograd.Function):
    """y, mean, m2, inv_std, scale and bits; only y is differentiable."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            results = torch.ops.normkit.batch_norm(*arguments)
        x, weight, bias, residual = arguments[:4]
        _, mean, _, inv_std, scale, bits = results
        if bits.numel():
            residual = None
        ctx.save_for_backward(x, weight, bias, residual, bits, mean, inv_std, scale)
        ctx.eps, _, ctx.channel_dim, ctx.activation, ctx.slope = arguments[9:]
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        dy = grad_outputs[0]
        nothing = (None,) * 10
        if dy is None:
            return (None, None, None, None, *nothing)
        wanted = list(ctx.needs_input_grad[:4])
        options = (ctx.channel_dim, ctx.activation, ctx.slope)
        if torch.is_grad_enabled():
            grads = _differentiable_batch_norm(dy, ctx, wanted)
        else:
            grads = torch.ops.normkit.batch_norm_backward(
                *(dy, *ctx.saved_tensors, *options, wanted)
            )
        found = [g if w else None for g, w in zip(grads, wanted, strict=True)]
        return (*found, *nothing)


def _differentiable_batch_norm(
    dy: Tensor, ctx: Any, wanted: list[bool]
) -> Sequence[Tensor | None]:
    x, weight, bias, residual, bits, *_ = ctx.saved_tensors
    shape = [1] * x.dim()
    shape[ctx.channel_dim] = x.shape[ctx.channel_dim]
    spec = Spec(
        tuple(d for d in range(x.dim()) if d != ctx.channel_dim),
        ctx.eps,
        activation=ctx.activation,
        slope=ctx.slope,
        vector=tuple(shape),
    )
    # The bits of a relu are also the signs of its output.
    gated = unpacked(bits, x) if bits.numel() else None
    learned = (x, weight, bias, residual)
    return differentiable.gradients(spec, dy, learned, None, None, gated, tuple(wanted))


class _StandardizeRows(torch.autograd.Function):
    """y, mean, m2 and inv_std of rows; only y is differentiable."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        x, weight, bias, dims, eps, centered = arguments
        with below_autograd():
            results = torch.ops.normkit.standardize_rows(*arguments)
        _, mean, _, inv_std = results
        ctx.save_for_backward(x, weight, bias, mean, inv_std)
        ctx.dims, ctx.eps, ctx.centered = dims, eps, centered
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        dy = grad_outputs[0]
        if dy is None:
            return (None,) * 6
        wanted = list(ctx.needs_input_grad[:3])
        x, weight, bias, mean, inv_std = ctx.saved_tensors
        if torch.is_grad_enabled():
            spec = Spec(tuple(ctx.dims), ctx.eps, ctx.centered)
            learned = (x, weight, bias, None)
            grads = differentiable.gradients(
                *(spec, dy, learned, None, None, None, (*wanted, False))
            )[:3]
        else:
            grads = torch.ops.normkit.standardize_rows_backward(
                *(dy, x, weight, bias, ctx.dims, mean, inv_std, ctx.centered, wanted)
            )
        found = [g if w else None for g, w in zip(grads, wanted, strict=True)]
        return (*found, None, None, None)

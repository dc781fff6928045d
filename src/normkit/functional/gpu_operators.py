"""GPU layers as operators with derivatives.

    batch norm   statistics, running statistics, affine, sum and activation in two
                 launches, eager and compiled
    rows         one operator under torch.compile

Eager calls run the kernels directly; under a compiler the same functions are operators
of torch. They do not run under torch.func and forward mode. A second derivative
differentiates the formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normkit.functional import differentiable
from normkit.functional.memory.block import memory_mode
from normkit.kernels.choose import asked_for, backend_named, choose
from normkit.kernels.epilogue import Epilogue
from normkit.kernels.gpu import GpuBackend
from normkit.kernels.gpu.config import FORWARD_ROW
from normkit.kernels.spec import Running, Spec
from normkit.torch_state import (
    below_autograd,
    has_forward_mode,
    has_transforms,
    is_compiling,
    is_exporting,
)

__all__ = ["batch_norm", "normalize", "serves"]

_NONE = Epilogue()


def batch_norm(
    x: Tensor,
    channel_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | Tensor | None = 0.1,
    skips_nonfinite: bool = True,
    epilogue: Epilogue = _NONE,
) -> Tensor | None:
    """Run batch norm in training on a GPU: see `normkit.functional.batch_norm`.

    Returns:
        The values, or None if the GPU kernels cannot run this call.
    """
    if not _is_on_device(x) or isinstance(momentum, Tensor) or x.numel() == 0:
        return None
    if memory_mode() is not None:
        return None  # the engine can recompute its output
    for buffer in (running_mean, running_var):
        if buffer is not None and not buffer.is_contiguous():
            return None
    dims = tuple(d for d in range(x.dim()) if d != channel_dim)
    residual = epilogue.residual
    shape = [1] * x.dim()
    shape[channel_dim] = x.shape[channel_dim]
    vectors = tuple(None if v is None else v.view(shape) for v in (weight, bias))
    if not _serves(x, dims, *vectors, residual):
        return None
    arguments = (
        *(x, weight, bias, residual, running_mean, running_var, num_batches_tracked),
        *(momentum, eps, skips_nonfinite, channel_dim),
        *(epilogue.activation, epilogue.slope),
    )
    if is_compiling():
        _register()
        return torch.ops.normkit.batch_norm(*arguments)[0]
    return _BatchNorm.apply(_directly("batch_norm"), *arguments)[0]


def serves(
    spec: Spec,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running | None,
) -> bool:
    """Return whether `normalize` below runs this call."""
    if not _is_on_device(x) or spec.given or spec.group is not None:
        return False
    if spec.shape is not None and not is_compiling():
        return False
    if _channel_of(spec, x) is not None:
        buffers = () if running is None else (running.mean, running.var)
        return (
            memory_mode() is None  # another route can recompute the output
            and x.numel() > 0
            and not (running is not None and isinstance(running.rate, Tensor))
            and all(b is None or b.is_contiguous() for b in buffers)
            and _serves(x, spec.dims, spec.along(weight), spec.along(bias), residual)
        )
    seen, weight, bias = spec.seen(x), spec.along(weight), spec.along(bias)
    # An exported program holds torch operations only: other runtimes must read it.
    return (
        is_compiling()
        and not is_exporting()
        and residual is None
        and running is None
        and spec.activation == "none"
        and _serves(seen, spec.dims, weight, bias)
        and _fits_rows(seen, spec.dims, weight if weight is not None else bias)
    )


def _channel_of(spec: Spec, x: Tensor) -> int | None:
    """Return the dimension of channels, if all others share a statistic."""
    if spec.shape is not None or not spec.centered or len(spec.dims) != x.dim() - 1:
        return None
    channel = x.dim() * (x.dim() - 1) // 2 - sum(spec.dims)
    per_channel = spec.kept(x.shape)
    return channel if spec.vector == per_channel else None


def normalize(
    spec: Spec,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running | None,
) -> Tensor:
    """Run a call for which `serves` is True."""
    channel = _channel_of(spec, x)
    if channel is None:
        _register()
        y, *_ = torch.ops.normkit.standardize_rows(
            *(spec.seen(x), spec.along(weight), spec.along(bias)),
            *(list(spec.dims), spec.eps, spec.centered),
        )
        return y.view(x.shape)
    mean, var, rate, batches, skipped, skips_nonfinite = (
        Running(None, None, 0.0) if running is None else running
    )
    is_counting = skipped is not None and batches is not None
    before = batches.clone() if is_counting and batches is not None else None
    y = batch_norm(
        *(x, channel, weight, bias, spec.eps),
        running_mean=mean,
        running_var=var,
        num_batches_tracked=batches,
        momentum=None if rate is None else float(rate),
        skips_nonfinite=skips_nonfinite,
        epilogue=spec.epilogue(residual),
    )
    assert y is not None
    if skipped is not None and batches is not None and before is not None:
        # The kernel updates all or nothing: a batch that is not counted was skipped.
        skipped.add_(1 - (batches - before))
    return y


def _is_on_device(x: Tensor) -> bool:
    """Return whether `x` is on a GPU: checked first, so that CPU calls pay little."""
    kernels = backend_named("gpu")
    return isinstance(kernels, GpuBackend) and x.device.type in kernels.device_types


def _constant_for_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Act as torch.compiler.assume_constant_result, without loading the compiler."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def _serves(x: Tensor, dims: tuple[int, ...], *others: Tensor | None) -> bool:
    """Return whether the GPU kernels can run this call and no tracer observes it."""
    if not _may_serve(x.device.type, x.device.index):
        return False
    if is_compiling():
        # Strides are unknown here; the operators accept any.
        served = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for t in others:
            if t is not None and t.shape == x.shape and t.dtype != x.dtype:
                served = False
        return served and x.numel() > 0
    if has_transforms() or has_forward_mode():
        return False
    kernels = choose(x, dims)
    return isinstance(kernels, GpuBackend) and kernels.fuses(x, dims, *others)


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


class _Runs:
    """Forward and backward functions that the autograd functions call."""

    def __init__(
        self, forward: Callable[..., Any], backward: Callable[..., Any]
    ) -> None:
        self.forward = forward
        self.backward = backward


@functools.cache
def _directly(name: str) -> _Runs:
    """Run the kernels without the dispatcher, which costs more than a launch."""
    from normkit.kernels.gpu import ops

    return _Runs(ops.FUNCTIONS[name], ops.FUNCTIONS[f"{name}_backward"])


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
        runs = _below_autograd(name)
        LIBRARY.impl(name, functools.partial(function.apply, runs), "Autograd")
    return True


def _below_autograd(name: str) -> _Runs:
    def call(operator: Any, *arguments: Any) -> Any:
        with below_autograd():
            return operator(*arguments)

    operators = torch.ops.normkit
    return _Runs(
        functools.partial(call, getattr(operators, name).default),
        getattr(operators, f"{name}_backward").default,
    )


class _BatchNorm(torch.autograd.Function):
    """y, mean, m2, inv_std, scale and bits; only y is differentiable."""

    @staticmethod
    def forward(ctx: Any, runs: _Runs, *arguments: Any) -> tuple[Tensor, ...]:
        results = runs.forward(*arguments)
        x, weight, bias, residual = arguments[:4]
        _, mean, _, inv_std, scale, bits = results
        if bits.numel():
            residual = None
        ctx.save_for_backward(x, weight, bias, residual, bits, mean, inv_std, scale)
        ctx.backward_of = runs.backward
        ctx.eps, (ctx.channel_dim, ctx.activation, ctx.slope) = (
            arguments[8],
            arguments[10:],
        )
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        dy = grad_outputs[0]
        nothing = (None,) * 9
        if dy is None:
            return (None, None, None, None, None, *nothing)
        wanted = list(ctx.needs_input_grad[1:5])
        options = (ctx.channel_dim, ctx.activation, ctx.slope)
        if torch.is_grad_enabled():
            grads = _differentiable_batch_norm(dy, ctx, wanted)
        else:
            grads = ctx.backward_of(dy, *ctx.saved_tensors, *options, wanted)
        found = [g if w else None for g, w in zip(grads, wanted, strict=True)]
        return (None, *found, *nothing)


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
    gated = _unpacked(bits, x, ctx.channel_dim) if bits.numel() else None
    learned = (x, weight, bias, residual)
    return differentiable.gradients(spec, dy, learned, None, None, gated, tuple(wanted))


def _unpacked(bits: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """Unpack the bits of relu's gates to bool, shaped and laid out as x."""
    place = torch.arange(8, dtype=torch.uint8, device=x.device)
    gates = (bits.unsqueeze(-1) >> place & 1).flatten(1).bool()
    width = x.numel() // bits.shape[0]
    values = gates[:, :width].reshape(-1)
    return torch.empty_like(x, dtype=torch.bool).copy_(
        values.as_strided(x.shape, torch.empty_like(x).stride())
    )


class _StandardizeRows(torch.autograd.Function):
    """y, mean, m2 and inv_std of rows; only y is differentiable."""

    @staticmethod
    def forward(ctx: Any, runs: _Runs, *arguments: Any) -> tuple[Tensor, ...]:
        x, weight, bias, dims, eps, centered = arguments
        results = runs.forward(*arguments)
        _, mean, _, inv_std = results
        ctx.save_for_backward(x, weight, bias, mean, inv_std)
        ctx.backward_of = runs.backward
        ctx.dims, ctx.eps, ctx.centered = dims, eps, centered
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        dy = grad_outputs[0]
        if dy is None:
            return (None,) * 7
        wanted = list(ctx.needs_input_grad[1:4])
        x, weight, bias, mean, inv_std = ctx.saved_tensors
        if torch.is_grad_enabled():
            spec = Spec(tuple(ctx.dims), ctx.eps, ctx.centered)
            learned = (x, weight, bias, None)
            grads = differentiable.gradients(
                *(spec, dy, learned, None, None, None, (*wanted, False))
            )[:3]
        else:
            grads = ctx.backward_of(
                *(dy, x, weight, bias, ctx.dims, mean, inv_std, ctx.centered, wanted)
            )
        found = [g if w else None for g, w in zip(grads, wanted, strict=True)]
        return (None, *found, None, None, None)

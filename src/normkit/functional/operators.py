"""The GPU layers as operators with derivatives, where they fit a call.

    batch_norm   statistics, running statistics, affine, sum and activation in two
                 launches; None where it does not fit, and the caller goes on as usual
    normalize    `engine.normalize`, which torch.compile sees as one operator

Eager calls go to the kernels directly; under a compiler the same functions are
operators of torch. Under torch.func and forward mode they step aside. A second
derivative runs on `composed`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normkit.functional import engine
from normkit.functional.composed import aliases, composed
from normkit.functional.memory import memory_mode
from normkit.kernels.choose import asked_for, backend_named, choose
from normkit.kernels.epilogue import Epilogue
from normkit.kernels.gpu import GpuBackend
from normkit.kernels.gpu.table import FORWARD_ROW
from normkit.moments import Moments

__all__ = ["batch_norm", "normalize"]

_NONE = Epilogue()
# torch 2.6 cannot tell an export from a compilation.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


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
    """Batch norm in training on a GPU: see `normkit.functional.batch_norm`.

    Args:
        x: Values.
        channel_dim: The dimension of channels, non-negative.
        weight: Shape `(C,)`, or None.
        bias: Shape `(C,)`, or None.
        eps: Added to the variance, inside the root.
        running_mean: Moved in place, shape `(C,)`, or None.
        running_var: Moved in place, shape `(C,)`, or None.
        num_batches_tracked: Counts batches in place, or None.
        momentum: Share of the batch; None gives every batch the same share.
        skips_nonfinite: Keep a batch with a NaN or Inf out of the running statistics.
        epilogue: A residual to add and an activation to apply.

    Returns:
        The values, or None if the GPU kernels do not serve this call.
    """
    if not _is_on_device(x) or isinstance(momentum, Tensor) or x.numel() == 0:
        return None
    if memory_mode() is not None:
        return None  # the engine knows how to make its output again
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
    if torch.compiler.is_compiling():
        _register()
        return torch.ops.normkit.batch_norm(*arguments)[0]
    return _BatchNorm.apply(_directly("batch_norm"), *arguments)[0]


def normalize(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    centered: bool = True,
) -> tuple[Tensor, Moments | None]:
    """`engine.normalize`; under torch.compile one operator, if a GPU runs it.

    The Moments are None then. An exported program holds torch operations instead:
    other runtimes have to read it.
    """
    if (
        _is_on_device(x)
        and torch.compiler.is_compiling()
        and not _is_exporting()
        and mask is None
        and _serves(x, dims, weight, bias)
        and _fits_rows(x, dims, weight if weight is not None else bias)
    ):
        _register()
        y, *_ = torch.ops.normkit.standardize_rows(
            *(x, weight, bias, list(dims), eps, centered)
        )
        return y, None
    return engine.normalize(x, dims, weight, bias, eps, mask=mask, centered=centered)


def _is_on_device(x: Tensor) -> bool:
    """First of all and cheap: a call on a CPU pays nothing for what is a GPU's."""
    kernels = backend_named("gpu")
    return isinstance(kernels, GpuBackend) and x.device.type in kernels.device_types


def _constant_for_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compiler.assume_constant_result does; that would load the compiler."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def _serves(x: Tensor, dims: tuple[int, ...], *others: Tensor | None) -> bool:
    """Whether the GPU kernels take this call, and nothing else watches it."""
    if not _may_serve(x.device.type, x.device.index):
        return False
    if torch.compiler.is_compiling():
        # Strides are not known here; the operators take whatever they are given.
        served = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for t in others:
            if t is not None and t.shape == x.shape and t.dtype != x.dtype:
                served = False
        return served and x.numel() > 0
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    kernels = choose(x, dims)
    return isinstance(kernels, GpuBackend) and kernels.fuses(x, dims, *others)


@_constant_for_compilers
def _may_serve(device_type: str, index: int | None) -> bool:
    """Whether the device has the kernels and no other backend was asked for."""
    if asked_for() not in (None, "gpu"):
        return False
    kernels = backend_named("gpu")
    device = torch.device(device_type if index is None else f"{device_type}:{index}")
    return isinstance(kernels, GpuBackend) and not kernels.device_reasons(device)


def _fits_rows(x: Tensor, dims: tuple[int, ...], affine: Tensor | None) -> bool:
    """Whether whole rows fit on the chip, and the affine lies on them as in a layer.

    Written for a compiler that traces it: loops, and no strides but contiguity.
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
    """A pair of functions, forward and backward, that the derivatives call."""

    def __init__(
        self, forward: Callable[..., Any], backward: Callable[..., Any]
    ) -> None:
        self.forward = forward
        self.backward = backward


@functools.cache
def _directly(name: str) -> _Runs:
    """The kernels without the dispatcher, which costs more than a launch."""
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
        with torch._C._AutoDispatchBelowAutograd():
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
    x, weight, bias, residual = aliases(x, weight, bias, residual)
    assert x is not None
    epilogue = Epilogue(ctx.activation, ctx.slope, residual)
    inputs = [x, weight, bias, residual]
    if bits.numel():
        # Where the relu was open is a constant: its second derivative is 0.
        dy = torch.where(_unpacked(bits, x, ctx.channel_dim), dy, 0.0)
        epilogue = _NONE
    shape = [1] * x.dim()
    shape[ctx.channel_dim] = x.shape[ctx.channel_dim]
    dims = tuple(d for d in range(x.dim()) if d != ctx.channel_dim)
    with torch.enable_grad():
        y, _ = composed(
            *(x, dims),
            None if weight is None else weight.view(shape),
            None if bias is None else bias.view(shape),
            ctx.eps,
            epilogue=epilogue,
        )
    grads = _grads_of(y, inputs, dy, wanted)
    if bits.numel() and wanted[3]:
        grads[3] = dy
    return grads


def _unpacked(bits: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """The bits of relu's gates as bool, shaped and laid out as x."""
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
            x, weight, bias = aliases(x, weight, bias)
            assert x is not None
            with torch.enable_grad():
                y, _ = composed(
                    *(x, tuple(ctx.dims), weight, bias, ctx.eps), centered=ctx.centered
                )
            grads = _grads_of(y, [x, weight, bias], dy, wanted)
        else:
            grads = ctx.backward_of(
                *(dy, x, weight, bias, ctx.dims, mean, inv_std, ctx.centered, wanted)
            )
        found = [g if w else None for g, w in zip(grads, wanted, strict=True)]
        return (None, *found, None, None, None)


def _grads_of(
    y: Tensor, inputs: Sequence[Tensor | None], dy: Tensor, wanted: list[bool]
) -> list[Tensor | None]:
    """The gradients of y that are wanted, as a graph of their own."""
    asked = [w and t is not None for w, t in zip(wanted, inputs, strict=True)]
    given = [
        t
        for t, is_asked in zip(inputs, asked, strict=True)
        if is_asked and t is not None
    ]
    if not given:
        return [None] * len(asked)
    found = iter(torch.autograd.grad(y, given, dy, create_graph=True))
    return [next(found) if is_asked else None for is_asked in asked]

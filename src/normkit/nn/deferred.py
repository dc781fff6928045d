"""Output of a batch norm that is computed when the operation after it is known.

    y = self.bn3(x)        DeferredTensor: nothing is computed yet
    y += identity          the same, with a residual
    y = self.relu(y)       act(normalize(x) + residual), in one pass over memory

The activation and the sum stay where they are written, as modules or as calls: a tool
that replaces or folds the batch norm, or exchanges the activation, finds each in its
place. Any other reader gets the plain values, so a path through the model that
`convert` has not seen costs time, not correctness.

A `DeferredTensor` is a node of autograd, too (`_Node`), for readers that bypass torch's
function protocol: full backward hooks, reentrant checkpoints, custom autograd functions
and scripted modules.

One difference from a layer that computes at once: the running statistics are updated
when the output is first read, or is dropped unread.

Its effect on a training step of ResNet-50 is measured in benchmarks/README.md.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_map_only

from normkit.functional.memory.recomputable import Recomputable
from normkit.nn.deferral import (
    OTHER_SUMMAND,
    Deferral,
    Residual,
    is_trial,
    note,
    reason_against,
    version_of,
)
from normkit.torch_state import unwrapped_apply, without_function_modes

__all__ = ["DeferredTensor", "defer"]

_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_SUMS_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), "relu"),
    **dict.fromkeys((F.relu_, torch.relu_, Tensor.relu_), "relu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh), "tanh"),
    F.silu: "silu",
    F.gelu: "gelu",
    F.leaky_relu: "leaky_relu",
}
_ACTIVATIONS_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_}
# Properties that do not depend on the values.
_FACTS = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous),
    *(Tensor.is_floating_point, Tensor.__len__),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "is_cpu", "is_cuda")
    ),
    # Read by module hooks, before the autograd node.
    getattr(Tensor, "requires_grad").__get__,  # noqa: B009  a property to pyright
}


def _without_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile from tracing into `function`: it breaks the graph there."""
    untraced: Callable[..., Any] | None = None

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        nonlocal untraced
        if untraced is None:
            # Importing the compiler would take seconds.
            if "torch._dynamo" not in sys.modules:
                return function(*args)
            untraced = torch.compiler.disable(function)
        return untraced(*args)

    return run


class DeferredTensor(Tensor):
    """Output of a batch norm, with or without a residual, that is not computed yet."""

    _deferral: Deferral
    _residual: Residual | None
    _plain: Tensor | None
    """The values with their graph, once read."""
    _bare: Tensor | None
    """The values without a graph, once torch's dispatcher has read them."""
    _node: Any
    """The autograd node of those values."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Fuse a sum and an activation; run anything else on the plain values."""
        return _call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run on the values without a graph: C++ autograd has the node already."""
        bare, named = tree_map_only(
            DeferredTensor, lambda y: _bare_values(y, str(func)), (args, kwargs or {})
        )
        result = func(*bare, **named)
        is_written = func._schema.is_mutable and isinstance(args[0], DeferredTensor)
        return args[0] if is_written else result


@_without_compiler
def _call(func: Any, args: Any, kwargs: Any) -> Any:
    if func in _FACTS:
        with without_function_modes():
            return func(*args, **kwargs)
    if func in _SUMS or func in _SUMS_IN_PLACE:
        result = _add(args, kwargs, in_place=func in _SUMS_IN_PLACE)
    else:
        result = _activate(func, args, kwargs)
    return _read(func, args, kwargs) if result is None else result


def defer(layer: Any, x: Tensor, uses_batch: bool, updates: bool) -> Tensor | None:
    """Return the deferred output of a batch norm on `x`; None if it cannot wait."""
    reason = reason_against(layer, x)
    if reason:
        note(layer, reason)
        return None
    deferral = Deferral(layer, x, uses_batch, updates)
    y = _placeholder(deferral, None)
    if deferral.needs_grad:
        _connect(y, lambda dy: (None, *deferral.gradients(dy)), *deferral.inputs)
    if deferral.use is not None:
        note(layer, deferral.use)
    return y


def _placeholder(deferral: Deferral, residual: Residual | None) -> DeferredTensor:
    x = deferral.inputs[0]
    y: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
        DeferredTensor, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device
    )
    y._deferral, y._residual = deferral, residual
    y._plain = y._bare = y._node = None
    if deferral.use is not None:
        deferral.use.outputs.append(weakref.ref(y))
    return y


class _Node(torch.autograd.Function):
    """Autograd node that is given to an existing tensor in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, backward: Any, *inputs: Tensor | None) -> Tensor:
        ctx.mark_dirty(y)
        ctx.run = backward
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        through_itself, *others = ctx.run(*grad_outputs)
        return through_itself, None, *others


_attach = unwrapped_apply(_Node)


def _connect(y: Any, backward: Callable[[Tensor], Any], *inputs: Tensor | None) -> None:
    # Otherwise torch reads y's properties in Python, which computes it.
    with without_function_modes():
        _attach(y, backward, *inputs)
    y._node = _history(y)


def _history(y: Tensor) -> Any:
    with without_function_modes():
        return y.grad_fn


def _is_unread(y: DeferredTensor) -> bool:
    return (
        y._plain is None
        and y._bare is None
        and _history(y) is y._node
        and torch.is_grad_enabled() == y._deferral.with_grad
    )


def _takes_residual(y: Any) -> bool:
    return isinstance(y, DeferredTensor) and y._residual is None and _is_unread(y)


def _add(args: Any, kwargs: Any, *, in_place: bool) -> DeferredTensor | None:
    """Return the deferred sum; None where it must be computed."""
    if len(args) != 2 or kwargs:
        return None
    first, second = args
    if _takes_residual(first):
        y, other = first, second
    elif _takes_residual(second) and not in_place:
        y, other = second, first
    else:
        return None
    if isinstance(other, DeferredTensor):
        other = _plain_values(other, OTHER_SUMMAND)
    if isinstance(other, Recomputable):
        other = other.plain
    if (
        not _is_unread(y)  # y + y
        or type(other) is not Tensor
        or (other.shape, other.dtype) != (y.shape, y.dtype)
        or other.device != y.device
        or other.is_inference()
    ):
        return None
    residual = (other, version_of(other))
    needs_grad = y._deferral.needs_grad or (
        y._deferral.with_grad and other.requires_grad
    )
    if in_place:
        y._residual = residual
        if needs_grad:
            _connect(y, lambda dy: (dy, dy), other)
        return y
    z = _placeholder(y._deferral, residual)
    if needs_grad:
        _connect(z, lambda dy: (None, dy, dy), y, other)
    return z


def _activate(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Return the activation of the first argument; None for any other function."""
    name = _ACTIVATIONS.get(func)
    y = args[0] if args else None
    if name is None or not isinstance(y, DeferredTensor) or not _is_unread(y):
        return None
    rest = dict(zip(_parameters_of(name), args[1:], strict=False)) | kwargs
    in_place = func in _ACTIVATIONS_IN_PLACE or bool(rest.pop("inplace", False))
    slope = float(rest.pop("negative_slope", 0.01))
    if rest.pop("approximate", "none") != "none" or rest:
        return None
    deferral = y._deferral
    z = deferral.values(y._residual, name, slope)
    if deferral.use is not None:
        deferral.use.took = name if y._residual is None else f"add+{name}"
        deferral.use.readers.append(name)
    if in_place:
        y._plain = z
        _adopt(y, z)
    return z


def _parameters_of(name: str) -> tuple[str, ...]:
    if name == "leaky_relu":
        return ("negative_slope", "inplace")
    return ("approximate",) if name == "gelu" else ("inplace",)


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function on the plain values."""
    read: list[tuple[DeferredTensor, Tensor, int]] = []
    reader = str(resolve_name(func)) if is_trial() else ""

    def plain(y: DeferredTensor) -> Tensor:
        values = _plain_values(y, reader)
        read.append((y, values, version_of(values)))
        return values

    args, kwargs = tree_map_only(DeferredTensor, plain, (args, kwargs))
    result = func(*args, **kwargs)
    for y, values, version in read:
        if version_of(values) != version:
            _adopt(y, values)
    return result


def _adopt(y: DeferredTensor, values: Tensor) -> None:
    """Take over the graph after an in-place change of the values."""
    if torch.is_grad_enabled() and values.requires_grad:
        _connect(y, lambda dy: (None, dy), values)


def _plain_values(y: DeferredTensor, reader: str) -> Tensor:
    """Return the values with their graph, for `reader`."""
    deferral = y._deferral
    node = _history(y)
    if node is not y._node or (y._plain is None and y._bare is not None):
        # An autograd function returned y as its output, or wrote into it.
        y._plain, y._node = _bare_values(y, reader).data, node
        if node is not None:
            with torch.enable_grad():
                _attach(y._plain, lambda dy: (None, dy), y)
    elif y._plain is None:
        if deferral.use is not None:
            deferral.use.readers.append(reader)
        with torch.set_grad_enabled(deferral.with_grad):
            y._plain = deferral.values(y._residual)
    return y._plain


def _bare_values(y: DeferredTensor, reader: str) -> Tensor:
    """Return the values without a graph, for `reader`."""
    if y._plain is not None:
        return y._plain.detach()
    if y._bare is None:
        if y._deferral.use is not None:
            y._deferral.use.readers.append(reader)
        with torch.no_grad():
            y._bare = y._deferral.values(y._residual)
    return y._bare

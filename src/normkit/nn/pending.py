"""A batch norm's output that waits for the sum and the activation that follow it.

    y = self.bn3(x)        Pending: nothing is computed yet
    y += identity          Pending with a residual
    y = self.relu(y)       act(normalize(x) + residual), in one pass over memory

For forwards whose sum is written out, which no exchange of modules reaches. Whatever
else reads a Pending gets the plain values: it stands for them under every function of
torch, and a reader that the layer was not told of costs time, not correctness. The
statistics move once, when the values are first computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from normkit.functional.remembered import Remembered

__all__ = ["Pending", "activation_called"]

# (residual, activation, slope, whether the statistics may move) → the values
Compute = Callable[[Tensor | None, str, float, bool], Tensor]

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
# What a tensor tells about itself without telling its values.
_FACTS = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous),
    *(Tensor.is_floating_point, Tensor.__len__),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "is_cpu", "is_cuda")
    ),
}


def activation_called(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, float, bool] | None:
    """The activation that a call applies to its first argument: name, slope, in place.

    None for any other call.
    """
    name = _ACTIVATIONS.get(func)
    if name is None or not args:
        return None
    rest = dict(zip(_parameters_of(name), args[1:], strict=False)) | kwargs
    in_place = func in _ACTIVATIONS_IN_PLACE or bool(rest.pop("inplace", False))
    slope = float(rest.pop("negative_slope", 0.01))
    if rest.pop("approximate", "none") != "none" or rest:
        return None
    return name, slope, in_place


def _parameters_of(name: str) -> tuple[str, ...]:
    if name == "leaky_relu":
        return ("negative_slope", "inplace")
    return ("approximate",) if name == "gelu" else ("inplace",)


class _Source:
    """What a layer was called with; shared by what its output is added to."""

    def __init__(self, x: Tensor, compute: Compute) -> None:
        self.x, self.version = x, x._version
        self.compute = compute
        self.has_moved = False
        self.with_grad = torch.is_grad_enabled()

    def values(
        self, residual: Tensor | None, version: int, activation: str, slope: float
    ) -> Tensor:
        for t, seen in ((self.x, self.version), (residual, version)):
            if t is not None and t._version != seen:
                raise RuntimeError(
                    f"a tensor of shape {tuple(t.shape)} was changed in place between "
                    "a batch norm and the activation that was fused into it; leave it "
                    "as it is until then, or set defers = False on the layer"
                )
        with torch.set_grad_enabled(self.with_grad):
            y = self.compute(residual, activation, slope, not self.has_moved)
        self.has_moved = True
        return y


class Pending(Tensor):
    """Stands for a batch norm's output, with a residual added or without."""

    _source: _Source
    _residual: Tensor | None
    _version_of_residual: int
    _done: Tensor | None

    @staticmethod
    def of(x: Tensor, compute: Compute) -> Pending:
        """The output of a layer on `x`, to be computed when it is known what follows.

        Args:
            x: The layer's input, of the shape, layout and dtype of its output.
            compute: Gives the output for a residual, an activation and its slope, and
                moves the running statistics if told to.
        """
        return _pending(x, _Source(x, compute), None)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Fuse a sum and an activation; give anything else the plain values."""
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _SUMS or func in _SUMS_IN_PLACE:
            y = _added(args, kwargs, in_place=func in _SUMS_IN_PLACE)
            if y is not None:
                return y
        first = args[0] if args else None
        if isinstance(first, Pending) and first._done is None:
            asked = activation_called(func, args, kwargs)
            if asked is not None:
                name, slope, in_place = asked
                y = first._source.values(
                    first._residual, first._version_of_residual, name, slope
                )
                if in_place:
                    first._done = y
                return y
        args, kwargs = tree_map_only(Pending, _values, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse what reached the values without telling torch's function protocol."""
        raise RuntimeError(
            f"{func} reads the output of a batch norm that waits for what follows it, "
            "unseen; set defers = False on the layer"
        )


def _pending(x: Tensor, source: _Source, residual: Tensor | None) -> Pending:
    y: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
        Pending, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device
    )
    y._source, y._residual, y._done = source, residual, None
    y._version_of_residual = 0 if residual is None else residual._version
    return y


def _values(y: Pending) -> Tensor:
    if y._done is None:
        y._done = y._source.values(y._residual, y._version_of_residual, "none", 0.0)
    return y._done


def _added(args: Any, kwargs: Any, *, in_place: bool) -> Pending | None:
    """The sum as a Pending; None where it has to be computed as it is."""
    if len(args) != 2 or kwargs:
        return None
    y, other = args if isinstance(args[0], Pending) else reversed(args)
    if isinstance(other, Pending):
        other = _values(other)
    if isinstance(other, Remembered):
        other = other.plain
    if (
        (in_place and y is not args[0])
        or y._done is not None
        or y._residual is not None
        or type(other) is not Tensor
        or (other.shape, other.dtype) != (y.shape, y.dtype)
        or other.device != y.device
    ):
        return None
    if not in_place:
        return _pending(y._source.x, y._source, other)
    y._residual, y._version_of_residual = other, other._version
    return y

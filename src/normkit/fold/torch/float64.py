"""A model that computes in float64 throughout, the casts in its code included."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normkit.modeling.pytree import map_tensors, tensors_in

__all__ = ["REDUCED", "InFloat64", "to_float64", "widen"]

REDUCED = (torch.float32, torch.float16, torch.bfloat16)


class InFloat64(TorchFunctionMode):
    """Give float64 to code that asks for a shorter float."""

    def __enter__(self) -> InFloat64:
        """Make float64 the default dtype too."""
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Restore the default dtype."""
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run `func` with float64 for each shorter float dtype named in the call."""
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        if func is torch.set_default_dtype:
            return None
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            return _grouped(*_widened(tuple(args)), **_widened(dict(kwargs or {})))
        return func(*_widened(tuple(args)), **_widened(dict(kwargs or {})))


def _grouped(
    x: Tensor, stack: Tensor, offs: Tensor, bias: Tensor | None = None, **more: Any
) -> Tensor:
    """Return the product of each group of rows with its matrix, as in grouped_mm.

    The operator of torch knows no float64.
    """
    ends = [0, *offs.tolist()]
    made = x.new_zeros(len(x), stack.shape[-1])
    for start, end, matrix in zip(ends, ends[1:], stack, strict=False):
        made[start:end] = x[start:end] @ matrix
    return made if bias is None else made + bias


def _widened(tree: Any) -> Any:
    if isinstance(tree, torch.dtype):
        return torch.float64 if tree in REDUCED else tree
    if type(tree) is tuple:
        return tuple(_widened(part) for part in tree)
    if type(tree) is dict:
        return {key: _widened(part) for key, part in tree.items()}
    return tree


def to_float64(model: nn.Module) -> nn.Module:
    """Convert every float tensor of `model` in place, plain attributes included.

    `Module.double` does not know those.
    """
    model.double()
    known = set(vars(nn.Module()))
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name in known:
                continue
            if any(t.dtype in REDUCED for t in tensors_in(value)):
                with contextlib.suppress(AttributeError, TypeError):
                    vars(module)[name] = map_tensors(value, widen)
    return model


def widen(tensor: Tensor) -> Tensor:
    """Return `tensor` in float64 if it is a shorter float, else itself."""
    return tensor.double() if tensor.dtype in REDUCED else tensor

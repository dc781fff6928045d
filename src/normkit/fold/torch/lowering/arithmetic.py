"""Sums and products, with tensors, parameters and numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.fold.algebra import MATMUL
from normkit.fold.ir.graph import Node, Value
from normkit.fold.ir.nodes import (
    Add,
    Experts,
    Gate,
    Linear,
    MatMul,
    Opaque,
    Quotient,
    Scale,
)
from normkit.fold.ir.nodes.matmul import matmul
from normkit.fold.torch.lowering.call import TorchCall, is_fixed, lowers
from normkit.fold.torch.lowering.weighted import experts

__all__: list[str] = []

_ADD = {
    "add": (1.0, 1.0),
    "iadd": (1.0, 1.0),
    "radd": (1.0, 1.0),
    "sub": (1.0, -1.0),
    "subtract": (1.0, -1.0),
    "isub": (1.0, -1.0),
    "rsub": (-1.0, 1.0),
}


@lowers("add iadd radd sub subtract isub rsub")
def _added(call: TorchCall) -> Node | None:
    first, second = _ADD[call.name]
    alpha = call.kwargs.get("alpha", 1)
    if not call.makes_floats or not isinstance(alpha, int | float):
        return None
    # alpha multiplies the second argument, which in rsub is the one not negated.
    terms = ((call.get(0, "input"), first), (call.get(1, "other"), second * alpha))
    node = Add(call.label)
    rank = len(call.outputs[0].shape)
    for term, factor in terms:
        number = _fixed_number(term)
        if number is not None:
            scaled = factor * number
            node.constant = scaled if node.constant is None else node.constant + scaled
        elif isinstance(term, Value):
            node.inputs.append(term)
            node.factors.append(float(factor))
        else:
            return None
    if node.constant is not None and node.constant.dim() > rank:
        return None
    return node


@lowers("mul imul rmul multiply")
def _multiplied(call: TorchCall) -> Node | None:
    if not call.makes_floats:
        return None
    left, right = call.get(0, "input"), call.get(1, "other")
    for x, factor in ((left, right), (right, left)):
        number = _fixed_number(factor)
        if number is not None and isinstance(x, Value) and not x.is_fixed:
            return Scale(call.label, [x], factor=number)
        if isinstance(factor, Value) and factor.is_fixed and isinstance(x, Value):
            return Scale(call.label, [x], weight=factor)
    if isinstance(left, Value) and isinstance(right, Value):
        return Gate(call.label, [left, right])
    return None


@lowers("div truediv itruediv idiv divide true_divide")
def _divided(call: TorchCall) -> Node | None:
    x, divisor = call.value(0, "input"), call.get(1, "other")
    number = _fixed_number(divisor)
    rounding = call.get(2, "rounding_mode")
    if x is None or not call.makes_floats or rounding is not None:
        return None
    if isinstance(divisor, Value) and not divisor.is_fixed and not x.is_fixed:
        return Quotient(call.label, [x, divisor])
    if number is None:
        return None
    return Scale(call.label, [x], factor=number.reciprocal())


@lowers("neg negative")
def _negated(call: TorchCall) -> Node | None:
    x = call.value(0, "input")
    if x is None or not call.makes_floats:
        return None
    return Scale(call.label, [x], factor=torch.tensor(-1.0, dtype=torch.float64))


@lowers("softmax _softmax")
def _softmax(call: TorchCall) -> Node | None:
    x, dim = call.value(0, "input"), call.get(1, "dim")
    if x is None or not isinstance(dim, int):
        return None
    node = Opaque(call.label, [x])
    node.softmax_dim = dim
    return node


@lowers("matmul mm bmm")
def _matmul(call: TorchCall) -> Node | None:
    left, right = (
        call.value(0, "input"),
        call.value(1, "other" if call.name == "matmul" else "mat2"),
    )
    if left is None or right is None or min(len(left.shape), len(right.shape)) < 2:
        return None
    if right.picked_from is not None:
        return experts(call, left, right, weight_dim=-2)
    if left.picked_from is not None:
        return experts(call, right, left, input_dim=-2)
    if is_fixed(right) and not left.is_fixed and len(right.shape) == 2:
        return Linear(call.label, [left], weight=right, layout=MATMUL)
    if is_fixed(right) and right.roots and not left.is_fixed:
        # A stack of matrices, all of them used.
        return Experts(
            call.label, [left], weight=right, weight_dim=len(right.shape) - 2
        )
    if left.is_fixed or right.is_fixed:
        return None
    return matmul(call.label, left, right)


@lowers("scaled_dot_product_attention")
def _attention(call: TorchCall) -> Node | None:
    query, key, value = (
        call.value(i, n) for i, n in enumerate(("query", "key", "value"))
    )
    if query is None or key is None or value is None or call.get(4, "dropout_p", 0.0):
        return None
    mask = call.value(3, "attn_mask")
    others = [query, key] if mask is None else [query, key, mask]
    return MatMul(call.label, [value, *others], rows_sum_to_one=True)


def _fixed_number(term: Any) -> Tensor | None:
    """Return a number, or a tensor that the code fixes; else None."""
    if isinstance(term, bool) or term is None:
        return None
    if isinstance(term, int | float):
        return torch.tensor(float(term), dtype=torch.float64)
    if isinstance(term, Value) and term.constant is not None:
        return term.constant.to("cpu", torch.float64)
    return None

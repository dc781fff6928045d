"""Convolutions, linear layers, normalizations and embeddings."""

from __future__ import annotations

from typing import Any

import torch

from normkit.fold.algebra import LINEAR, MATMUL
from normkit.fold.ir.convolution import (
    Weights,
    convolution,
    transposed_convolution,
)
from normkit.fold.ir.graph import Node, Value
from normkit.fold.ir.nodes import (
    BatchNorm,
    Embedding,
    Experts,
    Linear,
    Move,
    NormAffine,
)
from normkit.fold.torch.lowering.call import TorchCall, is_fixed, lowers

__all__ = ["experts"]


def _weights(call: TorchCall) -> Weights | None:
    """Return the arguments `weight` and `bias` of (input, weight, bias, …)."""
    weight, bias = call.get(1, "weight"), call.get(2, "bias")
    if not is_fixed(weight, bias):
        return None
    slot = None if bias is not None else call.empty_slot("bias", weight)
    return Weights(weight=weight, bias=bias, bias_slot=slot)


@lowers("conv1d conv2d conv3d")
def _convolution(call: TorchCall) -> Node | None:
    x, weights = call.value(0, "input"), _weights(call)
    if x is None or weights is None:
        return None
    kernel = weights["weight"].shape[2:]
    rank = len(kernel)
    dilation = _per_dim(call.get(5, "dilation", 1), rank)
    return convolution(
        call.label,
        x,
        weights,
        output_shape=call.outputs[0].shape,
        groups=call.get(6, "groups", 1),
        stride=_per_dim(call.get(3, "stride", 1), rank),
        dilation=dilation,
        padding=_padding(call.get(4, "padding", 0), kernel, dilation),
    )


def _padding(
    padding: Any, kernel: tuple[int, ...], dilation: list[int]
) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0) for _ in kernel]
    if padding == "same":
        totals = [d * (size - 1) for size, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _per_dim(padding, len(kernel))]


@lowers("conv_transpose1d conv_transpose2d conv_transpose3d")
def _transposed_convolution(call: TorchCall) -> Node | None:
    x, weights = call.value(0, "input"), _weights(call)
    if x is None or weights is None:
        return None
    kernel = weights["weight"].shape[2:]
    rank = len(kernel)
    paddings = [call.get(4, "padding", 0), call.get(5, "output_padding", 0)]
    return transposed_convolution(
        call.label,
        x,
        weights,
        groups=call.get(6, "groups", 1),
        is_pointwise=all(size == 1 for size in kernel)
        and all(size == 1 for size in _per_dim(call.get(3, "stride", 1), rank))
        and not any(size for each in paddings for size in _per_dim(each, rank)),
    )


def _per_dim(sizes: Any, rank: int) -> list[int]:
    sizes = list(sizes) if isinstance(sizes, tuple | list) else [sizes]
    return sizes * rank if len(sizes) == 1 else sizes


@lowers("linear")
def _linear(call: TorchCall) -> Node | None:
    x, weights = call.value(0, "input"), _weights(call)
    picked, bias = call.value(1, "weight"), call.value(2, "bias")
    if x is not None and picked is not None and picked.picked_from is not None:
        return experts(call, x, picked, bias=bias)
    if x is None or weights is None or len(weights["weight"].shape) != 2:
        return None
    return Linear(call.label, [x], **weights, layout=LINEAR, own_tap=0)


@lowers("addmm")
def _addmm(call: TorchCall) -> Node | None:
    bias, x, weight = call.get(0, "input"), call.get(1, "mat1"), call.get(2, "mat2")
    if not is_fixed(weight, bias) or bias is None or len(bias.shape) != 1:
        return None
    return Linear(
        call.label,
        [x],
        weight=weight,
        bias=bias,
        layout=MATMUL,
        alpha=float(call.kwargs.get("alpha", 1)),
        beta=float(call.kwargs.get("beta", 1)),
    )


@lowers("batch_norm _native_batch_norm_legit_no_training")
def _batch_norm(call: TorchCall) -> Node | None:
    order = ("input", "running_mean", "running_var", "weight", "bias")
    if isinstance(call.func, torch._ops.OpOverload) or call.func is torch.batch_norm:
        order = ("input", "weight", "bias", "running_mean", "running_var")
    at = {name: call.get(position, name) for position, name in enumerate(order)}
    is_training, eps = bool(call.get(5, "training", False)), call.get(7, "eps", 1e-5)
    if "no_training" in call.name:
        is_training, eps = False, call.get(6, "eps")
    x, locked = at["input"], ""
    if x.is_fixed:
        return None  # Weight standardization, not a batch norm of activations.
    if is_training:
        locked = "normalizes by the statistics of each batch"
        if at["running_mean"] is not None:
            locked += ", as in training mode; call model.eval() first"
    elif call.kwargs.get("mask") is not None:
        locked = "normalizes under a mask, and writes zeros elsewhere"
    node = BatchNorm(
        call.label,
        [x],
        mean=at["running_mean"],
        var=at["running_var"],
        weight=at["weight"],
        bias=at["bias"],
        eps=float(eps),
        channel_dim=int(call.kwargs.get("channel_dim", 1)) % max(len(x.shape), 1),
        locked=locked,
    )
    if node.weight is None:
        node.weight_slot = call.empty_slot("weight", None)
    if node.bias is None:
        node.bias_slot = call.empty_slot("bias", None)
    return node


@lowers("layer_norm rms_norm")
def _layer_norm(call: TorchCall) -> Node | None:
    x, shape = call.get(0, "input"), call.get(1, "normalized_shape")
    if not isinstance(shape, tuple | list) or x.is_fixed:
        return None
    dims = tuple(range(len(x.shape) - len(shape), len(x.shape)))
    node = _norm_affine(call, x, 2, dims, has_bias=call.name != "rms_norm")
    if node is not None:
        node.centers = call.name == "layer_norm"
    return node


@lowers("group_norm")
def _group_norm(call: TorchCall) -> Node | None:
    return _norm_affine(call, call.get(0, "input"), 2, (1,), has_bias=True)


@lowers("instance_norm")
def _instance_norm(call: TorchCall) -> Node | None:
    return _norm_affine(call, call.get(0, "input"), 3, (1,), has_bias=True)


def _norm_affine(
    call: TorchCall, x: Value, at: int, dims: tuple[int, ...], *, has_bias: bool
) -> NormAffine | None:
    weight = call.get(at, "weight")
    bias = call.get(at + 1, "bias") if has_bias else None
    if x.is_fixed or not all(v is None or is_fixed(v) for v in (weight, bias)):
        return None
    if call.kwargs.get("mask") is not None:
        return None
    residual = call.kwargs.get("residual")
    return NormAffine(
        call.label,
        [x] if residual is None else [x, residual],
        weight=weight,
        bias=bias,
        weight_slot=call.empty_slot("weight", None) if weight is None else None,
        bias_slot=call.empty_slot("bias", None) if has_bias and bias is None else None,
        dims=dims,
    )


@lowers("embedding")
def _embedding(call: TorchCall) -> Node | None:
    rows, weight = call.get(0, "input"), call.get(1, "weight")
    # torch.embedding takes the table first.
    if call.func is torch.embedding or isinstance(call.func, torch._ops.OpOverload):
        rows, weight = weight, rows
    if not is_fixed(weight) or call.get(3, "max_norm") is not None:
        return None
    if rows.constant is not None and len(weight.shape) == 2:
        # Positions: rows of the table, whatever the input.
        return Move(call.label, [weight], replay=call.replayed([weight]))
    return Embedding(call.label, [rows], weight=weight)


@lowers("grouped_mm _grouped_mm")
def _grouped(call: TorchCall) -> Node | None:
    """Lower sorted rows times the matrix of their expert."""
    x, stack = call.get(0, "input"), call.get(1, "mat2")
    if not is_fixed(stack) or not stack.roots or len(stack.shape) != 3 or x.is_fixed:
        return None
    return Experts(call.label, [x], weight=stack, weight_dim=1)


@lowers("einsum")
def _einsum(call: TorchCall) -> Node | None:
    """Lower a product of x and a parameter that sums over one dimension of both."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    terms, result = equation.replace(" ", "").split("->")
    factors = sorted(zip(terms.split(","), operands, strict=False), key=_fixed_last)
    if len(factors) != 2 or any(
        len({*t}) < len(t) for t in (*terms.split(","), result)
    ):
        return None
    (of_x, x), (of_weight, weight) = factors
    summed = [letter for letter in of_x if letter in of_weight and letter not in result]
    if x.is_fixed or not is_fixed(weight) or not weight.roots or len(summed) != 1:
        return None
    input_dim, weight_dim = of_x.index(summed[0]), of_weight.index(summed[0])
    made = of_weight.replace(summed[0], "")
    if len(made) == 1 and made not in of_x and made in result:
        return Linear(
            call.label,
            [x],
            weight=weight,
            layout=LINEAR if weight_dim == 1 else MATMUL,
            input_dim=input_dim,
            output_dim=result.index(made),
        )
    return Experts(
        call.label, [x], weight=weight, input_dim=input_dim, weight_dim=weight_dim
    )


def _fixed_last(factor: tuple[str, Value]) -> bool:
    return factor[1].is_fixed


def experts(
    call: TorchCall,
    x: Value,
    picked: Value,
    *,
    bias: Value | None = None,
    input_dim: int = -1,
    weight_dim: int = -1,
) -> Experts | None:
    """Return the node of a product with matrices picked from a stack.

    Args:
        call: The product.
        x: What is multiplied.
        picked: The matrices.
        bias: What is added.
        input_dim: The dimension of `x` that is contracted.
        weight_dim: The dimension of the stack that is, counted from the end.
    """
    stack = picked.picked_from
    if stack is None or len(stack.shape) != 3 or x.is_fixed:
        return None
    return Experts(
        call.label,
        [x],
        weight=stack,
        picked=picked,
        bias=bias,
        input_dim=input_dim,
        weight_dim=3 + weight_dim,
    )

"""Convolutions, linear layers, normalizations and tables of rows."""

from __future__ import annotations

from typing import Any

import torch

from normkit.fold.algebra import (
    LINEAR,
    MATMUL,
    conv_layout,
    conv_transpose_layout,
)
from normkit.fold.graph import Value
from normkit.fold.lowering.call import TorchCall, is_held, lowers
from normkit.fold.nodes import BatchNorm, Linear, Node, Table, Tail

__all__: list[str] = []


@lowers("conv1d conv2d conv3d")
def _convolution(call: TorchCall) -> Node | None:
    x, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
    if not is_held(weight, bias):
        return None
    kernel = weight.shape[2:]
    channel_dim = len(x.shape) - len(kernel) - 1
    return Linear(
        call.label,
        [x],
        weight=weight,
        bias=bias,
        bias_slot=None if bias is not None else call.empty_slot("bias", weight),
        layout=conv_layout(call.get(6, "groups", 1)),
        input_dim=channel_dim,
        output_dim=channel_dim,
        sees_all_taps=not _pads(call.get(4, "padding", 0), kernel),
        own_tap=_own_tap(call, kernel),
    )


def _own_tap(call: TorchCall, kernel: tuple[int, ...]) -> int | None:
    """The tap on the output position: in each dimension number padding/dilation."""
    if any(stride != 1 for stride in _listed(call.get(3, "stride", 1))):
        return None
    if (
        call.get(0, "input").shape[-len(kernel) :]
        != call.outputs[0].shape[-len(kernel) :]
    ):
        return None
    dilations = _listed(call.get(5, "dilation", 1)) * len(kernel)
    paddings = call.get(4, "padding", 0)
    if isinstance(paddings, str):
        paddings = [dilations[i] * (kernel[i] - 1) // 2 for i in range(len(kernel))]
    paddings = _listed(paddings) * len(kernel)
    tap = 0
    for size, padding, dilation in zip(kernel, paddings, dilations, strict=False):
        if padding % dilation or padding // dilation >= size:
            return None
        tap = tap * size + padding // dilation
    return tap


@lowers("conv_transpose1d conv_transpose2d conv_transpose3d")
def _transposed_convolution(call: TorchCall) -> Node | None:
    x, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
    if not is_held(weight, bias):
        return None
    kernel = weight.shape[2:]
    channel_dim = len(x.shape) - len(kernel) - 1
    # Each output position sees another subset of the taps, unless there is one tap.
    is_pointwise = all(size == 1 for size in kernel) and not (
        _pads(call.get(4, "padding", 0), kernel)
        or _pads(call.get(5, "output_padding", 0), kernel)
        or _pads([s - 1 for s in _listed(call.get(3, "stride", 1))], kernel)
    )
    return Linear(
        call.label,
        [x],
        weight=weight,
        bias=bias,
        bias_slot=None if bias is not None else call.empty_slot("bias", weight),
        layout=conv_transpose_layout(call.get(6, "groups", 1)),
        input_dim=channel_dim,
        output_dim=channel_dim,
        sees_all_taps=is_pointwise,
    )


def _pads(padding: Any, kernel: tuple[int, ...]) -> bool:
    if padding == "valid":
        return False
    if padding == "same":
        return any(size > 1 for size in kernel)
    return any(p != 0 for p in _listed(padding))


def _listed(sizes: Any) -> list[int]:
    return list(sizes) if isinstance(sizes, tuple | list) else [sizes]


@lowers("linear")
def _linear(call: TorchCall) -> Node | None:
    x, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
    if not is_held(weight, bias) or len(weight.shape) != 2:
        return None
    return Linear(
        call.label,
        [x],
        weight=weight,
        bias=bias,
        bias_slot=None if bias is not None else call.empty_slot("bias", weight),
        layout=LINEAR,
        own_tap=0,
    )


@lowers("addmm")
def _addmm(call: TorchCall) -> Node | None:
    bias, x, weight = call.get(0, "input"), call.get(1, "mat1"), call.get(2, "mat2")
    if not is_held(weight, bias) or len(bias.shape) != 1:
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
    x = at["input"]
    if x.is_fixed:
        return None  # Weight standardization, not a batch norm of activations.
    node = BatchNorm(
        call.label,
        [x],
        mean=at["running_mean"],
        var=at["running_var"],
        weight=at["weight"],
        bias=at["bias"],
        eps=float(eps),
        channel_dim=int(call.kwargs.get("channel_dim", 1)) % max(len(x.shape), 1),
    )
    if node.weight is None:
        node.weight_slot = call.empty_slot("weight", None)
    if node.bias is None:
        node.bias_slot = call.empty_slot("bias", None)
    held = [v for v in (node.mean, node.var, node.weight, node.bias) if v is not None]
    if is_training:
        node.locked = "normalizes by the statistics of each batch"
    elif call.kwargs.get("mask") is not None:
        node.locked = "normalizes under a mask, and writes zeros elsewhere"
    elif not all(value.is_fixed for value in held):
        node.locked = "takes its statistics or weights from the input"
    return node


@lowers("layer_norm rms_norm")
def _layer_norm(call: TorchCall) -> Node | None:
    x, shape = call.get(0, "input"), call.get(1, "normalized_shape")
    if not isinstance(shape, tuple | list) or x.is_fixed:
        return None
    dims = tuple(range(len(x.shape) - len(shape), len(x.shape)))
    return _tail(call, x, 2, dims, has_bias=call.name != "rms_norm")


@lowers("group_norm")
def _group_norm(call: TorchCall) -> Node | None:
    return _tail(call, call.get(0, "input"), 2, (1,), has_bias=True)


@lowers("instance_norm")
def _instance_norm(call: TorchCall) -> Node | None:
    return _tail(call, call.get(0, "input"), 3, (1,), has_bias=True)


def _tail(
    call: TorchCall, x: Value, at: int, dims: tuple[int, ...], *, has_bias: bool
) -> Node | None:
    weight = call.get(at, "weight")
    bias = call.get(at + 1, "bias") if has_bias else None
    if x.is_fixed or not all(v is None or is_held(v) for v in (weight, bias)):
        return None
    if call.kwargs.get("mask") is not None:
        return None
    return Tail(
        call.label,
        [x],
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
    if not is_held(weight) or call.get(3, "max_norm") is not None:
        return None
    return Table(call.label, [rows], weight=weight)

"""Lower ONNX operators to nodes; one without a rule is opaque."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from normkit.fold.algebra import LINEAR, MATMUL
from normkit.fold.ir.convolution import (
    Weights,
    convolution,
    transposed_convolution,
)
from normkit.fold.ir.graph import Node
from normkit.fold.ir.nodes import (
    Add,
    Gate,
    Linear,
    Move,
    Opaque,
    Quotient,
    Scale,
)
from normkit.fold.ir.nodes.commuting import COUNTS_PADDING, Commuting
from normkit.fold.ir.nodes.matmul import matmul
from normkit.fold.onnx.reading import Operator
from normkit.fold.onnx.rules import RULES, lowers

__all__ = ["RULES"]


def _weights(op: Operator) -> Weights | None:
    """Return inputs 1 and 2, if they are the same in every run."""
    if not op.is_fixed(1) or (op.has(2) and not op.is_fixed(2)):
        return None
    weight, bias, slot = op.held(1, name="weight"), None, None
    if op.has(2):
        bias = op.held(2, name="bias")
    else:
        slot = op.slot(2, "bias")
    return Weights(weight=weight, bias=bias, bias_slot=slot)


@lowers("Conv")
def _conv(op: Operator) -> Node | None:
    weights = _weights(op)
    if weights is None:
        return None
    kernel = weights["weight"].shape[2:]
    rank = len(kernel)
    dilation = op.attribute("dilations", (1,) * rank)
    return convolution(
        op.label,
        op.value(0),
        weights,
        output_shape=op.output_shape,
        groups=op.attribute("group", 1),
        stride=op.attribute("strides", (1,) * rank),
        dilation=dilation,
        padding=_padding(op, kernel, dilation),
    )


def _padding(
    op: Operator, kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Return (begin, end) per spatial dimension; for SAME_* that of stride 1."""
    mode = op.attribute("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [d * (size - 1) for size, d in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
        return pairs if mode == "SAME_UPPER" else [(b, a) for a, b in pairs]
    rank = len(kernel)
    pads = op.attribute("pads", (0,) * 2 * rank) if mode != "VALID" else (0,) * 2 * rank
    return list(zip(pads[:rank], pads[rank:], strict=True))


@lowers("ConvTranspose")
def _transposed_convolution(op: Operator) -> Node | None:
    weights = _weights(op)
    if weights is None:
        return None
    groups = op.attribute("group", 1)
    return transposed_convolution(
        op.label, op.value(0), weights, groups=groups, is_pointwise=False
    )


@lowers("Gemm")
def _gemm(op: Operator) -> Node | None:
    if not op.is_fixed(1) or op.is_fixed(0) or (op.has(2) and not op.is_fixed(2)):
        return None
    columns, beta = op.output_shape[1], op.attribute("beta", 1.0)
    weight, bias, slot = op.held(1, name="weight"), None, None
    if not op.has(2):
        beta = 1.0 if beta == 0 else beta
        slot = op.slot(2, "bias")
    elif op.shape(2) in ((), (1,), (columns,), (1, 1), (1, columns)):
        bias = op.held(2, name="bias", vector=columns)
    else:
        return None  # A matrix, or a column: no map per column.
    return Linear(
        op.label,
        [op.value(0)],
        weight=weight,
        bias=bias,
        bias_slot=slot,
        layout=LINEAR if op.attribute("transB", 0) else MATMUL,
        input_dim=0 if op.attribute("transA", 0) else 1,
        output_dim=1,
        alpha=op.attribute("alpha", 1.0),
        beta=beta,
    )


@lowers("MatMul")
def _matmul(op: Operator) -> Node | None:
    left, right = op.shape(0), op.shape(1)
    if min(len(left), len(right)) < 2:
        return None
    if op.is_fixed(1) and not op.is_fixed(0) and len(right) == 2:
        weight = op.held(1, name="weight")
        return Linear(op.label, [op.value(0)], weight=weight, layout=MATMUL)
    if op.is_fixed(0) and not op.is_fixed(1) and len(left) == 2:
        weight = op.held(0, name="weight")
        node = Linear(op.label, [op.value(1)], weight=weight, layout=LINEAR)
        node.input_dim = node.output_dim = -2
        return node
    if op.is_fixed(0) or op.is_fixed(1):
        return None
    return matmul(op.label, op.value(0), op.value(1))


@lowers("Softmax")
def _softmax(op: Operator) -> Node | None:
    axis, rank = op.attribute("axis", -1 if op.opset >= 13 else 1), len(op.shape(0))
    node = Opaque(op.label, [op.value(0)])
    if axis % rank == rank - 1:
        node.softmax_dim = -1
    return node


# Sums and products ------------------------------------------------------------


@lowers("Add Sub Sum")
def _added(op: Operator) -> Node | None:
    node = Add(op.label)
    for i in range(len(op.node.input)):
        value = op.held(i, name="constant") if op.is_fixed(i) else op.value(i)
        node.inputs.append(value)
        node.factors.append(-1.0 if i and op.node.op_type == "Sub" else 1.0)
    return node


@lowers("Mul")
def _multiplied(op: Operator) -> Node | None:
    for fixed, flows in ((1, 0), (0, 1)):
        if op.is_fixed(fixed) and not op.is_fixed(flows):
            node = Scale(op.label, [op.value(flows)])
            node.weight = op.held(fixed, name="factor")
            return node
    return Gate(op.label, [op.value(0), op.value(1)])


@lowers("Div")
def _divided(op: Operator) -> Node | None:
    if op.is_fixed(0):
        return None
    if not op.is_fixed(1):
        return Quotient(op.label, [op.value(0), op.value(1)])
    divisor = torch.as_tensor(op.found[op.node.input[1]], dtype=torch.float64)
    return Scale(op.label, [op.value(0)], factor=divisor.reciprocal())


@lowers("Neg")
def _negated(op: Operator) -> Node | None:
    minus = torch.tensor(-1.0, dtype=torch.float64)
    return Scale(op.label, [op.value(0)], factor=minus)


# Activations, pooling ---------------------------------------------------------


@lowers("Relu LeakyRelu PRelu")
def _rectified(op: Operator) -> Node | None:
    if op.node.op_type == "PRelu" and not op.is_fixed(1):
        return None
    if op.output_shape != op.shape(0):
        return None
    return Commuting(op.label, [op.value(0)])


@lowers("Clip")
def _clipped(op: Operator) -> Node | None:
    """Lower relu written as a clip: a lower bound of 0 and no upper one."""
    if op.opset >= 11:
        low = op.array(1)
        high = op.has(2)
    else:
        low, high = op.attribute("min"), op.attribute("max") is not None
    if high or low is None or float(low) != 0:
        return None
    return Commuting(op.label, [op.value(0)])


def _spatial(op: Operator) -> tuple[int, ...]:
    return tuple(range(2, len(op.shape(0))))


@lowers("MaxPool GlobalMaxPool")
def _max_pooled(op: Operator) -> Node | None:
    if len(op.node.output) > 1:
        return None
    return Commuting(
        op.label, [op.value(0)], combined_dims=_spatial(op), passes_shift=True
    )


@lowers("AveragePool GlobalAveragePool")
def _average_pooled(op: Operator) -> Node | None:
    kernel = op.attribute("kernel_shape", ())
    padding = _padding(op, kernel, [1] * len(kernel))
    counts = op.attribute("count_include_pad", 0) and (
        any(begin or end for begin, end in padding) or op.attribute("ceil_mode", 0)
    )
    return Commuting(
        op.label,
        [op.value(0)],
        combined_dims=_spatial(op),
        passes_shift=not counts,
        passes_negative=True,
        why_no_shift=COUNTS_PADDING,
    )


@lowers("ReduceMean ReduceSum ReduceMax")
def _reduced(op: Operator) -> Node | None:
    axes = op.attribute("axes")
    if axes is None and op.has(1):
        axes = op.array(1)
        if axes is None:
            return None
        axes = [int(axis) for axis in axes.reshape(-1)]
    if not axes:
        if op.attribute("noop_with_empty_axes", 0):
            return None
        axes = range(len(op.shape(0)))
    dims = tuple(int(axis) for axis in axes)
    kind = op.node.op_type
    return Commuting(
        op.label,
        [op.value(0)],
        combined_dims=dims,
        dropped_dims=() if op.attribute("keepdims", 1) else dims,
        passes_shift=kind != "ReduceSum",
        passes_negative=kind != "ReduceMax",
    )


@lowers("Resize Upsample")
def _resized(op: Operator) -> Node | None:
    if op.attribute("coordinate_transformation_mode") == "tf_crop_and_resize":
        return None
    if any(op.has(i) and op.array(i) is None for i in range(1, len(op.node.input))):
        return None
    if op.shape(0)[:2] != op.output_shape[:2] or len(op.shape(0)) < 3:
        return None
    # Copies elements, or weighs them by numbers that sum to 1.
    return Commuting(
        op.label,
        [op.value(0)],
        combined_dims=_spatial(op),
        passes_shift=True,
        passes_negative=True,
    )


# Data movement ------------------------------------------------------


@lowers("Identity Dropout Cast")
def _same(op: Operator) -> Node | None:
    if op.node.op_type == "Dropout":
        training = op.has(2) and (op.array(2) is None or bool(op.array(2)))
        if training or len([name for name in op.node.output if name]) > 1:
            return None
    return Move(op.label, [op.value(0)])


@lowers(
    "Reshape Flatten Transpose Squeeze Unsqueeze Expand Tile Split Slice Gather Pad "
    "DepthToSpace SpaceToDepth"
)
def _moved(op: Operator) -> Node | None:
    if op.is_fixed(0):
        return None  # Rows of a constant, picked by number.
    for i in range(1, len(op.node.input)):
        if op.has(i) and op.array(i) is None:
            return None
    if op.node.op_type == "Pad":
        value = op.attribute("value", 0.0) if op.opset < 11 else op.array(2)
        if op.attribute("mode", "constant") == "constant" and value:
            return None  # Padded with something that is not 0.
    return Move(op.label, [op.value(0)], replay=op.replay([0]), acts_on=_acts_on(op))


def _acts_on(op: Operator) -> tuple[int, ...] | None:
    if op.node.op_type == "Split":
        return (op.attribute("axis", 0),)
    return None


@lowers("Concat")
def _joined(op: Operator) -> Node | None:
    moved = list(range(len(op.node.input)))
    names = list(op.node.input)
    if len(set(names)) != len(names) or any(op.is_fixed(i) for i in moved):
        return None
    values = [op.value(i) for i in moved]
    return Move(
        op.label,
        values,
        replay=op.replay(moved),
        acts_on=(op.attribute("axis", 0),),
    )

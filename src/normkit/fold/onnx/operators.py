"""Which kind of node each ONNX operator is; one without a rule is opaque."""

from __future__ import annotations

import math
from typing import Any

import torch

from normkit.fold.algebra import (
    LINEAR,
    MATMUL,
    conv_layout,
    conv_transpose_layout,
)
from normkit.fold.nodes import (
    Add,
    BatchNorm,
    Gate,
    Linear,
    Mix,
    Move,
    Node,
    Opaque,
    Scale,
    Tail,
    Through,
)
from normkit.fold.onnx.reading import DEFAULTS, Lowering, Operator

__all__ = ["RULES"]

RULES: dict[str, Lowering] = {}


def _lowers(names: str) -> Any:
    def register(rule: Lowering) -> Lowering:
        for name in names.split():
            RULES[name] = rule
        return rule

    return register


def _pads(op: Operator, kernel: tuple[int, ...]) -> bool:
    mode = op.attribute("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return any(size > 1 for size in kernel)
    return mode != "VALID" and any(op.attribute("pads", ()))


@_lowers("Conv")
def _convolution(op: Operator) -> Node | None:
    if not op.is_fixed(1) or (op.has(2) and not op.is_fixed(2)):
        return None
    kernel = op.shape(1)[2:]
    node = Linear(op.label, [op.value(0)])
    node.weight = op.held(1, name="weight")
    node.bias = op.held(2, name="bias") if op.has(2) else None
    node.bias_slot = None if op.has(2) else op.slot(2, "bias")
    node.layout = conv_layout(op.attribute("group", 1))
    node.input_dim = node.output_dim = 1
    node.sees_all_taps = not _pads(op, kernel)
    node.own_tap = _own_tap(op, kernel)
    return node


def _own_tap(op: Operator, kernel: tuple[int, ...]) -> int | None:
    rank = len(kernel)
    pads = op.attribute("pads", (0,) * 2 * rank)
    dilations = op.attribute("dilations", (1,) * rank)
    same = op.shape(0)[2:] == op.output_shape[2:]
    is_plain = op.attribute("auto_pad", "NOTSET") == "NOTSET"
    strided = any(stride != 1 for stride in op.attribute("strides", ()))
    if strided or not same or not is_plain:
        return None
    tap = 0
    for size, pad, dilation in zip(kernel, pads, dilations, strict=False):
        if pad % dilation or pad // dilation >= size:
            return None
        tap = tap * size + pad // dilation
    return tap


@_lowers("ConvTranspose")
def _transposed_convolution(op: Operator) -> Node | None:
    if not op.is_fixed(1) or (op.has(2) and not op.is_fixed(2)):
        return None
    node = Linear(op.label, [op.value(0)])
    node.weight = op.held(1, name="weight")
    node.bias = op.held(2, name="bias") if op.has(2) else None
    node.bias_slot = None if op.has(2) else op.slot(2, "bias")
    node.layout = conv_transpose_layout(op.attribute("group", 1))
    node.input_dim = node.output_dim = 1
    # Each output position sees another part of the taps.
    node.sees_all_taps = False
    return node


@_lowers("Gemm")
def _gemm(op: Operator) -> Node | None:
    if not op.is_fixed(1) or op.is_fixed(0) or (op.has(2) and not op.is_fixed(2)):
        return None
    columns = op.output_shape[1]
    node = Linear(op.label, [op.value(0)])
    node.weight = op.held(1, name="weight")
    node.layout = LINEAR if op.attribute("transB", 0) else MATMUL
    node.input_dim = 0 if op.attribute("transA", 0) else 1
    node.output_dim = 1
    node.alpha = op.attribute("alpha", 1.0)
    node.beta = op.attribute("beta", 1.0)
    if not op.has(2):
        node.beta = 1.0 if node.beta == 0 else node.beta
        node.bias_slot = op.slot(2, "bias")
        return node
    if math.prod(op.shape(2)) not in (1, columns) or (
        len(op.shape(2)) == 2 and op.shape(2)[0] != 1
    ):
        return None  # A matrix, or a column: no map per column.
    flat = op.found[op.node.input[2]].reshape(-1)
    op.found[op.node.input[2]], shaped = flat, op.found[op.node.input[2]]
    try:
        node.bias = op.held(2, name="bias", shape=(columns,))
    finally:
        op.found[op.node.input[2]] = shaped
    return node


@_lowers("MatMul")
def _matmul(op: Operator) -> Node | None:
    left, right = op.shape(0), op.shape(1)
    if min(len(left), len(right)) < 2:
        return None
    if op.is_fixed(1) and not op.is_fixed(0) and len(right) == 2:
        node = Linear(op.label, [op.value(0)], layout=MATMUL)
        node.weight = op.held(1, name="weight")
        return node
    if op.is_fixed(0) and not op.is_fixed(1) and len(left) == 2:
        node = Linear(op.label, [op.value(1)], layout=LINEAR)
        node.input_dim = node.output_dim = -2
        node.weight = op.held(0, name="weight")
        return node
    if op.is_fixed(0) or op.is_fixed(1):
        return None
    source = op.value(0).producer
    is_softmax = isinstance(source, Opaque) and source.softmax_dim == -1
    pair = [op.value(1), op.value(0)]
    return Mix(op.label, pair, rows_sum_to_one=is_softmax)


@_lowers("Softmax")
def _softmax(op: Operator) -> Node | None:
    axis, rank = op.attribute("axis", -1 if op.opset >= 13 else 1), len(op.shape(0))
    node = Opaque(op.label, [op.value(0)])
    if axis % rank == rank - 1:
        node.softmax_dim = -1
    return node


@_lowers("BatchNormalization")
def _batch_norm(op: Operator) -> Node | None:
    x = op.value(0)
    node = BatchNorm(op.label, [x], eps=float(op.attribute("epsilon", 1e-5)))
    node.channel_dim = 1
    made = [name for name in op.node.output if name]
    if op.attribute("training_mode", 0) or len(made) > 1:
        node.locked = "normalizes by the statistics of each batch"
    elif not op.attribute("spatial", 1) and len(x.shape) > 2:
        node.locked = "normalizes each position by itself"
    elif not all(op.is_fixed(i) for i in (1, 2, 3, 4)):
        node.locked = "takes its statistics or weights from an input of the model"
        if op.reader.defaults & set(op.node.input):
            node.locked += f": {DEFAULTS}"
    if node.locked:
        node.inputs += [op.value(i) for i in (1, 2, 3, 4) if not op.is_fixed(i)]
        return node
    names = ("weight", "bias", "mean", "var")
    node.weight, node.bias, node.mean, node.var = (
        op.held(i + 1, name=name) for i, name in enumerate(names)
    )
    return node


@_lowers("LayerNormalization")
def _layer_norm(op: Operator) -> Node | None:
    rank = len(op.shape(0))
    axis = op.attribute("axis", -1) % rank
    dims = tuple(range(axis, rank))
    sizes = op.shape(0)[axis:]
    if not op.is_fixed(1) or op.shape(1) != sizes or len(op.node.output) > 1:
        return None
    if op.has(2) and not (op.is_fixed(2) and op.shape(2) == sizes):
        return None
    node = Tail(op.label, [op.value(0)], dims=dims)
    node.weight = op.held(1, name="weight")
    node.bias = op.held(2, name="bias") if op.has(2) else None
    node.bias_slot = None if op.has(2) else op.slot(2, "bias")
    return node


# Sums and products ------------------------------------------------------------


@_lowers("Add Sub Sum")
def _added(op: Operator) -> Node | None:
    node = Add(op.label)
    for i in range(len(op.node.input)):
        value = op.held(i, name="constant") if op.is_fixed(i) else op.value(i)
        node.inputs.append(value)
        node.factors.append(-1.0 if i and op.node.op_type == "Sub" else 1.0)
    return node


@_lowers("Mul")
def _multiplied(op: Operator) -> Node | None:
    for fixed, flows in ((1, 0), (0, 1)):
        if op.is_fixed(fixed) and not op.is_fixed(flows):
            node = Scale(op.label, [op.value(flows)])
            node.weight = op.held(fixed, name="factor")
            return node
    return Gate(op.label, [op.value(0), op.value(1)])


@_lowers("Div")
def _divided(op: Operator) -> Node | None:
    if not op.is_fixed(1) or op.is_fixed(0):
        return None
    divisor = torch.as_tensor(op.found[op.node.input[1]], dtype=torch.float64)
    return Scale(op.label, [op.value(0)], factor=divisor.reciprocal())


@_lowers("Neg")
def _negated(op: Operator) -> Node | None:
    minus = torch.tensor(-1.0, dtype=torch.float64)
    return Scale(op.label, [op.value(0)], factor=minus)


# Activations, pooling ---------------------------------------------------------


@_lowers("Relu LeakyRelu PRelu")
def _rectified(op: Operator) -> Node | None:
    if op.node.op_type == "PRelu" and not op.is_fixed(1):
        return None
    if op.output_shape != op.shape(0):
        return None
    return Through(op.label, [op.value(0)])


@_lowers("Clip")
def _clipped(op: Operator) -> Node | None:
    """Relu in disguise: a lower bound of 0 and no upper one."""
    if op.opset >= 11:
        low = op.array(1)
        high = op.has(2)
    else:
        low, high = op.attribute("min"), op.attribute("max") is not None
    if high or low is None or float(low) != 0:
        return None
    return Through(op.label, [op.value(0)])


def _spatial(op: Operator) -> tuple[int, ...]:
    return tuple(range(2, len(op.shape(0))))


@_lowers("MaxPool GlobalMaxPool")
def _max_pooled(op: Operator) -> Node | None:
    if len(op.node.output) > 1:
        return None
    return Through(op.label, [op.value(0)], mixes=_spatial(op), bears_shift=True)


@_lowers("AveragePool GlobalAveragePool")
def _average_pooled(op: Operator) -> Node | None:
    kernel = tuple(op.attribute("kernel_shape", ()))
    counts = op.attribute("count_include_pad", 0) and (
        _pads(op, kernel) or op.attribute("ceil_mode", 0)
    )
    return Through(
        op.label,
        [op.value(0)],
        mixes=_spatial(op),
        bears_shift=not counts,
        bears_negative=True,
        why_no_shift="averages over zero padding, where a shift would be missing",
    )


@_lowers("ReduceMean ReduceSum ReduceMax")
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
    return Through(
        op.label,
        [op.value(0)],
        mixes=dims,
        dropped=() if op.attribute("keepdims", 1) else dims,
        bears_shift=kind != "ReduceSum",
        bears_negative=kind != "ReduceMax",
    )


@_lowers("Resize Upsample")
def _resized(op: Operator) -> Node | None:
    if op.attribute("coordinate_transformation_mode") == "tf_crop_and_resize":
        return None
    if any(op.has(i) and op.array(i) is None for i in range(1, len(op.node.input))):
        return None
    if op.shape(0)[:2] != op.output_shape[:2] or len(op.shape(0)) < 3:
        return None
    # Copies elements, or weighs them by numbers that sum to 1.
    return Through(
        op.label,
        [op.value(0)],
        mixes=_spatial(op),
        bears_shift=True,
        bears_negative=True,
    )


# What changes no element ------------------------------------------------------


@_lowers("Identity Dropout Cast")
def _same(op: Operator) -> Node | None:
    if op.node.op_type == "Dropout":
        training = op.has(2) and (op.array(2) is None or bool(op.array(2)))
        if training or len([name for name in op.node.output if name]) > 1:
            return None
    return Move(op.label, [op.value(0)])


@_lowers(
    "Reshape Flatten Transpose Squeeze Unsqueeze Expand Tile Split Slice Gather Pad "
    "DepthToSpace SpaceToDepth"
)
def _moved(op: Operator) -> Node | None:
    if op.is_fixed(0):
        return None  # Numbers picked from a table.
    for i in range(1, len(op.node.input)):
        if op.has(i) and op.array(i) is None:
            return None
    if op.node.op_type == "Pad":
        value = op.attribute("value", 0.0) if op.opset < 11 else op.array(2)
        if op.attribute("mode", "constant") == "constant" and value:
            return None  # Padded with something that is not 0.
    return Move(op.label, [op.value(0)], replay=op.replay([0]), acts_on=_acts_on(op))


def _acts_on(op: Operator) -> tuple[int, ...] | None:
    if op.node.op_type == "Split" and not op.has(1) and not op.attribute("split"):
        return (op.attribute("axis", 0),)
    if op.node.op_type == "Split":
        return (op.attribute("axis", 0),)
    return None


@_lowers("Concat")
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

"""Lower the normalizations of ONNX, and onnxruntime's own, to nodes."""

from __future__ import annotations

from normkit.fold.ir.graph import Node
from normkit.fold.ir.nodes import BatchNorm, NormAffine
from normkit.fold.onnx.reading import DEFAULTS, Operator
from normkit.fold.onnx.rules import RULES, lowers

__all__ = ["RULES"]


@lowers("BatchNormalization")
def _batch_norm(op: Operator) -> Node | None:
    x, locked = op.value(0), ""
    made = [name for name in op.node.output if name]
    if op.attribute("training_mode", 0) or len(made) > 1:
        locked = "normalizes by the statistics of each batch"
    elif not op.attribute("spatial", 1) and len(x.shape) > 2:
        locked = "normalizes each position by itself"
    parts = [
        op.held(i, name=name) if op.is_fixed(i) else op.value(i)
        for i, name in enumerate(("weight", "bias", "mean", "var"), 1)
    ]
    weight, bias, mean, var = parts
    node = BatchNorm(
        op.label,
        [x],
        mean=mean,
        var=var,
        weight=weight,
        bias=bias,
        eps=float(op.attribute("epsilon", 1e-5)),
        locked=locked,
    )
    if node.locked:
        node.inputs += [value for value in parts if not value.is_fixed]
        if op.reader.defaults & set(op.node.input):
            node.locked += f": {DEFAULTS}"
    return node


@lowers("LayerNormalization RMSNormalization")
def _row_norm(op: Operator) -> Node | None:
    rank = len(op.shape(0))
    axis = op.attribute("axis", -1) % rank
    has_bias = op.node.op_type == "LayerNormalization"
    if len(op.node.output) > 1:
        return None
    node = _norm_affine(op, 1, 2 if has_bias else 0, tuple(range(axis, rank)))
    if node is not None:
        node.centers = has_bias
    return node


@lowers("InstanceNormalization")
def _instance_norm(op: Operator) -> Node | None:
    return _norm_affine(op, 1, 2, (1,))


@lowers("GroupNormalization")
def _group_norm(op: Operator) -> Node | None:
    # Before opset 21 it has a weight per group.
    return _norm_affine(op, 1, 2, (1,)) if op.opset >= 21 else None


@lowers(
    "com.microsoft::SkipLayerNormalization "
    "com.microsoft::SkipSimplifiedLayerNormalization"
)
def _skip_norm(op: Operator) -> Node | None:
    """Lower the norm of a sum: (input, skip, weight[, bias], bias of the sum)."""
    has_bias = op.node.op_type == "SkipLayerNormalization"
    rank = len(op.shape(0))
    node = _norm_affine(op, 2, 3 if has_bias else 0, (rank - 1,))
    if node is None or op.is_fixed(1):
        return None
    node.inputs = [op.value(0), op.value(1)]
    summand = 4 if has_bias else 3
    if op.has(summand) and not op.is_fixed(summand):
        return None
    return node


def _norm_affine(
    op: Operator, weight: int, bias: int, dims: tuple[int, ...]
) -> NormAffine | None:
    """Return the node of a norm with its parameters in these inputs; 0 for none."""
    sizes = tuple(op.shape(0)[dim] for dim in dims)
    for index in (weight, bias):
        if index and op.has(index):
            if not op.is_fixed(index) or op.shape(index) != sizes:
                return None
        elif index == weight:
            return None
    node = NormAffine(op.label, [op.value(0)], dims=dims)
    node.weight = op.held(weight, name="weight")
    if bias and op.has(bias):
        node.bias = op.held(bias, name="bias")
    elif bias:
        node.bias_slot = op.slot(bias, "bias")
    return node

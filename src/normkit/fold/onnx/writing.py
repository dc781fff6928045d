"""Apply a plan to an ONNX graph, through onnx-ir."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from normkit.fold.ir.graph import Slot
from normkit.fold.ir.nodes import BatchNorm, NormAffine
from normkit.fold.onnx.integers import rescale
from normkit.fold.onnx.norms import PARAMETERS, OnnxGraph, OnnxNorm
from normkit.fold.search.plan import Norm, Plan

__all__ = ["rewritten", "rounded"]


def rewritten(model: onnx.ModelProto, read: OnnxGraph, plan: Plan) -> onnx.ModelProto:
    """Return a copy of `model` with the weights and without the norms of `plan`.

    An operator that measures its input stays, with a weight of 1 and without a bias.

    Args:
        model: The model, in any precision: one plan edits it and its float64 copy.
        read: Its graph.
        plan: The folds.
    """
    edited = ir.from_proto(model)
    graph = edited.graph
    nodes = list(graph)
    names = _Names(edited)

    def weight(wish: str, array: np.ndarray) -> ir.Value:
        return _initializer(
            graph, wish, array, ir.DataType.from_numpy(array.dtype), names
        )

    new: dict[Slot, Tensor] = {}
    for _, solution in plan.steps:
        new |= solution.edits
    steps = [step for step in plan.steps if not _parameters(step[0])]
    gone = {position for norm, _ in steps for position in _positions(norm)}
    entries = {norm.path: _entry(nodes, read, norm) for norm, _ in steps}
    for (position, index), slot in read.slots.items():
        if slot not in new or position in gone:
            continue
        if slot in read.quantized:
            held = read.quantized[slot]
            node = nodes[position]
            rescale(graph, node, index, held, new[slot], weight, names.fresh)
        else:
            _set_input(graph, nodes[position], index, new[slot], names)
    for norm, solution in plan.steps:
        if _parameters(norm):
            node = nodes[_positions(norm)[0]]
            _drop_affine(graph, node, norm, solution.remainder, names)
    for norm, solution in steps:
        own = [nodes[position] for position in _positions(norm)]
        source = own[0].inputs[entries[norm.path]]
        assert source is not None
        if solution.remainder is not None:
            shift = _broadcast(norm.nodes[0], solution.remainder)
            source = _sum_instead(graph, own, source, shift, names)
        _bypass(graph, own, source)
    _remove_unused(graph)
    return ir.to_proto(edited)


def rounded(tensor: Tensor, dtype: ir.DataType) -> np.ndarray:
    """Return `tensor` in the type of the model's weight."""
    return tensor.numpy().astype(dtype.numpy())


def _positions(norm: Norm) -> tuple[int, ...]:
    assert isinstance(norm, OnnxNorm)
    return norm.positions


def _parameters(norm: Norm) -> tuple[int, ...]:
    assert isinstance(norm, OnnxNorm)
    return norm.parameters


def _broadcast(node: BatchNorm | NormAffine, shift: Tensor) -> Tensor:
    """Return what is left of a norm, shaped to be added to its output."""
    rank = len(node.outputs[0].shape)
    if isinstance(node, BatchNorm):
        return shift.reshape(-1, *(1,) * (rank - 2))
    first = min(dim % rank for dim in node.dims)
    shape = [n if d in node.dims else 1 for d, n in enumerate(node.outputs[0].shape)]
    return shift.reshape(shape[first:])


def _drop_affine(
    graph: ir.Graph,
    node: ir.Node,
    norm: Norm,
    bias: Tensor | None,
    names: _Names,
) -> None:
    """Give an operator that measures its input a weight of 1, and `bias` or none."""
    needed = PARAMETERS[node.op_type]
    for index, value in zip(
        needed, (norm.nodes[0].weight, norm.nodes[0].bias), strict=False
    ):
        is_bias = index != next(iter(needed))
        if value is None:
            continue
        if is_bias and bias is None and not needed[index]:
            node.replace_input_with(index, None)
            if index == len(node.inputs) - 1:
                node.resize_inputs(index)
            continue
        content = torch.full(value.shape, 0.0 if is_bias else 1.0, dtype=torch.float64)
        if is_bias and bias is not None:
            content = bias.reshape(value.shape)
        _set_input(graph, node, index, content, names)


def _entry(nodes: list[ir.Node], read: OnnxGraph, norm: Norm) -> int:
    """Return the index of the input, of its first node, that a norm normalizes."""
    first, wanted = nodes[_positions(norm)[0]], norm.nodes[0].inputs[0]
    names = [None if value is None else value.name for value in first.inputs]
    return next(
        i for i, name in enumerate(names) if name and read.values.get(name) is wanted
    )


class _Names:
    """Names that no value of the model has, in any of its graphs."""

    def __init__(self, model: ir.Model) -> None:
        self.taken: set[str | None] = {v.name for v in model.graph.inputs}
        self.taken |= set(model.graph.initializers)
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            self.taken |= {
                value.name for value in (*node.inputs, *node.outputs) if value
            }
            for graph in [*node.attributes.values()]:
                for inner in _graphs(graph):
                    self.taken |= {v.name for v in inner.inputs}
                    self.taken |= set(inner.initializers)

    def fresh(self, wish: str) -> str:
        """Return `wish`, or `wish` with a number, and reserve it."""
        name, count = wish, 1
        while name in self.taken:
            count += 1
            name = f"{wish}_{count}"
        self.taken.add(name)
        return name


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    if attribute.type == ir.AttributeType.GRAPHS:
        return list(attribute.as_graphs())
    return []


def _set_input(
    graph: ir.Graph, node: ir.Node, index: int, tensor: Tensor, names: _Names
) -> None:
    """Give one use of a weight a new initializer."""
    old = node.inputs[index] if index < len(node.inputs) else None
    beside = node.inputs[1] if old is None else old
    assert beside is not None
    dtype = _dtype(beside)
    wish = old.name if old is not None else f"{beside.name}_bias"
    value = _initializer(graph, f"{wish}_folded", rounded(tensor, dtype), dtype, names)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _initializer(
    graph: ir.Graph, wish: str, array: np.ndarray, dtype: ir.DataType, names: _Names
) -> ir.Value:
    name = names.fresh(wish)
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _dtype(value: ir.Value) -> ir.DataType:
    if value.const_value is not None:
        return value.const_value.dtype
    maker = value.producer()
    if value.dtype is not None:
        return value.dtype
    if maker is not None and maker.op_type == "Constant":
        held = ir.convenience.get_const_tensor(value)
        if held is not None:
            return held.dtype
    if maker is not None and maker.op_type == "DequantizeLinear":
        scale = maker.inputs[1]
        return ir.DataType.FLOAT if scale is None else _dtype(scale)
    if (
        maker is not None
        and maker.op_type in _KEEP_TYPE
        and maker.inputs[0] is not None
    ):
        return _dtype(maker.inputs[0])
    return ir.DataType.FLOAT


_KEEP_TYPE = {
    *("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Mul", "Add", "Sub"),
    *("Div", "Slice", "Concat", "Expand", "Neg", "Sqrt"),
}


def _sum_instead(
    graph: ir.Graph, own: list[ir.Node], source: ir.Value, shift: Tensor, names: _Names
) -> ir.Value:
    """Insert source + shift before the first of `own`, and return it."""
    like = own[0].inputs[1]
    assert like is not None
    dtype = source.dtype or _dtype(like)
    array = rounded(shift, dtype)
    added = _initializer(graph, f"{source.name}_shift", array, dtype, names)
    name = names.fresh(f"{source.name}_shifted")
    out = ir.Value(name=name, type=ir.TensorType(dtype), shape=source.shape)
    node = ir.Node("", "Add", [source, added], outputs=[out], name=name)
    graph.insert_before(own[0], node)
    return out


def _bypass(graph: ir.Graph, own: list[ir.Node], source: ir.Value) -> None:
    """Remove the nodes `own`; the readers of the last one read `source` instead."""
    last = own[-1].outputs[0]
    places = [i for i, output in enumerate(graph.outputs) if output is last]
    is_free = source.producer() is not None and not any(
        output is source for output in graph.outputs
    )
    name, kind, shape = last.name, last.type, last.shape
    instead = source
    if places and not is_free:
        # An input, or a value that is an output already, needs a node between.
        instead = ir.Value(type=kind, shape=shape)
        node = ir.Node("", "Identity", [source], outputs=[instead], name=own[-1].name)
        graph.insert_before(own[0], node)
    for i in places:
        graph.outputs[i] = instead
    ir.convenience.replace_all_uses_with(last, instead)
    graph.remove(list(reversed(own)), safe=True)
    if places:
        instead.name, instead.type, instead.shape = name, kind, shape


_OF_CONSTANTS = ("Constant", "Identity", "QuantizeLinear", "DequantizeLinear")


def _remove_unused(graph: ir.Graph) -> None:
    """Remove constants and initializers that nothing reads any more."""
    kept = {*graph.inputs, *graph.outputs}
    changed = True
    while changed:
        changed = False
        for node in list(graph):
            if node.op_type not in _OF_CONSTANTS or node.domain not in (
                "",
                "ai.onnx",
            ):
                continue
            if any(value.uses() or value in kept for value in node.outputs):
                continue
            graph.remove(node, safe=True)
            changed = True
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in kept:
            del graph.initializers[name]

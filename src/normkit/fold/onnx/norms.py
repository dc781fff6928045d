"""The norms of an ONNX graph: single operators, and those that are written out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx

from normkit.fold.ir.decomposed import as_batch_norm
from normkit.fold.ir.graph import Graph, Node, Slot, Value
from normkit.fold.ir.nodes import Add, BatchNorm, NormAffine, Quantized, Scale
from normkit.fold.ir.written_out import as_norm_affine

__all__ = ["PARAMETERS", "OnnxGraph", "OnnxNorm", "joined", "measuring"]

# The inputs that are weight and bias; the operator requires those marked True.
PARAMETERS: dict[str, dict[int, bool]] = {
    "LayerNormalization": {1: True, 2: False},
    "RMSNormalization": {1: True},
    "InstanceNormalization": {1: True, 2: True},
    "GroupNormalization": {1: True, 2: True},
    "SkipLayerNormalization": {2: True, 3: False},
    "SkipSimplifiedLayerNormalization": {2: True},
}


@dataclass(eq=False)
class OnnxNorm:
    """A norm of an ONNX model.

    Attributes:
        path: Its unique name.
        kind: Its operator, or the operators that it is decomposed into.
        nodes: Its one node.
        positions: The positions of its nodes in the ONNX graph, in order; of a layer
            or RMS norm written out, those of its weight and bias.
        refusal: Reason why it must stay; empty if it may go.
        stored: Number of stored numbers that may go.
        parameters: The inputs that are weight and bias of an operator that measures.
    """

    path: str
    kind: str
    nodes: list[BatchNorm | NormAffine]
    positions: tuple[int, ...]
    refusal: str = ""
    stored: int = 0
    parameters: tuple[int, ...] = ()


@dataclass(eq=False)
class OnnxGraph:
    """The graph of an ONNX model.

    Attributes:
        graph: The nodes and values.
        values: By their ONNX names.
        norms: The norms.
        slots: By (position of the node, which of its inputs).
        quantized: The weights made of integers, by their slots.
    """

    graph: Graph = field(default_factory=Graph)
    values: dict[str, Value] = field(default_factory=dict)
    norms: list[OnnxNorm] = field(default_factory=list)
    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)
    quantized: dict[Slot, Quantized] = field(default_factory=dict)


def joined(
    graph: Graph, norms: str
) -> Iterator[tuple[list[Node], BatchNorm | NormAffine]]:
    """Yield (operations, the node in their place) of each norm that is written out.

    Args:
        graph: The graph; the caller replaces the operations before the next is sought.
        norms: "batch" or "all".
    """
    for node in list(graph.nodes):
        if norms == "all":
            found = as_norm_affine(node)
            if found is not None:
                yield found[1], found[0]
                continue
        chain = _decomposed(node)
        if not chain:
            continue
        x, y = chain[0].inputs[0], chain[-1].outputs[0]
        norm = as_batch_norm(chain[0].label, chain, x, y)
        # A layer norm's weight runs along the last dimension.
        if norm is not None and norm.channel_dim == 1:
            yield chain, norm


def _decomposed(node: Node) -> list[Node]:
    """Return a product with a constant and the sum with one that alone reads it."""
    if not isinstance(node, Scale) or node.weight is None or len(node.outputs) != 1:
        return []
    y = node.outputs[0]
    if y.pinned or len(y.readers) != 1 or not isinstance(y.readers[0], Add):
        return []
    (add,) = y.readers
    others = [v for v in add.inputs if v is not y]
    if len(add.inputs) != 2 or len(others) != 1 or not others[0].roots:
        return []
    return [node, add]


def measuring(
    graph: Graph, known: list[OnnxNorm], proto: onnx.GraphProto
) -> list[OnnxNorm]:
    """Return the norms that measure their input and are operators of their own.

    Args:
        graph: The graph.
        known: The norms found already.
        proto: The graph in the file.
    """
    seen = {node for norm in known for node in norm.nodes}
    found = []
    for node in graph.nodes:
        if not isinstance(node, NormAffine) or node in seen:
            continue
        operator = proto.node[node.position].op_type
        held = PARAMETERS[operator]
        if operator == "InstanceNormalization" and _is_identity(node):
            continue  # The first step of a group norm.
        norm = OnnxNorm(node.label.strip("'"), operator, [node], (node.position,))
        norm.parameters = tuple(held)
        norm.stored = sum(
            math.prod(value.shape)
            for value, is_needed in zip(
                (node.weight, node.bias), held.values(), strict=False
            )
            if value is not None and not is_needed
        )
        found.append(norm)
    return found


def _is_identity(node: NormAffine) -> bool:
    affine = node.affine()
    return bool((affine.scale == 1).all() and (affine.shift == 0).all())

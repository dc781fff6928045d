"""Batch norms in the branches of an If or the body of a Loop.

An inner graph is folded as a model of its own, with a proof of its own, whether or not
a run enters it. The values that it reads from outside are inputs there, or weights if
they are weights outside. An input cannot absorb a batch norm, so it goes into layers of
the same inner graph or stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, shape_inference

from normkit.fold.ledger import FoldEntry
from normkit.fold.onnx.files import graphs_in
from normkit.fold.onnx.limits import TimeLimitError
from normkit.fold.onnx.reading import captured_by, inner_graphs

__all__ = ["FoldAlone", "fold_inside", "has_norms_inside", "left_inside"]

_OUTER = "its input is computed outside of that graph"

FoldAlone = Callable[
    [onnx.ModelProto, dict[str, Any]], tuple[onnx.ModelProto, list[FoldEntry], float]
]


def has_norms_inside(model: onnx.ModelProto) -> bool:
    """Return True if any inner graph holds a batch norm."""
    return any(_has_norm(g) for node in model.graph.node for g in inner_graphs(node))


def left_inside(model: onnx.ModelProto) -> list[FoldEntry]:
    """Return entries for all batch norms in inner graphs, which stay."""
    return [
        entry
        for node in model.graph.node
        for graph in inner_graphs(node)
        for entry in _left(node, graph)
    ]


def fold_inside(
    model: onnx.ModelProto, found: dict[str, Any], fold: FoldAlone
) -> tuple[onnx.ModelProto, list[FoldEntry], float]:
    """Return a copy of `model` with folded inner graphs, entries, the largest gap.

    Args:
        model: The model, in any precision.
        found: Every value of one run of it in float64.
        fold: Function that folds a model, given a value for each of its inputs.
    """
    edited = onnx.ModelProto()
    edited.CopyFrom(model)
    taken = {name for graph in graphs_in(model.graph) for name in _names(graph)}
    known = shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type for v in (*known.value_info, *known.input, *known.output)}
    entries: list[FoldEntry] = []
    largest = 0.0
    for node in edited.graph.node:
        for graph in inner_graphs(node):
            if not _has_norm(graph):
                continue
            alone = _alone(model, node, graph, found, kinds)
            if alone is None:
                entries += _left(node, graph)
                continue
            try:
                folded, own, gap = fold(*alone)
            except TimeLimitError:
                raise
            except Exception:
                # As a model of its own it does not run, so nothing can be proven.
                entries += _left(node, graph)
                continue
            _put_back(graph, folded, alone[0], taken)
            entries += [_placed(entry, node) for entry in own]
            largest = max(largest, gap)
    return edited, entries, largest


def _alone(
    model: onnx.ModelProto,
    node: onnx.NodeProto,
    graph: onnx.GraphProto,
    found: dict[str, Any],
    kinds: dict[str, onnx.TypeProto],
) -> tuple[onnx.ModelProto, dict[str, Any]] | None:
    """Return the inner `graph` as a model, and its inputs; None if they are unknown."""
    fixed = _fixed(model)
    weights: list[onnx.TensorProto] = []
    inputs: list[onnx.ValueInfoProto] = []
    first: dict[str, Any] = {}
    for name in sorted(captured_by(graph)):
        if name in fixed:
            weights.append(fixed[name])
            continue
        array = found.get(name)
        if name not in kinds or not isinstance(array, np.ndarray):
            return None
        kind = kinds[name].tensor_type.elem_type
        inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
        first[name] = array
    if graph.input:
        if node.op_type != "Loop":
            return None  # A Scan passes slices of its inputs.
        given = [np.array(0), np.array(True), *(found.get(n) for n in node.input[2:])]
        if not all(isinstance(array, np.ndarray) for array in given):
            return None
        inputs += graph.input
        first |= dict(zip([v.name for v in graph.input], given, strict=True))
    alone = helper.make_graph(
        graph.node,
        graph.name or "inside",
        inputs,
        graph.output,
        [*graph.initializer, *weights],
        value_info=graph.value_info,
    )
    opsets = list(model.opset_import)
    return (
        helper.make_model(alone, opset_imports=opsets, ir_version=model.ir_version),
        first,
    )


def _fixed(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return the weights and constants of the outer graph by name."""
    inputs = {value.name for value in model.graph.input}
    fixed = {t.name: t for t in model.graph.initializer if t.name not in inputs}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                tensor = onnx.TensorProto()
                tensor.CopyFrom(attribute.t)
                tensor.name = node.output[0]
                fixed[tensor.name] = tensor
    return fixed


def _put_back(
    graph: onnx.GraphProto,
    folded: onnx.ModelProto,
    alone: onnx.ModelProto,
    taken: set[str],
) -> None:
    """Replace `graph` by its folded model; no new name hides an outer one."""
    outer = {tensor.name for tensor in alone.graph.initializer}
    outer -= {tensor.name for tensor in graph.initializer}
    before = {name for each in graphs_in(alone.graph) for name in _names(each)}
    after = [name for each in graphs_in(folded.graph) for name in _names(each)]
    renamed: dict[str, str] = {}
    for name in dict.fromkeys(after):
        if name in before:
            continue
        fresh, count = name, 1
        while fresh in taken:
            count += 1
            fresh = f"{name}_{count}"
        taken.add(fresh)
        renamed[name] = fresh
    for each in graphs_in(folded.graph):
        for tensor in each.initializer:
            tensor.name = renamed.get(tensor.name, tensor.name)
        for node in each.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
    del graph.node[:], graph.initializer[:], graph.output[:], graph.value_info[:]
    graph.node.extend(folded.graph.node)
    graph.output.extend(folded.graph.output)
    graph.initializer.extend(t for t in folded.graph.initializer if t.name not in outer)


def _names(graph: onnx.GraphProto) -> list[str]:
    """Return every name of a value in `graph` itself."""
    names = [each.name for each in (*graph.input, *graph.output, *graph.initializer)]
    for node in graph.node:
        names += [*node.input, *node.output]
    return names


def _has_norm(graph: onnx.GraphProto) -> bool:
    return any(
        node.op_type == "BatchNormalization"
        for each in graphs_in(graph)
        for node in each.node
    )


def _left(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[FoldEntry]:
    why = (
        f"it runs inside {node.op_type} '{node.name}', whose inner graph cannot be run "
        "by itself"
    )
    return [
        FoldEntry(each.name or each.output[0], each.op_type, folded=False, reason=why)
        for inner in graphs_in(graph)
        for each in inner.node
        if each.op_type == "BatchNormalization"
    ]


def _placed(entry: FoldEntry, node: onnx.NodeProto) -> FoldEntry:
    where = f"inside {node.op_type} '{node.name}'"
    how, reason = entry.how, entry.reason
    if reason:
        told = reason.replace("the model's input is given by the caller", _OUTER)
        reason = f"it runs {where}: {told}"
    return replace(entry, how=f"{how}, {where}" if how else "", reason=reason)

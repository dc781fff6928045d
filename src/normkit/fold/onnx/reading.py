"""Read an ONNX graph, with the values of one run, into the graph of `ir`.

A name is fixed if it depends on no input of the model. Each use of a fixed name by an
operator with weights becomes a slot of its own: an edit gives that one use a new
initializer and leaves every other reader of the old one alone, whether it was shared,
came from a Constant, or is used inside an If.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from normkit.fold.ir.graph import Node, Slot, Value, slots_of
from normkit.fold.ir.nodes import BatchNorm, Opaque, Parameter
from normkit.fold.onnx.evaluate import evaluator
from normkit.fold.onnx.files import graphs_in
from normkit.fold.onnx.integers import ROUNDS, quantized
from normkit.fold.onnx.norms import OnnxGraph, OnnxNorm, joined, measuring

__all__ = [
    "DEFAULTS",
    "Operator",
    "captured_by",
    "inner_graphs",
    "read_graph",
]

# Their results differ from run to run.
_RANDOM = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Bernoulli", "Multinomial"),
}


# The reason, and what to do.
DEFAULTS = (
    "an input is a weight with a default in the file, which callers may replace; if "
    "no caller does, pass fixed_weights=True (--fixed-weights)"
)


@dataclass(frozen=True)
class Operator:
    """One node of an ONNX graph, with the values around it.

    Attributes:
        node: The node.
        position: Its position in the graph.
        label: Its name in messages.
        opset: The version of its operator set.
        found: The arrays of one run by name.
        reader: The reader of the graph.
    """

    node: onnx.NodeProto
    position: int
    label: str
    opset: int
    found: dict[str, Any]
    reader: _Reader

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute; text as str."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def has(self, index: int) -> bool:
        """Return True if the input number `index` is given."""
        return index < len(self.node.input) and bool(self.node.input[index])

    def is_fixed(self, index: int) -> bool:
        """Return True if that input is the same in every run."""
        return self.has(index) and self.node.input[index] in self.reader.fixed

    def shape(self, index: int) -> tuple[int, ...]:
        """Return the shape of that input in the run."""
        return tuple(np.shape(self.found[self.node.input[index]]))

    def array(self, index: int) -> Any:
        """Return that input if it is fixed or made of shapes alone; else None.

        Values made of shapes are the same for the same shapes.
        """
        if not self.has(index):
            return None
        name = self.node.input[index]
        known = name in self.reader.fixed or name in self.reader.from_shapes
        return self.found[name] if known else None

    def value(self, index: int) -> Value:
        """Return the value of that input."""
        return self.reader.value(self.node.input[index])

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of its first output in the run."""
        return tuple(np.shape(self.found[self.node.output[0]]))

    def held(self, index: int, *, name: str, vector: int = 0) -> Value:
        """Return the fixed input `index` as a parameter to edit.

        Args:
            index: Which input.
            name: Its name in the ledger.
            vector: Expand it to a vector of so many elements; 0 keeps its shape.
        """
        source = self.node.input[index]
        tensor = torch.as_tensor(np.array(self.found[source], dtype=np.float64))
        if vector:
            tensor = tensor.reshape(-1).expand(vector).clone()
        slot = self.slot(index, name, tensor)
        node = Parameter(f"'{slot.name}'", slot=slot)
        if source in self.reader.quantized and name != "bias":
            # A bias becomes a float: it is added to a sum that no integer holds.
            integers = quantized(self.reader.makers.get(source), self.found, node)
            if integers is None or name != "weight":
                slot.locked = "is computed from quantized numbers"
            else:
                node = self.reader.result.quantized[slot] = integers
        value = Value(tuple(tensor.shape), node, roots=(slot,))
        node.outputs = [value]
        return value

    def slot(self, index: int, name: str, tensor: Tensor | None = None) -> Slot:
        """Create the slot of that input; empty without `tensor`."""
        bare = self.label.strip("'")
        slot = Slot(f"{bare}.{name}", tensor)
        self.reader.result.slots[self.position, index] = slot
        return slot

    def replay(self, moved: list[int]) -> Callable[[list[Tensor]], list[Tensor]]:
        """Return a function that repeats the node with other tensors for `moved`."""
        inputs = [
            helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None)
            for name in dict.fromkeys(self.node.input)
            if name
        ]
        outputs = [
            helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None)
            for name in self.node.output
            if name
        ]
        graph = helper.make_graph([self.node], "one", inputs, outputs)
        opset = helper.make_opsetid("", self.opset)
        alone = evaluator(helper.make_model(graph, opset_imports=[opset]))
        fixed = {
            name: self.found[name]
            for i, name in enumerate(self.node.input)
            if name and i not in moved
        }

        def replay(tensors: list[Tensor]) -> list[Tensor]:
            given = {
                self.node.input[i]: tensor.numpy()
                for i, tensor in zip(moved, tensors, strict=True)
            }
            found = alone.run(None, fixed | given)
            return [torch.from_numpy(np.array(array)) for array in found]

        return replay


Lowering = Callable[[Operator], Node | None]


class _Reader:
    """Read the nodes of a graph in order."""

    def __init__(
        self,
        model: onnx.ModelProto,
        found: dict[str, Any],
        rules: dict[str, Lowering],
        opset: int,
        norms: str,
    ) -> None:
        self.norms = norms
        self.proto = model.graph
        self.found = found
        self.rules = rules
        self.opset = opset
        self.result = OnnxGraph()
        self.fixed: set[str] = set()
        self.defaults: set[str] = set()
        self.from_shapes: set[str] = set()
        self.quantized: set[str] = set()
        self.makers: dict[str, onnx.NodeProto] = {}
        self.groups = 0

    def read(self) -> OnnxGraph:
        """Return the whole graph."""
        inputs = {value.name for value in self.proto.input}
        for tensor in self.proto.initializer:
            # A weight that is an input as well is only a default.
            held = self.defaults if tensor.name in inputs else self.fixed
            held.add(tensor.name)
        for name in inputs:
            value = self.value(name)
            value.pinned = "is given by the caller"
            self.result.graph.inputs.append(value)
        for position, node in enumerate(self.proto.node):
            self._read_node(position, node)
        for output in self.proto.output:
            value = self.value(output.name)
            value.pinned = value.pinned or "is returned by the model"
            self.result.graph.outputs.append(value)
        self._join()
        return self.result

    def value(self, name: str) -> Value:
        """Return the value of that name."""
        if name not in self.result.values:
            array = self.found.get(name)
            shape = () if array is None else tuple(np.shape(array))
            value = Value(shape)
            self.groups += 1
            value.alias_group = self.groups
            if name in self.fixed and isinstance(array, np.ndarray):
                value.constant = torch.as_tensor(np.array(array, dtype=np.float64))
            self.result.values[name] = value
        return self.result.values[name]

    def _read_node(self, position: int, node: onnx.NodeProto) -> None:
        inner = {name for graph in inner_graphs(node) for name in captured_by(graph)}
        read = [name for name in (*node.input, *sorted(inner)) if name]
        if node.op_type in ("Shape", "Size"):
            self.from_shapes.update(node.output)
        elif node.op_type not in _RANDOM and not inner and not inner_graphs(node):
            if all(name in self.fixed for name in read):
                self.fixed.update(node.output)
                self.makers.update((name, node) for name in node.output)
                if node.op_type.startswith("Dequantize") or any(
                    name in self.quantized for name in read
                ):
                    self.quantized.update(node.output)
                return
            if all(name in self.fixed | self.from_shapes for name in read):
                self.from_shapes.update(node.output)
        label = f"'{node.name or node.output[0]}'"
        operator = Operator(node, position, label, self.opset, self.found, self)
        is_standard = node.domain in ("", "ai.onnx")
        name = node.op_type if is_standard else f"{node.domain}::{node.op_type}"
        rule = self.rules.get(name)
        lowered = None
        if rule is not None and _is_float(self.found.get(node.output[0])):
            lowered = rule(operator)
        if lowered is None:
            self._drop_slots(position)
            made = [n for n in read if n not in self.fixed]
            if self.defaults & set(read):
                label += f", of which {DEFAULTS}"
            label += f", which {ROUNDS[name]}" if name in ROUNDS else ""
            lowered = Opaque(label, [self.value(name) for name in made])
        lowered.position = position
        lowered.outputs = [self.value(name) for name in node.output if name]
        for value in lowered.outputs:
            value.producer = lowered
        for value in dict.fromkeys(lowered.inputs):
            value.readers.append(lowered)
        for slot in slots_of(lowered):
            slot.readers.append(lowered)
        self.result.graph.nodes.append(lowered)
        if isinstance(lowered, BatchNorm):
            stored = sum(np.size(self.found[name]) for name in node.input[1:5])
            norm = OnnxNorm(label.strip("'"), node.op_type, [lowered], (position,))
            norm.refusal = f"it {lowered.locked}" if lowered.locked else ""
            norm.stored = stored
            self.result.norms.append(norm)

    def _drop_slots(self, position: int) -> None:
        for key in [key for key in self.result.slots if key[0] == position]:
            del self.result.slots[key]

    def _join(self) -> None:
        """Replace each norm that is written out by one node, and name all norms."""
        graph, found = self.result.graph, self.result.norms
        for old, norm in joined(graph, self.norms):
            positions = tuple(each.position for each in old)
            norm.position = positions[0]
            graph.nodes[graph.nodes.index(old[0])] = norm
            for each in old:
                if each in graph.nodes:
                    graph.nodes.remove(each)
                for value in each.inputs:
                    value.readers[:] = [r for r in value.readers if r is not each]
                if isinstance(norm, BatchNorm):
                    self._drop_slots(each.position)
            norm.inputs[0].readers.append(norm)
            for value in norm.outputs:
                value.producer = norm
            for slot in self.result.slots.values():
                if any(each in slot.readers for each in old):
                    slot.readers[:] = [norm]
            kind = "+".join(self.proto.node[at].op_type for at in positions)
            named = OnnxNorm(norm.label.strip("'"), kind, [norm], positions)
            named.stored = 2 * norm.channels if isinstance(norm, BatchNorm) else 0
            found.append(named)
        if self.norms == "all":
            found += measuring(graph, found, self.proto)
        found.sort(key=lambda norm: norm.positions)
        seen: dict[str, int] = {}
        for each in found:
            count = seen[each.path] = seen.get(each.path, 0) + 1
            each.path += f" ({count})" if count > 1 else ""


def _is_float(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype == np.float64


def inner_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the graphs inside a node: branches, bodies."""
    graphs = [a.g for a in node.attribute if a.HasField("g")]
    return graphs + [g for a in node.attribute for g in a.graphs]


def captured_by(graph: onnx.GraphProto) -> set[str]:
    """Return the names that an inner graph reads from outside."""
    read, made = set(), set()
    for inner in graphs_in(graph):
        made |= {t.name for t in inner.initializer} | {v.name for v in inner.input}
        read |= {value.name for value in inner.output}
        for node in inner.node:
            read |= set(node.input)
            made |= set(node.output)
    return read - made - {""}


def read_graph(
    model: onnx.ModelProto,
    found: dict[str, Any],
    rules: dict[str, Lowering],
    opset: int,
    norms: str = "batch",
) -> OnnxGraph:
    """Read the graph of `model`.

    Args:
        model: The model, in any precision.
        found: Every value of one run in float64.
        rules: The lowering of each operator.
        opset: The version of the operator set.
        norms: "batch" or "all".
    """
    return _Reader(model, found, rules, opset, norms).read()

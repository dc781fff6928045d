"""Read an ONNX graph, with the values of one run, into the graph of `ir`.

A name is fixed if it depends on no input of the model. Each use of a fixed name by an
operator with weights becomes a slot of its own: an edit gives that one use a new
initializer and leaves every other reader of the old one alone, whether it was shared,
came from a Constant, or is used inside an If.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from normkit.fold.ir.decomposed import as_batch_norm
from normkit.fold.ir.graph import Graph, Node, Slot, Value
from normkit.fold.ir.nodes import Add, BatchNorm, Opaque, Parameter, Scale
from normkit.fold.onnx.evaluate import evaluator
from normkit.fold.onnx.files import graphs_in

__all__ = [
    "DEFAULTS",
    "OnnxGraph",
    "OnnxNorm",
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


@dataclass(eq=False)
class OnnxNorm:
    """A batch norm of an ONNX model.

    Attributes:
        path: Its unique name.
        kind: Its operator, or the operators that it is decomposed into.
        nodes: Its one node.
        positions: The positions of its nodes in the ONNX graph, in order.
        refusal: Reason why it must stay; empty if it may go.
        stored: Number of stored numbers.
    """

    path: str
    kind: str
    nodes: list[BatchNorm]
    positions: tuple[int, ...]
    refusal: str = ""
    stored: int = 0


@dataclass(eq=False)
class OnnxGraph:
    """The graph of an ONNX model.

    Attributes:
        graph: The nodes and values.
        values: By their ONNX names.
        norms: The batch norms.
        slots: By (position of the node, which of its inputs).
    """

    graph: Graph = field(default_factory=Graph)
    values: dict[str, Value] = field(default_factory=dict)
    norms: list[OnnxNorm] = field(default_factory=list)
    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)


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
        if source in self.reader.quantized:
            slot.locked = "is computed from quantized numbers"
        node = Parameter(f"'{slot.name}'", slot=slot)
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
    ) -> None:
        self.proto = model.graph
        self.found = found
        self.rules = rules
        self.opset = opset
        self.result = OnnxGraph()
        self.fixed: set[str] = set()
        self.defaults: set[str] = set()
        self.from_shapes: set[str] = set()
        self.quantized: set[str] = set()
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
        self._join_decomposed()
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
                if node.op_type.startswith("Dequantize") or any(
                    name in self.quantized for name in read
                ):
                    self.quantized.update(node.output)
                return
            if all(name in self.fixed | self.from_shapes for name in read):
                self.from_shapes.update(node.output)
        label = f"'{node.name or node.output[0]}'"
        operator = Operator(node, position, label, self.opset, self.found, self)
        rule = self.rules.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        lowered = None
        if rule is not None and _is_float(self.found.get(node.output[0])):
            lowered = rule(operator)
        if lowered is None:
            self._drop_slots(position)
            made = [n for n in read if n not in self.fixed]
            if self.defaults & set(read):
                label += f", of which {DEFAULTS}"
            lowered = Opaque(label, [self.value(name) for name in made])
        lowered.position = position
        lowered.outputs = [self.value(name) for name in node.output if name]
        for value in lowered.outputs:
            value.producer = lowered
        for value in dict.fromkeys(lowered.inputs):
            value.readers.append(lowered)
        fields = [*lowered.inputs, *vars(lowered).values()]
        slots = [s for f in fields if isinstance(f, Value) for s in f.roots]
        slots += [f for f in fields if isinstance(f, Slot)]
        for slot in dict.fromkeys(slots):
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

    def _join_decomposed(self) -> None:
        """Replace a product and a sum of constants by one batch norm."""
        graph = self.result.graph
        for node in list(graph.nodes):
            chain = _decomposed(node)
            if not chain:
                continue
            first, last = chain[0], chain[-1]
            x, y = first.inputs[0], last.outputs[0]
            norm = as_batch_norm(first.label, chain, x, y)
            if norm is None or norm.channel_dim != 1:
                continue  # A layer norm's weight runs along the last dimension.
            norm.position = first.position
            graph.nodes[graph.nodes.index(first)] = norm
            graph.nodes.remove(last)
            for old in chain:
                for value in old.inputs:
                    value.readers[:] = [r for r in value.readers if r is not old]
                self._drop_slots(old.position)
            x.readers.append(norm)
            y.producer = norm
            positions = tuple(old.position for old in chain)
            kind = "+".join(self.proto.node[at].op_type for at in positions)
            found = OnnxNorm(norm.label.strip("'"), kind, [norm], positions)
            found.stored = 2 * norm.channels
            self.result.norms.append(found)
        self.result.norms.sort(key=lambda norm: norm.positions)
        seen: dict[str, int] = {}
        for norm in self.result.norms:
            count = seen[norm.path] = seen.get(norm.path, 0) + 1
            norm.path += f" ({count})" if count > 1 else ""


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
) -> OnnxGraph:
    """Read the graph of `model`.

    Args:
        model: The model, in any precision.
        found: Every value of one run in float64.
        rules: The lowering of each operator.
        opset: The version of the operator set.
    """
    return _Reader(model, found, rules, opset).read()

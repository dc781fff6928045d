"""Layer norms as RMS norms: the mean of what they read taken out where it is written.

A layer norm ignores the mean of its input. Let every writer of a residual stream be a
linear map, an embedding or a parameter, and every reader a layer norm. With
W ← W − 1·mean(W) and b ← b − mean(b), means over the outputs, each row of the stream
has mean 0, and a layer norm without bias is an RMS norm of the same eps, exactly.
(Ashkboos et al., SliceGPT, https://arxiv.org/abs/2401.15024)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit.fold.ir.graph import Node, Refusal, Slot, Value
from normkit.fold.ir.nodes import (
    Add,
    Embedding,
    Linear,
    Move,
    NormAffine,
    Parameter,
    Scale,
)
from normkit.fold.ir.nodes.parameters import edit_value, editable, read, read_parameter
from normkit.fold.ir.written_out import is_copy

__all__ = ["Centered", "center"]


@dataclass(eq=False)
class Centered:
    """One stream whose rows have mean 0 after its edits.

    Attributes:
        edits: The new content of each slot, float64.
        values: The tensors of the stream.
        norms: The layer norms that read it.
        nodes: The operations that write, hand on and read it.
    """

    edits: dict[Slot, Tensor] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    norms: list[NormAffine] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


def center(norm: NormAffine) -> Centered:
    """Return the stream that a layer norm reads, centered.

    Raises:
        Refusal: a writer or a reader does not permit it.
    """
    rank = len(norm.inputs[0].shape)
    if not norm.centers or tuple(d % rank for d in norm.dims) != (rank - 1,):
        raise Refusal(f"{norm.label} is no layer norm over the last dimension")
    return _Flood().over(norm.inputs[0], rank - 1)


class _Flood:
    """All tensors that are summed into one stream, with their feature dimension."""

    def __init__(self) -> None:
        self.dims: dict[Value, int] = {}
        self.todo: list[Value] = []
        self.found = Centered()
        self.members: set[Node] = set()

    def over(self, value: Value, dim: int) -> Centered:
        """Return the stream that `value` is a part of, features along `dim`."""
        self._join(value, dim)
        while self.todo:
            value = self.todo.pop()
            self._ask_producer(value)
            for node in dict.fromkeys(value.readers):
                self._ask_reader(node, value)
        for slot in self.found.edits:
            others = [r for r in slot.readers if r not in self.members]
            if others:
                raise Refusal(f"{slot.name} is also used by {others[0].label}")
        self.found.values = list(self.dims)
        self.found.nodes = [*self.members, *self.found.norms]
        return self.found

    def _join(self, value: Value, dim: int) -> None:
        known = self.dims.setdefault(value, dim)
        if known != dim:
            raise Refusal(f"{value.name} has its features along two dimensions")
        if value not in self.found.values:
            self.found.values.append(value)
            self.todo.append(value)
        if value.pinned:
            raise Refusal(f"{value.name} {value.pinned}")

    def _ask_producer(self, value: Value) -> None:
        node, dim = value.producer, self.dims[value]
        if isinstance(node, Linear | Embedding | Parameter):
            self._write(node, value, dim)
        elif node is None or not self._passes(node, None):
            raise Refusal(f"{value.name} has a mean that no weight can take out")

    def _ask_reader(self, node: Node, value: Value) -> None:
        rank, dim = len(value.shape), self.dims[value]
        if isinstance(node, NormAffine):
            dims = tuple(d % rank for d in node.dims)
            if node.centers and dims == (dim,) and len(node.inputs) == 1:
                if node not in self.found.norms:
                    self.found.norms.append(node)
                return
        elif self._passes(node, value):
            return
        raise Refusal(f"{node.label} reads the mean of {value.name}")

    def _passes(self, node: Node, source: Value | None) -> bool:
        """Join the values on the other side of `node`, if it keeps rows centered."""
        self.members.add(node)
        y = node.outputs[0]
        if is_copy(node) or (isinstance(node, Scale | Add) and len(node.outputs) == 1):
            dim = self.dims[y if source is None else source]
            if source is not None:
                dim += len(y.shape) - len(source.shape)
            if isinstance(node, Scale) and not _is_even(node, dim):
                return False
            if isinstance(node, Add) and not _adds_centered(node, dim):
                return False
            for each in (*node.inputs, y):
                own = dim - (len(y.shape) - len(each.shape))
                if own < 0 or each.shape[own] != y.shape[dim]:
                    return False
                self._join(each, own)
            return True
        if isinstance(node, Move):
            return self._moves(node)
        return False

    def _moves(self, node: Move) -> bool:
        """Join both sides of a move of whole rows."""
        numbers = node._numbered([value.shape for value in node.inputs])
        around = [v for v in (*node.inputs, *node.outputs) if v in self.dims]
        width = around[0].shape[self.dims[around[0]]]
        for made, index in zip(node.outputs, numbers.outputs, strict=True):
            dims = [self.dims[made]] if made in self.dims else range(len(made.shape))
            for dim in dims:
                if made.shape[dim] != width:
                    continue
                rows = index.movedim(dim, -1).reshape(-1, width)
                own = [
                    _dim_of(rows, value, numbers.starts[i], self.dims.get(value))
                    for i, value in enumerate(node.inputs)
                ]
                if None not in own:
                    self._join(made, dim)
                    for value, each in zip(node.inputs, own, strict=True):
                        assert each is not None
                        self._join(value, each)
                    break
            else:
                return False
        return True

    def _write(self, node: Node, value: Value, dim: int) -> None:
        self.members.add(node)
        if isinstance(node, Linear):
            assert node.weight is not None
            if node.layout.groups != 1 or node.output_dim % len(value.shape) != dim:
                raise Refusal(f"{node.label} writes in groups or along another dim")
            weight = node.layout.to_goik(read(node.weight))
            weight = weight - weight.mean(1, keepdim=True)
            shape = node.weight.shape
            edits = edit_value(
                node.weight, node.layout.from_goik(weight, shape), node.label
            )
            bias = read_parameter(node.bias, node.bias_slot)
            if bias is not None and node.bias is not None:
                edits |= edit_value(node.bias, bias - bias.mean(), node.label)
            elif bias is not None:
                edits[editable(node.bias_slot, node.label)] = bias - bias.mean()
        elif isinstance(node, Embedding):
            assert node.weight is not None
            rows = read(node.weight)
            edits = edit_value(
                node.weight, rows - rows.mean(-1, keepdim=True), node.label
            )
        else:
            content = read(value)
            edits = node.edit_for(
                value, content - content.mean(dim, keepdim=True), node.label
            )
        for slot, tensor in edits.items():
            known = self.found.edits.setdefault(slot, tensor)
            if not torch.allclose(known, tensor, rtol=1e-11, atol=1e-14):
                raise Refusal(f"{slot.name} is used by several calls")


def _is_even(node: Scale, dim: int) -> bool:
    """Return True if the factor is the same along `dim` of the output."""
    factor = node.factor if node.weight is None else read(node.weight)
    assert factor is not None
    own = dim - (len(node.outputs[0].shape) - factor.dim())
    return own < 0 or factor.shape[own] == 1


def _adds_centered(node: Add, dim: int) -> bool:
    if node.constant is None:
        return True
    own = dim - (len(node.outputs[0].shape) - node.constant.dim())
    if own < 0:
        return not bool((node.constant != 0).any())
    mean = node.constant.mean(own)
    return bool((mean.abs() <= 1e-14).all())


def _dim_of(rows: Tensor, value: Value, start: int, known: int | None) -> int | None:
    """Return the dimension of `value` of which `rows` are whole rows, or padding."""
    end = start + math.prod(value.shape)
    mine = rows[((rows >= start) & (rows < end)).all(1)] - start
    inside = ((rows >= start) & (rows < end)).any(1)
    if int(inside.sum()) != len(mine):
        return None
    width = rows.shape[1]
    for dim in range(len(value.shape)) if known is None else [known]:
        if value.shape[dim] != width:
            continue
        step = math.prod(value.shape[dim + 1 :])
        is_whole = bool((mine == mine[:, :1] + torch.arange(width) * step).all())
        if is_whole and bool(((mine[:, 0] // step) % width == 0).all()):
            return dim
    return None

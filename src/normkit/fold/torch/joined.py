"""Norms that a module writes out: its operations joined to one node."""

from __future__ import annotations

from collections.abc import Iterator

from normkit.fold.ir.decomposed import as_batch_norm
from normkit.fold.ir.graph import Node, Value
from normkit.fold.ir.nodes import BatchNorm, Scale
from normkit.fold.ir.nodes.parameters import read
from normkit.fold.ir.written_out import as_norm_affine, dims_of, is_copy, sources
from normkit.fold.torch.trace import ModuleCall

__all__ = ["joined"]


def joined(call: ModuleCall, norms: str) -> Iterator[tuple[list[Node], Node]]:
    """Yield (operations, the node in their place) of a call that has just ended.

    A frozen batch norm is a product and a sum of statistics; a per-channel gate
    (LayerScale) a product with a parameter; a layer or RMS norm in Python ends in a
    product with its weight.

    Args:
        call: The call.
        norms: "batch" joins batch norms alone, "all" joins all of them.
    """
    if call.children or not call.nodes:
        return
    if len(call.inputs) == 1 and len(call.outputs) == 1 and _is_fixed_map(call):
        node = as_batch_norm(
            f"'{call.path}'", call.nodes, call.inputs[0], call.outputs[0]
        )
        if node is not None:
            yield list(call.nodes), node
            return
    if norms == "batch":
        return
    gate = _gate(call)
    if gate is not None:
        yield list(call.nodes), gate
        return
    for end in list(call.nodes):
        found = as_norm_affine(end)
        if found is not None and set(found[1]) <= set(call.nodes):
            node, old = found
            node.label = f"'{call.path}'" if call.path else node.label
            yield old, node


def _is_fixed_map(call: ModuleCall) -> bool:
    held = {**call.module._parameters, **call.module._buffers}
    return {"running_mean", "running_var"} <= set(held)


def _gate(call: ModuleCall) -> BatchNorm | None:
    """Return the map of a module that only multiplies by its own vector, else None."""
    scales = [node for node in call.nodes if isinstance(node, Scale)]
    others = [node for node in call.nodes if node not in scales]
    if len(scales) != 1 or not all(is_copy(node) for node in others):
        return None
    weight = scales[0].weight
    if weight is None or not weight.roots or len(call.inputs) != 1:
        return None
    x, y = call.inputs[0], call.nodes[-1].outputs[0]
    dims = dims_of(weight, y)
    if (
        len(dims) != 1
        or x.shape != y.shape
        or sources(y)[-1] is not (scales[0].outputs[0])
        or x not in sources(scales[0].inputs[0])
    ):
        return None
    vector = read(weight).reshape(-1)
    held = weight if weight.shape == vector.shape else None
    held = held or Value(tuple(vector.shape), constant=vector)
    return BatchNorm(f"'{call.path}'", [x], [y], weight=held, channel_dim=dims[0])

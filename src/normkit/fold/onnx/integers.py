"""Quantized models (QuantizeLinear, DequantizeLinear): what passes their integers.

A norm behind a linear map with integer weights goes into the scales of the weights and
into the bias, which becomes a float. QuantizeLinear of an activation rounds and clips:
nothing is moved past it, in either direction, and the ledger says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper
from torch import Tensor

from normkit.fold.ir.nodes import Parameter, Quantized
from normkit.fold.ir.nodes.quantized import along

__all__ = ["ROUNDS", "quantized", "rescale"]

# Of activations; those of weights are constants.
ROUNDS = {
    "QuantizeLinear": "rounds to integers and clips",
    "DequantizeLinear": "reads the integers of a quantizer",
    "DynamicQuantizeLinear": "rounds to integers by the range of each input",
}


def quantized(
    maker: onnx.NodeProto | None, found: dict[str, Any], held: Parameter
) -> Quantized | None:
    """Return the parameter of a weight made of integers, else None.

    Args:
        maker: The node that computes the weight.
        found: The arrays of one run by name.
        held: The parameter as numbers.
    """
    if maker is None or maker.op_type != "DequantizeLinear" or maker.domain:
        return None
    settings = {a.name: helper.get_attribute_value(a) for a in maker.attribute}
    integers, scale = (np.asarray(found[name]) for name in maker.input[:2])
    if settings.get("block_size") or scale.ndim > 1 or integers.dtype not in _TYPES:
        return None
    axis = settings.get("axis", 1) % integers.ndim if scale.size > 1 else None
    has_zero = len(maker.input) > 2 and maker.input[2]
    zero = np.asarray(found[maker.input[2]] if has_zero else 0, np.int64)
    if zero.size > 1:
        zero = zero.reshape([-1 if d == axis else 1 for d in range(integers.ndim)])
    return Quantized(
        held.label,
        slot=held.slot,
        integers=torch.from_numpy(np.array(integers)),
        zero=torch.from_numpy(np.array(zero)),
        scale=torch.tensor(scale.reshape(-1 if scale.size > 1 else ()), dtype=_WIDE),
        axis=axis,
    )


_TYPES = {np.dtype(kind) for kind in (np.int8, np.uint8, np.int16, np.uint16)}
_WIDE = torch.float64


def rescale(
    graph: ir.Graph,
    node: ir.Node,
    index: int,
    held: Quantized,
    new: Tensor,
    initializer: Callable[[str, np.ndarray], ir.Value],
    fresh: Callable[[str], str],
) -> None:
    """Give one use of a weight a DequantizeLinear of its own, which makes it `new`.

    Args:
        graph: The graph, which is edited.
        node: The reader.
        index: Which of its inputs.
        held: The weight.
        new: Its new content, which `held` accepted.
        initializer: Makes a weight of the graph from (a wish for its name, content).
        fresh: Makes a name that no value has from a wish.
    """
    old = node.inputs[index]
    assert old is not None
    maker = old.producer()
    assert maker is not None
    change = held.rescaled(new)
    integers, kept, *zero = maker.inputs
    assert kept is not None
    if bool((change.factor < 0).any()):
        sign = along(change.factor, change.axis, new.dim()) < 0
        turned = torch.where(sign, held.mirrored(), held.integers.long())
        kind = held.integers.numpy().dtype
        integers = initializer(f"{old.name}_folded", turned.numpy().astype(kind))
    scale = (held.scale * change.factor.abs()).numpy()
    dtype = kept.dtype or ir.DataType.FLOAT
    scale_value = initializer(f"{kept.name}_folded", scale.astype(dtype.numpy()))
    if zero and zero[0] is not None and held.axis is None and scale.ndim:
        spread = held.zero.reshape(-1).expand(scale.size).contiguous().numpy()
        spread = spread.astype(held.integers.numpy().dtype)
        zero = [initializer(f"{zero[0].name}_folded", spread)]
    attributes = dict(maker.attributes)
    if change.axis is not None:
        attributes["axis"] = ir.AttrInt64("axis", change.axis)
    name = fresh(f"{old.name}_folded")
    out = ir.Value(name=name, type=old.type, shape=old.shape)
    inputs = [integers, scale_value, *zero]
    graph.insert_before(
        node,
        ir.Node(
            "", maker.op_type, inputs, attributes.values(), outputs=[out], name=name
        ),
    )
    node.replace_input_with(index, out)

"""Convolutions as nodes, from the same arguments for torch calls and ONNX nodes.

Sizes are per spatial dimension, padding as (begin, end) per spatial dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from normkit.fold.algebra import conv_layout, conv_transpose_layout
from normkit.fold.ir.graph import Slot, Value
from normkit.fold.ir.nodes import Linear

__all__ = ["Weights", "convolution", "transposed_convolution"]


class Weights(TypedDict):
    """Parameters of a linear map: fixed values, and where a bias can be created."""

    weight: Value
    bias: Value | None
    bias_slot: Slot | None


def convolution(
    label: str,
    x: Value,
    weights: Weights,
    *,
    output_shape: tuple[int, ...],
    groups: int,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Linear:
    """Return the node of a convolution that pads with zeros."""
    kernel = weights["weight"].shape[2:]
    node = Linear(label, [x], **weights, layout=conv_layout(groups))
    dim = node.input_dim = node.output_dim = len(x.shape) - len(kernel) - 1
    node.sees_all_taps = not any(begin or end for begin, end in padding)
    if any(n != 1 for n in stride) or x.shape[dim + 1 :] != output_shape[dim + 1 :]:
        return node
    tap = 0
    for size, step, (begin, _) in zip(kernel, dilation, padding, strict=True):
        # The tap at the output position is number begin/dilation in each dimension.
        if begin % step or begin // step >= size:
            return node
        tap = tap * size + begin // step
    node.own_tap = tap
    return node


def transposed_convolution(
    label: str, x: Value, weights: Weights, *, groups: int, is_pointwise: bool
) -> Linear:
    """Return the node of a transposed convolution.

    Args:
        label: Its label.
        x: Its input.
        weights: Its parameters.
        groups: Number of groups.
        is_pointwise: True if it has one tap, stride 1 and no padding; otherwise each
            output position sees another subset of the taps.
    """
    node = Linear(label, [x], **weights, layout=conv_transpose_layout(groups))
    node.input_dim = node.output_dim = len(x.shape) - len(weights["weight"].shape) + 1
    node.sees_all_taps = is_pointwise
    return node

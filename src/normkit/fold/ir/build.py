"""Nodes from the arguments of an operation; the same for torch calls and ONNX nodes.

A front end names its arguments in the terms used here: sizes per spatial dimension,
padding as (begin, end) per spatial dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normkit.fold.algebra import WeightLayout, conv_layout, conv_transpose_layout
from normkit.fold.ir.graph import Slot, Value
from normkit.fold.ir.nodes import BatchNorm, Linear

__all__ = ["Weights", "batch_norm", "convolution", "linear", "transposed_convolution"]


@dataclass(frozen=True)
class Weights:
    """The parameters of a linear map.

    Attributes:
        weight: A fixed value.
        bias: A fixed value, or None.
        bias_slot: Where a bias can be created if there is none.
    """

    weight: Value
    bias: Value | None = None
    bias_slot: Slot | None = None

    @property
    def kernel(self) -> tuple[int, ...]:
        """The spatial size of a convolution's weight."""
        return self.weight.shape[2:]


def linear(
    label: str,
    x: Value,
    weights: Weights,
    layout: WeightLayout,
    *,
    dims: tuple[int, int] = (-1, -1),
    own_tap: int | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Linear:
    """Return alpha·W·x + beta·b over the dimensions `dims` of input and output."""
    return Linear(
        label,
        [x],
        weight=weights.weight,
        bias=weights.bias,
        bias_slot=weights.bias_slot,
        layout=layout,
        input_dim=dims[0],
        output_dim=dims[1],
        own_tap=own_tap,
        alpha=alpha,
        beta=beta,
    )


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
    kernel = weights.kernel
    dim = len(x.shape) - len(kernel) - 1
    node = linear(label, x, weights, conv_layout(groups), dims=(dim, dim))
    node.sees_all_taps = not any(begin or end for begin, end in padding)
    if all(n == 1 for n in stride) and x.shape[dim + 1 :] == output_shape[dim + 1 :]:
        node.own_tap = _own_tap(kernel, dilation, padding)
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
    dim = len(x.shape) - len(weights.kernel) - 1
    layout = conv_transpose_layout(groups)
    node = linear(label, x, weights, layout, dims=(dim, dim))
    node.sees_all_taps = is_pointwise
    return node


def batch_norm(
    label: str,
    x: Value,
    *,
    mean: Value | None,
    var: Value | None,
    weight: Value | None,
    bias: Value | None,
    eps: float,
    channel_dim: int = 1,
    locked: str = "",
) -> BatchNorm:
    """Return the node of a batch norm; `locked` says why its map is not fixed."""
    parts = [value for value in (mean, var, weight, bias) if value is not None]
    if not locked and not all(value.is_fixed for value in parts):
        locked = "takes its statistics or weights from an input of the model"
    return BatchNorm(
        label,
        [x],
        mean=mean,
        var=var,
        weight=weight,
        bias=bias,
        eps=float(eps),
        channel_dim=channel_dim,
        locked=locked,
    )


def _own_tap(
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> int | None:
    """Return the tap at the output position: number padding/dilation in each dim."""
    tap = 0
    for size, step, (begin, _) in zip(kernel, dilation, padding, strict=True):
        if begin % step or begin // step >= size:
            return None
        tap = tap * size + begin // step
    return tap

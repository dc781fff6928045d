"""Batch norms decomposed into a product and a sum of constants."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.fold.ir.graph import Node, Refusal, Value
from normkit.fold.ir.nodes import Add, BatchNorm, Move, Scale
from normkit.fold.ir.nodes.parameters import read

__all__ = ["as_batch_norm"]


def as_batch_norm(
    label: str, chain: list[Node], x: Value, y: Value
) -> BatchNorm | None:
    """Return one node for `chain` if it is y = scale·x + shift per channel, else None.

    Args:
        label: The label of the new node.
        chain: The nodes in order, each one reading the output of the one before.
        x: What the first one reads.
        y: What the last one computes.
    """
    rank = len(x.shape)
    scale = torch.ones((1,) * rank, dtype=torch.float64)
    shift = torch.zeros_like(scale)
    value = x
    for node in chain:
        if len(node.outputs) != 1 or node.outputs[0].shape != x.shape:
            return None
        try:
            factor, summand = _affine(node, value)
        except Refusal:
            return None
        scale, shift = factor * scale, factor * shift + summand
        value = node.outputs[0]
    dims = {d for t in (scale, shift) for d, n in enumerate(t.shape) if n > 1}
    if value is not y or len(dims) != 1 or max(scale.dim(), shift.dim()) != rank:
        return None
    (dim,) = dims
    vectors = [t.reshape(-1).expand(x.shape[dim]).clone() for t in (scale, shift)]
    weight, bias = (Value(tuple(v.shape), constant=v) for v in vectors)
    return BatchNorm(label, [x], [y], weight=weight, bias=bias, channel_dim=dim)


def _affine(node: Node, value: Value) -> tuple[Tensor, Tensor]:
    """Return the factor and the summand that `node` applies to its input `value`."""
    one = torch.ones((), dtype=torch.float64)
    zero = torch.zeros_like(one)
    if isinstance(node, Move) and node.replay is None and node.inputs == [value]:
        return one, zero
    if isinstance(node, Scale) and node.inputs == [value]:
        factor = node.factor if node.weight is None else read(node.weight)
        assert factor is not None
        return factor, zero
    if isinstance(node, Add) and node.inputs.count(value) == 1:
        at = node.inputs.index(value)
        summand = zero if node.constant is None else node.constant
        for i, (other, factor) in enumerate(
            zip(node.inputs, node.factors, strict=True)
        ):
            if i != at:
                summand = summand + factor * read(other)
        return one * node.factors[at], summand
    raise Refusal(f"{node.label} is no fixed map")

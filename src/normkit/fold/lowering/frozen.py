"""Batch norms written out as a product and a sum of constants, recognised as one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normkit.fold.graph import Refusal, Value
from normkit.fold.nodes import Add, BatchNorm, Move, Node, Scale
from normkit.fold.nodes.node import current

__all__ = ["as_batch_norm"]


def as_batch_norm(
    module: nn.Module, path: str, nodes: list[Node], x: Value, y: Value
) -> BatchNorm | None:
    """One node for all that `module` did, if it is a frozen batch norm.

    That is a module which holds running statistics and whose forward came down to
    y = scale·x + shift with two constants per channel.

    Args:
        module: The module.
        path: Its name.
        nodes: What its own forward ran, in order.
        x: What it was called with.
        y: What it returned.
    """
    held = {**module._parameters, **module._buffers}
    if not {"running_mean", "running_var"} <= set(held) or not nodes:
        return None
    scale = torch.ones((1,) * len(x.shape), dtype=torch.float64)
    shift = torch.zeros_like(scale)
    value = x
    for node in nodes:
        if node.inputs != [value] or len(node.outputs) != 1:
            return None
        if node.outputs[0].shape != x.shape:
            return None
        try:
            factor, summand = _affine(node)
        except Refusal:
            return None
        scale, shift = factor * scale, factor * shift + summand
        value = node.outputs[0]
    if value is not y:
        return None
    dims = {d for t in (scale, shift) for d, n in enumerate(t.shape) if n > 1}
    if len(dims) != 1:
        return None
    (dim,) = dims
    vectors = [t.reshape(-1).expand(x.shape[dim]) for t in (scale, shift)]
    weight, bias = (Value(tuple(v.shape), constant=v) for v in vectors)
    return BatchNorm(f"'{path}'", [x], [y], weight=weight, bias=bias, channel_dim=dim)


def _affine(node: Node) -> tuple[Tensor, Tensor]:
    one, zero = (
        torch.ones((), dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    if isinstance(node, Move) and node.replay is None:
        return one, zero
    if isinstance(node, Scale):
        factor = node.factor if node.weight is None else current(node.weight)
        assert factor is not None
        return factor, zero
    if isinstance(node, Add) and len(node.inputs) == 1 and node.constant is not None:
        return one * node.factors[0], node.constant
    raise Refusal(f"{node.label} is no fixed map")

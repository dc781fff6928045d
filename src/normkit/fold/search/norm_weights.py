"""Weight and bias of a norm that measures its input, moved into what reads it.

y = n(x)·γ + β keeps n; the stored output is n(x), with y = γ·stored + β as its gauge.
Where the readers take a scale alone, the stored output is n(x) + β/γ.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.fold.ir.gauge import Gauge
from normkit.fold.ir.graph import Gauges, Node, Refusal
from normkit.fold.ir.nodes import Add, Move, NormAffine, Scale
from normkit.fold.search.solve import Search, Solution

__all__ = ["NORM_WAYS", "explained", "solve_norm_weights"]

# Between a norm on queries and their rotation are a view, a transpose and two cuts.
_MAX_STEPS = 8

NORM_WAYS = ("weight and bias", "weight")


def solve_norm_weights(norms: list[NormAffine], way: str) -> Solution:
    """Find the edits that take weight and bias from all calls of one norm.

    Args:
        norms: The calls of one module.
        way: A name in `NORM_WAYS`; "weight" leaves a bias.

    Raises:
        Refusal: it cannot be done this way; the message gives the reason.
    """
    gauges = Gauges()
    todo: list[Node] = []
    search = Search(set(norms))
    remainder: Tensor | None = None
    for norm in norms:
        y = norm.outputs[0]
        affine = norm.finite_affine()
        if way == "weight":
            affine, rest = _without_shift(norm, affine)
            if remainder is not None and not torch.equal(remainder, rest):
                raise Refusal("its calls would keep different biases")
            remainder = rest
        search.put(gauges, y, Gauge.reading(affine))
        todo += search.around(y)
    return search.solution(way, gauges, todo, needs_copy=False, remainder=remainder)


def _without_shift(norm: NormAffine, affine: Affine) -> tuple[Affine, Tensor]:
    """Return the scale alone, and the bias that then stays."""
    shift, scale = norm.along(affine.shift), norm.along(affine.scale)
    if not bool((shift != 0).any()):
        raise Refusal("it has no bias that could stay")
    if bool((scale == 0).any()):
        raise Refusal("a weight of 0 cannot be taken out of its bias")
    if norm.bias is None or not bool((scale != 1).any()):
        raise Refusal("its bias alone would stay")
    return Affine(affine.scale, torch.zeros_like(affine.shift)), shift / scale


def explained(norm: NormAffine) -> str:
    """Return why the weight of `norm` stays, in the terms of transformers, or ""."""
    todo = [norm.outputs[0]]
    for value in itertools.islice(todo, _MAX_STEPS):
        for node in value.readers:
            if _is_rotation(node):
                return (
                    "pairs of its features are rotated behind it (rotary positions), "
                    "and no weight passes that differs within a pair"
                )
            if isinstance(node, Add):
                others = [v for v in node.inputs if v is not value and not v.is_fixed]
                if others:
                    return (
                        f"its output is a part of the residual stream ({node.label}), "
                        "whose readers need it with its weight"
                    )
            if isinstance(node, Move):
                todo += node.outputs
    return ""


def _is_rotation(node: Node) -> bool:
    """Return True for the minus of (−x₂, x₁)."""
    if not isinstance(node, Scale) or node.factor is None:
        return False
    behind = [r for r in node.outputs[0].readers if isinstance(r, Move)]
    is_joined = any(len(move.inputs) > 1 for move in behind)
    return is_joined and bool((node.factor == -1).all())

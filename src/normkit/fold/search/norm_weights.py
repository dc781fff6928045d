"""Weight and bias of a norm that measures its input, moved into what reads it.

y = n(x)·γ + β keeps n; the stored output is n(x), with y = γ·stored + β as its gauge.
Where the readers take a scale alone, the stored output is n(x) + β/γ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.fold.ir.gauge import Gauge
from normkit.fold.ir.graph import Gauges, Node, Refusal
from normkit.fold.ir.nodes import NormAffine
from normkit.fold.search.solve import Search, Solution

__all__ = ["NORM_WAYS", "solve_norm_weights"]

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

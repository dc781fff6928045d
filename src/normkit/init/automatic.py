"""Scales of the linear maps from what precedes and what follows each.

    n·Var[w] = q / E[x²]

E[x²] is what theory says of the layer's inputs, given the layers before, for inputs of
the model of mean square 1. q is what its outputs should have: 1, or for activations
with φ(cz) = c·φ(z), as ReLU, so much that their outputs have 1. The last linear map of
each of L residual branches gets q/L, so that the sum of all grows by a factor of about
e at most; a normalization that ends a branch gets weight 0: the block starts as the
identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.init.signal_graph import SignalGraph, Step, is_homogeneous
from normkit.init.theory import kept_signal

__all__ = ["Plan", "plan"]

# Inputs of a smaller mean square are not made up for: the weights would be so large
# that the steps of an optimizer hardly change them. Behind the pooled branches of an
# NFNet inputs have 5e-5, and 20 steps of AdamW at 3e-4 moved weights 140 times as large
# as the library's by 4e-6 of their size each (D27 of the doctor).
MIN_INCOMING = 0.01


@dataclass(frozen=True)
class Plan:
    """Plan of the scheme "auto" for one model.

    Attributes:
        scales: fan_in·Var[w] by name, for linear maps whose outputs are followed.
        rules: The reason, in a few words, by name.
        zeroed: Names of normalizations whose weight becomes 0.
        branch_scale: For linear maps inside a module that is not followed (the output
            projection of attention) and ends a branch, by name of the module.
    """

    scales: dict[str, float]
    rules: dict[str, str]
    zeroed: tuple[str, ...]
    branch_scale: dict[str, float]


def plan(graph: SignalGraph, *, residual: bool = True) -> Plan:
    """Choose the scales.

    Args:
        graph: A recorded run.
        residual: Scale or zero the ends of residual branches.
    """
    ends = graph.branch_ends() if residual else []
    share = 1.0 / max(len(ends), 1)
    scaled = {step.name for step in ends if step.kind == "linear"}
    zeroed = {step.name for step in ends if step.kind == "norm"}
    opaque = {step.name: share for step in ends if step.kind == "opaque"}
    scales: dict[str, float] = {}
    rules: dict[str, str] = {}
    mean_square: dict[int, float] = {}
    nonnegative: set[int] = set()
    for step in graph.steps:
        incoming = mean_square.get(step.inputs[0], 1.0)
        if step.kind == "linear":
            if step.name not in scales:
                activation = graph.following_activation(step.name)
                q, rules[step.name] = _wanted(activation)
                if step.name in scaled:
                    q *= share
                    rules[step.name] += f", 1 of {len(ends)} residual branches"
                scales[step.name] = q / max(incoming or 1.0, MIN_INCOMING)
            outgoing = scales[step.name] * incoming
        elif step.kind == "activation" and step.function is not None:
            positive = step.inputs[0] in nonnegative
            outgoing = step.activated(incoming, is_nonnegative=positive)
            if _is_rectifier(step.function):
                nonnegative.add(step.output)
        elif step.kind == "norm":
            outgoing = 0.0 if step.name in zeroed else 1.0
        elif step.kind == "add":
            terms = {v: mean_square.get(v, 1.0) for v in step.inputs}
            outgoing = sum(terms.values())
            if all(v in nonnegative for v, term in terms.items() if term):
                nonnegative.add(step.output)
        elif step.kind == "opaque":
            outgoing = incoming * opaque.get(step.name, 1.0)
        else:
            outgoing = incoming
            if step.inputs[0] in nonnegative:
                nonnegative.add(step.output)
        mean_square[step.output] = outgoing
    return Plan(scales, rules, tuple(sorted(zeroed)), opaque)


def _wanted(activation: Step | None) -> tuple[float, str]:
    """Return the mean square that the outputs of a map should have, and the rule."""
    if activation is None or activation.function is None:
        return 1.0, "no activation follows"
    if is_homogeneous(activation.function):
        q = 1.0 / kept_signal(activation.function)
        return q, f"before {activation.name}"
    return 1.0, f"before {activation.name}"


def _is_rectifier(function: Callable[[Tensor], Tensor]) -> bool:
    with torch.no_grad():
        return bool((function(torch.linspace(-4, 4, 81).double()) >= 0).all())

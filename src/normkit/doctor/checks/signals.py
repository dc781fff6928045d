"""Checks of signals over the depth: D22 and D23.

A signal that changes by the same factor g in every layer has changed by g^depth at the
end. So the checks judge the trend over the depth, not two neighbouring layers: over
layers of one kind, the rms of their outputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial

from normkit.doctor.checks.gradients import (
    MIN_LAYERS,
    START,
    arrives,
    before_its_branches,
    slope,
)
from normkit.doctor.checks.thresholds import above, below
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import LayerStatistics, Statistics

__all__ = ["CHECKS", "activations_explode", "activations_vanish"]

# Last layer against first. tanh: .09 at n·Var[w] = .41, .47 at Xavier's; ReLU: .17 at
# Xavier's, .97 at Kaiming's.
VANISH_WARNING, VANISH_ERROR = 0.2, 0.02
EXPLODE_WARNING, EXPLODE_ERROR = 10.0, 100.0

_D22 = partial(Finding, "D22", "activations_vanish")
_D23 = partial(Finding, "D23", "activations_explode")


def activations_vanish(statistics: Statistics) -> Iterator[Finding]:
    """Check D22: the outputs shrink from layer to layer."""
    for layers in _stacks(statistics):
        if reason := _too_few_or_not_finite(layers):
            yield _D22(layers[-1].name, "not_judged", evidence=reason)
            continue
        ratio = _trend(layers)
        severity, threshold = below(ratio, warning=VANISH_WARNING, error=VANISH_ERROR)
        evidence = _evidence(layers)
        if severity == "warning" and arrives(statistics):
            severity = "info"
            evidence += "; the gradients arrive at the first layers nevertheless (D24)"
        severity, reason = before_its_branches(statistics, severity)
        evidence += reason
        yield _D22(layers[-1].name, severity, ratio, threshold, evidence, START)


def activations_explode(statistics: Statistics) -> Iterator[Finding]:
    """Check D23: the outputs grow from layer to layer."""
    for layers in _stacks(statistics):
        if reason := _too_few_or_not_finite(layers):
            yield _D23(layers[-1].name, "not_judged", evidence=reason)
            continue
        ratio = _trend(layers)
        if math.isnan(ratio) and all(s.output_rms == 0 for s in layers):
            continue  # all outputs are zero: D22 reports it
        severity, threshold = above(ratio, warning=EXPLODE_WARNING, error=EXPLODE_ERROR)
        yield _D23(
            layers[-1].name, severity, ratio, threshold, _evidence(layers), START
        )


def _too_few_or_not_finite(layers: Sequence[LayerStatistics]) -> str:
    """Return the reason why layers have no trend; "" when they have one."""
    if len(layers) < MIN_LAYERS:
        return f"{len(layers)} layers of kind {layers[0].kind} are too few for a trend"
    if not all(math.isfinite(layer.output_rms) for layer in layers):
        return "not all outputs are finite (D28, D34)"
    return ""


def _trend(layers: Sequence[LayerStatistics]) -> float:
    """Return the rms of the last output over the first; nan when the first is 0."""
    first, last = layers[0].output_rms, layers[-1].output_rms
    return last / first if first > 0 else math.nan


def _evidence(layers: Sequence[LayerStatistics]) -> str:
    rms = [layer.output_rms for layer in layers]
    return (
        f"the rms of the outputs goes from {rms[0]:.3g} at {layers[0].name} to "
        f"{rms[-1]:.3g} here, a factor of {slope(rms):.2f} per layer of kind "
        f"{layers[0].kind}"
    )


def _stacks(statistics: Statistics) -> Collection[Sequence[LayerStatistics]]:
    """Return layers of one kind: the activations, or the weights where there are none.

    The output layer is left out: its scale is set by the loss. So are weights whose
    output a norm takes, which removes its scale, and side branches such as the gates of
    squeeze and excitation: layers on one position per sample, with layers on many
    positions after them.
    """
    stacks: dict[str, list[LayerStatistics]] = {}
    seen = [s for s in statistics.layers if s.output is not None and not s.is_output]
    last_wide = max((i for i, s in enumerate(seen) if s.positions > 1), default=-1)
    seen = [s for i, s in enumerate(seen) if i >= last_wide or s.positions > 1]
    hidden = [s for s in seen if s.role == "activation"]
    plain = [s for s in seen if s.role == "weight" and not s.is_normalized]
    for layer in hidden or plain:
        stacks.setdefault(layer.kind, []).append(layer)
    return stacks.values()


CHECKS = {"D22": activations_vanish, "D23": activations_explode}

"""Checks of signals over the depth: D22 and D23.

A signal that changes by the same factor g in every layer has changed by g^depth at the
end. So the checks judge the trend over the depth, not two neighbouring layers: over
layers of one kind, the rms of their outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from normkit.doctor.checks.gradients import (
    MIN_LAYERS,
    START,
    arrives,
    before_its_branches,
    slope,
)
from normkit.doctor.checks.progress import has_learned, has_learned_all, loss_fell
from normkit.doctor.checks.thresholds import above, below
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import LayerStatistics, Statistics

__all__ = ["CHECKS", "activations_explode", "activations_vanish"]

# Last layer against first. tanh: .09 at n·Var[w] = .41, .47 at Xavier's; ReLU: .17 at
# Xavier's, .97 at Kaiming's.
VANISH_WARNING, VANISH_ERROR = 0.2, 0.02
# Calls from which a training should have learned something of its first steps.
MANY = 100
EXPLODE_WARNING, EXPLODE_ERROR = 10.0, 100.0

# A new VGG with 25,088 inputs to its first dense layer: 2.6 before the first step of
# AdamW at 3e-4, 19 after 20, and the loss 14 times as large in between.
_GROWN = "; if they grew in training, lower the learning rate or warm it up"

_NOTHING_LEFT = "; the network has learned nevertheless, and little is left to gain"

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
        if severity == "warning" and has_learned_all(statistics):
            severity, evidence = "info", evidence + _NOTHING_LEFT
        severity, reason = before_its_branches(statistics, severity)
        evidence += reason
        yield _D22(layers[-1].name, severity, ratio, threshold, evidence, START)
    yield from _at_start(statistics, is_low=True)


def _at_start(statistics: Statistics, *, is_low: bool) -> Iterator[Finding]:
    """Check the signals of the first step of a training that has come to little.

    They may be right by now, and the steps that made them so are lost.
    """
    loop = statistics.training
    if loop is None or not statistics.while_training or statistics.began_trained:
        return
    if loop.forwards < MANY:
        return  # nothing has come to anything yet
    if has_learned(statistics) or loss_fell(statistics):
        return
    make = _D22 if is_low else _D23
    for layers in _stacks(statistics, at_start=True):
        if _too_few_or_not_finite(layers):
            continue
        ratio = _trend(layers)
        is_bad = ratio < VANISH_ERROR if is_low else ratio > EXPLODE_ERROR
        if is_bad:
            yield make(
                layers[-1].name,
                "warning",
                ratio,
                VANISH_ERROR if is_low else EXPLODE_ERROR,
                "in the first step " + _evidence(layers) + "; it has learned little "
                "since",
                START,
                {"is_origin": True},
            )


def activations_explode(statistics: Statistics) -> Iterator[Finding]:
    """Check D23: the outputs grow from layer to layer."""
    for layers in _stacks(statistics):
        if reason := _too_few_or_not_finite(layers):
            yield _D23(layers[-1].name, "not_judged", evidence=reason)
            continue
        ratio = _trend(layers)
        if math.isnan(ratio) and all(s.rms == 0 for s in layers):
            continue  # all outputs are zero: D22 reports it
        severity, threshold = above(ratio, warning=EXPLODE_WARNING, error=EXPLODE_ERROR)
        fix = START + (_GROWN if statistics.while_training else "")
        evidence = _evidence(layers)
        if severity == "warning" and has_learned(statistics):
            severity = "info"
            evidence += "; the network has learned nevertheless"
        yield _D23(layers[-1].name, severity, ratio, threshold, evidence, fix)
    yield from _at_start(statistics, is_low=False)
    yield from _over_steps(statistics)


def _over_steps(statistics: Statistics) -> Iterator[Finding]:
    """Check recurrent layers, which gates or a tanh hold at about one."""
    for layer in statistics.of_role("recurrent"):
        if layer.input is None or not float(layer.input.mean_square) > 0:
            continue
        given = float(layer.input.mean_square.sqrt())
        is_seen = math.isfinite(layer.rms_at_start)
        left = layer.rms_at_start if is_seen else layer.output_rms
        left = max(left, layer.output_rms)
        if not (math.isfinite(left) and left > EXPLODE_ERROR * given):
            continue
        yield _D23(
            layer.name,
            "warning",
            left / given,
            EXPLODE_ERROR,
            f"its inputs have an rms of {given:.3g}, and its outputs "
            + "of the first step " * (left > layer.output_rms)
            + f"one of {left:.3g}: they grow with each step of a sequence",
            "start the weight of its states orthogonal, take tanh, an LSTM or a GRU, "
            "and clip the gradients",
            {"is_origin": True},
        )


class _Signal(NamedTuple):
    """The output of a layer."""

    name: str
    kind: str
    rms: float


def _too_few_or_not_finite(layers: Sequence[_Signal]) -> str:
    """Return the reason why layers have no trend; "" when they have one."""
    if len(layers) < MIN_LAYERS:
        return f"{len(layers)} layers of kind {layers[0].kind} are too few for a trend"
    if not all(math.isfinite(layer.rms) for layer in layers):
        return "not all outputs are finite (D28, D34)"
    return ""


def _trend(layers: Sequence[_Signal]) -> float:
    """Return the rms of the last output over the first; nan when the first is 0."""
    first, last = layers[0].rms, layers[-1].rms
    return last / first if first > 0 else math.nan


def _evidence(layers: Sequence[_Signal]) -> str:
    first, last = layers[0], layers[-1]
    return (
        f"the rms of the outputs goes from {first.rms:.3g} at {first.name} to "
        f"{last.rms:.3g} here, a factor of {slope([s.rms for s in layers]):.2f} per "
        f"layer of kind {first.kind}"
    )


def _stacks(
    statistics: Statistics, *, at_start: bool = False
) -> Collection[Sequence[_Signal]]:
    """Return layers of one kind: the activations, or the weights where there are none.

    The output layer is left out: its scale is set by the loss. So are weights whose
    output a norm takes, which removes its scale, and side branches such as the gates of
    squeeze and excitation: layers on one position per sample, with layers on many
    positions after them.

    Where a norm feeds some of the weights, as in a transformer with its norms before
    the branches, the signal starts anew there: only layers of one place in their
    blocks, `blocks.0.mlp` and `blocks.1.mlp`, are then compared.
    """
    stacks: dict[tuple[str, str], list[_Signal]] = {}
    seen = [s for s in statistics.layers if s.output is not None and not s.is_output]
    last_wide = max((i for i, s in enumerate(seen) if s.positions > 1), default=-1)
    seen = [s for i, s in enumerate(seen) if i >= last_wide or s.positions > 1]
    hidden = [s for s in seen if s.role == "activation"]
    plain = [s for s in seen if s.role == "weight" and not s.is_normalized]
    scales = {s.name: s.gains.rms for s in seen if s.gains is not None}
    norms = {s.name for s in statistics.of_role("norm")}
    starts_anew = not hidden and any(s.fed_by in norms for s in plain)
    for layer in hidden or plain:
        # A branch whose scale starts at zero has no signal in the first step.
        start = layer.rms_at_start or None
        rms = start if at_start else _unscaled(layer, scales)
        if rms is not None:
            place = re.sub(r"\d+", "#", layer.name) if starts_anew else ""
            signal = _Signal(layer.name, layer.kind, rms)
            stacks.setdefault((layer.kind, place), []).append(signal)
    return stacks.values()


def _unscaled(layer: LayerStatistics, scales: Mapping[str, float]) -> float | None:
    """Return the rms of the outputs, over the scale of a norm directly before it.

    A branch whose norm starts at a scale of zero has a small one for the first steps:
    that is the branch, and no trend over the depth. None where it is zero still. A
    scale above one is left, because it makes the signal larger.

    Args:
        layer: An activation, or a weight.
        scales: The rms of gains and shifts, by the name of the norm. A norm may hold
            the activation, as timm's do.
    """
    around = layer.name.rpartition(".")[0]
    scale = scales.get(layer.fed_by, scales.get(around, 1.0))
    if scale == 0:
        return layer.output_rms or None
    return layer.output_rms / min(scale, 1.0)


CHECKS = {"D22": activations_vanish, "D23": activations_explode}

"""Do signals reach the last layer, and gradients the first?

A signal that changes by the same factor g in every layer has changed by g^depth at the
end. So the trend over the depth is judged, not two neighbouring layers: over layers of
one kind, the rms of their outputs h going forward, and going backward

    response = ‖dL/dh‖ · rms(h)

by how much the loss answers to a relative change of h. dL/dh alone depends on the
units of h, which a following batch norm takes out again.
"""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Iterator, Sequence
from functools import partial

from normkit.doctor.checks.judge import below
from normkit.doctor.finding import Finding
from normkit.doctor.statistics import LayerStatistics, Statistics

__all__ = ["CHECKS", "activations_vanish", "gradients_vanish"]

LEAST_LAYERS = 3
# Last layer against first. tanh: .09 at n·Var[w] = .41, .47 at Xavier's; ReLU: .17 at
# Xavier's, .97 at Kaiming's.
VANISH_WARNING, VANISH_ERROR = 0.2, 0.02
GRADIENT_WARNING, GRADIENT_ERROR = 0.02, 1e-4
# Median over steps of ‖Δw‖/‖w‖ below which a layer stands still.
STILL = 1e-6
RECENT = 5

_D22 = partial(Finding, "D22", "activations_vanish")
_D24 = partial(Finding, "D24", "gradients_vanish")


def activations_vanish(statistics: Statistics) -> Iterator[Finding]:
    """D22: the outputs shrink from layer to layer."""
    for kind, layers in _stacks(statistics).items():
        rms = [layer.output_rms for layer in layers]
        if len(layers) < LEAST_LAYERS:
            reason = f"{len(layers)} layers of kind {kind} are too few for a trend"
            yield _D22(layers[-1].name, "not_judged", evidence=reason)
            continue
        ratio = rms[-1] / rms[0] if rms[0] > 0 else math.nan
        severity, threshold = below(ratio, warning=VANISH_WARNING, error=VANISH_ERROR)
        yield _D22(
            layers[-1].name,
            severity,
            ratio,
            threshold,
            f"the rms of the outputs goes from {rms[0]:.3g} at {layers[0].name} to "
            f"{rms[-1]:.3g} here, a factor of {_slope(rms):.2f} per layer of kind "
            f"{kind}",
            _START,
            {"layers": [layer.name for layer in layers], "rms": rms},
        )


def gradients_vanish(statistics: Statistics) -> Iterator[Finding]:
    """D24: the gradients do not reach the first layers."""
    yield from _vanish_backward(statistics)
    yield from _stand_still(statistics)


def _vanish_backward(statistics: Statistics) -> Iterator[Finding]:
    layers = [layer for layer in statistics.of_role("weight") if layer.gradient_norm]
    if not layers:
        if statistics.of_role("weight"):
            reason = "no gradient was seen; give a loss_fn"
            yield _D24("", "not_judged", evidence=reason)
        return
    if len(layers) < LEAST_LAYERS:
        reason = f"{len(layers)} layers are too few for a trend"
        yield _D24(layers[0].name, "not_judged", evidence=reason)
        return
    response = [
        numbers.median(layer.gradient_norm[-RECENT:]) * layer.output_rms
        for layer in layers
    ]
    if not response[-1] > 0:
        reason = f"the loss answers by {response[-1]:.3g} to the last layer already"
        yield _D24(layers[0].name, "not_judged", evidence=reason)
        return
    ratio = response[0] / response[-1]
    severity, threshold = below(ratio, warning=GRADIENT_WARNING, error=GRADIENT_ERROR)
    yield _D24(
        layers[0].name,
        severity,
        ratio,
        threshold,
        f"to a relative change of its outputs the loss answers by {response[-1]:.3g} "
        f"at {layers[-1].name} and by {response[0]:.3g} here, a factor of "
        f"{_slope(response[::-1]):.2f} per layer",
        _START,
        {"layers": [layer.name for layer in layers], "response": response},
    )


def _stand_still(statistics: Statistics) -> Iterator[Finding]:
    updates = {
        layer.name: numbers.median(layer.weight.update_ratio)
        for layer in statistics.of_role("weight")
        if layer.weight is not None and layer.weight.update_ratio
    }
    if not updates:
        return
    still = [name for name, ratio in updates.items() if ratio < STILL]
    share = len(still) / len(updates)
    if share < 0.5:
        return
    yield _D24(
        still[0],
        "warning",
        updates[still[0]],
        STILL,
        f"{len(still)} of {len(updates)} layers change by less than {STILL:g} of their "
        "weight in a step",
        _START + ", or raise the learning rate",
        {"update_ratio": updates},
    )


_START = (
    "start from normkit.initialize(model), put batch norm between the layers, or add "
    "skip connections"
)


def _stacks(statistics: Statistics) -> dict[str, list[LayerStatistics]]:
    """Layers of one kind: the activations, or the weights of a model without any.

    The output layer is left out: its scale answers to the loss.
    """
    stacks: dict[str, list[LayerStatistics]] = {}
    seen = [s for s in statistics.layers if s.output is not None and not s.is_output]
    hidden = [s for s in seen if s.role == "activation"]
    for layer in hidden or [s for s in seen if s.role == "weight"]:
        stacks.setdefault(layer.kind, []).append(layer)
    return stacks


def _slope(values: Sequence[float]) -> float:
    """The factor per step of the line through the logarithms; nan when one is 0."""
    if any(not (v > 0 and math.isfinite(v)) for v in values):
        return math.nan
    return math.exp(
        numbers.linear_regression(range(len(values)), [math.log(v) for v in values])[0]
    )


CHECKS = {"D22": activations_vanish, "D24": gradients_vanish}

"""Inputs on another scale than those of training, by the running statistics: D01, D28.

In training mode the first batch norm takes the scale away, and all norms behind it see
what they saw before; its own running statistics are off by one factor in all channels.
"""

from __future__ import annotations

import math

from normkit.doctor.checks.distance import distance, has_finite_inputs
from normkit.doctor.measurements import NormStatistics, Statistics

__all__ = ["SCALE_FIX", "of_other_scale", "scaled_by"]

# Least |ln| of one factor on all variances of the first norm, and the largest standard
# deviation of ln over its channels: .11 to .18 where a loader gave pixels from 0 to 255
# or 0 to 1 for standardized ones, or the reverse (CNN on MNIST; padding stays zero),
# .54 where weights had moved.
SCALED, UNEVEN = math.log(4.0), 0.25

SCALE_FIX = (
    "give this loader the preprocessing of the training data; where it is the right "
    "one, normkit.calibrate(model, loader)"
)


def scaled_by(norm: NormStatistics) -> float | None:
    """Return the factor by which all variances of a norm's inputs have changed.

    None where the channels differ, or where it is near 1.
    """
    if norm.in_training is None or len(norm.calls) > 1 or not has_finite_inputs(norm):
        return None
    var = norm.in_training.pooled.unbiased_var + norm.eps
    ratios = (var / (norm.running_var + norm.eps)).log()
    if len(ratios) < 2 or not abs(float(ratios.mean())) > SCALED:
        return None
    return math.exp(float(ratios.mean())) if float(ratios.std()) < UNEVEN else None


def of_other_scale(statistics: Statistics) -> tuple[str, float]:
    """Return the first norm and the factor, where it alone is off, by one factor.

    Otherwise ("", 1); also where it is frozen, as that of another task.
    """
    norms = statistics.norms
    if len(norms) < 2 or norms[0][1].frozen or norms[0][1].is_new:
        return "", 1.0
    distances = [distance(norm) for _, norm in norms[1:] if not norm.frozen]
    if not distances or any(d is None or d.severity != "clear" for d in distances):
        return "", 1.0
    layer, first = norms[0]
    factor = scaled_by(first)
    return ("", 1.0) if factor is None else (layer.name, factor)

"""Are the units of the activations still able to learn?"""

from __future__ import annotations

import statistics as numbers
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.judge import above
from normkit.doctor.finding import Finding
from normkit.doctor.statistics import Statistics

__all__ = ["CHECKS", "saturation"]

# Share of (unit, sample) pairs. Batch norm keeps it at 1 to 5 %; a sigmoid network
# without it reaches 32 % at learning rate 1 and 63 % at 3.
SATURATED_WARNING, SATURATED_ERROR = 0.25, 0.60
LEAST_VALUES = 500
# While training, a state counts when it lasts this many observations.
LASTING = 3

_D20 = partial(Finding, "D20", "saturation")


def saturation(statistics: Statistics) -> Iterator[Finding]:
    """D20: many units sit where the activation is flat, on many samples."""
    for layer in statistics.of_role("activation"):
        if not layer.saturated or layer.input is None:
            continue
        if layer.is_output:
            reason = "it gives the model's output, which may well be sure of itself"
            yield _D20(layer.name, "not_judged", evidence=reason)
            continue
        values, seen = int(layer.input.count), len(layer.saturated)
        if values < LEAST_VALUES or (statistics.while_training and seen < LASTING):
            reason = f"{values} values in {seen} observations are too few"
            yield _D20(layer.name, "not_judged", evidence=reason)
            continue
        recent = layer.saturated[-LASTING:]
        # The least of the last few: a state that comes and goes is none.
        share = (
            min(recent) if statistics.while_training else numbers.fmean(layer.saturated)
        )
        severity, threshold = above(
            share, warning=SATURATED_WARNING, error=SATURATED_ERROR
        )
        yield _D20(
            layer.name,
            severity,
            share,
            threshold,
            f"{share:.0%} of the inputs of this {layer.kind} lie where its slope is "
            "below 5 % of its greatest",
            "put a batch norm before it, or start from normkit.initialize(model), or "
            "lower the learning rate",
            {"input_std": float(layer.input.var.sqrt())},
        )


CHECKS = {"D20": saturation}

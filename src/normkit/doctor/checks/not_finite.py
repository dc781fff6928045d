"""Check for the layer that makes the first value that is not finite: part of D34.

A NaN reaches every layer behind it, with the gradients every layer, and with the next
step of the optimizer every weight. So the first observation that has one is searched,
and in it the first layer in the order of execution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from normkit.doctor.finding import Finding
from normkit.doctor.measurements import LayerStatistics, Statistics

__all__ = ["not_finite"]

_D34 = partial(Finding, "D34", "basics")


def not_finite(statistics: Statistics) -> Iterator[Finding]:
    """Check for values that are not finite in the model's output.

    A layer inside may have some on purpose, as a softmax over scores with a mask of
    −inf; and so may the output, where the loss is finite nevertheless. Inputs of the
    model that are not finite are D28.
    """
    yield from _targets(statistics)
    data = None if statistics.data is None else statistics.data.input
    if data is not None and not math.isfinite(float(data.mean + data.m2)):
        return
    layer, out = _first(statistics), statistics.output
    if layer is not None:
        when, evidence, fix = _told(statistics, layer)
        details = {"is_not_finite": True, "observation": when}
        if _has_passed(statistics, layer):
            details["has_passed"] = True
        yield _D34(layer.name, "error", math.nan, math.inf, evidence, fix, details)
    elif out is not None and not math.isfinite(out.scale):
        found = statistics.evaluation
        losses = () if found is None else found.batch_loss
        is_masked = bool(losses) and all(map(math.isfinite, losses))
        yield _D34(
            "",
            "info" if is_masked else "warning",
            out.scale,
            math.inf,
            "the output holds values that are not finite, those of its layers do not"
            + "; the loss is finite, as with a mask of -inf" * is_masked,
            "look at what the model computes behind its last layer",
        )


def _targets(statistics: Statistics) -> Iterator[Finding]:
    """Check for targets that are not numbers; a loss may leave them out on purpose."""
    found, evaluation = statistics.targets, statistics.evaluation
    losses = () if evaluation is None else evaluation.batch_loss
    if found is None or not found.not_finite or all(map(math.isfinite, losses)):
        return
    yield _D34(
        "",
        "error",
        found.not_finite,
        0.0,
        f"{found.not_finite:.2g} of the targets are not finite (NaN or infinite), and "
        "so are losses of their batches",
        "find the samples that have them, and leave them out of the loss: "
        "torch.isfinite(targets).all()",
        {"is_not_finite": True, "is_origin": True},
    )


def _has_passed(statistics: Statistics, first: LayerStatistics) -> bool:
    """Return True for values that came with a batch, which no weight has kept."""
    is_given = first is statistics.layers[0] and first.not_finite.input is not None
    return is_given and all(s.not_finite.weight is None for s in statistics.layers)


def _first(statistics: Statistics) -> LayerStatistics | None:
    """Return the layer that made the first of them; None where none reach the end."""
    ends = [*statistics.layers[-1:], *(s for s in statistics.layers if s.is_output)]
    if all(layer.not_finite.output is None for layer in ends):
        return None
    made = [s for s in statistics.layers if s.not_finite.output is not None]
    # The first of equals: the layers are in the order of execution.
    return min(made, key=lambda layer: layer.not_finite.output or 0)


def _told(statistics: Statistics, layer: LayerStatistics) -> tuple[int, str, str]:
    """Return the observation, the evidence and the fix."""
    at = layer.not_finite
    when, at_step, since = at.output or 0, "", ""
    if statistics.while_training and statistics.training is not None:
        at_step = f" at step {statistics.training.steps[when]}"
        since = f"; a step before step {statistics.training.steps[when]} made it so"
    first = f"its outputs are the first that are not finite{at_step}"
    if at.weight is not None and at.weight <= when:
        return (
            when,
            f"{first}, and its weight is not finite" + since * (when > 0),
            "load or start the weight again; where training made it so, look at the "
            "batch and the gradients of the step before, or clip them",
        )
    if at.input is not None and at.input <= when:
        is_first = layer is statistics.layers[0]
        source = (
            "the batch, or what the model does before its first layer"
            if is_first
            else "what the model computes between the layers before it and this one"
        )
        return (
            when,
            f"{first}, and so are its inputs: they come from {source}",
            "look there for log, sqrt, a division or an exponential, and bound its "
            "inputs",
        )
    return (
        when,
        f"{first}, of finite inputs and a finite weight",
        "look for numbers too large for the dtype, in half precision above 65,504, "
        "and for a bias that is not finite",
    )

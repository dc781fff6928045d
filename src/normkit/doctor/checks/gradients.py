"""Checks of gradients over the depth and over the training: D24 and D25.

Backward, what is held against the depth is

    response = ‖dL/dh‖ · rms(h)

the change of the loss for a relative change of the outputs h of a layer. dL/dh alone
depends on the scale of h, which a following batch norm removes.
"""

from __future__ import annotations

import itertools
import math
import statistics as numbers
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from normkit.doctor.checks.no_gradient import cut_off, detached, no_gradient
from normkit.doctor.checks.progress import has_learned, has_learned_all
from normkit.doctor.checks.steps import (
    UPDATE_LOW,
    has_no_rate,
    is_left_out,
    largest_step,
)
from normkit.doctor.checks.thresholds import above, below
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.measurements import LayerStatistics, Statistics
from normkit.doctor.transformer_statistics import streams

__all__ = [
    "CHECKS",
    "MIN_LAYERS",
    "START",
    "arrives",
    "before_its_branches",
    "gradients_explode",
    "gradients_vanish",
    "slope",
]

MIN_LAYERS = 4
GRADIENT_WARNING, GRADIENT_ERROR = 0.02, 1e-4
# First layer against last, as in torchmortem; and growth from one window of steps to
# the next, as in TheDeepChecker.
GRADIENT_HIGH = 100.0
GROWTH, WINDOW = 2.0, 5
# A batch norm behind a ReLU makes gradients grow towards the input by this factor, at
# any scale of the weights: √(π/(π−1)), Yang et al., "A Mean Field Theory of Batch
# Normalization", ICLR 2019. Fresh MobileNet, MNASNet and ShuffleNet have 1.11.
BATCH_NORM_GROWTH = (math.pi / (math.pi - 1)) ** 0.5
# Steps between neighbouring layers that are places and no trend: where a branch starts
# small, as from the encoder of a new Bart to its decoder (75).
JUMP, MAX_JUMPS = 10.0, 2
# ‖Δw‖/‖w‖ below which a layer never moved: a million steps to change by its own size.
STILL = 1e-6
RECENT = 5
# Steps, and their share of a training, in which no gradient arrives. Adam makes steps
# of one size of any gradient, and in the end one may arrive.
LONG, LONG_SHARE = 100, 0.5

_D24 = partial(Finding, "D24", "gradients_vanish")
_D25 = partial(Finding, "D25", "gradients_explode")

_CALM = (
    "lower the learning rate, clip the gradients, put batch norm between the layers, "
    "or start from normkit.initialize(model, example_inputs=inputs)"
)
START = (
    "start from normkit.initialize(model, example_inputs=inputs), put batch norm "
    "between the layers, or add skip connections"
)


def arrives(statistics: Statistics) -> bool:
    """Return True where the loss responds to the first layers as to the last.

    Signals that shrink less than 50-fold are then no fault: AlexNet's own start shrinks
    them 43-fold, and learns.
    """
    found = _responses(statistics)
    if found is None or isinstance(found, Finding):
        return False
    _, response = found
    return response[-1] > 0 and response[0] > GRADIENT_WARNING * response[-1]


def gradients_vanish(statistics: Statistics) -> Iterator[Finding]:
    """Check D24: the gradients do not reach the first layers."""
    if none := [*no_gradient(statistics)]:
        yield from none
        return
    now = [*_vanish_backward(statistics)]
    yield from now
    if not any(found.is_alarm for found in now):
        yield from _vanished_before(statistics)
    yield from cut_off(statistics)
    yield from detached(statistics)
    yield from _check_still(statistics)


def _vanish_backward(statistics: Statistics) -> Iterator[Finding]:
    found = _responses(statistics)
    if isinstance(found, Finding):
        yield replace(found, id="D24", name="gradients_vanish")
        return
    if found is None:
        return
    names, response = found
    if not response[-1] > 0:
        reason = f"the response of the loss to the last layer is {response[-1]:.3g}"
        yield _D24(names[0], "not_judged", evidence=reason)
        return
    ratio = response[0] / response[-1]
    severity, threshold = below(ratio, warning=GRADIENT_WARNING, error=GRADIENT_ERROR)
    evidence = (
        f"the response of the loss to a relative change of the outputs is "
        f"{response[-1]:.3g} at {names[-1]} and {response[0]:.3g} here, a factor "
        f"of {slope(response[::-1]):.2f} per layer"
    )
    # Every layer of a transformer lies in a branch, and a cross-attention in two.
    # Before any training a branch may be a hundred thousandth of its stream: CaiT's
    # class token reads the patches by a scale that starts at 1e-5.
    jumps = _jumps(response) if statistics.attention else {}
    is_start = severity == "error" and statistics.has_moved is False
    if (severity == "warning" or is_start) and (
        ratio * math.prod(jumps.values()) > GRADIENT_WARNING
    ):
        severity = "info"
        places = " and ".join(
            f"{step:.3g}-fold behind {names[i]}" for i, step in jumps.items()
        )
        evidence += f"; most of it at single places ({places}), not over the depth"
    if severity in ("warning", "error") and has_learned_all(statistics):
        severity = "info"
        evidence += "; the network has learned all there is to learn"
    yield _D24(
        names[0],
        severity,
        ratio,
        threshold,
        evidence,
        START,
        {"layers": names, "response": response},
    )


def _vanished_before(statistics: Statistics) -> Iterator[Finding]:
    """Check for gradients that did not arrive for most of the training."""
    steps = () if statistics.training is None else statistics.training.steps
    # Layers in branches move the loss little, as at the start of BERT.
    if not steps or statistics.blocks or statistics.attention:
        return
    measured = [s for s in statistics.of_role("weight") if s.gradient_norm]
    layers = [
        layer
        for layer in _strongest_of_parallel(measured)
        if len(layer.gradient_norm) == len(steps)
    ]
    if len(layers) < MIN_LAYERS:
        return
    first, last = layers[0], layers[-1]
    pairs = zip(first.gradient_norm, last.gradient_norm, strict=True)
    least = GRADIENT_ERROR * last.output_rms / max(first.output_rms, 1e-30)
    arrived = (
        step
        for step, (here, there) in zip(steps, pairs, strict=True)
        if not here < least * there
    )
    begins = next(arrived, steps[-1])
    if begins < max(LONG, LONG_SHARE * steps[-1]):
        return
    ratio = first.gradient_norm[0] / last.gradient_norm[0]
    yield _D24(
        first.name,
        "info" if has_learned(statistics) else "warning",
        ratio,
        GRADIENT_ERROR,
        f"for the first {begins} of {steps[-1] + 1} steps the response of the loss to "
        f"it was below {GRADIENT_ERROR:g} of that to {last.name}: until then "
        "nothing that it does was learned",
        START,
        {"is_origin": True},
    )


def _jumps(response: Sequence[float]) -> dict[int, float]:
    """Return the largest steps of JUMP or more, by the layer before them."""
    steps = {
        index: after / before if before > 0 else 0.0
        for index, (before, after) in enumerate(itertools.pairwise(response))
    }
    found = {index: step for index, step in steps.items() if step >= JUMP}
    largest = sorted(found, key=lambda index: -found[index])[:MAX_JUMPS]
    return {index: found[index] for index in sorted(largest)}


def gradients_explode(statistics: Statistics) -> Iterator[Finding]:
    """Check D25: gradients that grow towards the first layers, over time, or to inf."""
    # Backward, the last layer comes first: the one that is named.
    for layer in reversed(statistics.of_role("weight")):
        norms = (
            *layer.gradient_norm,
            *(layer.weight.gradient_norm if layer.weight else ()),
        )
        bad = sum(not math.isfinite(norm) for norm in norms)
        if bad:
            evidence = f"{bad} of {len(norms)} gradients are not finite"
            yield _D25(layer.name, "error", math.nan, 0.0, evidence, _CALM)
    found = _responses(statistics)
    if isinstance(found, Finding):
        yield replace(found, id="D25", name="gradients_explode")
    elif found is not None:
        names, response = found
        ratio = response[0] / response[-1] if response[-1] > 0 else math.nan
        if math.isfinite(ratio):
            severity, evidence = _growth_over_depth(statistics, ratio)
            yield _D25(
                names[0],
                severity,
                ratio,
                GRADIENT_HIGH,
                f"the response of the loss to a relative change of the outputs is "
                f"{response[0]:.3g} here and {response[-1]:.3g} at {names[-1]}"
                + evidence,
                _CALM,
            )
    if statistics.while_training:
        yield from _growth(statistics)


def _growth_over_depth(statistics: Statistics, ratio: float) -> tuple[Severity, str]:
    """Return the severity of gradients that grow by `ratio`, and a clause on it."""
    severity, _ = above(ratio, warning=math.inf, error=GRADIENT_HIGH)
    layers = sum(not norm.frozen for _, norm in statistics.norms)
    own = BATCH_NORM_GROWTH**layers
    if severity == "error" and ratio <= GRADIENT_HIGH * own:
        return "info", (
            f", {ratio ** (1 / layers):.2f}-fold per batch norm; batch norm itself "
            f"makes it up to {BATCH_NORM_GROWTH:.2f}, and removes the scale of the "
            "weights"
        )
    return before_its_branches(statistics, severity)


def before_its_branches(
    statistics: Statistics, severity: Severity
) -> tuple[Severity, str]:
    """Return "info" in place of an alarm where branches have not begun to count.

    A norm that starts at a scale of zero hides its branch, and with it whatever the
    shortcuts leave out: those of a RegNet read one pixel of 32 by 32.
    """
    if severity not in ("warning", "error") or not statistics.is_before_branches:
        return severity, ""
    return "info", "; branches that start at a scale of zero carry nothing yet"


def _growth(statistics: Statistics) -> Iterator[Finding]:
    """Check for three windows in a row in which the gradient more than doubles.

    It is the gradient of all weights together, and must have become larger than the
    weights: a network that starts with scales or a last layer of zero begins to learn
    with gradients that grow from nothing, and is no fault.
    """
    recent = {
        layer.name: layer.weight
        for layer in statistics.of_role("weight")
        if layer.weight is not None
        and len(layer.weight.gradient_norm) >= 4 * WINDOW
        and all(map(math.isfinite, layer.weight.gradient_norm[-4 * WINDOW :]))
    }
    if not recent:
        return
    series = {name: w.gradient_norm[-4 * WINDOW :] for name, w in recent.items()}
    together = [math.hypot(*each) for each in zip(*series.values(), strict=True)]
    growth = _least_growth(together)
    size = math.hypot(*(weight.norm for weight in recent.values()))
    if growth > GROWTH and numbers.median(together[-WINDOW:]) > size:
        name = max(series, key=lambda name: _least_growth(series[name]))
        evidence = (
            f"the gradient of all weights grew {growth:.3g}-fold or more in each of "
            f"the last three windows of {WINDOW} steps, most of all here, and is now "
            "larger than the weights"
        )
        yield _D25(name, "error", growth, GROWTH, evidence, _CALM)


def _least_growth(norms: Sequence[float]) -> float:
    """Return the least factor between the medians of four windows."""
    spans = (norms[i * WINDOW : (i + 1) * WINDOW] for i in range(4))
    return min(
        after / before if before > 0 else 0.0
        for before, after in itertools.pairwise(map(numbers.median, spans))
    )


def _responses(
    statistics: Statistics,
) -> tuple[list[str], list[float]] | Finding | None:
    """Return names and responses over the depth, a not-judged finding, or None.

    Those of the layers with weights; but of blocks that end in a sum, or in a norm of
    one, those of the blocks. A branch may be a hundredth of what it is added to, as at
    the start of BERT; its layers then move the loss little, and learn as all others.
    """
    every = statistics.of_role("weight")
    measured = [layer for layer in every if layer.gradient_norm]
    layers = _strongest_of_parallel(measured)
    if not every:
        return None
    if not layers:
        reason = "no gradient was measured; give a loss_fn"
        return Finding("", "", "", "not_judged", evidence=reason)
    blocks = [
        block
        for row in streams(statistics.blocks)
        for block in row
        if len(row) >= MIN_LAYERS and block.end and block.gradient
    ]
    found: dict[str, float] = {}
    for layer in layers:
        around = [b for b in blocks if layer.name.startswith(f"{b.name}.")]
        if around:
            found[around[0].name] = around[0].response(RECENT)
        else:
            found[layer.name] = _response(layer)
    if len(found) < MIN_LAYERS:
        reason = f"{len(found)} layers are too few for a trend"
        return Finding("", "", layers[0].name, "not_judged", evidence=reason)
    return list(found), list(found.values())


def _response(layer: LayerStatistics) -> float:
    return numbers.median(layer.gradient_norm[-RECENT:]) * layer.output_rms


def _strongest_of_parallel(layers: list[LayerStatistics]) -> list[LayerStatistics]:
    """Return the layers, of each group on one input the one with the largest response.

    Query and key move the loss by their softmax alone, a thousandth of what the value
    beside them does in a new network: no sign that gradients do not arrive.
    """
    groups: dict[str, list[LayerStatistics]] = {}
    for layer in layers:
        groups.setdefault(layer.beside or layer.name, []).append(layer)
    return [max(group, key=_response) for group in groups.values()]


def _check_still(statistics: Statistics) -> Iterator[Finding]:
    updates = {
        layer.name: largest_step(layer.weight.update_ratio)
        for layer in statistics.of_role("weight")
        if layer.weight is not None
        and layer.weight.update_ratio
        and layer.had_gradients is not False
        # D27 reports these; their gradients may be large.
        and not (is_left_out(layer) or has_no_rate(layer.weight))
    }
    if not updates:
        return
    still = [name for name, ratio in updates.items() if ratio < STILL]
    share = len(still) / len(updates)
    if share < 0.5:
        return
    # Where no layer moves, nothing is lost over the depth: the steps are too small.
    is_of_steps = max(updates.values()) < UPDATE_LOW
    yield _D24(
        still[0],
        "warning",
        updates[still[0]],
        STILL,
        f"{len(still)} of {len(updates)} layers change by less than {STILL:g} of their "
        "weight in a step",
        START + ", or raise the learning rate",
        {"update_ratio": updates, "is_of_steps": is_of_steps},
    )


def slope(values: Sequence[float]) -> float:
    """Return the factor per step of a log-linear fit; nan when a value is 0."""
    if any(not (v > 0 and math.isfinite(v)) for v in values):
        return math.nan
    return math.exp(
        numbers.linear_regression(range(len(values)), [math.log(v) for v in values])[0]
    )


CHECKS = {"D24": gradients_vanish, "D25": gradients_explode}

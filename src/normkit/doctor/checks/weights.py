"""Checks of the weights: biases, decay, symmetry, step size: D10, D14, D26, D27."""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.progress import has_learned
from normkit.doctor.checks.steps import (
    RECENT,
    UPDATE_LOW,
    has_no_rate,
    is_left_out,
    largest_step,
    lost_steps,
    median_step,
    steps_of,
)
from normkit.doctor.checks.thresholds import above
from normkit.doctor.checks.too_large import too_large
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.measurements import LayerStatistics, Statistics

__all__ = [
    "CHECKS",
    "decayed_scale",
    "redundant_bias",
    "symmetric_weights",
    "update_size",
]

# ‖dL/db‖ / ‖dL/dw‖ below which a bias has no effect; rounding leaves 2e-7 to 5e-7.
BIAS_RATIO = 1e-6
# Entries of a weight that tell it from others, and digits in which norms of copies are
# equal: two drawn weights of 16 entries agree in five by chance once in 10^4 pairs, and
# their gradients besides never.
MIN_COPIED, DIGITS = 16, 5
# Decay on a scale shrinks the function, not only its parametrization.
DECAY_WARNING = 1e-3
# Decay from which it is a warning in any case; below, networks learn with scales that
# it has left above a half: 1e-3 on all parameters is an old habit.
DECAY_LARGE, KEPT = 1e-2, 0.5
# Decay that at a rate of 0.1 takes all but a third of a scale in 100 steps.
STRONG = 0.1
# The share that AdamW takes of a scale in a step, rate times decay, from which 100
# steps leave half of it at most; usual are 1e-5 to 1e-4.
TAKES_ALL = 7e-3
# Half of the units: a few equal pairs occur by chance in small layers.
EQUAL_ROWS = 0.5
# ‖Δw‖/‖w‖ per step, median over the steps after the first tenth; TheDeepChecker has
# 1e-4 to 1e-1, torchmortem 1e-5 (`UPDATE_LOW`) to 1e-1.
UPDATE_HIGH = 1e-1
MIN_UPDATES, WARMUP = 20, 0.1
# Steps that are no more than a start: a last layer that began with std .01, a sixth of
# its usual size, moves by .34 of it in step 5, .09 in step 20 and .01 in later ones. A
# watch has seen 20 before its 50th step.
ONLY_A_START = 40
# ‖w‖ at the start over that of entries with variance 1/fan_in, below which a weight has
# no size of its own: its n-th step is 1/n of it at any learning rate. Zeros have 0, the
# gates of gMLP (std 1e-6) 4e-6; torch's own start has 0.58, GPT-2's smallest 0.05.
NO_SIZE = 0.01
# Growth of the steps over a run that shows a start.
STARTING = 2.0

_D10 = partial(Finding, "D10", "redundant_bias")
_D14 = partial(Finding, "D14", "decayed_scale")
_D26 = partial(Finding, "D26", "symmetric_weights")
_D27 = partial(Finding, "D27", "update_size")


def redundant_bias(statistics: Statistics) -> Iterator[Finding]:
    """Check D10: a bias that the following batch norm subtracts.

    Found by its gradient, which is zero up to rounding; layer norm and group norm do
    not cancel a bias, and its gradient is not zero.
    """
    for layer in statistics.of_role("weight"):
        weight = layer.weight
        if weight is None or layer.is_output:
            continue
        if not weight.bias_gradient_norm or not weight.gradient_norm:
            continue
        size = numbers.median(weight.gradient_norm)
        if not size > 0:
            reason = "the weight itself has no gradient"
            yield _D10(layer.name, "not_judged", evidence=reason)
            continue
        ratio = numbers.median(weight.bias_gradient_norm) / size
        yield _D10(
            layer.name,
            "info" if ratio < BIAS_RATIO else "clear",
            ratio,
            BIAS_RATIO,
            f"the gradient of its bias is {ratio:.1e} of that of its weight"
            + (": the following norm removes the bias" if ratio < BIAS_RATIO else ""),
            "pass bias=False to the layer",
        )


def decayed_scale(statistics: Statistics) -> Iterator[Finding]:
    """Check D14: weight decay on the scale and shift of normalization layers."""
    loop = statistics.training
    if loop is None or loop.weight_decay is None:
        return
    severity: Severity = "clear"
    takes_all = False
    if loop.weight_decay > 0:
        is_strong = loop.weight_decay >= DECAY_WARNING and not loop.is_decoupled
        takes_all = loop.decay_per_step >= TAKES_ALL
        if loop.weight_decay < DECAY_LARGE and has_learned(statistics):
            scales = [s.gains.rms for s in statistics.of_role("norm") if s.gains]
            is_strong &= min(scales, default=0.0) < KEPT
        severity = "warning" if is_strong or takes_all else "info"
    yield _D14(
        "",
        severity,
        loop.weight_decay,
        DECAY_WARNING,
        f"the optimizer applies weight_decay={loop.weight_decay:g} to the weights and "
        "biases of normalization layers, too"
        + (
            ", and so pulls each step the scale of their outputs towards 0"
            if severity == "warning"
            else ""
        ),
        "give these parameters a group of their own without decay: "
        "torch.optim.SGD(normkit.nn.parameter_groups(model, weight_decay="
        f"{loop.weight_decay:g}), …)",
        # The scales of what the norms give shrink by it, and all that follows.
        {
            "is_origin": severity == "warning"
            and (takes_all or loop.weight_decay >= STRONG)
        },
    )


def symmetric_weights(statistics: Statistics) -> Iterator[Finding]:
    """Check D26: units with equal weights and equal gradients, which stay equal.

    Or whole layers, such as branches that are copies of one.
    """
    yield from _copies(statistics)
    yield from _one_value(statistics)
    for name in statistics.flat_tables:
        yield _D26(
            name,
            "error",
            1.0,
            EQUAL_ROWS,
            "the numbers of each of its vectors are equal, and training has kept them "
            "so: each vector remains one number",
            "start it from random numbers: nn.init.normal_(embedding.weight, std=0.02)",
        )
    for layer in statistics.of_role("weight"):
        weight = layer.weight
        if weight is None or layer.is_output:
            continue
        if weight.equal_rows > 0 and weight.equal_gradients is None:
            reason = (
                f"{weight.equal_rows:.0%} of the rows are equal, but no gradient shows "
                "whether they stay equal"
            )
            yield _D26(layer.name, "not_judged", evidence=reason)
            continue
        share = min(weight.equal_rows, weight.equal_gradients or 0.0)
        severity: Severity = "error" if share >= EQUAL_ROWS else "clear"
        yield _D26(
            layer.name,
            severity,
            share,
            EQUAL_ROWS,
            f"{share:.0%} of the units have the same weights and the same gradients as "
            "another: they remain one unit",
            "start from random weights: "
            "normkit.initialize(model, example_inputs=inputs)",
        )


def _left_out(statistics: Statistics) -> Iterator[Finding]:
    """Check for scales, shifts and others that the optimizer was not given."""
    loop = statistics.training
    if loop is None or loop.is_trial or (loop.updates or 0) < MIN_UPDATES:
        return
    told = {layer.name for layer in statistics.layers if is_left_out(layer)}
    of_layers: dict[str, list[str]] = {}
    for name in loop.left_out:
        layer, _, parameter = name.rpartition(".")
        if layer not in told:
            of_layers.setdefault(layer, []).append(parameter)
    for layer, names in of_layers.items():
        yield _D27(
            layer,
            "warning",
            len(names),
            0.0,
            f"its {' and '.join(names)} got gradients that are not zero, none of "
            f"{loop.updates} steps changed them, and the optimizer does not hold them",
            "give the optimizer all parameters, those of norms in a group without "
            "decay: normkit.nn.parameter_groups(model, weight_decay=...); freeze by "
            "requires_grad_(False) what should stay as it is",
            {"is_origin": True},
        )


def _one_value(statistics: Statistics) -> Iterator[Finding]:
    """Check for weights that a training began with one value in all entries.

    Biases and rounding part the units slowly: later their rows are not equal.
    """
    for layer in statistics.of_role("weight"):
        weight = layer.weight
        if weight is None or not weight.began_constant or layer.is_output:
            continue
        yield _D26(
            layer.name,
            "warning",
            1.0,
            EQUAL_ROWS,
            "its weight was one value in all entries when the training began: all its "
            "units compute the same, and only their biases and rounding part them",
            "start from random weights: "
            "normkit.initialize(model, example_inputs=inputs)",
            {"is_origin": True},
        )


def _copies(statistics: Statistics) -> Iterator[Finding]:
    """Check for layers with equal weights and gradients that are not one weight."""
    groups: dict[tuple[object, ...], list[LayerStatistics]] = {}
    for layer in statistics.of_role("weight"):
        weight = layer.weight
        if weight is None or not weight.parameter or weight.size < MIN_COPIED:
            continue
        if not (weight.norm > 0 and any(weight.gradient_norm)):
            continue
        sizes = (weight.norm, *weight.gradient_norm)
        # Sums in another order differ by about 1e-6.
        alike = tuple(float(f"{size:.{DIGITS}g}") for size in sizes)
        groups.setdefault((layer.kind, weight.size, *alike), []).append(layer)
    for group in groups.values():
        tied = {layer.weight.parameter for layer in group if layer.weight is not None}
        if len(tied) < 2:
            continue
        for layer in group[1:]:
            yield _D26(
                layer.name,
                "error",
                1.0,
                EQUAL_ROWS,
                f"its weight and gradients are those of {group[0].name}, though it is "
                "a layer of its own: both remain one",
                "draw each by itself: make the layers in a loop, not by deepcopy of "
                "one, or draw their weights again",
            )


def update_size(statistics: Statistics) -> Iterator[Finding]:
    """Check D27: steps that are far too large or too small for the weights.

    Or that never reach them: a rate that has gone, a large eps, a coarse dtype, an
    optimizer that was not given the weight.
    """
    yield from lost_steps(statistics)
    yield from too_large(statistics)
    yield from _left_out(statistics)
    unread = _unread(statistics)
    for layer in statistics.of_role("weight"):
        if layer.weight is None or not layer.weight.update_ratio:
            continue
        if layer.had_gradients is False:
            continue  # it runs under no_grad, and is not meant to move
        if layer.is_factor and layer.is_normalized:
            continue  # the norm removes the factor: its gradient is rounding
        if layer.name in unread:
            continue
        ratios = layer.weight.update_ratio
        if len(ratios) < MIN_UPDATES:
            reason = f"{len(ratios)} observed updates are too few"
            yield _D27(layer.name, "not_judged", evidence=reason)
            continue
        if is_left_out(layer):
            yield _D27(
                layer.name,
                "warning",
                0.0,
                UPDATE_LOW,
                f"its gradients are not zero, none of {len(ratios)} observed steps "
                "changed it, and the optimizer does not hold it",
                "give it to the optimizer: optimizer.add_param_group({'params': …}), "
                "or make the optimizer after requires_grad is set; freeze it by "
                "requires_grad_(False) where it should stay as it is",
            )
            continue
        if has_no_rate(layer.weight):
            yield _D27(
                layer.name,
                "warning",
                0.0,
                UPDATE_LOW,
                "the learning rate of its parameter group is 0: no step changes it",
                "give the group a learning rate, or freeze the layer by "
                "requires_grad_(False) where it should stay as it is",
            )
            continue
        ratio, size = median_step(layer.weight, without=WARMUP), "its size"
        usual = layer.weight.usual_norm
        is_grown = layer.weight.norm_at_start < NO_SIZE * usual
        if ratio > UPDATE_HIGH and is_grown and layer.weight.norm < usual:
            ratio *= layer.weight.norm / usual
            size = "the usual size of such a weight, which began near zero"
        severity, threshold = above(ratio, warning=UPDATE_HIGH)
        # Steps that shrink as the loss does have arrived, or were made to; steps that
        # grow are those of a branch that starts with a scale of zero.
        first, last = (numbers.median(r) for r in (ratios[:RECENT], ratios[-RECENT:]))
        is_starting = last > STARTING * first
        clause = ""
        if severity == "warning" and last <= UPDATE_HIGH:
            seen = sum(steps_of(layer.weight))
            if seen < ONLY_A_START:
                severity = "info"
                clause = f" of {seen:.0f} steps, and by {last:.1e} in the last of them"
        if ratio < UPDATE_LOW and not (
            is_starting or largest_step(ratios) > UPDATE_LOW
        ):
            severity, threshold = "warning", UPDATE_LOW
        yield _D27(
            layer.name,
            severity,
            ratio,
            threshold,
            f"a step changes the weight by {ratio:.1e} of {size} (median)" + clause,
            "lower the learning rate"
            if ratio > UPDATE_HIGH
            else "find the first value that is not finite; lower the learning rate"
            if math.isnan(ratio)
            else "raise the learning rate, or check that gradients reach this layer, "
            "and are clipped behind scaler.unscale_() in mixed precision",
        )


def _unread(statistics: Statistics) -> set[str]:
    """Return the last layers of a forward that no gradient reaches, as others do.

    Nothing reads them, as the features of the last layer of a graph network whose
    answer are the places.
    """
    found: set[str] = set()
    for layer in reversed(statistics.of_role("weight")):
        if layer.weight is None or any(layer.weight.gradient_norm):
            return found
        if layer.is_output:
            break  # read, but not by the loss
        found.add(layer.name)
    return set()


CHECKS = {
    "D10": redundant_bias,
    "D14": decayed_scale,
    "D26": symmetric_weights,
    "D27": update_size,
}

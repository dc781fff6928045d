"""Checks of units and channels: constant, collapsed, saturated, dead: D18 to D21."""

from __future__ import annotations

import statistics as numbers
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.eval_mode import costs_nothing, train_eval_gap
from normkit.doctor.checks.progress import (
    has_learned,
    has_learned_all,
    has_learned_nothing,
    is_learning,
    loss_fell,
)
from normkit.doctor.checks.signals import VANISH_WARNING, activations_vanish
from normkit.doctor.checks.thresholds import above
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.measurements import LayerStatistics, Statistics

__all__ = [
    "CHECKS",
    "collapsed_scale",
    "constant_channels",
    "dead_units",
    "saturation",
]

# Share of (unit, sample) pairs. Batch norm keeps it at 1 to 5 %; healthy tanh networks
# without it reach 32 % in their first layer, and a sigmoid network at a learning rate
# of 3 has 63 %, and a hundred units of tanh on vectors of letters 65 %. A tanh network
# of one input ends with 45 % in its second layer: units of few inputs are steps.
# Standard normal weights have 80 %, and learn more slowly.
SATURATED_WARNING, SATURATED_ERROR = 0.40, 0.70
# The standard error of a share of 500 values is .5/√500 = 2 points.
MIN_VALUES = 500
# During training, the number of observations that a state must last.
LASTING = 3

# Share of a layer's units that were zero on every sample. A unit that is zero on half
# of the samples is healthy.
DEAD_WARNING, DEAD_ERROR = 0.10, 0.50
DEAD_SAMPLES = 1000
# The share below which D22 is the cause where it raises an alarm: of signals that have
# become the same for all samples about half are below zero, .64 of 64 units in sixteen
# layers as torch draws them.
DEAD_WHERE_ALIKE = 0.75
# rms of inputs, and share of outputs that comes from them, which is nothing.
NOTHING = 0.01
# Dense layers behind convolutions end with .22 to .58 at a good accuracy; networks of
# one or two inputs start with .12 to .48.
DEAD_THOUGH_LEARNED = 0.75
# Fewer units give no reliable share: 3 of 4 gates were off in a healthy network.
MIN_UNITS = 16
RECTIFIERS = ("ReLU", "ReLU6", "Threshold", "Hardswish", "Hardshrink", "Softshrink")

# One channel in twenty; no healthy run of docs/doctor-score.md is above it.
CONSTANT_SHARE = 0.05
# Variance over the mean variance of the layer's channels. Where all are small none is
# constant: behind a depthwise convolution of a new MNASNet 35 % lie below eps, on maps
# of one pixel.
FAINT = 1e-3
# A scale below a thousandth, in most channels.
COLLAPSED, COLLAPSED_SHARE = 1e-3, 0.5

# Scales that let a twentieth of a signal through.
SMALL = 0.05
# Share of all scales that have the other sign: of 16 drawn around zero fewer have it in
# 2 % of cases. Scales that begin at one keep their sign in training.
MIXED = 0.25

_D18 = partial(Finding, "D18", "constant_channels")
_D19 = partial(Finding, "D19", "collapsed_scale")
_D21 = partial(Finding, "D21", "dead_units")
_D20 = partial(Finding, "D20", "saturation")


def saturation(statistics: Statistics) -> Iterator[Finding]:
    """Check D20: many units in the flat range of the activation, on many samples.

    The gates of nn.GRU, nn.LSTM and nn.RNN are computed inside one call, where no hook
    runs, and the output does not show the gates: not judged.
    """
    for layer in statistics.of_role("recurrent"):
        reason = (
            f"the gates of {layer.kind} are computed inside one call, without hooks"
        )
        yield _D20(layer.name, "not_judged", evidence=reason)
    for layer in statistics.of_role("activation"):
        if not layer.saturated or layer.input is None:
            continue
        if layer.is_output:
            reason = "it gives the model's output, where confident values are normal"
            yield _D20(layer.name, "not_judged", evidence=reason)
            continue
        values, seen = int(layer.input.count), len(layer.saturated)
        if values < MIN_VALUES or (statistics.while_training and seen < LASTING):
            reason = f"{values} values in {seen} observations are too few"
            yield _D20(layer.name, "not_judged", evidence=reason)
            continue
        recent = layer.saturated[-LASTING:]
        # The minimum of the last few: the state must last.
        share = (
            min(recent) if statistics.while_training else numbers.fmean(layer.saturated)
        )
        severity, threshold = above(
            share, warning=SATURATED_WARNING, error=SATURATED_ERROR
        )
        clause = ""
        can_do = has_learned(statistics) or loss_fell(statistics)
        if severity == "error" and can_do:
            severity = "info" if has_learned_all(statistics) else "warning"
        elif severity == "warning" and can_do:
            severity = "info"
        if severity == "info":
            clause = "; the network has learned with the others"
        yield _D20(
            layer.name,
            severity,
            share,
            threshold,
            f"{share:.0%} of the inputs of this {layer.kind} lie where its slope is "
            "below 5 % of its maximum" + clause,
            "put a batch norm before it, or start from "
            "normkit.initialize(model, example_inputs=inputs), or lower the learning "
            "rate",
            {"input_std": float(layer.input.var.sqrt())},
        )


def dead_units(statistics: Statistics) -> Iterator[Finding]:
    """Check D21: units that are zero on every sample, and so have no gradient."""
    for layer in statistics.of_role("activation"):
        if layer.kind not in RECTIFIERS:
            continue
        if layer.dead is None or layer.dead_samples < DEAD_SAMPLES:
            reason = f"{layer.samples} samples are too few; {DEAD_SAMPLES} are needed"
            yield _D21(layer.name, "not_judged", evidence=reason)
            continue
        if layer.units < MIN_UNITS:
            reason = f"{layer.units} units are too few for a share"
            yield _D21(layer.name, "not_judged", evidence=reason)
            continue
        start = layer.dead_at_start
        value, severity, threshold = _judged_dead(statistics, layer, layer.dead)
        yield _D21(
            layer.name,
            severity,
            value,
            threshold,
            f"{layer.dead:.0%} of its units were zero on each of "
            f"{layer.dead_samples} samples"
            + (f", {start:.0%} at the start" if start is not None else ""),
            "start from normkit.initialize(model, example_inputs=inputs), lower the "
            "learning rate, put batch norm before it, or use a leaky activation",
        )


def _judged_dead(
    statistics: Statistics, layer: LayerStatistics, dead: float
) -> tuple[float, Severity, float]:
    """Return the value to judge, its severity and its threshold.

    A share is no fault by itself: units that were dead from the start cost what they
    cost then, and a network that has learned with the rest can lose them. Up to half of
    the units are no fault either where nothing shows that the network does not learn.
    """
    start = layer.dead_at_start
    is_most = dead >= DEAD_WHERE_ALIKE
    if start is not None and start < DEAD_ERROR:
        dead -= start
    severity, threshold = above(dead, warning=DEAD_WARNING, error=DEAD_ERROR)
    if severity == "clear":
        return dead, severity, threshold
    if not is_most and any(f.is_alarm for f in activations_vanish(statistics)):
        return dead, "info", DEAD_WHERE_ALIKE
    if not is_most and _gets_bias_alone(statistics, layer):
        return dead, "info", DEAD_WHERE_ALIKE
    if has_learned(statistics):
        severity, threshold = above(dead, warning=DEAD_THOUGH_LEARNED)
    elif dead <= DEAD_THOUGH_LEARNED and is_learning(statistics):
        severity, threshold = "clear", DEAD_THOUGH_LEARNED
    elif dead <= DEAD_ERROR and (
        statistics.has_moved is False or not has_learned_nothing(statistics)
    ):
        severity, threshold = "clear", DEAD_ERROR
    return dead, "info" if severity == "clear" else severity, threshold


def _gets_bias_alone(statistics: Statistics, layer: LayerStatistics) -> bool:
    """Return True behind a layer whose inputs are nothing beside its bias.

    As behind a code that says nothing: half of the units are off for all samples.
    """
    for before in statistics.layers[1:]:
        if before is layer:
            return False
        if before.weight is None or before.input is None or before.units < 1:
            continue
        size = float(before.input.mean_square.sqrt())
        own = before.weight.norm / before.units**0.5 * size
        if size < NOTHING and own < NOTHING * before.output_rms:
            return True
    return False


def constant_channels(statistics: Statistics) -> Iterator[Finding]:
    """Check D18: channels without variance, which batch norm amplifies by 1/√eps.

    From eps = 1 on nothing is amplified; D16 reports so large an eps. Constant columns
    of the data before the first layer are no fault of the network; nor are channels of
    a fresh one, whose inputs start at a scale of zero, or below zero before a ReLU; and
    where the network has learned, and eval mode is as good, they do no harm.
    """
    first = next(iter(statistics.layers), None)
    for layer, norm in statistics.norms:
        if norm.in_training is None or norm.eps <= 0:
            continue
        # Inside the batches, which is what the layer divides by.
        seen = norm.in_training
        var = seen.within / seen.pooled.count
        is_faint = (var <= norm.eps) & (var <= FAINT * var.mean().clamp(min=norm.eps))
        share = float((is_faint & (norm.eps < 1)).double().mean())
        severity, threshold = above(share, warning=CONSTANT_SHARE)
        # Of a network that has learned, they are units that are dead behind a ReLU.
        can_do = has_learned(statistics) and costs_nothing(statistics)
        is_given = layer is first or statistics.has_moved is False
        if severity == "warning" and (is_given or can_do):
            severity = "info"
        yield _D18(
            layer.name,
            severity,
            share,
            threshold,
            f"{share:.0%} of its channels have a variance of at most eps={norm.eps:g}, "
            f"and a thousandth of the others'"
            + (
                f"; a change in them is amplified up to {norm.eps**-0.5:.3g}-fold"
                if norm.eps < 1
                else ", and none is amplified"
            ),
            "check that these channels receive an input, and prune them if not",
        )


def collapsed_scale(statistics: Statistics) -> Iterator[Finding]:
    """Check D19: channels switched off by the scale, learned or drawn."""
    yield from _drawn_around_zero(statistics)
    yield from _kept_zero(statistics)
    yield from _emptied(statistics)
    yield from _tiny(statistics)
    for layer, norm in statistics.norms:
        if norm.weight is None or norm.is_new:
            continue
        share = float((norm.weight.abs() < COLLAPSED).double().mean())
        yield _D19(
            layer.name,
            "info" if share > COLLAPSED_SHARE else "clear",
            share,
            COLLAPSED_SHARE,
            f"{share:.0%} of its scales are below {COLLAPSED:g} in size",
            "these channels can be pruned",
        )


def _kept_zero(statistics: Statistics) -> Iterator[Finding]:
    """Check for scales of zero that training leaves so, as a step would not.

    A branch may start at a scale of zero: the first step moves it, unless the scale is
    frozen, or what follows lets no gradient through.
    """
    for layer, norm in statistics.norms:
        scale = norm.weight
        if scale is None or len(scale) < 2 or bool(scale.any()) or norm.is_constant:
            continue
        if norm.is_trainable and not statistics.has_moved:
            continue
        yield _D19(
            layer.name,
            "warning",
            1.0,
            COLLAPSED_SHARE,
            "all its scales are zero"
            + (
                ", and training has not moved them"
                if norm.is_trainable
                else ", and no training will move them: they are frozen"
            )
            + "; it gives its shift, whatever comes in",
            "start the scales at 1; at 0 only in the last norm of a branch that is "
            "added to its input, and there train them",
            {"is_origin": True},
        )


def _emptied(statistics: Statistics) -> Iterator[Finding]:
    """Check for scales that training has made small in all batch norms.

    Such as by a penalty on their size. That some channels are switched off is meant;
    but not where eval mode has become worse than batch statistics, because what is left
    of the signals is noise to the running statistics.
    """
    norms = [
        (layer, norm.weight)
        for layer, norm in statistics.norms
        if norm.weight is not None and not norm.is_new and not norm.frozen
    ]
    gaps = {finding.severity for finding in train_eval_gap(statistics)}
    # Also one that will pass as the rate falls.
    if len(norms) < 2 or not gaps & {"info", "warning", "error"}:
        return
    shares = [float((w.abs() < SMALL).double().mean()) for _, w in norms]
    channels = [len(w) for _, w in norms]
    share = sum(s * n for s, n in zip(shares, channels, strict=True)) / sum(channels)
    if share <= COLLAPSED_SHARE or min(shares) <= COLLAPSED_SHARE / 2:
        return
    for (layer, _), own in zip(norms, shares, strict=True):
        yield _D19(
            layer.name,
            "warning",
            own,
            COLLAPSED_SHARE / 2,
            f"{own:.0%} of its scales are below {SMALL:g} in size, and {share:.0%} of "
            "those of all batch norms: little of any signal is left, and eval mode is "
            "worse than batch statistics (D02)",
            "lower the penalty or the decay on the scales of norms; network slimming "
            "has 1e-4 to 1e-5 times the sum of their sizes",
        )


def _tiny(statistics: Statistics) -> Iterator[Finding]:
    """Check for scales so small in all batch norms that nothing is answered.

    As those of a file whose own framework ignores them (MXNet's `fix_gamma`).
    """
    norms = [
        (layer, float(norm.weight.square().mean().sqrt()))
        for layer, norm in statistics.norms
        if norm.weight is not None and not norm.is_new
    ]
    if len(norms) < 2 or statistics.while_training or not statistics.has_moved:
        return
    if max(size for _, size in norms) >= SMALL or has_learned(statistics):
        return
    for layer, size in norms:
        if size > 0:  # scales of zero are told of as such
            yield _D19(
                layer.name,
                "warning",
                size,
                SMALL,
                f"the rms of its scales is {size:.2g}, that of all batch norms below "
                f"{SMALL:g}: behind several such norms nothing is left of a signal",
                "where a checkpoint comes from another framework, look how that stores "
                "scales: a fixed one may be 1 there, whatever the file holds",
                {"is_origin": True},
            )


def _drawn_around_zero(statistics: Statistics) -> Iterator[Finding]:
    """Check for scales that are drawn like weights, or stored less one.

    In all norms: those that end a branch may start at zero, and have small scales of
    both signs for long, beside others that let the signal through. A norm that adds one
    to its weight gives outputs of about one. And a network whose norms all end
    branches has its signal in the sums: one of them must feed a layer.
    """
    norms = [(s, s.gains) for s in statistics.of_role("norm") if s.gains is not None]
    channels = sum(gains.channels for _, gains in norms)
    feeding = {layer.fed_by for layer in statistics.layers if layer.fed_by}
    if channels < MIN_UNITS or not any(layer.name in feeding for layer, _ in norms):
        return
    negative = sum(gains.negative * gains.channels for _, gains in norms) / channels
    largest = max(max(gains.rms, layer.output_rms) for layer, gains in norms)
    if not (MIXED <= negative <= 1 - MIXED and largest < VANISH_WARNING):
        return
    for layer, gains in norms:
        yield _D19(
            layer.name,
            "warning",
            layer.output_rms,
            VANISH_WARNING,
            f"its outputs have an rms of {layer.output_rms:.2g}, where a scale of 1 "
            f"gives 1: its scales are at most {gains.largest:.2g} in size, and "
            f"{negative:.0%} of those of all norms are negative",
            "start the scales of norms at 1, and draw only the weights of other "
            "layers; where a checkpoint stores scale - 1, add 1 as it is loaded",
            {"is_origin": True},
        )


CHECKS = {
    "D18": constant_channels,
    "D19": collapsed_scale,
    "D20": saturation,
    "D21": dead_units,
}

"""Checks of norms over single samples, of the output and of the order: D29, D34."""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.answers import answers
from normkit.doctor.checks.dependence import dependence
from normkit.doctor.checks.eval_mode import are_served_singly
from normkit.doctor.checks.few_samples import few_samples
from normkit.doctor.checks.no_gradient import uncleared
from normkit.doctor.checks.not_finite import not_finite
from normkit.doctor.checks.outliers import outliers
from normkit.doctor.checks.progress import progress
from normkit.doctor.checks.targets import (
    BINARY,
    COMPARING,
    is_cross_entropy,
    targets,
)
from normkit.doctor.checks.thresholds import MIN_SAMPLES, above, too_few
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.measurements import LayerStatistics, Statistics
from normkit.results import counted

__all__ = ["CHECKS", "basics", "norm_choice"]

# Standard deviation of the output below which a norm has erased its input: over two
# values or more it is about the scale, 1; over one value rounding leaves 1e-5
# (measured).
ERASED = 1e-3
# Change of the answers, as a share of their spread, that is none: eps leaves a little
# of the size of a sample.
UNMOVED = 1e-2
# Response in front of a norm over that behind it which is none: rounding leaves 1e-6.
LET_THROUGH = 1e-4
# Standard deviation over samples divided by the rms, for a constant output: float32
# rounds at 6e-8, and about ten operations lie between.
CONSTANT = 1e-6
# Loss at the start against ln C; twice is the threshold of TheDeepChecker.
START_RATIO = 2.0
# Linear layers that follow a linear layer directly, as a share of all but the first.
# Four healthy networks of papers have .08 to .29; of four layers one is .33.
MANY_PAIRS = 0.33

_D29 = partial(Finding, "D29", "norm_choice")
_D34 = partial(Finding, "D34", "basics")


def norm_choice(statistics: Statistics) -> Iterator[Finding]:
    """Check D29: a norm that erases its input, over steps, or over many lengths.

    Or the mean or size of each sample, though the targets depend on it.
    """
    yield from _of_samples(statistics)
    for layer in statistics.of_role("norm"):
        if layer.input is None or layer.output is None:
            continue
        given, left = (float(m.var.sqrt()) for m in (layer.input, layer.output))
        # A branch that starts at a scale of zero has a small one for some steps.
        scale = 1.0 if layer.gains is None else layer.gains.rms
        # What a norm of one value gives is its shift, which differs by channel.
        # (Or less, where what it gives is the same for all samples, but not erased.)
        left = math.sqrt(abs(left**2 - layer.shift_spread**2))
        is_erased = given > ERASED and not left > ERASED * scale * min(given, 1.0)
        stream = (
            None if layer.norm is None or layer.norm.frozen else layer.norm.in_training
        )
        low, high = (0, 0) if stream is None else stream.lengths
        reason = ""
        if int(layer.input.count) < MIN_SAMPLES:
            reason = f"{int(layer.input.count)} values are too few"
        elif layer.has_zero_scale:
            reason = "its scale is zero, as at the start of a residual branch"
        elif high and stream is not None and stream.batches < 2 and not is_erased:
            reason = "one batch does not show whether lengths vary"
        if reason:
            yield _D29(layer.name, "not_judged", evidence=reason)
            continue
        # A batch norm that gives nothing got nothing: D18.
        is_erased &= layer.norm is None
        if not is_erased and _has_its_mean_read(statistics, layer):
            yield _of_mean(layer)
            continue
        if layer.crossed is not None and not is_erased:
            yield _across(layer)
            continue
        severity: Severity = "clear"
        evidence = (
            f"its inputs have a standard deviation of {given:.3g}, its outputs of "
            f"{left:.3g}"
        )
        fix = (
            "normalize over more than one value: fewer groups, other dimensions, or "
            "batch norm"
        )
        if is_erased:
            severity = "error"
        elif low != high:
            is_single = are_served_singly(statistics)
            severity = "info" if is_single else "warning"
            evidence = f"it saw sequences of {low} to {high} positions in one average"
            fix = "use layer norm, or pass mask= to normkit.nn's batch norm"
        yield _D29(layer.name, severity, left, ERASED, evidence, fix)


def _of_samples(statistics: Statistics) -> Iterator[Finding]:
    """Check for norms that remove what explains the targets."""
    depends = statistics.dependence
    found = None if depends is None else depends.erased
    if found is None or found.change > UNMOVED:
        return
    norms = (s.name for s in statistics.of_role("norm") if s.norm is None)
    is_mean = found.what == "mean"
    yield _D29(
        next(norms, ""),
        "warning",
        found.by_answers,
        found.by_it,
        ("the mean" if is_mean else "the size (the log of the deviation)")
        + f" of a sample explains {found.by_it:.0%} of the variance of a target, the "
        f"answers explain {found.by_answers:.0%}, and they do not change when all "
        f"inputs are {'shifted' if is_mean else 'doubled'}: norms over single samples "
        "have taken it away",
        "give it back behind the last layer, or beside the other features, or take "
        "batch norm, which keeps how samples differ",
        {"is_origin": True},
    )


def _has_its_mean_read(statistics: Statistics, layer: LayerStatistics) -> bool:
    """Return True for a norm over single samples that lets no gradient through.

    What a norm sets itself, such as the mean over the positions, does not depend on
    its input, and a loss that reads nothing else has no gradient there.
    """
    if layer.norm is not None or layer.has_zero_scale or not layer.fed_by:
        return False
    before = next((s for s in statistics.layers if s.name == layer.fed_by), None)
    if before is None or not before.gradient_norm or not layer.gradient_norm:
        return False
    pairs = [
        numbers.median(each.gradient_norm) * each.output_rms for each in (before, layer)
    ]
    return pairs[0] < LET_THROUGH * pairs[1]


def _of_mean(layer: LayerStatistics) -> Finding:
    return _D29(
        layer.name,
        "error",
        0.0,
        LET_THROUGH,
        f"no gradient passes this {layer.kind}: what is read of its output is what it "
        "sets itself, such as a mean over the positions that it has normalized",
        "normalize fewer groups of more channels, or by batch norm, or take another "
        "summary than the mean, such as a maximum",
        {"is_origin": True},
    )


def _across(layer: LayerStatistics) -> Finding:
    """Return the finding on a norm that takes the steps for the features."""
    given, taken = layer.crossed or (0, 0)
    return _D29(
        layer.name,
        "warning",
        taken,
        given,
        f"{layer.fed_by} gives its features along dimension {given}, and this "
        f"{layer.kind} takes dimension {taken}, the steps of the sequence",
        f"transpose before and after it, or pass channel_dim={given} to normkit.nn's",
    )


def basics(statistics: Statistics) -> Iterator[Finding]:
    """Check D34: output, loss and order of the layers."""
    yield from _linear_after_linear(statistics)
    yield from uncleared(statistics)
    yield from not_finite(statistics)
    yield from targets(statistics)
    yield from dependence(statistics)
    told = [*answers(statistics)]
    yield from told
    if not told:
        yield from progress(statistics)
    yield from outliers(statistics)
    yield from few_samples(statistics)
    out, data = statistics.output, statistics.evaluation
    if out is None:
        return
    yield from _ends_in_norm(statistics)
    if out.sums_to_one and is_cross_entropy(out):
        yield _D34(
            "",
            "warning",
            1.0,
            0.0,
            "the output is already a softmax, and cross_entropy applies another",
            "give cross_entropy the logits: drop the last softmax",
            {"softmax": out.softmax},
        )
    if out.unregistered:
        yield _D34(
            "",
            "warning",
            len(out.unregistered),
            0.0,
            f"the output depends on {counted(len(out.unregistered), 'parameter')} that "
            f"the model does not own, such as {out.unregistered[0]}: parameters() and "
            "state_dict() leave them out",
            "keep layers in nn.ModuleList or nn.ModuleDict, and parameters in "
            "nn.Parameter",
            {"parameters": list(out.unregistered)},
        )
    if reason := too_few(statistics.samples):
        yield _D34("", "not_judged", evidence=reason)
        return
    if out.spread <= CONSTANT * out.scale:
        # ResMLP and gMLP start their last layer at zero; its first step ends that.
        is_start = statistics.has_moved is False and any(
            layer.is_output and layer.has_zero_scale for layer in statistics.layers
        )
        yield _D34(
            "",
            "info" if is_start else "warning",
            out.spread,
            CONSTANT * out.scale,
            "the output is the same for every input",
            "look for dead units, symmetric weights or inputs that do not arrive",
        )
    is_new = bool(statistics.norms) and all(norm.is_new for _, norm in statistics.norms)
    if data is None or out.classes is None or out.units < 2 or not is_new:
        return
    if not is_cross_entropy(out):
        return
    loss, chance = data.mean(data.batch_loss), math.log(out.units)
    severity, threshold = above(loss, warning=START_RATIO * chance)
    if severity == "warning":
        # It costs the first steps and no more: MNASNet and MobileNet start at 7 and 4
        # times chance, with a last layer that was made for 1000 classes.
        severity = "info"
    yield _D34(
        "",
        severity,
        loss,
        threshold,
        f"the loss at the start is {loss:.3g}; the loss of a guess among {out.units} "
        f"classes is {chance:.3g}",
        "start the last layer with smaller weights: "
        "normkit.initialize(model, example_inputs=inputs)",
    )


def _ends_in_norm(statistics: Statistics) -> Iterator[Finding]:
    """Check for a batch norm that gives the values which a loss compares.

    Their mean and size in a batch are its shift and scale then, whatever the inputs.
    Codes may end in one: they are compared with each other.
    """
    out, wanted = statistics.output, statistics.targets
    if out is None or wanted is None or wanted.classes is not None:
        return
    if not (COMPARING | BINARY) & out.operations or out.has_critic:
        return
    last = statistics.layers[-1] if statistics.layers else None
    if last is None or last.norm is None or not last.is_output or last.norm.frozen:
        return
    if last.norm.weight is not None and not last.norm.is_trainable:
        return  # the features of a frozen network, which are compared
    yield _D34(
        last.name,
        "warning",
        1.0,
        0.0,
        "the answers are the output of a batch norm: in training their mean and their "
        "spread over a batch are its shift and scale, whatever the samples are",
        "end in the linear layer: move the batch norm in front of its activation",
    )


def _linear_after_linear(statistics: Statistics) -> Iterator[Finding]:
    """Check for two linear layers in a row, which are one unless a bottleneck.

    A network of many layers loses little by one such pair: it stays an information.
    Papers have them, as the gates of the temporal fusion transformer and a map of
    codes over time.
    """
    by_name = {layer.name: layer for layer in statistics.layers}
    # Several maps of one input, as query, key and value, share what makes it.
    sharing = {layer.beside for layer in statistics.layers if layer.beside}
    pairs: list[tuple[str, str]] = []
    for layer in statistics.layers:
        # A model that is one layer has the name "", as has no layer.
        before = by_name.get(layer.fed_by) if layer.fed_by else None
        if before is None or layer.features is None or before.features is None:
            continue
        if layer.beside or layer.name in sharing:
            continue
        if layer.gets_gradients != before.gets_gradients:
            continue  # one of them is that of another network, which is frozen
        given, middle = before.features
        if middle < min(given, layer.features[1]):
            continue
        pairs.append((layer.name, before.name))
    maps = sum(layer.features is not None for layer in statistics.layers) - 1
    for name, before_it in pairs:
        yield _D34(
            name,
            "warning" if len(pairs) >= MANY_PAIRS * maps else "info",
            len(pairs) / maps,
            MANY_PAIRS,
            f"{before_it} is its input, directly: the two are one linear map",
            "put an activation between them, or merge them",
        )


CHECKS = {"D29": norm_choice, "D34": basics}

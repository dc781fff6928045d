"""Checks of the buffers: precision, finite values, defaults: D16, D17, D31, D32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.distance import MAX_NOISE, distance
from normkit.doctor.checks.eval_mode import (
    costs_nothing,
    train_eval_gap,
    weights_fit_statistics,
)
from normkit.doctor.checks.modes import is_kept_new
from normkit.doctor.checks.progress import has_learned, is_untrained
from normkit.doctor.checks.signals import activations_explode, activations_vanish
from normkit.doctor.checks.thresholds import above, too_few
from normkit.doctor.finding import SEVERITIES, Finding, Severity
from normkit.doctor.measurements import (
    LayerStatistics,
    NormStatistics,
    Statistics,
    standard_error,
)

__all__ = [
    "CHECKS",
    "averaged_weights",
    "default_buffers",
    "narrow_precision",
    "nonfinite_statistics",
]

# The smallest positive number of float16; an eps below half of it becomes 0.
MIN_HALF = 6e-8
# Share of channels whose variance is below ten times eps, where eps lowers the scale
# by 1 - 1/√1.1 = 5 % or more. In most channels eps is at fault, in a few the channels
# (D18).
EPS_SHARE = 0.5
# The largest default of a library (Keras; torch has 1e-5). An eps above it that is also
# above the variances is no trace of a signal that has vanished: it makes it vanish.
USUAL_EPS = 1e-3
# Rows above and below the largest number of float16. If all rows that are zero are
# large and none is small, 20 of each leave no doubt that size decides.
MIN_ROWS = 20

# Averaged weights stand still, so that statistics computed for them are off by sampling
# alone: d_mean .003 and d_var .02 after update_bn. Those of the last weights gave at
# most .08 and .08 where eval mode lost nothing (EMA of .9 and .98, SWA), .13 and .31
# where it lost 4 points of accuracy, .19 and .37 where it lost 11 (EMA of .995).
AVERAGED_MEAN, AVERAGED_VAR = 0.1, 0.15

_LOWER_EPS = "lower eps, or scale the inputs of the layer up"
_EPS_ARGUMENT = (
    "lower eps (torch's default is 1e-5): the argument behind the number of channels "
    "may be eps, as in BatchNorm2d(64, 64)"
)

_D16 = partial(Finding, "D16", "narrow_precision")
_D17 = partial(Finding, "D17", "nonfinite_statistics")
_D31 = partial(Finding, "D31", "averaged_weights")
_D32 = partial(Finding, "D32", "default_buffers")


def narrow_precision(statistics: Statistics) -> Iterator[Finding]:
    """Check D16: statistics in half precision, or an eps as large as the variances.

    Also squares that are summed in half precision, where a sum above 65,504 is
    infinite, and the row that is divided by its root zero.
    """
    can_do = has_learned(statistics)
    can_do &= statistics.while_training or costs_nothing(statistics)
    for layer, norm in statistics.norms:
        is_half = norm.dtype in ("float16", "bfloat16")
        if is_half:
            is_lost = norm.dtype == "float16" and norm.eps < MIN_HALF
            yield _D16(
                layer.name,
                "error" if is_lost else "warning",
                norm.eps,
                MIN_HALF,
                f"the running statistics are {norm.dtype}"
                + (f", where eps={norm.eps:g} is 0" if is_lost else ""),
                "keep batch norms in float32: after model.half() call .float() on them",
                {"dtype": norm.dtype},
            )
            continue
        share = float((norm.running_var < 10 * norm.eps).double().mean())
        severity, threshold = above(share, warning=EPS_SHARE)
        is_above = float((norm.running_var < norm.eps).double().mean()) > EPS_SHARE
        is_origin = norm.eps > USUAL_EPS and is_above
        is_harmless = severity == "warning" and can_do
        if is_harmless:
            severity = "info"
        yield _D16(
            layer.name,
            severity,
            share,
            threshold,
            f"in {share:.0%} of the channels the variance is below ten times "
            f"eps={norm.eps:g}, which then decides the scale"
            + "; the network has learned with it"
            * is_harmless,
            _EPS_ARGUMENT if is_origin else _LOWER_EPS,
            {"is_origin": is_origin},
        )
    for layer in statistics.of_role("norm"):
        if layer.norm is None:
            yield from _large_eps(layer, statistics)
            yield from _lost_rows(layer)


def _large_eps(layer: LayerStatistics, statistics: Statistics) -> Iterator[Finding]:
    """Check the eps of a norm without running statistics.

    A usual one decides where signals have vanished, whose finding is another, but for
    the inputs themselves.
    """
    if layer.eps is None or layer.input is None:
        return
    is_first = layer is statistics.layers[0] and not has_learned(statistics)
    if not (layer.eps > USUAL_EPS or is_first):
        return
    # No row or group varies more than all values together, on average.
    size = float(layer.input.mean_square)
    severity: Severity = "warning" if size < layer.eps else "clear"
    yield _D16(
        layer.name,
        severity,
        layer.eps,
        size,
        f"eps={layer.eps:g} is added to variances of at most {size:.3g} on average",
        _EPS_ARGUMENT if layer.eps > USUAL_EPS else _LOWER_EPS,
        {"is_origin": severity == "warning"},
    )


def _lost_rows(layer: LayerStatistics) -> Iterator[Finding]:
    """Check for rows that a norm makes zero because their squares overflow.

    A norm that leaves padding out makes rows zero as well, but not by their size.
    """
    rows = layer.rows
    if rows is None or layer.has_zero_scale:
        return
    if rows.large < MIN_ROWS or rows.small < MIN_ROWS:
        return
    is_lost = rows.large_lost == rows.large and rows.small_lost == 0
    yield _D16(
        layer.name,
        "error" if is_lost else "clear",
        rows.large_lost / rows.large,
        0.0,
        f"of {rows.large + rows.small} rows {rows.large} have a sum of squares above "
        f"65,504, the largest number of float16; its outputs are zero on "
        f"{rows.large_lost} of them, and on {rows.small_lost} of the others",
        "sum the squares in float32: x.float().square().mean(-1)",
        {"is_origin": is_lost},
    )


def nonfinite_statistics(statistics: Statistics) -> Iterator[Finding]:
    """Check D17: NaN or infinite running statistics, or a negative variance."""
    for layer, norm in statistics.norms:
        bad = ~(norm.running_mean.isfinite() & norm.running_var.isfinite())
        bad |= norm.running_var < 0
        share = float(bad.double().mean())
        severity: Severity = "error" if share > 0 else "clear"
        yield _D17(
            layer.name,
            severity,
            share,
            0.0,
            f"{int(bad.sum())} of {bad.numel()} channels have a running mean or "
            "variance that is NaN, infinite or negative",
            "find the batch that caused it, then layer.reset_running_stats() and "
            "normkit.calibrate(model, loader); normkit.nn's layers skip such batches",
            {"channels": bad.nonzero().flatten()[:20].tolist()},
        )


def averaged_weights(statistics: Statistics) -> Iterator[Finding]:
    """Check D31: averaged weights (SWA, EMA) with the statistics of other weights."""
    if not statistics.is_averaged:
        return
    has_gap = any(f.is_alarm for f in train_eval_gap(statistics))
    can_do = has_learned(statistics) and costs_nothing(statistics)
    for layer, norm in statistics.norms:
        found = None if norm.frozen else distance(norm)
        if found is None or found.noise > MAX_NOISE * AVERAGED_MEAN:
            reason = "the inputs were not measured, or on too few samples"
            yield _D31(layer.name, "not_judged", evidence=reason)
            continue
        value, threshold = found.mean, AVERAGED_MEAN
        if not value / AVERAGED_MEAN > found.var / AVERAGED_VAR:
            value, threshold = found.var, AVERAGED_VAR
        severity, _ = above(value, warning=threshold)
        if severity != "clear":
            severity = "error" if has_gap else "info" if can_do else severity
        yield _D31(
            layer.name,
            severity,
            value,
            threshold,
            "the weights are an average over training, and the running statistics "
            f"belong to other weights (d_mean {found.mean:.2f}, d_var {found.var:.2f})"
            + "; eval mode is as good as batch statistics"
            * (severity == "info"),
            "normkit.calibrate(averaged_model, loader) after the last average",
        )


def default_buffers(statistics: Statistics) -> Iterator[Finding]:
    """Check D32: a trained layer whose running statistics were never set.

    Or one that nothing will ever set: a norm that was frozen, by its class or in eval
    mode, without a checkpoint.
    """
    yield from _never_loaded(statistics)
    loop = statistics.training
    is_in_eval = loop is not None and loop.updates_in_eval > 0
    nothing_learned = is_untrained(statistics)
    for layer, norm in statistics.norms:
        # D03 tells of a flag, D08 of a training in eval mode.
        if norm.is_identity or not norm.tracks or is_in_eval or is_kept_new(norm):
            continue
        if statistics.has_moved and _is_left_new(layer, norm, statistics):
            yield _left_new(layer, norm, _says_nothing_in_eval(statistics))
            continue
        if norm.is_new or nothing_learned:
            reason = "the layer is new: default statistics, scale 1, shift 0"
            if not norm.is_new:
                reason = "default statistics, and the model has learned nothing yet"
            yield _D32(layer.name, "not_judged", evidence=reason)
            continue
        # Also when batches were counted: the statistics were reset, or the count was
        # loaded without them.
        is_default = norm.has_default_buffers
        is_learned = is_default and norm.weight is not None
        severity: Severity = "error" if is_default else "clear"
        if severity == "error" and weights_fit_statistics(statistics):
            # Trained in eval mode from the start. But where batches were counted, the
            # statistics that they gave are lost, and what is trained since fits that.
            severity = "warning" if norm.tracked else "info"
        yield _D32(
            layer.name,
            severity,
            float(norm.tracked or 0),
            1.0,
            f"the running statistics are {'' if is_default else 'not '}mean 0 and "
            f"variance 1, as in a new layer, after {norm.tracked or 0} counted batches"
            + (", yet scale and shift are learned" if is_learned else ""),
            "save and load the buffers with the weights (state_dict holds them), or "
            "normkit.calibrate(model, loader)",
            {"tracked": norm.tracked},
        )


def _is_left_new(
    layer: LayerStatistics, norm: NormStatistics, statistics: Statistics
) -> bool:
    """Return True for a frozen norm that no checkpoint has reached.

    One that is the identity on purpose, after its layer was folded, stands behind a
    bias, which a fold needs, and the network answers well. One whose inputs have mean 0
    and variance 1 does no harm.
    """
    if not norm.is_new or norm.is_trainable or norm.is_constant:
        return False
    if statistics.came_in_eval and _says_nothing_in_eval(statistics):
        return True
    if not norm.frozen:
        return False
    fed_by = next(
        (each for each in statistics.layers if each.name == layer.fed_by), None
    )
    if fed_by is None or fed_by.weight is None or fed_by.weight.has_bias is not False:
        return False
    found = distance(norm)
    return found is not None and found.severity == "error"


def _says_nothing_in_eval(statistics: Statistics) -> bool:
    """Return True where classes in eval mode are as right as the most frequent one."""
    found, wanted = statistics.evaluation, statistics.targets
    if found is None or wanted is None or too_few(sum(found.samples)):
        return False
    if wanted.most_frequent is None or len(found.running_metric) < 2:
        return False
    error = standard_error(found.running_metric)
    return found.mean(found.running_metric) <= wanted.most_frequent + 2 * error


def _left_new(
    layer: LayerStatistics, norm: NormStatistics, says_nothing: bool
) -> Finding:
    stream = norm.in_training
    var = math.nan if stream is None else float(stream.pooled.var.mean())
    return _D32(
        layer.name,
        "warning",
        var,
        1.0,
        "it is frozen with the statistics, scale and shift of a new layer, though the "
        "network was trained: it normalizes nothing, and its inputs have a variance "
        f"of {var:.3g} in place of 1"
        + "; in eval mode the answers are no better than the most frequent class"
        * says_nothing,
        "load the checkpoint that it was frozen for: load_state_dict(strict=False) "
        "returns the names that it did not find, and a prefix such as module. makes "
        "them differ",
        {"is_origin": True},
    )


def _never_loaded(statistics: Statistics) -> Iterator[Finding]:
    """Check norms that are the identity, and whose class keeps them so.

    By itself that is no fault: after folding, or where the signals keep their size, no
    norm is needed. So it is one where signals vanish or explode, as without norms.
    """
    trends = [*activations_vanish(statistics), *activations_explode(statistics)]
    worst = min(trends, key=lambda f: SEVERITIES.index(f.severity), default=None)
    for layer, norm in statistics.norms:
        if not norm.is_identity:
            continue
        if worst is None or not worst.is_alarm:
            reason = "it is the identity, and signals neither vanish nor explode"
            yield _D32(layer.name, "not_judged", evidence=reason)
            continue
        yield _D32(
            layer.name,
            worst.severity,
            0.0,
            1.0,
            f"its mean is 0 and its variance 1, and {layer.kind} never changes them: "
            f"it normalizes nothing, and behind such norms {worst.evidence}",
            "load the checkpoint that it was made for, or train with "
            "torch.nn.BatchNorm2d in its place",
            {"is_origin": True},
        )


CHECKS = {
    "D16": narrow_precision,
    "D17": nonfinite_statistics,
    "D31": averaged_weights,
    "D32": default_buffers,
}

"""Check of the cost of eval mode, D02, and the questions of other checks about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.distance import distance
from normkit.doctor.checks.progress import (
    has_learned,
    has_learned_nothing,
    is_starting,
)
from normkit.doctor.checks.thresholds import above, too_few
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.measurements import (
    Evaluation,
    Statistics,
    standard_error,
)

__all__ = [
    "CHECKS",
    "FITTING",
    "FITTING_FIX",
    "HARMLESS",
    "LAGGING",
    "METRIC_ERROR",
    "MOMENTUM_HIGH",
    "PASSING",
    "SINGLE",
    "STARTING",
    "are_served_singly",
    "costs_nothing",
    "eval_is_better",
    "for_now",
    "is_lagging",
    "train_eval_gap",
    "weights_fit_statistics",
]

# A loss half as large again, as in TheDeepChecker. Accuracy: healthy runs lose at
# most .2 points; momentum .01 lost 2.2 and .001 42.8.
LOSS_RATIO = 1.5
METRIC_WARNING, METRIC_ERROR = 0.01, 0.1
# A loss of accuracy that is one whatever the loss says. While they learn fast, healthy
# programs lose up to .085.
METRIC_SURE = 0.05

# At .5 the last two batches have a weight of 3/4. The reversed convention gives .9 and
# above.
MOMENTUM_HIGH = 0.5
# The weight of the initial values that is more than a lag: 24 batches at a momentum of
# .1 leave .08. A training that ends after 8 leaves .43, and lost 14 points.
COLD = 0.1
# Single samples whose losses tell one mode from the other.
LEAST_SINGLE = 20
# Batches in which the weights may move faster than their averages: in 4 of 32 healthy
# programs eval mode was up to 44 points worse after 24 to 44 steps of 120 to 220, and
# as good as batch statistics at their end.
YOUNG = 60
# What a loss may differ by, and what it may be of that of other samples' answers, to
# count as the same.
NEAR, NEGLIGIBLE = 0.1, 0.01
_D02 = partial(Finding, "D02", "train_eval_gap")
FITTING = (
    "; eval mode is at least as good as batch statistics, so the weights fit them "
    "(frozen batch norm, or training in eval mode)"
)
STARTING = "; training has just begun, and the answers say little yet"
PASSING = (
    "; the statistics of each layer are those of its recent inputs: it passes as the "
    "learning rate falls"
)
LAGGING = (
    "; these are the first batches of a training, in which the weights move faster "
    "than the averages: it passes as the learning rate falls"
)
SINGLE = (
    "; these are batches of one sample, and eval mode is better than their statistics: "
    "the training had larger ones"
)
HARMLESS = "; eval mode is hardly worse than batch statistics (D02)"
FITTING_FIX = (
    "keep the statistics, and the layer frozen: normkit.convert(model, to='frozen')"
)


def weights_fit_statistics(statistics: Statistics) -> bool:
    """Return True where eval mode is at least as good as batch statistics.

    The weights then fit the running statistics, as after training with frozen batch
    norms or in eval mode, and statistics of the data would do harm.
    """
    found = statistics.evaluation
    if found is None or too_few(sum(found.samples)):
        return False
    if not found.mean(found.running_loss) <= found.mean(found.batch_loss):
        return False
    return not _is_sure(found, found.batch_metric, -1.0) if found.batch_metric else True


def eval_is_better(statistics: Statistics) -> bool:
    """Return True where eval mode is better by more than two standard errors.

    By the metric, against batch statistics on the same batches with dropout off: what
    the running statistics hold does no harm then. A loss does not tell: where dropout
    has made the running variance large, answers are small in eval mode, and so are
    their errors, right or wrong.
    """
    found = statistics.evaluation
    if found is None or too_few(sum(found.samples)) or len(found.samples) < 2:
        return False
    pairs = zip(found.running_metric, found.batch_metric, strict=True)
    if not found.batch_metric:
        return False
    gains = [better - worse for better, worse in pairs]
    return sum(gains) / len(gains) > 2 * standard_error(gains)


def are_served_singly(statistics: Statistics) -> bool:
    """Return True for batches of one sample that are not those of the training.

    Eval mode is better than their own statistics, by more than two standard errors: the
    weights were trained with those of larger batches.
    """
    found = statistics.evaluation
    if found is None or not found.samples or max(found.samples) > 1:
        return False
    pairs = [*zip(found.running_loss, found.batch_loss, strict=True)]
    if len(pairs) < LEAST_SINGLE:
        return False
    gains = [batch - running for running, batch in pairs]
    return sum(gains) / len(gains) > 2 * standard_error(gains)


def is_lagging(statistics: Statistics) -> bool:
    """Return True where averages follow the weights of a young network that learns.

    In its first batches, with no average far off, and hardly anything left of
    the initial values.
    """
    moving = [norm for _, norm in statistics.norms if not norm.frozen]
    if not moving or has_learned_nothing(statistics) or statistics.while_training:
        return False
    if not all(0 < (norm.tracked or 0) <= YOUNG for norm in moving):
        return False
    if not all((norm.momentum or 0) < MOMENTUM_HIGH for norm in moving):
        return False
    if any((1 - (n.momentum or 0)) ** (n.tracked or 0) > COLD for n in moving):
        return False  # averages of too few batches (D03)
    found = [distance(norm) for norm in moving]
    return all(d is not None and d.severity != "error" for d in found)


def costs_nothing(statistics: Statistics) -> bool:
    """Return True where the loss in eval mode is that under batch statistics.

    To a tenth, to its error, or where both are a hundredth of the loss of other
    samples' answers.
    """
    found = statistics.evaluation
    if found is None or too_few(sum(found.samples)) or len(found.samples) < 2:
        return False
    if any(finding.is_alarm for finding in train_eval_gap(statistics)):
        return False
    batch, running = found.mean(found.batch_loss), found.mean(found.running_loss)
    if found.shuffled_loss and 0 <= running < NEGLIGIBLE * found.mean(
        found.shuffled_loss
    ):
        return True
    is_near = abs(running - batch) <= NEAR * abs(batch)
    return is_near or not _is_sure(found, found.batch_loss, 1.0)


def for_now(statistics: Statistics, severity: Severity) -> Severity:
    """Return the severity in the first steps, where what is an error later passes."""
    is_error = severity == "error" and statistics.has_just_begun
    return "warning" if is_error else severity


def train_eval_gap(statistics: Statistics) -> Iterator[Finding]:
    """Check D02: eval mode is worse than batch statistics on the same batches."""
    found, norms = statistics.evaluation, [norm for _, norm in statistics.norms]
    is_frozen = all(norm.frozen for norm in norms)
    if is_frozen and (found is None or found.running_loss == found.batch_loss):
        return
    # Else instance norms with running statistics: they tell of no batch. Or norms whose
    # averages have names of their own.
    fix = _GAP_FIX
    if is_frozen:
        is_instance = any("InstanceNorm" in layer.kind for layer in statistics.layers)
        fix = _TRACKED_FIX if is_instance else _OWN_FIX
    is_new = all(norm.is_new for norm in norms) if norms else not statistics.has_moved
    if is_new and (norms or not has_learned(statistics)):
        reason = "the layers are new and have counted no batch yet"
        yield _D02("", "not_judged", evidence=reason)
        return
    if found is None:
        yield _D02("", "not_judged", evidence="there is no loss_fn to compare with")
        return
    samples = sum(found.samples)
    if reason := too_few(samples):
        yield _D02("", "not_judged", evidence=reason)
        return
    batch, running = found.mean(found.batch_loss), found.mean(found.running_loss)
    ratio = running / batch if batch > 0 else math.nan
    evidence = f"loss {running:.3g} in eval mode, {batch:.3g} with batch statistics"
    details = {"batch_loss": batch, "running_loss": running, "loss_ratio": ratio}
    if found.batch_metric:
        metric = found.mean(found.batch_metric), found.mean(found.running_metric)
        drop = metric[0] - metric[1]
        details |= {"batch_metric": metric[0], "running_metric": metric[1]}
        evidence = (
            f"{metric[1]:.1%} in eval mode, {metric[0]:.1%} with batch statistics "
            f"on the same {samples} samples; {evidence}"
        )
        severity, threshold = above(drop, warning=METRIC_WARNING, error=METRIC_ERROR)
        is_sure = ratio > LOSS_RATIO and _is_sure(found, found.batch_metric, -1.0)
        if severity == "warning" and not (drop > METRIC_SURE or is_sure):
            severity = "clear"
        if weights_fit_statistics(statistics):
            severity = "clear"  # a drop within its error, at a lower loss
        if severity in ("warning", "error") and drop < 1 and _are_recent(statistics):
            threshold = METRIC_WARNING
            if severity == "error":
                severity = "warning"
            else:
                severity, evidence = "info", evidence + PASSING
        if severity != "clear" and is_starting(statistics):
            severity, evidence = "info", evidence + STARTING
        elif severity in ("warning", "error") and is_lagging(statistics):
            severity, evidence = "info", evidence + LAGGING
        severity = for_now(statistics, severity)
        yield _D02("", severity, drop, threshold, evidence, fix, details)
        return
    if math.isnan(ratio):
        reason = f"a loss of {batch:.3g} has no ratio; pass metric="
        yield _D02("", "not_judged", evidence=reason, details=details)
        return
    sure = _is_sure(found, found.batch_loss, 1.0)
    severity: Severity = "warning" if ratio > LOSS_RATIO and sure else "clear"
    evidence += f", on the same {samples} samples"
    if severity != "clear" and is_starting(statistics):
        severity, evidence = "info", evidence + STARTING
    elif severity != "clear" and is_lagging(statistics):
        severity, evidence = "info", evidence + LAGGING
    yield _D02("", severity, ratio, LOSS_RATIO, evidence, fix, details)


_TRACKED_FIX = (
    "set track_running_stats=False on the instance norms: with it they normalize by "
    "running statistics in eval mode, and no sample by its own"
)
_OWN_FIX = (
    "look at how norms of a class of their own, or calls of F.batch_norm, keep their "
    "averages: new = (1 - momentum) * old + momentum * batch, from all batches of the "
    "training, in buffers; or take torch.nn's, whose averages normkit.calibrate(model, "
    "loader) recomputes; of a scripted model, before torch.jit.script"
)
_GAP_FIX = (
    "recompute the statistics with normkit.calibrate(model, loader); where no other "
    "finding says why they were wrong, the weights have moved since: lower the "
    "learning rate before evaluating"
)


def _are_recent(statistics: Statistics) -> bool:
    """Return True where each layer's statistics are those of its inputs.

    Their small errors then add up over the layers, as those of the last few weights do
    while a network learns fast: it passes as the learning rate falls.
    """
    moving = [norm for _, norm in statistics.norms if not norm.frozen]
    found = [distance(norm) for norm in moving]
    if any((norm.momentum or 0) >= MOMENTUM_HIGH for norm in moving):
        return False  # they are those of a batch or two, and stay so
    return bool(found) and all(d is not None and d.severity == "clear" for d in found)


def _is_sure(found: Evaluation, batch: tuple[float, ...], sign: float) -> bool:
    """Return True where eval mode is worse by more than two standard errors."""
    running = found.running_metric if sign < 0 else found.running_loss
    worse = [sign * (r - b) for r, b in zip(running, batch, strict=True)]
    error = standard_error(worse) if len(worse) > 1 else 0.0
    return sum(worse) / len(worse) > 2 * error


CHECKS = {"D02": train_eval_gap}

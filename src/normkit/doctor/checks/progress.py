"""Check of what a network has learned: part of D34, and of D21.

    gain = loss with each answer given to another sample − loss

is zero for answers that say nothing of their own sample's target, whatever the loss:
before any training, and where training has not helped. A watch evaluates nothing; it
sees the gradient of the loss with respect to the output, dL/dy, which is the error of
the answers for squared errors and cross entropy, and falls as they become right.
"""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.targets import COMPARING, SAME
from normkit.doctor.checks.thresholds import too_few
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import (
    Evaluation,
    OutputStatistics,
    Statistics,
    TargetStatistics,
    standard_error,
)

__all__ = [
    "READING",
    "has_learned",
    "has_learned_all",
    "has_learned_nothing",
    "is_learning",
    "is_starting",
    "is_untrained",
    "loss_fell",
    "progress",
]

# Share of the shuffled loss below which a gain is none, and above which a network has
# learned. Digits: at most .004 at a learning rate of zero, .9 at 90 % accuracy.
NO_GAIN, LEARNED = 0.02, 0.5
# Share of a network that is learning: two healthy programs with many dead units had .43
# and .44 at 40 % of their training.
LEARNING = 0.25
# Share from which nothing is left to gain: the loss is a hundredth of the shuffled one.
LEARNED_ALL = 0.99
# The same for ‖dL/dy‖ over that of the start. Of squared errors, where targets have
# variance V and answers explain E of it, the gain is 2E / (V + E), above LEARNED where
# E > V/3; ‖dL/dy‖ has then fallen to √(1 − E/V) < √(2/3). The other from E > .98 V.
FALLEN, FALLEN_FAR = math.sqrt(2 / 3), math.sqrt(0.02)
# Above it the error has not fallen: that of batches alone varies by a hundredth.
FALLEN_LITTLE = 0.95
# Above it the error of a network that was trained before has risen. Of 35 healthy
# trained programs it was .08 to 1.64 after 40 steps more.
RISEN = 2.0
# Observed steps whose median is one reading of ‖dL/dy‖, and losses of the loss.
READING = 5
# Spread of the answers, as a share of their size, from which a loss that compares them
# with their targets cannot be the same for any pairing.
VARIES = 1e-3
# rms of targets that is far for a network whose answers begin at about 1, and the share
# of it above which answers have arrived. Of scaled targets it is 1.
FAR, ARRIVED = 20.0, 0.1

_D34 = partial(Finding, "D34", "basics")


def _gain(statistics: Statistics) -> tuple[float, float] | None:
    """Return the gain as a share of the shuffled loss, and its standard error."""
    found = statistics.evaluation
    if found is None or len(found.shuffled_loss) < 2:
        return None
    shuffled = found.mean(found.shuffled_loss)
    pairs = zip(found.shuffled_loss, found.batch_loss, strict=True)
    gains = [other - own for other, own in pairs]
    mean, error = found.mean(tuple(gains)), standard_error(gains)
    if not (math.isfinite(mean + error) and shuffled):
        return None
    return mean / abs(shuffled), error / abs(shuffled)


def has_learned(statistics: Statistics) -> bool:
    """Return True where the loss is far below that of another sample's answers.

    In a watch, where the error of the answers is far below that of its first steps, or
    has not risen since in a network that was trained before.
    """
    found = _gain(statistics)
    if found is not None:
        return found[0] - 2 * found[1] > LEARNED
    return statistics.while_training and _error_fell(statistics, FALLEN)


def is_learning(statistics: Statistics) -> bool:
    """Return True where the loss is clearly below that of another sample's answers."""
    found = _gain(statistics)
    return found is not None and found[0] - 2 * found[1] > LEARNING


def has_learned_all(statistics: Statistics) -> bool:
    """Return True where the loss is hardly anything of that of other answers."""
    found = _gain(statistics)
    if found is not None:
        return found[0] > LEARNED_ALL
    return statistics.while_training and _error_fell(statistics, FALLEN_FAR)


def has_learned_nothing(statistics: Statistics) -> bool:
    """Return True where answers are no better than those of other samples.

    False where that cannot be told, as where the loss takes no targets. In a watch,
    where the error of the answers has hardly fallen, nor the losses: dL/dy of an
    absolute error is a sign, and does not fall.
    """
    if statistics.while_training:
        return not (_error_fell(statistics, FALLEN_LITTLE) or loss_fell(statistics))
    found, data = _gain(statistics), statistics.evaluation
    if found is None or data is None or not data.has_targets or _is_the_same(data):
        return False
    return _is_none(*found)


def _is_none(gain: float, error: float) -> bool:
    """Return True for a gain that is none, where its error lets one be seen."""
    return gain <= max(NO_GAIN, 2 * error) and 2 * error <= LEARNED


def is_starting(statistics: Statistics) -> bool:
    """Return True after a few steps in which the network has not learned yet."""
    return statistics.has_just_begun and not has_learned(statistics)


def _is_the_same(data: Evaluation) -> bool:
    """Return True where the loss is the same for any pairing."""
    pairs = zip(data.shuffled_loss, data.batch_loss, strict=True)
    return all(abs(other - own) <= SAME * abs(own) for other, own in pairs)


def _error_fell(statistics: Statistics, share: float) -> bool:
    """Return True where ‖dL/dy‖ has fallen below that share of the start.

    Or has not risen since, in a network that was trained before.
    """
    share = RISEN if statistics.began_trained else share
    ends = [s for s in statistics.layers if s.is_output]
    for layer in ends or statistics.of_role("weight")[-1:]:
        errors = layer.gradient_norm
        if len(errors) < 2 * READING:
            return False
        first, last = errors[:READING], errors[-READING:]
        if not numbers.median(last) < share * numbers.median(first):
            return False
    return bool(ends or statistics.of_role("weight"))


def loss_fell(statistics: Statistics) -> bool:
    """Return True where the losses of a watch fell by `LEARNED` of those of its start.

    The first answers say nothing of their samples, as those of others do in the gain.
    This holds for densities, too, whose dL/dy does not fall.
    """
    loop = statistics.training
    losses = () if loop is None else loop.losses
    if len(losses) < 2 * READING:
        return False
    values = [value for _, value in losses]
    first, last = (numbers.median(v) for v in (values[:READING], values[-READING:]))
    return first - last > LEARNED * abs(first)


def is_untrained(statistics: Statistics) -> bool:
    """Return True where neither weights nor answers show any training.

    Scales alone do not tell: RepVGG draws them, and a checkpoint that was loaded
    without its buffers has the statistics of a start beside trained weights.
    """
    found = _gain(statistics)
    if statistics.has_moved is not False or found is None:
        return False
    return _is_none(*found)


def progress(statistics: Statistics) -> Iterator[Finding]:
    """Check that the answers of a trained network depend on their samples."""
    found, wanted = _gain(statistics), statistics.targets
    if found is None or wanted is None or too_few(statistics.samples):
        return
    if wanted.low == wanted.high:
        return  # there is nothing to learn
    gain, error = found
    data, out = statistics.evaluation, statistics.output
    if data is not None and not data.has_targets:
        reason = (
            "the loss is the same for any pairing of answers and targets: the targets "
            "have no part in it, as in that of a density"
        )
        yield _D34("", "not_judged", gain, NO_GAIN, reason)
        return
    if gain > max(NO_GAIN, 2 * error):
        return
    if not _is_none(gain, error):
        reason = (
            f"the loss changes by {gain:.3g} ± {error:.2g} of its size when each "
            "answer is given to another sample, which tells nothing"
        )
        yield _D34("", "not_judged", gain, NO_GAIN, reason)
        return
    if not statistics.has_moved or statistics.has_just_begun:
        when = "when training begins" if statistics.has_moved else "before training"
        reason = f"its answers say nothing of the targets, as {when}"
        yield _D34("", "not_judged", gain, NO_GAIN, reason)
        return
    loss = math.nan if data is None else data.mean(data.batch_loss)
    if out is not None and _is_far(wanted, out, loss):
        yield _D34(
            "",
            "warning",
            out.scale,
            ARRIVED * math.hypot(wanted.mean, wanted.spread),
            f"the targets have mean {wanted.mean:.3g} and standard deviation "
            f"{wanted.spread:.3g}, and the answers are about {out.scale:.3g}: they "
            "have not arrived there, and say nothing of single samples",
            "subtract the mean of the training targets and divide by their standard "
            "deviation",
            {"is_origin": True},
        )
        return
    varies = out is not None and out.spread > VARIES * out.scale
    if varies and data is not None and _is_the_same(data):
        reason = (
            "the loss is the same for any pairing of answers and targets, as that "
            "of a generator whose critic sees no target"
        )
        yield _D34("", "not_judged", gain, NO_GAIN, reason)
        return
    share = None if out is None else out.most_chosen
    same = "" if share is None else f"; {share:.0%} of its answers are one class"
    yield _D34(
        "",
        "warning",
        gain,
        NO_GAIN,
        f"the loss is {loss:.3g}, and stays so when each answer is given to another "
        f"sample: it has learned nothing about single samples{same}",
        "check that inputs and targets belong together, that zero_grad, backward and "
        "step are all called, and try other learning rates",
        {"is_symptom": True},
    )


def _is_far(wanted: TargetStatistics, out: OutputStatistics, loss: float) -> bool:
    """Return True for answers that have not come to the size of their targets.

    A loss that scales the targets itself is far below their size.
    """
    size = math.hypot(wanted.mean, wanted.spread)
    compares = bool(COMPARING & out.operations) and wanted.classes is None
    return compares and size > FAR and out.scale < ARRIVED * size < loss

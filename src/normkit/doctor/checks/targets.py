"""Check of the targets against the output and the loss: part of D34.

The operations of the autograd graph say what gives the output and what the loss makes
of it, also where both are functions in a lambda.
"""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.thresholds import MIN_SAMPLES
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import (
    OutputStatistics,
    Statistics,
    TargetStatistics,
)

__all__ = ["is_cross_entropy", "targets"]

# The values of functions that end a model.
RANGES = {
    "Sigmoid": (0.0, 1.0),
    "Hardsigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Relu": (0.0, math.inf),
    "Softplus": (0.0, math.inf),
    "LogSigmoid": (-math.inf, 0.0),
    "LogSoftmax": (-math.inf, 0.0),
    "Elu": (-1.0, math.inf),
}
# What the states of gated recurrent layers come out of, and those layers.
STATES = frozenset(["MkldnnRnnLayer", "CudnnRnn", "Stack"])
GATED = frozenset(["LSTM", "GRU"])
# Scores that end in one of these cannot become sure: of ten classes a sigmoid's give
# the right one at most e/(e + 9) = .23, a tanh's .45; a ReLU's have no gradient below
# zero.
SQUASHED = ("Sigmoid", "Hardsigmoid", "Tanh", "Relu")
# Standard deviations of the targets that the farthest lies outside the output's range:
# that part of its error stays. Rounding and label noise lie below a tenth.
OUTSIDE = 0.1
# Losses that compare output and target value by value.
COMPARING = frozenset({"MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "Sub"})
BINARY = frozenset({"BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"})
CTC = frozenset({"CtcLoss", "CudnnCtcLoss"})  # of scores (T, N, K) or (N, T, K)
NLL = frozenset({"NllLoss", "NllLoss2D"})
# A cross-entropy with a minus sign, and nothing beside it.
NEGATED = NLL | {"LogSoftmax", "Neg", "Mean", "Sum", "View", "Transpose", "Permute"}
# Relative difference of two losses that are one sum in another order: float32 rounds at
# 6e-8, and a batch of hundreds leaves ten times that.
SAME = 1e-5
# Largest over least, of the shares of classes and of their weights in the loss, from
# which weights are meant to even out the shares; and the exponent of weights over
# shares, -1 for the inverse, from which they do the opposite.
UNEVEN, TWICE = 2.0, 0.5
# The largest size of a cosine, and the share of right answers which tells that a
# network has learned all the same. Of few classes a score of 1 is sure enough.
COSINE, MOST_ARE_RIGHT, MANY = 1.001, 0.8, 5
# Ones per row above which a softmax, whose row sums to one, cannot be right.
LABELS = 1.01

_D34 = partial(Finding, "D34", "basics")


def is_cross_entropy(out: OutputStatistics) -> bool:
    """Return True where the loss takes a softmax of the output."""
    return "LogSoftmax" in out.operations or out.loss_kind in (
        "CrossEntropyLoss",
        "cross_entropy",
    )


def targets(statistics: Statistics) -> Iterator[Finding]:
    """Check that output, loss and targets belong together."""
    found, out = statistics.targets, statistics.output
    if found is not None and found.beyond is not None:
        label, units = found.beyond
        yield _D34(
            "",
            "error",
            label,
            units - 1,
            f"a target is class {label}, and the output has {units} units, for the "
            f"classes 0 to {units - 1}",
            f"give the last layer {label + 1} units, or number the classes from 0"
            if label >= units
            else "number the classes from 0, or pass ignore_index= to the loss",
        )
    if out is None or (found is not None and found.not_finite):
        return  # what is not finite is told on its own
    yield from _output(statistics, out)
    yield from _pairing(statistics, out)
    if found is not None:
        yield from _values(statistics, found, out)
        if statistics.samples >= MIN_SAMPLES:
            yield from _variety(found, out)
            yield from _class_weights(found, out)


def _output(statistics: Statistics, out: OutputStatistics) -> Iterator[Finding]:
    """Check the function that gives the output against the loss.

    Not where the scores are a critic's, as those of what a generator made.
    """
    is_scored = not out.has_critic
    if out.units == 1 and (
        is_cross_entropy(out) or out.activation in ("Softmax", "LogSoftmax")
    ):
        yield _D34(
            "",
            "error",
            1.0,
            2.0,
            "the output is a softmax over one unit, which is 1 for every input",
            "use a sigmoid: binary_cross_entropy_with_logits on the one unit, or give "
            "the last layer a unit per class",
        )
    elif is_scored and out.activation in SQUASHED and is_cross_entropy(out):
        yield _D34(
            "",
            "warning",
            1.0,
            0.0,
            f"the scores end in {out.activation.lower()}, and cross_entropy applies "
            "its softmax to them",
            "give cross_entropy the logits: drop the activation behind the last layer",
        )
    elif (
        is_scored
        and out.activation == "Sigmoid"
        and "BinaryCrossEntropyWithLogits" in out.operations
    ):
        yield _D34(
            "",
            "warning",
            1.0,
            0.0,
            "the output is already a sigmoid, and the loss applies another",
            "give binary_cross_entropy_with_logits the logits: drop the last sigmoid",
        )
    elif is_cross_entropy(out) and _are_bounded(out):
        most = 1 / (1 + (out.units - 1) * math.exp(-2.0))
        yield _D34(
            "",
            "warning",
            out.largest,
            COSINE,
            f"{out.right or 0.0:.0%} of the answers are right, and no score is above "
            f"{out.largest:.3g} in size, as of cosines: the softmax gives the right "
            f"one of {out.units} classes at most {most:.2g}",
            "multiply cosines by a scale, such as 16 or a parameter, before "
            "cross_entropy",
        )
    elif out.squashed_by:
        function = out.squashed_by.lower()
        is_binary = "BinaryCrossEntropyWithLogits" in out.operations
        name = (
            "binary_cross_entropy_with_logits, which has a sigmoid"
            if is_binary
            else "cross_entropy, which has a softmax"
        )
        yield _D34(
            "",
            "warning",
            1.0,
            0.0,
            f"the loss takes the {function} of the output and gives it to {name} of "
            "its own",
            f"give the loss the output as it is: drop the {function} in front of it",
        )
    loss = statistics.evaluation
    least = min(loss.batch_loss, default=0.0) if loss is not None else 0.0
    # A loss may take the logarithm itself.
    is_nll = bool(NLL & out.operations) and not {"Log", "LogSoftmax"} & out.operations
    if is_nll and (out.sums_to_one or least < 0):
        yield _D34(
            "",
            "error",
            least,
            0.0,
            f"nll_loss gets {'probabilities' if out.sums_to_one else 'raw scores'}, "
            f"and is {least:.3g}; the loss of log-probabilities is never negative",
            "end the model in log_softmax, or use cross_entropy on its logits",
        )
    elif least < 0 and "Neg" in out.operations and out.operations <= NEGATED:
        yield _D34(
            "",
            "error",
            least,
            0.0,
            f"the loss is minus a cross-entropy ({least:.3g}), which is least where "
            "the answers are most wrong",
            "drop the minus sign: cross_entropy and nll_loss have their own",
        )
    elif least < 0 and _is_divergence(statistics, out):
        yield _D34(
            "",
            "error",
            least,
            0.0,
            f"the targets are distributions, and the loss is {least:.3g}: a divergence "
            "is never negative; it is given probabilities, and takes their logarithms",
            "give kl_div log-probabilities first and probabilities second",
        )


def _are_bounded(out: OutputStatistics) -> bool:
    """Return True for cosines that are scores, and right, though they cannot grow.

    A loss with a margin, as ArcFace's, scales them itself.
    """
    if not out.are_cosines or {"Mul", "Div"} & out.operations:
        return False
    is_learned = out.right is not None and out.right > MOST_ARE_RIGHT
    return is_learned and out.units >= MANY and out.largest <= COSINE


def _is_divergence(statistics: Statistics, out: OutputStatistics) -> bool:
    """Return True for a loss with the operations of kl_div, which takes no logarithm.

    It is t·ln t - t·x for targets t and answers x.
    """
    wanted = statistics.targets
    if wanted is None or not wanted.sums_to_one:
        return False
    is_probability = out.sums_to_one or "Softmax" in out.operations
    has_logarithm = bool({"Log", "LogSoftmax"} & out.operations)
    return is_probability and not has_logarithm and {"Sub", "Mul"} <= out.operations


def _pairing(statistics: Statistics, out: OutputStatistics) -> Iterator[Finding]:
    """Check that each answer is compared with the target of its own sample."""
    taken, right = out.softmax_dim, 1 if out.class_dim is None else out.class_dim
    is_other = taken == 0 or (out.class_dim is not None and taken != right)
    if CTC & out.operations:
        right, is_other = 2, taken is not None and taken < 2
    if taken is not None and is_other and (NLL | CTC) & out.operations:
        over = ", the samples of a batch," * (taken == 0 and right == 1)
        yield _D34(
            "",
            "error",
            taken,
            right,
            f"the output is a softmax over dimension {taken}{over} and the classes lie "
            f"along dimension {right}",
            f"take the softmax over dimension {right}, or give cross_entropy the "
            "logits",
        )
    loss = statistics.evaluation
    if out.broadcast is None or loss is None or not loss.shuffled_loss:
        return
    # A loss that brings them to one shape by itself tells the samples apart.
    pairs = zip(loss.shuffled_loss, loss.batch_loss, strict=True)
    if not all(abs(other - own) <= SAME * abs(own) for other, own in pairs):
        return
    answers, wanted = out.broadcast
    yield _D34(
        "",
        "error",
        0.0,
        SAME,
        f"the output has the shape {answers} and the targets {wanted}: the loss "
        "compares each answer with every target, and is the same when each is given to "
        "another sample",
        "give both one shape: targets.view_as(output)",
    )


def _values(
    statistics: Statistics, found: TargetStatistics, out: OutputStatistics
) -> Iterator[Finding]:
    """Check the range of the targets."""
    raw, found = found, out.compared or found
    shares = out.compared_binary or raw
    is_paired = out.compared is not None or out.has_their_size
    if BINARY & out.operations and not 0 <= shares.low <= shares.high <= 1:
        yield _D34(
            "",
            "error",
            shares.high if shares.high > 1 else shares.low,
            1.0 if shares.high > 1 else 0.0,
            f"targets go from {shares.low:.3g} to {shares.high:.3g}; outside 0 to 1 "
            "binary cross-entropy has no least value",
            "scale the targets to 0 to 1, or use cross_entropy for more than two "
            "classes",
        )
    elif is_paired and COMPARING & out.operations and not NLL & out.operations:
        last = statistics.layers[-1] if statistics.layers else None
        is_state = last is not None and last.kind in GATED and out.activation in STATES
        name = last.kind if is_state and last is not None else out.activation.lower()
        low, high = RANGES.get(
            "Tanh" if is_state else out.activation, (-math.inf, math.inf)
        )
        away = max(low - found.low, found.high - high)
        # Class numbers have no spread of their own; they are one apart.
        spread = found.spread or 1.0
        if away > OUTSIDE * spread:
            yield _D34(
                "",
                "warning",
                away,
                OUTSIDE * spread,
                f"targets go from {found.low:.3g} to {found.high:.3g}, and the output "
                f"ends in {name}, which gives {low:.3g} to {high:.3g}",
                "put a linear layer behind the recurrent one"
                if is_state
                else "drop the activation behind the last layer, or scale the targets "
                "to its range",
            )
    labels = raw.labels_per_sample
    is_softmax = is_cross_entropy(out) or out.sums_to_one
    if (
        labels is not None
        and labels > LABELS
        and is_softmax
        and not out.has_distributions
    ):
        yield _D34(
            "",
            "warning",
            labels,
            LABELS,
            f"a sample has {labels:.3g} labels on average, and the softmax shares one "
            "among the classes",
            "use a sigmoid per class: binary_cross_entropy_with_logits on the logits",
        )


def _variety(found: TargetStatistics, out: OutputStatistics) -> Iterator[Finding]:
    """Check that the targets of a classifier differ.

    Those of a generator are all one: its critic tells its answers apart.
    """
    if out.has_critic:
        return
    is_one_class = found.most_frequent == 1.0 and bool(NLL & out.operations)
    is_one_value = found.low == found.high and bool(BINARY & out.operations)
    if is_one_class or is_one_value:
        yield _D34(
            "",
            "warning",
            1.0,
            1.0,
            f"every target is {found.low:g}: there is nothing to tell apart",
            "check how the labels are read and joined to the samples",
        )


def _class_weights(found: TargetStatistics, out: OutputStatistics) -> Iterator[Finding]:
    """Check that a loss does not weight classes by how frequent they are.

    Weights are meant to even out the classes; those of a frequent class then are small.
    """
    shares = _shares(found, len(out.class_weights))
    both = [
        (share, weight)
        for share, weight in zip(shares, out.class_weights, strict=False)
        if share > 0 and weight > 0
    ]
    if len(both) < 2:
        return
    of_shares, of_weights = zip(*both, strict=True)
    if min(max(v) / min(v) for v in (of_shares, of_weights)) < UNEVEN:
        return
    logs = [[math.log(v) for v in values] for values in (of_shares, of_weights)]
    exponent, _ = numbers.linear_regression(*logs)
    if exponent < TWICE or numbers.correlation(*logs) < TWICE:
        return
    (most, heavy), (least, light) = max(both), min(both)
    yield _D34(
        "",
        "warning",
        exponent,
        TWICE,
        f"the loss weights the class with {most:.0%} of the targets by {heavy:.3g} and "
        f"the one with {least:.0%} by {light:.3g}: rare classes count still less",
        "weight each class by the inverse of its share: 1 / (classes * share)",
    )


def _shares(found: TargetStatistics, classes: int) -> list[float]:
    """Return the share of each class among the targets; empty where not known."""
    if found.classes is None:
        is_binary = (found.low, found.high) == (0.0, 1.0) and classes == 2
        return [1 - found.mean, found.mean] if is_binary else []
    if found.channels is None:
        return []
    shares = found.channels.pooled.mean.tolist()
    return shares if len(shares) == found.classes else []

"""Checks of what a batch holds: dropout, padding, mixing, calls: D11 to D13, D33.

F compares the variance between batch means with that between the means
of samples inside a batch, and is 1 when batches are drawn at random.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial

import torch

from normkit.doctor.channel_statistics import (
    ChannelStatistics,
)
from normkit.doctor.checks.eval_mode import (
    costs_nothing,
    eval_is_better,
    train_eval_gap,
)
from normkit.doctor.checks.in_order import in_order
from normkit.doctor.checks.progress import has_learned, has_learned_nothing
from normkit.doctor.checks.read_padding import read_padding
from normkit.doctor.checks.targets import BINARY, COMPARING, NLL
from normkit.doctor.checks.thresholds import above, below, too_few
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import Statistics

__all__ = [
    "CHECKS",
    "batches_not_mixed",
    "dropout_shift",
    "padding_contaminates",
    "shared_norm",
]

# var with dropout off / var with dropout on: .97 to 1.05 without dropout before it,
# .78 to .85 at p = .2, .43 to .46 at p = .5.
DROPOUT_INFO, DROPOUT_WARNING = 0.9, 0.7
# From here on a warning whatever it costs; p = .3 before a linear layer leaves .63 to
# .69, which many networks for tables have.
DROPOUT_MUCH = 0.55

# Layers with weights, as autograd names them: a loss with none takes the answers.
LAYERS = frozenset(["Addmm", "Baddbmm", "Bmm", "Convolution", "Mm", "Mv"])

# 9 % of padding: .04 / .93; 32 %: .16 / .73; 50 %: .25 / .57.
PADDING_SHIFT, PADDING_RATIO = 0.1, 0.85
# The same for a third of padding, which a network of one length may learn with.
MUCH_SHIFT, MUCH_RATIO = 0.2, 0.7

# Shuffled: at most 1.2 (90th percentile 1.5); a shuffle buffer of 100 samples 5 to 11;
# sorted by class 14 to 64.
MIXED_WARNING, MIXED_ERROR = 2.5, 6.0
# F of targets below which batches were put together by them, as the episodes of
# few-shot learning: of 20 random batches it is so in one of 14,000 cases.
STRATIFIED = 0.2
# Of 20 batches F has a spread of √(2/19) = .32: 2.5 is 4.6 of it above 1.
MIN_BATCHES = 20

# The average of two calls lies between them, so each is off by about half their
# distance: .25 and .38, D01's warnings.
CALL_MEAN, CALL_VAR = 0.5, 1.0
# Share of the channels that are constant in one forward and vary in the next, and how
# often they came or went. Units that die stay dead, and rare ones fire one by one.
COME_AND_GO, TIMES = 0.5, 5
# Half of fewer channels come and go by chance.
MIN_CHANNELS = 16

# Variance over the squared mean that is nothing but rounding.
ROUNDED = 1e-9

# Share from which a dropout leaves little. Hinton et al. drop 0.2 of the inputs and 0.5
# of hidden values.
MOSTLY = 0.75

_D11 = partial(Finding, "D11", "dropout_shift")
_D12 = partial(Finding, "D12", "padding_contaminates")
_D13 = partial(Finding, "D13", "batches_not_mixed")
_D33 = partial(Finding, "D33", "shared_norm")


def dropout_shift(statistics: Statistics) -> Iterator[Finding]:
    """Check D11: dropout before the layer changes its variance in eval mode.

    No fault where eval mode is better than batch statistics nevertheless, nor where a
    network without dropout layers learns, and hardly loses by it: sampled codes and
    noise shift it, too. So is a shift down to `DROPOUT_MUCH` where a network has
    learned and eval mode costs nothing. Or it drops the answers themselves.
    """
    yield from _answers_dropped(statistics)
    yield from _nearly_all_dropped(statistics)
    is_better = eval_is_better(statistics)
    is_free = (
        not statistics.has_dropout
        and statistics.evaluation is not None
        and not has_learned_nothing(statistics)
        and not any(finding.is_alarm for finding in train_eval_gap(statistics))
    )
    is_harmless = not has_learned_nothing(statistics) and costs_nothing(statistics)
    for layer, norm in statistics.norms:
        if norm.frozen or norm.in_training is None or norm.without_dropout is None:
            continue
        if reason := too_few(float(norm.in_training.sample_means.count.min())):
            yield _D11(layer.name, "not_judged", evidence=reason)
            continue
        both = norm.without_dropout.pooled.var / norm.in_training.pooled.var
        both = both[both.isfinite() & (both > 0)]
        if not both.numel():
            continue
        ratio = float(both.log().mean().exp())
        severity, threshold = below(ratio, warning=DROPOUT_WARNING)
        if severity == "clear" and ratio < DROPOUT_INFO:
            severity, threshold = "info", DROPOUT_INFO
        evidence = (
            f"with dropout off its inputs have {ratio:.2f} times the variance they "
            "have in training, which is what the running statistics hold"
        )
        if is_better and severity == "warning":
            severity = "info"
            evidence += "; eval mode is better than batch statistics nevertheless"
        elif is_free and severity == "warning":
            severity = "info"
            evidence += (
                "; it has no dropout layer, so that something else is random in "
                "training, and eval mode is hardly worse than batch statistics (D02)"
            )
        elif is_harmless and severity == "warning" and ratio > DROPOUT_MUCH:
            severity = "info"
            evidence += "; eval mode costs nothing on these batches"
        yield _D11(
            layer.name,
            severity,
            ratio,
            threshold,
            evidence,
            "move dropout behind the last batch norm, or recompute the statistics "
            "with dropout off: normkit.calibrate(model, loader)",
        )


def _answers_dropped(statistics: Statistics) -> Iterator[Finding]:
    """Check for a loss that compares the output of a dropout with the targets.

    A loss with a network of its own, or one that compares answers with each other, may
    take them as features.
    """
    found, out, wanted = statistics.dependence, statistics.output, statistics.targets
    if found is None or out is None or wanted is None or not found.dropped:
        return
    evaluation = statistics.evaluation
    if evaluation is None or not evaluation.has_targets:
        return
    if out.has_critic or LAYERS & out.operations:
        return
    is_compared = COMPARING & out.operations and wanted.classes is None
    if not (is_compared or BINARY & out.operations or NLL & out.operations):
        return
    yield _D11(
        found.dropped_by,
        "warning",
        found.dropped,
        0.0,
        f"the answers are the output of a dropout: in training {found.dropped:.0%} of "
        "them are exactly zero whatever the input, and the others "
        f"{1 / (1 - found.dropped) if found.dropped < 1 else math.inf:.3g} times as "
        "large; the loss compares them with the targets",
        "put dropout before the last layer with weights, not behind it",
        {"is_of_answers": True},
    )


def _nearly_all_dropped(statistics: Statistics) -> Iterator[Finding]:
    """Check for a dropout that leaves little, in a network that has not learned."""
    found = statistics.dependence
    if found is None or not MOSTLY < found.most_dropped < 1 or has_learned(statistics):
        return
    yield _D11(
        found.most_dropped_by,
        "warning",
        found.most_dropped,
        MOSTLY,
        f"a dropout takes {found.most_dropped:.0%} of its values away, and the network "
        "has learned little",
        "give the share to drop, not the share to keep: 0.1 to 0.5 are usual",
        {"is_origin": True},
    )


def padding_contaminates(statistics: Statistics) -> Iterator[Finding]:
    """Check D12: the padding of sequences enters the statistics.

    Padding is recognized as a constant end of the sequence in every channel of the
    layer's input: zeros, or their images position by position. Behind a position
    embedding or a recurrent layer it varies and cannot be told from data: the check
    reports `clear` there. A `mask=` given to one of normkit.nn's layers excludes it.
    Rows `(N·L, C)` of a batch of N are sequences that were flattened.

    Up to a third of padding is no fault of a network that takes one length, as one that
    reads its positions side by side, and has learned: no other padding comes later.

    And of any model: whether its loss is better without the padding that all samples of
    a batch share.
    """
    yield from read_padding(statistics)
    can_do = statistics.has_one_length and has_learned(statistics)
    can_do &= costs_nothing(statistics)
    for layer, norm in statistics.norms:
        found = norm.padding
        if norm.frozen or norm.in_training is None:
            continue
        if found is None and norm.in_training.lengths[1] < 2:
            continue
        if reason := too_few(float(norm.in_training.sample_means.count.min())):
            yield _D12(layer.name, "not_judged", evidence=reason)
            continue
        shift = 0.0 if found is None else found.shift
        ratio = 1.0 if found is None else found.var_ratio
        is_bad = not (shift <= PADDING_SHIFT and ratio >= PADDING_RATIO)
        is_much = not (shift <= MUCH_SHIFT and ratio >= MUCH_RATIO)
        is_harmless = is_bad and can_do and not is_much
        share = 0.0 if found is None else found.share
        yield _D12(
            layer.name,
            "info" if is_harmless else "warning" if is_bad else "clear",
            shift,
            PADDING_SHIFT,
            f"{share:.0%} of the positions lie in constant ends of their sequence; "
            f"they shift the mean by {shift:.2f} standard deviations and change the "
            f"variance by a factor of {ratio:.2f}"
            + "; the network has learned with it"
            * is_harmless,
            "pass mask= to normkit.nn's batch norm, or use layer norm",
            {"share": share, "var_ratio": ratio},
        )


def batches_not_mixed(statistics: Statistics) -> Iterator[Finding]:
    """Check D13: the batches differ more than random ones would.

    Judged by the inputs of the batch norms, and of the model, and by the targets; a
    warning is information where the network has learned, and eval mode is as good. A
    mask or a sequence is one sample: its pixels or tokens are alike in any order. In a
    watch by the inputs of the model alone.
    """
    yield from in_order(statistics)
    evaluation = statistics.evaluation
    if evaluation is not None and max(evaluation.samples, default=0) == 1:
        reason = "batches of one sample are in any order"
        yield _D13("", "not_judged", evidence=reason)
        return
    readings: list[tuple[float, str]] = []
    reason = ""
    for name, channels in _mixed(statistics).items():
        if channels.batches < MIN_BATCHES:
            reason = (
                f"{channels.batches} batches are too few to compare; "
                f"give at least {MIN_BATCHES}"
            )
            continue
        found = mixing(channels)
        if not math.isnan(found):
            readings.append((found, name))
    if not readings:
        if reason:
            yield _D13("", "not_judged", evidence=reason)
        return
    layers = {layer.name for layer, _ in statistics.norms}
    # A layer is named rather than the data, where it shows.
    of_layers = [r for r in readings if r[1] in layers and r[0] > MIXED_WARNING]
    value, name = max(of_layers or readings)
    has_targets = evaluation is None or evaluation.has_targets
    severity, threshold = above(value, warning=MIXED_WARNING, error=MIXED_ERROR)
    if severity == "error" and not layers:
        severity, threshold = "warning", MIXED_WARNING  # no statistics are spoiled
    clause = ""
    of_targets = min((f for f, layer in readings if layer == "targets"), default=1.0)
    if severity == "warning" and not of_layers and of_targets < STRATIFIED:
        severity = "info"
        clause = (
            "; each batch has the same share of each target: it was put together so"
        )
    if severity == "warning" and has_learned(statistics) and costs_nothing(statistics):
        severity = "info"
        clause += "; the network has learned nevertheless, perhaps from other batches"
    yield _D13(
        name if name in layers else "",
        severity,
        value,
        threshold,
        (
            f"the means of batches vary {value:.3g} times as much as random batches of "
            "the same samples would (F, median over channels)"
            if math.isfinite(value)
            else "each batch holds samples of one value"
        )
        + ("" if name in layers else f", of the {name if has_targets else 'inputs'}")
        + clause,
        "shuffle=True, or a larger shuffle buffer; for several domains a batch norm "
        "for each",
        {"by_layer": {layer: f for f, layer in readings}},
    )


def _mixed(statistics: Statistics) -> dict[str, ChannelStatistics]:
    """Return what shows the order of the samples, by layer; "inputs", "targets"."""
    found: dict[str, ChannelStatistics] = {}
    for layer, norm in statistics.norms:
        if not norm.frozen and norm.in_training is not None:
            # The first call of each forward: differences between the calls of a shared
            # layer come from the model (D33), not from the loader.
            found[layer.name] = norm.calls[0] if norm.calls else norm.in_training
    data, wanted = statistics.data, statistics.targets
    if data is not None and data.columns is not None:
        found["inputs"] = data.columns
    if wanted is not None and wanted.channels is not None:
        found["targets"] = wanted.channels
    return found


def mixing(channels: ChannelStatistics) -> float:
    """Return the F ratio of batches, median over channels; nan when unknown.

    Infinite for a channel that varies between batches alone, as targets do where a
    batch holds one class.
    """
    total, batches = channels.sample_means, channels.batches
    spare = total.count.to(torch.float64) - batches
    between = (total.m2 - channels.sample_within) / (batches - 1)
    within = channels.sample_within / spare
    # Sample means of one value differ by their rounding.
    varies = between > ROUNDED * total.mean.square()
    ratio = (between / within)[((within > 0) | varies) & (spare > 0)]
    return float(ratio.median()) if ratio.numel() else math.nan


def shared_norm(statistics: Statistics) -> Iterator[Finding]:
    """Check D33: one batch norm called on inputs of different distributions."""
    yield from _of_two_widths(statistics)
    for layer, norm in statistics.norms:
        if norm.frozen or len(norm.calls) < 2:
            continue
        calls = [call.pooled for call in norm.calls]
        first = calls[0]
        sd = (first.var + norm.eps).sqrt()
        shifts = [float(((c.mean - first.mean).abs() / sd).mean()) for c in calls]
        ratios = [
            float(((c.var + norm.eps) / sd.square()).log().abs().mean()) for c in calls
        ]
        shift, ratio = max(shifts), max(ratios)
        is_bad = not (shift <= CALL_MEAN and ratio <= CALL_VAR)
        yield _D33(
            layer.name,
            "warning" if is_bad else "info",
            shift,
            CALL_MEAN,
            f"{len(norm.calls)} calls in one forward, up to {shift:.2f} standard "
            f"deviations and a variance factor of {math.exp(ratio):.2f} apart; they "
            "share one running average",
            "give each use its own batch norm (the other weights may stay shared)",
            {"shift": shifts, "log_ratio": ratios},
        )


def _of_two_widths(statistics: Statistics) -> Iterator[Finding]:
    """Check for channels that are empty in every other forward of a training.

    In a slimmable network, or behind inputs of several kinds that are filled up with
    zeros. Other differences between the forwards of a step are not judged: real and
    generated images through one critic are common, and do no harm until eval mode.
    """
    for layer, norm in statistics.norms:
        # A batch without content, as of blank patches, has no channel that varies.
        shares = [share for share in norm.constant if share < 1]
        if norm.frozen or len(norm.running_mean) < MIN_CHANNELS or not shares:
            continue
        steps = [abs(b - a) for a, b in itertools.pairwise(shares)]
        if sum(step >= COME_AND_GO for step in steps) < TIMES:
            continue
        low, high = min(shares), max(shares)
        yield _D33(
            layer.name,
            "warning",
            high,
            COME_AND_GO,
            f"in some forwards of the training {high:.0%} of its channels are "
            f"constant, in others {low:.0%}; they share one running average, which "
            "fits neither",
            "give each use its own batch norm (the other weights may stay shared)",
            {"constant": shares},
        )


CHECKS = {
    "D11": dropout_shift,
    "D12": padding_contaminates,
    "D13": batches_not_mixed,
    "D33": shared_norm,
}

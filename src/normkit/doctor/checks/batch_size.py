"""Checks of the size of batches: D05, D06, D15, D30.

    n_eff = var / Var(batch mean)

is the number of independent values in a batch; neighbouring positions of one image add
little to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from normkit.doctor.channel_statistics import (
    MIN_EFFECTIVE_BATCHES,
    ChannelStatistics,
)
from normkit.doctor.checks.eval_mode import (
    SINGLE,
    are_served_singly,
    costs_nothing,
)
from normkit.doctor.checks.progress import has_learned
from normkit.doctor.checks.thresholds import NOT_ITS_LOOP
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.measurements import Statistics
from normkit.results import counted

__all__ = [
    "CHECKS",
    "accumulated_batches",
    "batch_too_small",
    "effective_values",
    "last_batch_of_one",
    "unsynchronised_ranks",
]

# Samples per batch: accuracy on digits fell by 32 points at 2 and by 1 at 4; on
# ImageNet by 11, 3.7 and 1.2 points at 2, 4 and 8 (Wu & He 2018).
SMALL_WARNING, FEW, SMALL_ERROR = 8, 4, 2
# Calls that are a training, and no trial of one.
MIN_CALLS = 3
# Many independent positions compensate few samples, from more than `FEW` on: the
# standard error of a variance of 16 values is √(2/16) = 35 %, D01's warning.
MIN_EFFECTIVE = 16.0

_LARGER = (
    "train with larger batches; where that cannot be, use group norm "
    "(normkit.convert(model, to='group')), SyncBatchNorm over ranks, or freeze the "
    "batch norms with the statistics of a pretrained model"
)

_HARMLESS = "; the network has learned with them, and eval mode is hardly worse (D02)"

_D05 = partial(Finding, "D05", "batch_too_small")
_D06 = partial(Finding, "D06", "last_batch_of_one")
_D15 = partial(Finding, "D15", "accumulated_batches")
_D30 = partial(Finding, "D30", "unsynchronised_ranks")


def batch_too_small(statistics: Statistics) -> Iterator[Finding]:
    """Check D05: too few values per channel in a batch for a mean and a variance.

    From five samples on no fault of a network that has learned with them, and whose
    answers in eval mode are as good.
    """
    if statistics.single_value is not None:
        yield _D05(
            statistics.single_value,
            "error",
            1.0,
            SMALL_ERROR,
            "a batch gives each channel of this layer a single value, whose mean is "
            "itself and whose variance is not defined: in training mode the layer "
            "raises an error",
            _LARGER,
            {"fewest_values": 1},
        )
    for layer in statistics.layers:
        if layer.own_batches is not None:
            yield _served_by_few(layer.name, layer.own_batches)
    yield from _trained_on_few(statistics)
    can_do = has_learned(statistics) and costs_nothing(statistics)
    is_single = are_served_singly(statistics)
    for layer, norm in statistics.norms:
        if norm.frozen or norm.in_training is None:
            continue
        samples = norm.in_training.samples_per_batch
        # In eval mode: in training mode the layers before it fix the batch means.
        effective = math.nan
        if norm.in_eval is not None:
            effective = effective_values(norm.in_eval)
        is_small = not effective > MIN_EFFECTIVE
        severity: Severity = "clear"
        if samples <= SMALL_WARNING:
            severity = "warning" if is_small or samples <= FEW else "info"
        if samples <= SMALL_ERROR and is_small:
            severity = "error"
        is_harmless = severity == "warning" and samples > FEW and can_do
        if is_harmless:
            severity = "info"
        is_served = is_single and severity in ("warning", "error")
        if is_served:
            severity = "info"
        is_alarm = severity in ("warning", "error")
        threshold = SMALL_ERROR if severity == "error" else SMALL_WARNING
        yield _D05(
            layer.name,
            severity,
            samples,
            threshold,
            _evidence_of_size(samples, effective, is_small=is_alarm)
            + _HARMLESS * is_harmless
            + SINGLE * is_served,
            _LARGER,
            {"n_eff": effective, "fewest_values": norm.in_training.values},
        )


def _trained_on_few(statistics: Statistics) -> Iterator[Finding]:
    """Check the batches of a watched training, whose values are not counted."""
    loop = statistics.training
    layers = [
        layer.name
        for layer, norm in statistics.norms
        if norm.train_steps and "Sync" not in layer.kind
    ]
    if loop is None or loop.is_trial or not layers or loop.forwards < MIN_CALLS:
        return
    if not 0 < loop.samples <= FEW:
        return
    if (loop.updates or 0) > 0 and loop.forwards >= 1.5 * (loop.updates or 1):
        return  # D15 tells of gradients that are accumulated
    # Four cost a point on digits: no more than an information where the network learns.
    can_do = loop.samples > SMALL_ERROR + 1 and has_learned(statistics)
    yield _D05(
        layers[0],
        "info" if can_do else "warning",
        loop.samples,
        FEW,
        f"the training calls the model with {counted(round(loop.samples, 1), 'sample')}"
        " at a time, on average: the statistics of each batch are those of so few, and "
        "eval mode has others",
        _LARGER,
        {"n_eff": math.nan, "fewest_values": 0},
    )


def _served_by_few(name: str, seen: ChannelStatistics) -> Finding:
    """Return the finding on a batch norm that has no statistics but each batch's own.

    With enough positions in a sample that is an instance norm, and no fault.
    """
    samples, effective = seen.samples_per_batch, effective_values(seen)
    if math.isnan(effective):
        effective = seen.values
    is_small = samples <= SMALL_WARNING and not effective > MIN_EFFECTIVE
    evidence = "it keeps no running statistics, so that in eval mode, too, an answer "
    evidence += f"depends on the {samples:.3g} samples of its batch"
    return _D05(
        name,
        "warning" if is_small else "clear",
        samples,
        SMALL_WARNING,
        evidence + f", worth {effective:.3g} independent values" * is_small,
        "keep running statistics: track_running_stats=True, or evaluate in larger "
        "batches; a norm of single samples is normkit.convert(model, to='group')",
        {"n_eff": effective, "fewest_values": seen.values},
    )


def _evidence_of_size(samples: float, effective: float, *, is_small: bool) -> str:
    text = f"its batches hold {counted(round(samples, 1), 'sample')}"
    if effective > 0:
        text += f", worth {counted(round(effective, 1), 'independent value')}"
    if is_small:
        text += (
            ": too few for the mean and variance that training mode normalizes by, "
            "unlike eval mode"
        )
    return text


def effective_values(channels: ChannelStatistics) -> float:
    """Return the number of independent values in a batch; nan when unknown."""
    if channels.batches < MIN_EFFECTIVE_BATCHES:
        return math.nan
    ratio = channels.pooled.var / channels.batch_means.unbiased_var
    ratio = ratio[ratio.isfinite()]
    if not ratio.numel():
        return math.nan
    # No batch holds more independent values than values.
    return min(float(ratio.median()), channels.values)


def last_batch_of_one(statistics: Statistics) -> Iterator[Finding]:
    """Check D06: a last batch of one sample, which batch norm cannot normalize."""
    data = statistics.data
    if data is None:
        return
    single = [
        layer.name
        for layer, norm in statistics.norms
        if not norm.frozen
        and not norm.takes_one_value
        and norm.in_training is not None
        and norm.in_training.values_per_sample <= 1
    ]
    if not single:
        return
    if data.last is None:
        reason = "the size of the loader's last batch is unknown"
        yield _D06(single[0], "not_judged", evidence=reason)
        return
    yield _D06(
        single[0],
        "error" if data.last == 1 else "clear",
        data.last,
        1.0,
        f"an epoch ends with a batch of {data.last or 'full size'}; a sample has one "
        "value per channel in this layer",
        "pass drop_last=True or another batch size to the loader",
        {"layers": single},
    )


def accumulated_batches(statistics: Statistics) -> Iterator[Finding]:
    """Check D15: gradients are accumulated over small batches, statistics are not."""
    loop = statistics.training
    if loop is None or not any(not norm.frozen for _, norm in statistics.norms):
        return
    if loop.is_trial:
        yield _D15("", "not_judged", evidence=NOT_ITS_LOOP)
        return
    if not loop.updates:
        reason = "no optimizer was given to watch, or it made no step"
        yield _D15("", "not_judged", evidence=reason)
        return
    per_update = loop.forwards / loop.updates
    is_bad = per_update >= 1.5 and loop.samples <= SMALL_WARNING
    yield _D15(
        "",
        "warning" if is_bad else "clear",
        loop.samples,
        SMALL_WARNING,
        f"{per_update:.3g} forwards per step of the optimizer, of {loop.samples:.3g} "
        "samples each; batch norm normalizes each by itself",
        "larger batches, SyncBatchNorm over ranks, or group norm: "
        "normkit.convert(model, to='group')",
        {"forwards_per_update": per_update},
    )


def unsynchronised_ranks(statistics: Statistics) -> Iterator[Finding]:
    """Check D30: several ranks with small batches, not synchronized."""
    if statistics.world_size < 2:
        return
    for layer, norm in statistics.norms:
        if norm.frozen or norm.in_training is None or "Sync" in layer.kind:
            continue
        samples = norm.in_training.samples_per_batch
        severity: Severity = "warning" if samples <= SMALL_WARNING else "clear"
        yield _D30(
            layer.name,
            severity,
            samples,
            SMALL_WARNING,
            f"{samples:.3g} samples per rank on {statistics.world_size} ranks, "
            "normalized separately",
            "normkit.convert(model, to='sync')",
        )


CHECKS = {
    "D05": batch_too_small,
    "D06": last_batch_of_one,
    "D15": accumulated_batches,
    "D30": unsynchronised_ranks,
}

"""Check of the order in which a watched training gets its samples: part of D13.

A diagnosis reads the batches of a loader, which may not be those of the training. A
watch sees the calls: one weighted sum of each sample tells whether the samples of a
batch are alike, and whether each batch is like the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.progress import has_learned, loss_fell
from normkit.doctor.checks.spikes import loss_spike
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import Statistics

__all__ = ["in_order"]

# F, and the correlation of each batch with the one before, of samples that come in an
# order: 23 and .95 where a game gives them level by level, 31 and .64 of digits sorted
# by class in batches of 64, 1 and 0 where they are drawn. Of 199 healthy programs a
# policy that learns on what it does has 8.5 and .84, an actor and its critic 49, .33.
ALIKE, DRIFTS = 12.0, 0.5
MIN_STEPS = 100

_D13 = partial(Finding, "D13", "batches_not_mixed")


def in_order(statistics: Statistics) -> Iterator[Finding]:
    """Check for samples in an order, where the loss leaps or nothing is learned."""
    loop = statistics.training
    if loop is None or loop.is_trial or (loop.updates or 0) < MIN_STEPS:
        return
    alike, drift = loop.order
    if not (alike > ALIKE and drift > DRIFTS):
        return
    leaps = any(finding.is_alarm for finding in loss_spike(statistics))
    learns = has_learned(statistics) or loss_fell(statistics)
    yield _D13(
        "",
        "warning" if leaps or not learns else "info",
        alike,
        ALIKE,
        f"the means of the batches of this training vary {alike:.3g} times as much as "
        "random batches of the same samples would (F), and each is like the one before "
        f"(correlation {drift:.2f}): samples come in an order",
        "shuffle=True; where samples come one after another, as from a game or a "
        "sensor, keep some and draw batches from these",
        {"drift": drift},
    )

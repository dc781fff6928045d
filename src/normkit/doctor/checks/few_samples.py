"""Check of a training that gets the same few samples again and again: part of D34."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from normkit.doctor.finding import Finding
from normkit.doctor.measurements import Statistics

__all__ = ["few_samples"]

# Calls that are compared, and how often each of the samples came.
MIN_CALLS, TIMES = 100, 20
# Samples in all. Fewer are a truth table, more may be a small table as it is; images
# are moved and changed where there are few.
LEAST, MOST, MOST_IMAGES = 16, 64, 256
IMAGES = 4
# Parameters per sample, with which these can be learned by heart.
PER_SAMPLE = 10

_D34 = partial(Finding, "D34", "basics")


def few_samples(statistics: Statistics) -> Iterator[Finding]:
    """Check for few samples that come again and again, as of `next(iter(loader))`.

    A large network learns so few samples by heart, and nothing of others.
    """
    loop = statistics.training
    if loop is None or loop.is_trial or loop.compared_calls < MIN_CALLS:
        return
    samples = loop.different_samples
    size = sum(s.weight.size for s in statistics.layers if s.weight is not None)
    most = MOST_IMAGES if loop.input_dims >= IMAGES else MOST
    if samples * TIMES > loop.compared_samples or not LEAST <= samples <= most:
        return
    if size >= PER_SAMPLE * samples:
        yield _D34(
            "",
            "warning",
            samples,
            most,
            f"the first {loop.compared_calls} calls got the same {samples} samples "
            f"again and again, and the weights have {size:,} numbers: they are learned "
            "by heart, and nothing of others",
            "take the batches by `for x, y in loader`, since each `iter(loader)` "
            "begins anew; train on more data, or change it at random in each step",
        )

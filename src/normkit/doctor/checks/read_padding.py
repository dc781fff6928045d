"""Check of answers that padding makes worse, with or without a norm: part of D12."""

from __future__ import annotations

import statistics as numbers
from collections.abc import Iterator
from functools import partial

from normkit.doctor.finding import Finding
from normkit.doctor.measurements import Statistics, standard_error

__all__ = ["read_padding"]

# Share of the loss that is left without padding which no sample needs.
SPARED = 0.7

_D12 = partial(Finding, "D12", "padding_contaminates")


def read_padding(statistics: Statistics) -> Iterator[Finding]:
    """Check for answers that get worse with padding that no sample needs.

    As where means over positions, attention or a norm count it, and training had less.
    """
    found = statistics.trimmed
    if found is None:
        return
    more = [a - b for a, b in zip(found.whole, found.cut, strict=True)]
    whole, cut = numbers.fmean(found.whole), numbers.fmean(found.cut)
    is_sure = numbers.fmean(more) > 2 * standard_error(more)
    is_bad = is_sure and 0 <= cut < SPARED * whole
    yield _D12(
        "",
        "warning" if is_bad else "clear",
        cut / whole if whole else 1.0,
        SPARED,
        f"without {found.places:.3g} positions that are padding in all samples of a "
        f"batch, the loss in eval mode is {cut:.3g}, with them {whole:.3g}",
        "give attention, means and norms a mask of the padding, or pad as in training: "
        "to the longest sample of a batch",
        {"is_origin": is_bad},
    )

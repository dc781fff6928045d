"""The checks: pure functions from what was measured to what follows from it.

Each takes a `Statistics` and yields a `Finding` for every layer it looked at: an
error, a warning, an info, `clear` with the value, or `not_judged` with the reason.
Grouped by question: `population` (do the running statistics describe the inputs?),
`buffers` (can they be what they claim?), `batches` (does one batch speak for the
data?), `modes` (was every layer in the right mode?), `weights` (have the weights what
they need?), `saturation` (can the units still learn?), `flow` (do signals and gradients
pass?), `basics` (input, output, order of the layers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from normkit.doctor.checks import (
    basics,
    batches,
    buffers,
    flow,
    modes,
    population,
    saturation,
    weights,
)
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import Statistics
from normkit.errors import ArgumentError

__all__ = ["CHECKS", "run"]

Check = Callable[[Statistics], Iterator[Finding]]

CHECKS: dict[str, Check] = dict(
    sorted(
        item
        for group in (
            basics,
            batches,
            buffers,
            flow,
            modes,
            population,
            saturation,
            weights,
        )
        for item in group.CHECKS.items()
    )
)


def run(statistics: Statistics, only: Iterable[str] | None = None) -> list[Finding]:
    """Every reading of every check.

    Args:
        statistics: What was measured.
        only: Ids of the checks to run; all of them by default.

    Raises:
        ArgumentError: `only` names a check that does not exist.
    """
    ids = list(CHECKS) if only is None else list(only)
    unknown = [id_ for id_ in ids if id_ not in CHECKS]
    if unknown:
        raise ArgumentError(
            f"no check is called {', '.join(unknown)}; there are {', '.join(CHECKS)}"
        )
    return [finding for id_ in ids for finding in CHECKS[id_](statistics)]

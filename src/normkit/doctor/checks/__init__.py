"""The checks: pure functions from measurements to findings.

Each takes a `Statistics` and yields a `Finding` for every layer it checks: an error, a
warning, an info, `clear` with the value, or `not_judged` with the reason. Grouped by
subject: `population` (running statistics against the inputs), `eval_mode` (what it
costs), `averages` (how they are kept), `buffers` (their values and precision),
`batch_size`, `batches` (what a batch holds, with `in_order`), `modes` (training and
eval mode), `weights` (with `steps` and `too_large`), `saturation`, `signals` and
`gradients` (over the depth, with `no_gradient`), `inputs` (their scale), `basics`
(norms of single samples, output, order of the layers, with `answers`, `targets`,
`outliers`, `few_samples`, `progress` and `not_finite`), `transformers` (residual
stream, attention, gains, post-norm), `spikes` (the loss over the steps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from normkit.doctor.checks import (
    averages,
    basics,
    batch_size,
    batches,
    buffers,
    eval_mode,
    gradients,
    inputs,
    modes,
    population,
    saturation,
    signals,
    spikes,
    transformers,
    weights,
)
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import Statistics
from normkit.errors import ArgumentError

__all__ = ["CHECKS", "run"]

Check = Callable[[Statistics], Iterator[Finding]]

_MODULES = (
    *(averages, basics, batch_size, batches, buffers, eval_mode, gradients, inputs),
    *(modes, population, saturation, signals, spikes, transformers, weights),
)
CHECKS: dict[str, Check] = dict(
    sorted(item for module in _MODULES for item in module.CHECKS.items())
)


def run(statistics: Statistics, only: Iterable[str] | None = None) -> list[Finding]:
    """Run the checks, and return all their results.

    Args:
        statistics: The measurements.
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
    if statistics.single_value is not None:
        reason = "training mode fails in a batch norm with one value per channel (D05)"
        return [
            finding
            for id_ in ids
            for finding in list(CHECKS[id_](statistics))
            or [Finding(id_, CHECKS[id_].__name__, "", "not_judged", evidence=reason)]
        ]
    return [finding for id_ in ids for finding in CHECKS[id_](statistics)]

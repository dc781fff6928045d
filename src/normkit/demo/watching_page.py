"""The part of the demo's page about what was watched while the networks trained."""

from __future__ import annotations

import math
from collections.abc import Iterable

from normkit.demo.watching import Seen, WatchStep
from normkit.doctor.history_charts import gaps
from normkit.doctor.pages import finding_cards
from normkit.report import Bands, Block, Figure, Heading, Lines, Row, Table, Text

__all__ = ["watching"]

_SEEN, _WHICH = ("saturated %", "gradient"), ("without", "with")
# Below this share a chart of saturation shows a line along its axis.
WORTH_A_CHART = 0.01


def watching(step: WatchStep) -> Iterable[Block]:
    """Return the part of the page about what was watched while training."""
    both = step.plain, step.normalized
    yield Heading(f"2. {step.title}")
    yield Text(
        "Probes in every layer merged moments while the networks of step 1 were "
        "trained; no activation was kept and the training is bitwise the one without."
    )
    limits = _common_range(both)
    yield Row(
        [
            Figure(
                f"Input of one unit: {seen.name}",
                Bands(
                    seen.steps,
                    low=gaps(seen.band[0]),
                    middle=gaps(seen.band[1]),
                    high=gaps(seen.band[2]),
                    y_label="input of the sigmoid",
                    y_range=limits,
                    hue=i,
                ),
                alt=_band_in_words(seen),
                caption=f"Unit {seen.unit} of `{seen.band_layer}`, over the images of "
                "a batch. A band without width tells no digit from another.",
            )
            for i, seen in enumerate(both)
        ]
    )
    yield Row(
        [
            Figure(
                f"Gradient by layer: {seen.name}",
                Lines(
                    {
                        name: (seen.steps, gaps(values))
                        for name, values in seen.gradient_norm.items()
                    },
                    y_label="‖dL/dy‖",
                    log_y=True,
                    in_order=True,
                    y_range=_gradient_range(both),
                ),
                alt=f"The median norm at {step.first_layer} is "
                f"{seen.median_gradient(step.first_layer):.1e}.",
            )
            for seen in both
        ]
    )
    yield from _saturation(both)
    for seen in both:
        yield Heading(f"The doctor on {seen.name}", level=3)
        if seen.findings:
            yield finding_cards(seen.findings)
        else:
            yield Text("Nothing was found.")


def _saturation(both: tuple[Seen, Seen]) -> Iterable[Block]:
    largest = max(seen.most_saturated(n) for seen in both for n in seen.saturated)
    if largest >= WORTH_A_CHART:
        yield Row(
            [
                Figure(
                    f"Saturated share by layer: {seen.name}",
                    Lines(
                        {
                            name: (seen.steps, [100 * v for v in gaps(values)])
                            for name, values in seen.saturated.items()
                        },
                        y_label="inputs where sigmoid is flat, %",
                        in_order=True,
                        y_range=(0, 105 * largest),
                    ),
                    alt=_saturation_in_words(seen),
                )
                for seen in both
            ]
        )
    else:
        most = f"at most {100 * largest:.2g}%" if largest else "none"
        yield Text(
            f"Saturation does not stop the first network: {most} of the inputs of "
            "any layer were where the sigmoid is flat. The slope of a sigmoid is at "
            "most 1/4, and the gradient passes six of them."
        )
    yield Table(
        ["hidden layer", *(f"{what}, {which}" for what in _SEEN for which in _WHICH)],
        [
            [
                str(number),
                *(100 * seen.most_saturated(activation) for seen in both),
                *(seen.median_gradient(weights) for seen in both),
            ]
            for number, (weights, activation) in enumerate(
                zip(both[0].gradient_norm, both[0].saturated, strict=False), start=1
            )
        ],
        "Saturated: the largest share, at any step, of inputs where the slope of the "
        "sigmoid is below 5% of its largest. Gradient: the median of ‖dL/dy‖ over the "
        "steps. Without and with batch norm.",
    )


def _finite(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def _common_range(both: Iterable[Seen]) -> tuple[float, float]:
    values = [v for seen in both for edge in seen.band for v in _finite(edge)]
    low, high = min(values, default=-1.0), max(values, default=1.0)
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def _gradient_range(both: Iterable[Seen]) -> tuple[float, float] | None:
    values = [
        v
        for seen in both
        for series in seen.gradient_norm.values()
        for v in _finite(series)
        if v > 0
    ]
    return (min(values) / 2, max(values) * 2) if values else None


def _band_in_words(seen: Seen) -> str:
    low, _, high = (_finite(edge) for edge in seen.band)
    if not low or not high:
        return "No values were recorded."
    return (
        f"The band from the 15th to the 85th percentile is {high[0] - low[0]:.2g} wide "
        f"at first and {high[-1] - low[-1]:.2g} at the end."
    )


def _saturation_in_words(seen: Seen) -> str:
    last = {n: _finite(values)[-1:] for n, values in seen.saturated.items()}
    parts = [f"{name} {100 * v[0]:.1f} %" for name, v in last.items() if v]
    return "At the end: " + ", ".join(parts)

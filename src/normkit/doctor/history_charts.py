"""Charts of a watched training over its steps, as blocks of a page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from normkit.report import Bands, Block, Figure, Heading, Heat, Lines, Row
from normkit.report.charts import thinned

__all__ = ["MAX_ROWS", "gaps", "history_charts"]

# The most layers in a chart; tables and cards keep the worst.
MAX_ROWS = 60
MAX_COLUMNS = 40


def history_charts(history: dict[str, Any]) -> Iterable[Block]:
    """Yield logged numbers, bands of two layers, saturation and gradients of all."""
    steps, layers = history["steps"], history["layers"]
    if history["logged"]:
        yield Heading("Logged")
        yield Row([_logged(name, pairs) for name, pairs in history["logged"].items()])
    hidden = {n: s for n, s in layers.items() if s["role"] == "activation"} or layers
    banded = {n: s for n, s in hidden.items() if not _is_empty(s["middle"])}
    # A unit that gets one value throughout shows nothing where others show something.
    banded = {n: s for n, s in banded.items() if not _is_flat(s)} or banded
    if banded:
        yield Heading("Inputs over time")
        yield Row(
            [
                Figure(
                    f"Input of unit {history['unit']} of {name}",
                    Bands(steps, gaps(s["low"]), gaps(s["middle"]), gaps(s["high"])),
                    alt=f"The median goes from {_first(s['middle']):.3g} to "
                    f"{_first(s['middle'][::-1]):.3g}.",
                )
                for name, s in _ends(banded)
            ]
        )
    saturated = {n: s["saturated"] for n, s in layers.items()}
    yield from _heat(steps, saturated, "Saturated share", largest=1.0)
    gradients = {
        name: (steps, gaps(s["gradient_norm"]))
        for name, s in thinned(list(layers.items()), 10)
        if s["role"] == "weight" and not _is_empty(s["gradient_norm"])
    }
    if gradients:
        yield Heading("Gradients over time")
        yield Figure(
            "Gradient norm by layer",
            Lines(gradients, y_label="‖dL/dh‖", log_y=True, in_order=True),
            alt="Norm of the loss's gradient at the output of each weight layer.",
        )
    dead = {
        name: s["dead"]
        for name, s in layers.items()
        if s["role"] == "activation" and any(s["dead"])
    }
    yield from _heat(
        steps, dead, "Share of units that are zero on the whole batch", 1.0
    )
    updates = {n: s["update_ratio"] for n, s in layers.items()}
    yield from _heat(steps, updates, "Change of the weights per step, ‖Δw‖/‖w‖")
    streams = {n: s["after"] for n, s in history["blocks"].items()}
    yield from _heat(steps, streams, "rms of the output of each block")
    logits = {n or "(model)": s["largest"] for n, s in history["attention"].items()}
    yield from _heat(steps, logits, "Largest attention logit")


def _logged(name: str, pairs: list[list[float]]) -> Figure:
    steps, values = [step for step, _ in pairs], [value for _, value in pairs]
    alt = f"{name} goes from {values[0]:.3g} to {values[-1]:.3g}."
    return Figure(name, Lines({name: (steps, values)}), alt=alt)


def _heat(
    steps: list[int],
    series: dict[str, list[float | None]],
    title: str,
    largest: float | None = None,
) -> Iterable[Block]:
    present = {name: values for name, values in series.items() if not _is_empty(values)}
    if not present:
        return
    columns = thinned(list(range(len(steps))), MAX_COLUMNS)
    yield Heading(title)
    yield Heat(
        [str(steps[i]) for i in columns],
        [
            (name, [values[i] for i in columns])
            for name, values in thinned(list(present.items()), MAX_ROWS)
        ],
        f"{title}, by layer and step",
        largest=largest,
    )


def _ends(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the first and the last entry."""
    items = list(found.items())
    return items if len(items) <= 2 else [items[0], items[-1]]


def _is_empty(values: list[float | None]) -> bool:
    return all(value is None for value in values)


def _is_flat(series: dict[str, list[float | None]]) -> bool:
    ends = {value for key in ("low", "high") for value in series[key]}
    return len(ends - {None}) < 2


def gaps(values: list[float | None]) -> list[float]:
    """Return the values with NaN, which a chart leaves out, for each missing one."""
    return [math.nan if value is None else value for value in values]


def _first(values: list[float | None]) -> float:
    return next((v for v in values if v is not None), math.nan)

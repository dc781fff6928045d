"""Charts as values, with their legends and the numbers they show.

The legend is not drawn: `legend(chart)` returns it as data, and the page writes it as
text that wraps on a phone. `drawing.draw` makes the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from normkit.report.svg import css_name

__all__ = [
    "NUM_HUES",
    "Bands",
    "Chart",
    "Histograms",
    "LegendEntry",
    "Lines",
    "legend",
    "series_colours",
    "summary",
    "thinned",
]

Numbers = Sequence[float] | np.ndarray

# Colours defined in page.html: 8 distinct ones, 10 in order.
NUM_HUES, NUM_RAMP = 8, 10


@dataclass(frozen=True)
class Bands:
    """Three percentiles of one quantity over steps, the outer two as a band.

    Attributes:
        steps: The step of each value.
        low: The lower edge, as long as `steps`.
        middle: The line in the middle.
        high: The upper edge.
        x_label: Name of `steps`.
        y_label: Name of the values, with the unit.
        names: Names of the line and of the band.
        y_range: Limits of the vertical axis; equal limits make charts comparable.
        hue: Index of the colour, 0 to 7.
    """

    kind: ClassVar[str] = "bands"
    steps: Numbers
    low: Numbers
    middle: Numbers
    high: Numbers
    x_label: str = "step"
    y_label: str = ""
    names: tuple[str, str] = ("50th percentile", "15th to 85th percentile")
    y_range: tuple[float, float] | None = None
    hue: int = 0


@dataclass(frozen=True)
class Lines:
    """One line per series over steps.

    Attributes:
        series: Name → (steps, values).
        x_label: Name of the steps.
        y_label: Name of the values, with the unit.
        log_y: Use a logarithmic vertical axis; zeros are then left out.
        in_order: The series have an order (layers by depth), shown by a scale of
            colours instead of distinct ones.
        y_range: Limits of the vertical axis.
        marks: Horizontal lines: name → value (a threshold, chance).
        x_names: Name of each place 0, 1, … on the horizontal axis, such as a layer; the
            pointer shows the name and the value of each point.
    """

    kind: ClassVar[str] = "lines"
    series: Mapping[str, tuple[Numbers, Numbers]]
    x_label: str = "step"
    y_label: str = ""
    log_y: bool = False
    in_order: bool = False
    y_range: tuple[float, float] | None = None
    marks: Mapping[str, float] | None = None
    x_names: Sequence[str] = ()


@dataclass(frozen=True)
class Histograms:
    """Histograms over one another, each as a share of its own values.

    Attributes:
        series: Name → (edges, counts), one more edge than counts.
        x_label: Name of the values, with the unit.
        y_label: Name of the height of a bar.
        x_range: Limits of the horizontal axis.
    """

    kind: ClassVar[str] = "histograms"
    series: Mapping[str, tuple[Numbers, Numbers]]
    x_label: str = ""
    y_label: str = "share of values"
    x_range: tuple[float, float] | None = None


Chart = Bands | Lines | Histograms


@dataclass(frozen=True)
class LegendEntry:
    """One line of a legend: a name, the CSS variable of its colour, its shape."""

    name: str
    colour: str
    shape: str  # "line", "band" or "mark"


def legend(chart: Chart) -> list[LegendEntry]:
    """Return the meaning of each colour of `chart`, in drawing order."""
    match chart:
        case Bands():
            colour = css_name("hue", chart.hue % NUM_HUES)
            line, band = chart.names
            return [
                LegendEntry(line, colour, "line"),
                LegendEntry(band, colour, "band"),
            ]
        case Lines():
            colours = series_colours(len(chart.series), in_order=chart.in_order)
            return [
                LegendEntry(name, css_name(*colour), "line")
                for name, colour in zip(chart.series, colours, strict=True)
            ] + [
                LegendEntry(name, css_name("ink", 1), "mark")
                for name in chart.marks or {}
            ]
        case Histograms():
            colours = series_colours(len(chart.series), in_order=False)
            return [
                LegendEntry(name, css_name(*colour), "band")
                for name, colour in zip(chart.series, colours, strict=True)
            ]


def summary(chart: Chart) -> tuple[list[str], list[list[Any]]]:
    """Return the numbers of `chart` as a small table: its columns and its rows."""
    match chart:
        case Bands():
            columns = [chart.x_label or "step", "low", "middle", "high"]
            rows = zip(chart.steps, chart.low, chart.middle, chart.high, strict=True)
            return columns, [list(row) for row in thinned(list(rows), 8)]
        case Lines():
            columns = ["", "first", "least", "most", "last", "points"]
            return columns, [
                [name, *_ends(values), len(values)]
                for name, (_, values) in chart.series.items()
            ]
        case Histograms():
            columns = ["", "from", "to", "fullest from", "fullest to", "values"]
            return columns, [
                [name, *_histogram_summary(edges, counts)]
                for name, (edges, counts) in chart.series.items()
            ]


def series_colours(count: int, *, in_order: bool) -> list[tuple[str, int]]:
    """Return the colour of each series as kind and index, for `svg.css_name`."""
    # Beyond the number of distinct colours, a scale of colours is used.
    if not in_order and count <= NUM_HUES:
        return [("hue", i) for i in range(count)]
    last = max(count - 1, 1)
    return [("ramp", round(i * (NUM_RAMP - 1) / last)) for i in range(count)]


def thinned(items: list[Any], most: int) -> list[Any]:
    """Return at most `most` of the items, spread evenly, with the first and last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _ends(values: Numbers) -> list[float | None]:
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return [None] * 4
    ends = (finite[0], finite.min(), finite.max(), finite[-1])
    return [float(end) for end in ends]


def _histogram_summary(edges: Numbers, counts: Numbers) -> list[float | int | None]:
    edges, counts = np.asarray(edges, float), np.asarray(counts, float)
    full = np.flatnonzero(counts)
    if not len(full):
        return [None, None, None, None, 0]
    mode = int(counts.argmax())
    return [
        float(edges[full[0]]),
        float(edges[full[-1] + 1]),
        float(edges[mode]),
        float(edges[mode + 1]),
        int(counts.sum()),
    ]

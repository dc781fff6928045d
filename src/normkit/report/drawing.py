"""Drawings of charts as inline SVG with the colours of the page.

matplotlib draws on a separate figure (no pyplot, no global state) with sentinel
colours, which are then replaced by CSS variables, so one picture serves light and dark
pages. Text stays text, ids are made unique by `prefix`, and numbers are rounded to a
tenth of a pixel.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from normkit.errors import ArgumentError, DependencyError
from normkit.report.charts import (
    NUM_HUES,
    Bands,
    Chart,
    Histograms,
    Lines,
    Numbers,
    series_colours,
)
from normkit.report.svg import FONT, HEIGHT, WIDTH, inlined, sentinel

__all__ = ["draw"]

# Characters of a label that fit along the height.
MAX_LABEL = 32
# Characters of a name at a place of the horizontal axis, and of all of them: 400
# pixels hold 55 of 11 pixels and the gaps between.
MAX_TICK, MAX_TICKS_WIDTH = 14, 48
# Points per line and per chart, to limit the size of the page; each bucket keeps its
# extremes, so no spike is lost.
MAX_POINTS, MAX_POINTS_IN_ALL = 160, 1600


def draw(chart: Chart, prefix: str) -> str:
    """Return the SVG of `chart`, for use inside an HTML page.

    Args:
        chart: The chart. NaN and infinite values leave gaps.
        prefix: Prefix of every id in the picture; unique within the page.

    Raises:
        ArgumentError: The parts of a series differ in length.
        DependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError(
            "a page with charts needs matplotlib, which is not installed; "
            "pip install 'normkit[report]'"
        ) from None

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": prefix,
        "text.parse_math": False,
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": True,
        "font.size": FONT,
        "path.simplify": True,
    }
    with rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = figure.add_subplot()
        _dress(figure, axes)
        _PAINTERS[type(chart)](axes, chart)
        axes.set_xlabel(_label(chart.x_label), color=sentinel("ink", 1))
        axes.set_ylabel(_label(chart.y_label), color=sentinel("ink", 1))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return inlined(text.getvalue(), prefix, _titles(chart))


def _paint_bands(axes: Any, chart: Bands) -> None:
    steps, low, middle, high = _same_length(
        "Bands", chart.steps, chart.low, chart.middle, chart.high
    )
    colour = sentinel("hue", chart.hue % NUM_HUES)
    kept = _thin(MAX_POINTS, steps, low, middle, high)
    steps, low, middle, high = steps[kept], low[kept], middle[kept], high[kept]
    axes.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.plot(steps, middle, color=colour, linewidth=1.6)
    _count_steps(axes, steps)
    _set_limits(axes, y_range=chart.y_range, empty=len(steps) == 0)


def _paint_lines(axes: Any, chart: Lines) -> None:
    colours = series_colours(len(chart.series), in_order=chart.in_order)
    drawn = 0
    if chart.log_y:
        axes.set_yscale("log", nonpositive="mask")
        # matplotlib writes powers as math text, which names must never be parsed as.
        axes.yaxis.set_major_formatter(lambda value, _: _power_of_ten(value))
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    for (name, (steps, values)), colour in zip(
        chart.series.items(), colours, strict=True
    ):
        x, y = _same_length(name, steps, values)
        if chart.log_y:
            y = np.where(y > 0, y, math.nan)
        kept = _thin(min(MAX_POINTS, MAX_POINTS_IN_ALL // len(colours)), x, y)
        # A single measurement is a dot; a line through it would be invisible.
        marker = "o" if len(kept) == 1 else None
        axes.plot(
            x[kept],
            y[kept],
            color=sentinel(*colour),
            linewidth=1.6,
            marker=marker,
        )
        drawn += int(np.isfinite(y).sum())
        _count_steps(axes, x)
        if chart.x_names:
            _add_targets(axes, name, x, y)
    if chart.log_y and drawn and not _holds_power_of_ten(*axes.get_ylim()):
        axes.set_yscale("linear")
    for value in (chart.marks or {}).values():
        axes.axhline(value, color=sentinel("ink", 1), linewidth=1, dashes=(4, 3))
    if chart.x_names:
        places = _ticks(chart.x_names)
        axes.set_xticks(places, [_tick(chart.x_names[i]) for i in places])
    _set_limits(axes, y_range=chart.y_range, empty=drawn == 0)


def _add_targets(axes: Any, name: str, x: np.ndarray, y: np.ndarray) -> None:
    """Add an invisible square for the pointer to each point of a line."""
    for place, value in zip(x, y, strict=True):
        if math.isfinite(value):
            axes.plot(
                *([place], [value]),
                linestyle="",
                marker="s",
                markersize=10,
                markeredgewidth=0,
                color=sentinel("ink", 1),
                alpha=0,
                gid=_gid(name, place),
            )


def _gid(name: str, place: float) -> str:
    return f"point {place:g} of {name}"


def _titles(chart: Chart) -> dict[str, str]:
    """Return what the pointer shows at each point of a chart with names of places."""
    if not isinstance(chart, Lines) or not chart.x_names:
        return {}
    return {
        _gid(name, place): _printable(
            f"{chart.x_names[int(place)]}: {name} {value:.3g}"
        )
        for name, (places, values) in chart.series.items()
        for place, value in zip(places, values, strict=True)
    }


def _ticks(names: Sequence[str]) -> list[int]:
    """Return the places whose names fit on the axis: the ends, others between."""
    width = min(MAX_TICK, max(map(len, names)))
    count = min(len(names), max(MAX_TICKS_WIDTH // width, 2))
    return sorted(
        {round(i * (len(names) - 1) / max(count - 1, 1)) for i in range(count)}
    )


def _tick(name: str) -> str:
    """Return the end of a name, which differs more than its beginning."""
    seen = _printable(name)
    return seen if len(seen) <= MAX_TICK else "…" + seen[1 - MAX_TICK :]


def _paint_histograms(axes: Any, chart: Histograms) -> None:
    colours = series_colours(len(chart.series), in_order=False)
    drawn = 0.0
    for (name, (edges, counts)), colour in zip(
        chart.series.items(), colours, strict=True
    ):
        edges, counts = np.asarray(edges, float), np.asarray(counts, float)
        if len(edges) != len(counts) + 1:
            raise ArgumentError(
                f"histogram {name!r} has {len(counts)} counts and {len(edges)} edges; "
                "it needs one edge more than counts"
            )
        total = counts.sum()
        axes.stairs(
            counts / total if total else counts,
            edges,
            color=sentinel(*colour),
            fill=True,
            alpha=0.35,
        )
        drawn += total
    axes.set_ylim(bottom=0)
    _set_limits(axes, x_range=chart.x_range, empty=drawn == 0)


def _count_steps(axes: Any, steps: np.ndarray) -> None:
    """Use integer ticks where all steps are integers."""
    if (steps % 1 == 0).all():
        axes.xaxis.get_major_locator().set_params(integer=True)


def _holds_power_of_ten(low: float, high: float) -> bool:
    """Return False for a range in which a logarithmic axis would have no number."""
    return math.ceil(math.log10(low)) <= math.floor(math.log10(high))


def _power_of_ten(value: float) -> str:
    if value <= 0:
        return ""
    exponent = round(math.log10(value))
    if exponent in (0, 1):
        return f"{value:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


_PAINTERS: dict[type, Callable[[Any, Any], None]] = {
    Bands: _paint_bands,
    Lines: _paint_lines,
    Histograms: _paint_histograms,
}


def _dress(figure: Any, axes: Any) -> None:
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(sentinel("ink", 2))
    axes.grid(axis="y", color=sentinel("ink", 3), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(
        which="both", length=0, labelcolor=sentinel("ink", 1), labelsize=FONT
    )
    axes.margins(x=0.01)


def _set_limits(
    axes: Any,
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    empty: bool,
) -> None:
    if x_range is not None:
        axes.set_xlim(*x_range)
    if y_range is not None:
        axes.set_ylim(*y_range)
    if empty:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(
            *(0.5, 0.5, "no finite values to draw"),
            transform=axes.transAxes,
            ha="center",
            color=sentinel("ink", 1),
        )


def _same_length(name: str, *parts: Numbers) -> list[np.ndarray]:
    arrays = [np.asarray(part, dtype=float) for part in parts]
    if len({len(a) for a in arrays}) != 1:
        lengths = ", ".join(str(len(a)) for a in arrays)
        raise ArgumentError(
            f"the parts of {name!r} have lengths {lengths}; a chart needs one value "
            "of each per step"
        )
    return [np.where(np.isfinite(a), a, math.nan) for a in arrays]


def _thin(most: int, x: np.ndarray, *values: np.ndarray) -> np.ndarray:
    """Return the indices to keep: all, or each bucket's extremes of each value."""
    if len(x) <= most:
        return np.arange(len(x))
    kept = {0, len(x) - 1}
    num_buckets = max(most // (2 * len(values)), 4)
    for bucket in np.array_split(np.arange(len(x)), num_buckets):
        for y in values:
            part = y[bucket]
            if np.isnan(part).all():
                kept.add(int(bucket[0]))
            else:
                kept.add(int(bucket[np.nanargmin(part)]))
                kept.add(int(bucket[np.nanargmax(part)]))
    return np.array(sorted(kept))


def _printable(text: str) -> str:
    # Characters that XML cannot hold become U+FFFD.
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _label(text: str) -> str:
    # Long labels would hide the chart.
    seen = _printable(text)
    return seen if len(seen) <= MAX_LABEL else seen[: MAX_LABEL - 1] + "…"

"""Style of the studies' figures: one palette, one size, SVG and PNG.

matplotlib is loaded when a figure is drawn, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normkit.errors import DependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["COLORS", "band", "bars", "bars_by_group", "color", "points", "save"]

# Okabe & Ito: eight colours that colour-blind readers tell apart.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000", "#8C8C8C"),
)

_STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "normkit",
}


def color(index: int) -> str:
    """Return the colour of the arm number `index`."""
    return COLORS[index % len(COLORS)]


def save(draw: Callable[[Figure], None], stem: Path, title: str) -> list[Path]:
    """Draw one figure and write it as `stem`.svg and `stem`.png.

    Args:
        draw: Fills an empty figure of 7.2 by 2.9 inches.
        stem: Path without suffix; its folder is made.
        title: Kept in the file for readers who cannot see it.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise DependencyError(
            "figures need matplotlib, which is not installed; "
            "pip install 'normkit[report]'"
        ) from missing
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                _label_powers(axis)
        for suffix, metadata in (
            ("svg", {"Title": title, "Date": None}),
            ("png", {"Title": title, "Software": None}),
        ):
            path = stem.with_name(f"{stem.name}.{suffix}")
            figure.savefig(path, dpi=160, metadata=metadata)
            written.append(path)
    return written


def _label_powers(axis: Axis) -> None:
    """Label a log axis by powers of ten, or 1, 2, 5 within a decade or two.

    matplotlib's own labels, 6 × 10⁻¹ at every tick, crowd a narrow axis.
    """
    from matplotlib.ticker import (
        LogLocator,
        NullFormatter,
        NullLocator,
        ScalarFormatter,
    )

    if axis.get_scale() != "log" or isinstance(axis.get_minor_locator(), NullLocator):
        return
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if low > 0 and high / low < 100:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(ScalarFormatter())


def band(
    axes: Axes,
    x: Sequence[float],
    rows: Sequence[Sequence[float]],
    *,
    label: str = "",
    index: int = 0,
    dashed: bool = False,
) -> None:
    """Draw the median over seeds as a line, and all of them as a band."""
    values = np.asarray(rows, dtype=float)
    with np.errstate(all="ignore"):
        middle = np.median(values, axis=0)
    style = "--" if dashed else "-"
    axes.plot(x, middle, style, color=color(index), label=label)
    if len(values) > 1:
        axes.fill_between(
            x, values.min(0), values.max(0), color=color(index), alpha=0.15, lw=0
        )


def bars(
    axes: Axes,
    names: Sequence[str],
    rows: Sequence[Sequence[float]],
    *,
    indices: Sequence[int] | None = None,
) -> None:
    """Draw one bar per arm: the median over seeds, with a dot for each seed.

    For an axis from 0, or of orders of magnitude; `points` suits the others.

    `rows` has one value per seed for each arm.
    """
    for i, row in enumerate(rows):
        shade = color(i if indices is None else indices[i])
        _bar(axes, i, row, shade, 0.7)
    axes.set_xticks(range(len(names)), names)
    axes.grid(visible=False, axis="x")


def bars_by_group(
    axes: Axes,
    groups: Sequence[str],
    arms: Mapping[str, Sequence[Sequence[float]]],
    *,
    indices: Sequence[int] | None = None,
) -> None:
    """Draw the bars of several arms side by side in each group, with a legend.

    `arms` has one value per seed for each arm and group.
    """
    width = 0.8 / len(arms)
    for i, (name, rows) in enumerate(arms.items()):
        shade = color(i if indices is None else indices[i])
        for group, row in enumerate(rows):
            left = group - 0.4 + (i + 0.5) * width
            label = name if group == 0 else ""
            _bar(axes, left, row, shade, 0.9 * width, label)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(visible=False, axis="x")


def _bar(
    axes: Axes,
    x: float,
    row: Sequence[float],
    shade: str,
    width: float,
    label: str = "",
) -> None:
    """Draw the median as a bar, the seeds as dots on it."""
    median = float(np.median(row))
    axes.bar(x, median, color=shade, alpha=0.75, width=width, label=label)
    _seeds(axes, x, row, 0.21 * width)


def points(
    axes: Axes,
    names: Sequence[str],
    rows: Sequence[Sequence[float]],
    *,
    indices: Sequence[int] | None = None,
) -> None:
    """Draw one dash per arm at the median over seeds, with a dot for each seed.

    For an axis that does not start at 0, where the length of a bar would mislead.

    `rows` has one value per seed for each arm.
    """
    for i, row in enumerate(rows):
        shade = color(i if indices is None else indices[i])
        axes.hlines(float(np.median(row)), i - 0.3, i + 0.3, color=shade, lw=2)
        _seeds(axes, i, row, 0.15)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(visible=False, axis="x")


def _seeds(axes: Axes, x: float, row: Sequence[float], reach: float) -> None:
    spread = np.linspace(-reach, reach, len(row)) if len(row) > 1 else [0.0]
    axes.plot(x + np.asarray(spread), row, ".", color="black", ms=3)

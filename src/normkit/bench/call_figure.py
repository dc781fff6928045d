"""Figure of the ratio over the number of values as an SVG: one line for each layer.

One panel for each mode and number of threads, all with the same logarithmic axes. The
SVG is written without a plotting library, so a record always gives the same file. It
has its own background and both sets of colours, and its text is still 10 pixels high
where a page shows it 400 pixels wide.
"""

from __future__ import annotations

from html import escape
from math import ceil, floor, log2, prod

from normkit.bench.call_cases import KINDS, SIZES, CallCase
from normkit.bench.call_tables import LOSS, sentence
from normkit.bench.calls import MODES, CallCell, Calls

__all__ = ["draw"]

_WIDTH, _MARGIN, _LEFT, _RIGHT = 400, 10, 41, 12
_LEGEND_ROW, _OCTAVE, _TITLE, _TICKS, _FOOT = 18, 22, 24, 22, 16
# Where the columns of the legend begin: the second holds the longest name.
_LEGEND_COLUMNS = (10, 120, 285)
# 130k and 6.4M would touch their neighbours.
_LABELLED = ("4k", "16k", "64k", "200k", "800k", "3.2M")

# Class of the line by layer, in light and in dark; both layouts of batch norm share
# one colour. Those of Okabe and Ito, for which no kind of colour blindness matters.
_COLOURS = {
    "batch": ("#0072b2", "#56b4e9"),
    "group": ("#c65000", "#ff9d4d"),
    "layer": ("#007d5a", "#3ddc97"),
    "RMS": ("#b0508a", "#f0a8d0"),
    "instance": ("#555555", "#cfcfcf"),
}


def draw(found: Calls) -> str:
    """Draw the undisturbed plain cells of a record as an SVG document."""
    plain = [
        cell
        for cell in found.cells
        if cell.case.form == "plain" and not cell.is_disturbed
    ]
    kinds = [kind for kind in KINDS if any(_kind(cell.case) == kind for cell in plain)]
    low = min([-2, *(floor(log2(cell.ratio)) for cell in plain)])
    high = max([2, *(ceil(log2(cell.ratio)) for cell in plain)])
    height_of_panel = _TITLE + _OCTAVE * (high - low) + _TICKS
    top = _MARGIN + _LEGEND_ROW * ceil(len(kinds) / len(_LEGEND_COLUMNS)) + 6
    parts = [_legend(kinds)]
    for threads in found.threads:
        for mode in MODES:
            cells = [c for c in plain if (c.threads, c.mode) == (threads, mode)]
            title = f"{mode}, {threads} thread{'s' * (threads != 1)}"
            parts.append(_panel(title, cells, top, low, high))
            top += height_of_panel
    height = top + _FOOT
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{top + 6}" text-anchor="end">'
        "number of values</text>"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img">\n<title>torch ÷ normkit over the number of values</title>\n'
        f"<desc>{escape(sentence(found))}</desc>\n<style>\n{_style()}\n</style>\n"
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>\n{body}\n</svg>\n'
    )


def _style() -> str:
    colours = _COLOURS.items()
    light = [f".{name} {{ stroke: {c[0]}; fill: {c[0]} }}" for name, c in colours]
    dark = [f".{name} {{ stroke: {c[1]}; fill: {c[1]} }}" for name, c in colours]
    return "\n".join(
        [
            "text { font: 11px system-ui, sans-serif; fill: #24292f; stroke: none }",
            ".title { font-weight: 600 }",
            ".note { font-size: 10px; fill: #9a1c1c }",
            ".page { fill: #ffffff }",
            ".loss { fill: #d62728; fill-opacity: 0.09 }",
            ".grid { stroke: #d0d7de; stroke-width: 0.6 }",
            ".one { stroke: #24292f; stroke-width: 1.2 }",
            "polyline.line { fill: none; stroke-width: 1.8 }",
            ".dashed { stroke-dasharray: 4 2.5 }",
            *light,
            "@media (prefers-color-scheme: dark) {",
            "text { fill: #e6edf3 } .note { fill: #ff9b9b }",
            ".page { fill: #0d1117 } .loss { fill-opacity: 0.2 }",
            ".grid { stroke: #3d444d } .one { stroke: #e6edf3 }",
            *dark,
            "}",
        ]
    )


def _legend(kinds: list[tuple[str, str]]) -> str:
    parts: list[str] = []
    for place, (layer, layout) in enumerate(kinds):
        row, column = divmod(place, len(_LEGEND_COLUMNS))
        x, y = _LEGEND_COLUMNS[column], _MARGIN + _LEGEND_ROW * row + 6
        name = CallCase(layer, layout, "plain", "4k").row
        parts.append(
            f'<polyline class="line {_classes(layer, layout)}" '
            f'points="{x},{y} {x + 20},{y}"/>'
            f'<text x="{x + 25}" y="{y + 4}">{name}</text>'
        )
    return "\n".join(parts)


def _panel(title: str, cells: list[CallCell], top: int, low: int, high: int) -> str:
    above, below = top + _TITLE, top + _TITLE + _OCTAVE * (high - low)
    right = _WIDTH - _RIGHT

    def height(ratio: float) -> float:
        return above + _OCTAVE * (high - log2(ratio))

    loss = height(LOSS)
    frame = [
        f'<text class="title" x="{_LEFT}" y="{top + 16}">{title}</text>',
        f'<text x="{right}" y="{top + 16}" text-anchor="end">torch ÷ ours</text>',
        f'<rect class="loss" x="{_LEFT}" y="{loss:.1f}" width="{right - _LEFT}" '
        f'height="{below - loss:.1f}"/>',
        f'<text class="note" x="{_LEFT + 4}" y="{below - 5}">slower than torch</text>',
    ]
    frame += [
        f'<line class="{"grid" if octave else "one"}" x1="{_LEFT}" x2="{right}" '
        f'y1="{height(2.0**octave):.1f}" y2="{height(2.0**octave):.1f}"/>'
        f'<text x="{_LEFT - 5}" y="{height(2.0**octave) + 4:.1f}" '
        f'text-anchor="end">{2.0**octave:g}</text>'
        for octave in range(low, high + 1)
    ]
    frame += [
        f'<text x="{_across(size):.1f}" y="{below + 14}" '
        f'text-anchor="middle">{size}</text>'
        for size in _LABELLED
    ]
    curves = [
        _curve(
            *kind,
            {
                cell.case.size: (_across(cell.case.size), height(cell.ratio))
                for cell in cells
                if _kind(cell.case) == kind
            },
        )
        for kind in KINDS
    ]
    return "\n".join(frame + curves)


def _curve(layer: str, layout: str, points: dict[str, tuple[float, float]]) -> str:
    """Draw dots, and lines between neighbours; a missing size leaves a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for size in SIZES:
        if size in points:
            runs[-1].append(points[size])
        elif runs[-1]:
            runs.append([])
    lines = [
        f'<polyline class="line {_classes(layer, layout)}" points="'
        + " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
        + '"/>'
        for run in runs
        if len(run) > 1
    ]
    dots = [
        f'<circle class="{layer}" cx="{x:.1f}" cy="{y:.1f}" r="1.8"/>'
        for x, y in points.values()
    ]
    return "".join(lines + dots)


def _across(size: str) -> float:
    """Return the x coordinate of a size, on a logarithmic axis."""
    counts = {
        name: log2(prod(CallCase("batch", "NCHW", "plain", name).shape))
        for name in SIZES
    }
    first, last = min(counts.values()), max(counts.values())
    # Half a label fits beside the first and the last point.
    left, right = _LEFT + 14, _WIDTH - _RIGHT - 8
    return left + (right - left) * (counts[size] - first) / (last - first)


def _kind(case: CallCase) -> tuple[str, str]:
    return case.layer, case.layout


def _classes(layer: str, layout: str) -> str:
    return f"{layer} dashed" if layout == "channels_last" else layer

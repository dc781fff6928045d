"""A report page: a small document model, and one self-contained HTML file from it.

    page = Page(
        title="Report of the doctor",
        lead="Two findings in 8 layers.",
        blocks=[
            Heading("Findings"),
            Cards([Card("D01 stale statistics", "…", severity="error", fix="…")]),
            Heading("Saturation"),
            Row([Figure("Without", Lines({...}), alt="…"), Figure("With", …)]),
            Table(["layer", "share"], rows, caption="Saturated share at the end"),
            Details("All layers", [Bars(…), Heat(…)]),
        ],
    )
    page.write("report.html")          # or page.to_html()

Blocks: Heading, Text, Code, Numbers, Table (a cell may be a Mark), Bars, Heat, Cards,
Figure, Row, Details.
Charts inside a Figure: Lines, Bands, Histograms (from `normkit.doctor.charts`,
re-exported here).

Every string is untrusted and escaped; in prose (`Text`, leads, captions, cards)
`backticks` set code. The file holds no script and asks the network for nothing, and
its content policy forbids both. jinja2 and matplotlib load when a page is made.
"""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

from normkit.doctor.charts import (
    Bands,
    Chart,
    Histograms,
    Lines,
    draw,
    legend,
    summary,
)
from normkit.errors import DependencyError

__all__ = [
    "Bands",
    "Bar",
    "Bars",
    "Block",
    "Card",
    "Cards",
    "Code",
    "Details",
    "Figure",
    "Heading",
    "Heat",
    "Histograms",
    "Lines",
    "Mark",
    "Number",
    "Numbers",
    "Page",
    "Row",
    "Severity",
    "Table",
    "Text",
    "format_value",
]

Severity = Literal["error", "warning", "info", "ok", "not judged"]


@dataclass(frozen=True)
class Heading:
    """The start of a section; those of level 2 make the table of contents."""

    kind: ClassVar[str] = "heading"
    text: str
    level: Literal[2, 3] = 2


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    """Lines of code or of a terminal, kept as they are."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Number:
    """One figure to notice: what it is, its value, a word on it."""

    label: str
    value: Any
    note: str = ""
    severity: Severity | None = None


@dataclass(frozen=True)
class Numbers:
    """A few figures side by side."""

    kind: ClassVar[str] = "numbers"
    numbers: Sequence[Number]


@dataclass(frozen=True)
class Mark:
    """A cell of a table that says by sign and word how something stands."""

    severity: Severity
    text: str = ""

    def __str__(self) -> str:
        return self.text or self.severity


@dataclass(frozen=True)
class Table:
    """Rows under column names.

    Attributes:
        columns: The head.
        rows: As many cells as columns; numbers are formatted by `format_value` and
            set to the right where a whole column is numeric; a `Mark` shows its sign.
        caption: What the table shows; screen readers announce it.
    """

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    @property
    def is_numeric(self) -> list[bool]:
        """Per column, whether every cell is a number or missing."""
        return [
            any(_is_number(row[i]) for row in self.rows)
            and all(_is_number(row[i]) or row[i] is None for row in self.rows)
            for i in range(len(self.columns))
        ]

    @property
    def name_column(self) -> int | None:
        """The column that names the rows: the first one of words."""
        for i, is_numeric in enumerate(self.is_numeric):
            if not is_numeric and not any(isinstance(r[i], Mark) for r in self.rows):
                return i
        return None


@dataclass(frozen=True)
class Bar:
    """One line of `Bars`; a severity marks it."""

    name: str
    value: float | None
    severity: Severity | None = None


@dataclass(frozen=True)
class Bars:
    """One horizontal bar per name (per layer), as a table.

    Attributes:
        bars: In the order to show.
        caption: What the bars show.
        value_name: The head of the value column, with the unit.
        limit: A threshold to mark on every bar.
        largest: The value of a full bar; the largest value or limit by default.
    """

    kind: ClassVar[str] = "bars"
    bars: Sequence[Bar]
    caption: str = ""
    value_name: str = "value"
    limit: float | None = None
    largest: float | None = None

    def percent(self, value: float | None) -> float:
        """How full the bar of `value` is, 0 to 100."""
        values = [b.value for b in self.bars] + [self.limit]
        finite = [v for v in values if v is not None and math.isfinite(v)]
        full = self.largest or max(finite, default=0.0)
        if value is None or math.isnan(value) or full <= 0:
            return 0.0
        return round(min(max(100 * value / full, 0.0), 100.0), 1)


@dataclass(frozen=True)
class Heat:
    """A strip of shaded cells per row (layers by steps), as a table.

    Attributes:
        columns: Names of the cells' columns.
        rows: Name and values of each row; None where there is nothing.
        caption: What the shade shows.
        corner: The head of the name column.
        largest: The value of the full shade; the largest one by default.
    """

    kind: ClassVar[str] = "heat"
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]
    caption: str = ""
    corner: str = "layer"
    largest: float | None = None

    def percent(self, value: float | None) -> int | None:
        """How strong the shade of `value` is, 0 to 100; None for no value."""
        if value is None or math.isnan(value):
            return None
        finite = [
            v for _, row in self.rows for v in row if v is not None and math.isfinite(v)
        ]
        full = self.largest or max(finite, default=0.0)
        if full <= 0:
            return 0
        return round(min(max(100 * value / full, 0.0), 100.0))


@dataclass(frozen=True)
class Card:
    """One finding.

    Attributes:
        title: What was found, in a few words.
        text: The evidence, in a sentence or two.
        severity: Shown by word, sign and colour.
        where: The layer or object it is about.
        facts: Short pairs: (name, value).
        fix: What to do; code in backticks.
    """

    title: str
    text: str = ""
    severity: Severity = "info"
    where: str = ""
    facts: Sequence[tuple[str, Any]] = ()
    fix: str = ""


@dataclass(frozen=True)
class Cards:
    """Findings, one under the other."""

    kind: ClassVar[str] = "cards"
    cards: Sequence[Card]


@dataclass(frozen=True)
class Figure:
    """A chart with its title, its legend and its numbers.

    Attributes:
        title: What is shown.
        chart: Lines, Bands or Histograms.
        alt: What a reader who sees no picture should know: the point, in words.
        caption: A sentence under the chart.
    """

    kind: ClassVar[str] = "figure"
    title: str
    chart: Chart
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """Blocks side by side, one under the other on a narrow page."""

    kind: ClassVar[str] = "row"
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Details:
    """Blocks that open on a click."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Block]
    is_open: bool = False


Block = (
    Heading
    | Text
    | Code
    | Numbers
    | Table
    | Bars
    | Heat
    | Cards
    | Figure
    | Row
    | Details
)


@dataclass(frozen=True)
class Page:
    """A report: a title, a lead that says the outcome, blocks, a foot.

    Attributes:
        title: The title of the file and its first heading.
        lead: The outcome in one or two sentences.
        blocks: What follows, in order.
        foot: How the page was made (versions, seed, date): one line.

    Example:
        >>> page = Page("Tiny", "Nothing was found.", [Text("<b> is text here.")])
        >>> "&lt;b&gt; is text here." in page.to_html()
        True
    """

    title: str
    lead: str = ""
    blocks: Sequence[Block] = field(default_factory=list)
    foot: str = ""

    def to_html(self) -> str:
        """Give the page as one HTML file that needs nothing beside itself.

        Raises:
            DependencyError: jinja2 or, for charts, matplotlib is not installed.
        """
        try:
            from jinja2 import Environment, StrictUndefined
        except ImportError:
            raise DependencyError(
                "a report page needs jinja2, which is not installed; "
                "pip install 'normkit[demo]'"
            ) from None
        environment = Environment(
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["value"] = format_value
        environment.filters["prose"] = _prose
        environment.filters["printable"] = _printable
        template = environment.from_string(
            files("normkit.doctor").joinpath("page.html").read_text("utf-8")
        )
        return template.render(
            page=self, figures=_Figures(), headings=_Headings(self.blocks)
        ).lstrip()

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to `path`, whole or not at all, and return the path."""
        target = Path(path)
        text = self.to_html()
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        return target


def format_value(value: Any) -> str:
    """Write a value as a reader wants it: 4 significant digits, words for the rest.

    Example:
        >>> [format_value(v) for v in (0.123456, 3e-12, 12345, 98765.4, None, True)]
        ['0.1235', '3e-12', '12,345', '98,765', '–', 'yes']
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not _is_number(value):
        return _printable(str(value))
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    if number and not 1e-3 <= abs(number) < 1e6:
        mantissa, exponent = f"{number:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{number:,.0f}" if abs(number) >= 1e4 else f"{number:.4g}"


class _Figures:
    """Numbers the figures of a page as they are drawn."""

    def __init__(self) -> None:
        self.drawn = 0

    def draw(self, figure: Figure) -> dict[str, Any]:
        from markupsafe import Markup

        self.drawn += 1
        name = f"figure-{self.drawn}"
        columns, rows = summary(figure.chart)
        return {
            "id": name,
            # Made by `draw` from escaped text; the only markup that is not a template.
            "svg": Markup(draw(figure.chart, name)),
            "legend": legend(figure.chart),
            "table": Table(columns, rows),
        }


class _Headings:
    """The anchors of a page's headings, unique and readable."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._taken: dict[str, int] = {}
        self._given: dict[int, str] = {}
        self.contents = [
            (self.anchor(block), block.text)
            for block in blocks
            if isinstance(block, Heading) and block.level == 2
        ]

    def anchor(self, heading: Heading) -> str:
        if id(heading) not in self._given:
            slug = re.sub(r"[^a-z0-9]+", "-", heading.text.lower()).strip("-")
            slug = slug or "section"
            again = self._taken[slug] = self._taken.get(slug, 0) + 1
            self._given[id(heading)] = slug if again == 1 else f"{slug}-{again}"
        return self._given[id(heading)]


def _prose(text: str) -> Any:
    from markupsafe import Markup, escape

    parts = _printable(text).split("`")
    # An odd backtick out is a backtick.
    if len(parts) % 2 == 0:
        parts[-2:] = ["`".join(parts[-2:])]
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )


def _printable(text: str) -> str:
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"
        for c in str(text)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)

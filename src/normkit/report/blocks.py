"""The blocks of a report page: values without any HTML."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from normkit.report.charts import Chart

__all__ = [
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
    "Mark",
    "Number",
    "Numbers",
    "Row",
    "Severity",
    "Table",
    "Text",
    "is_number",
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
    """One paragraph of text."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    """Lines of code or of a terminal, shown verbatim."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Number:
    """A key number: label, value, short note."""

    label: str
    value: Any
    note: str = ""
    severity: Severity | None = None


@dataclass(frozen=True)
class Numbers:
    """Key numbers side by side."""

    kind: ClassVar[str] = "numbers"
    numbers: Sequence[Number]


@dataclass(frozen=True)
class Mark:
    """A table cell that shows a severity by sign and word."""

    severity: Severity
    text: str = ""

    def __str__(self) -> str:
        return self.text or self.severity


@dataclass(frozen=True)
class Table:
    """Rows under column names.

    Attributes:
        columns: Names of the columns.
        rows: One cell per column; numbers are formatted by `format_value`, and a
            column of numbers is aligned to the right; a `Mark` shows its sign.
        caption: Description of the table; screen readers announce it.
    """

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    @property
    def is_numeric(self) -> list[bool]:
        """Per column, True where every cell is a number or missing."""
        return [
            any(is_number(row[i]) for row in self.rows)
            and all(is_number(row[i]) or row[i] is None for row in self.rows)
            for i in range(len(self.columns))
        ]

    @property
    def name_column(self) -> int | None:
        """The column that names the rows: the first column of text."""
        for i, is_numeric in enumerate(self.is_numeric):
            if not is_numeric and not any(isinstance(r[i], Mark) for r in self.rows):
                return i
        return None


@dataclass(frozen=True)
class Bar:
    """One line of `Bars`, coloured by severity."""

    name: str
    value: float | None
    severity: Severity | None = None


@dataclass(frozen=True)
class Bars:
    """One horizontal bar per name (per layer), as a table.

    Attributes:
        bars: The bars, in order.
        caption: Description of the bars.
        value_name: Name of the value column, with the unit.
        limit: A threshold marked on every bar.
        largest: The value of a full bar; the largest value or limit by default.
    """

    kind: ClassVar[str] = "bars"
    bars: Sequence[Bar]
    caption: str = ""
    value_name: str = "value"
    limit: float | None = None
    largest: float | None = None

    def percent(self, value: float | None) -> float:
        """Return the length of the bar of `value`, 0 to 100."""
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
        rows: Name and values of each row; None for a missing value.
        caption: Description of the shade.
        corner: Name of the name column.
        largest: The value of the full shade; the largest value by default.
    """

    kind: ClassVar[str] = "heat"
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]
    caption: str = ""
    corner: str = "layer"
    largest: float | None = None

    def percent(self, value: float | None) -> int | None:
        """Return the strength of the shade of `value`, 0 to 100; None for no value."""
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
        title: Title of the finding.
        text: The evidence, in one or two sentences.
        severity: Shown by word, sign and colour.
        where: The layer or object concerned.
        facts: Pairs of name and value.
        fix: How to fix it; code in backticks.
    """

    title: str
    text: str = ""
    severity: Severity = "info"
    where: str = ""
    facts: Sequence[tuple[str, Any]] = ()
    fix: str = ""


@dataclass(frozen=True)
class Cards:
    """Findings, one below the other."""

    kind: ClassVar[str] = "cards"
    cards: Sequence[Card]


@dataclass(frozen=True)
class Figure:
    """A chart with its title, its legend and its numbers.

    Attributes:
        title: Title of the chart.
        chart: Lines, Bands or Histograms.
        alt: The message of the chart in words, for readers who cannot see it.
        caption: A sentence below the chart.
    """

    kind: ClassVar[str] = "figure"
    title: str
    chart: Chart
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """Blocks side by side; one below the other on a narrow page."""

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


def is_number(value: Any) -> bool:
    """Return True for a real number that is not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)

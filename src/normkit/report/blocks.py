"""The blocks of a report page: values that say what to show, and nothing of HTML."""

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
            any(is_number(row[i]) for row in self.rows)
            and all(is_number(row[i]) or row[i] is None for row in self.rows)
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


def is_number(value: Any) -> bool:
    """Whether a value is one to format: any real number but a truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)

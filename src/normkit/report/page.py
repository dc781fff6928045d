"""One self-contained HTML file from a title and blocks."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from normkit.errors import DependencyError
from normkit.modeling.atomic_file import atomic_file
from normkit.report.blocks import Block, Figure, Heading, Table, is_number
from normkit.report.charts import legend, summary
from normkit.report.drawing import draw

__all__ = ["Page", "check_installed", "format_value"]


def check_installed() -> None:
    """Require what a page with charts needs, before the work that it will show.

    Raises:
        DependencyError: jinja2 or matplotlib is not installed.
    """
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"a report page needs {' and '.join(missing)}, not installed here; "
            "pip install 'normkit[report]'"
        )


@dataclass(frozen=True)
class Page:
    """A report: a title, a lead with the outcome, blocks, a foot.

    Attributes:
        title: The title of the file and its first heading.
        lead: The outcome in one or two sentences.
        blocks: What follows, in order.
        foot: How the page was made (versions, seed, date): one line.

    Example:
        >>> from normkit.report import Text
        >>> page = Page("Tiny", "Nothing was found.", [Text("<b> is text here.")])
        >>> "&lt;b&gt; is text here." in page.to_html()
        True
    """

    title: str
    lead: str = ""
    blocks: Sequence[Block] = field(default_factory=list)
    foot: str = ""

    def to_html(self) -> str:
        """Return the page as one HTML file that needs no other file.

        Raises:
            DependencyError: jinja2 or, for charts, matplotlib is not installed.
        """
        try:
            from jinja2 import Environment, StrictUndefined
        except ImportError:
            raise DependencyError(
                "a report page needs jinja2, which is not installed; "
                "pip install 'normkit[report]'"
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
            files("normkit.report").joinpath("page.html").read_text("utf-8")
        )
        return template.render(
            page=self, figures=_Figures(), headings=_Headings(self.blocks)
        ).lstrip()

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to `path`, whole or not at all, and return the path."""
        target = Path(path)
        text = self.to_html()
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            file.write(text.encode())
        return target


def format_value(value: Any) -> str:
    """Return a value as text: 4 significant digits, words for what is no number.

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
    if not is_number(value):
        return _printable(str(value))
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    if number and not 1e-3 <= abs(number) < 1e6:
        mantissa, exponent = f"{number:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{number:,.0f}" if abs(number) >= 1e4 else f"{number:.4g}"


class _Figures:
    """Draw the figures of a page and number them."""

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
    """Unique, readable anchors of a page's headings."""

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
    # An unpaired backtick is shown as a backtick.
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

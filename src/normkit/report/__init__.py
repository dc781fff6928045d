"""Report pages: a small document model, and one self-contained HTML file from it.

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
Figure, Row, Details. Charts inside a Figure: Lines, Bands, Histograms.

Every string is untrusted and escaped; in prose (`Text`, leads, captions, cards)
`backticks` set code. The file holds no script and makes no request, and its content
policy forbids both. jinja2 and matplotlib load when a page is made.
"""

from normkit.report.blocks import (
    Bar,
    Bars,
    Block,
    Card,
    Cards,
    Code,
    Details,
    Figure,
    Heading,
    Heat,
    Mark,
    Number,
    Numbers,
    Row,
    Severity,
    Table,
    Text,
)
from normkit.report.charts import Bands, Histograms, Lines
from normkit.report.page import Page, check_installed, format_value

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
    "check_installed",
    "format_value",
]

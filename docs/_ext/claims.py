"""Directives of the part Learn.

    ```{claims} A0 C6 C7        the claims of one article, each with its verdict, the
    ```                         numbers, the place in the code and the study
    ```{drawing} densities      a figure of `drawings`, in the colours of the page
    ```

Verdicts and numbers are read from the records of the studies while the site is built.
"""

from __future__ import annotations

import html
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import drawings
from claim_code import CODE
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from normkit.report.charts import legend, summary
from normkit.report.drawing import draw
from normkit.report.page import format_value
from normkit.studies import CLAIMS, Record
from normkit.studies.literature import of
from normkit.studies.summary import deciding_numbers, overall, read_records, spelled

DOCS = Path(__file__).parents[1]


@cache
def records() -> dict[str, Record]:
    """Return the records of all studies."""
    return read_records(DOCS / "claims")


class ClaimsDirective(SphinxDirective):
    """Show claims of an article in the order given."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return one block per claim.

        Raises:
            ExtensionError: The article makes no such claim.
        """
        article, *ids = self.arguments[0].split()
        foreign = [i for i in ids if article not in CLAIMS[i].sources.split()]
        if foreign:
            raise self.error(f"{article} does not make the claims {foreign}")
        text = "\n\n".join(map(_claim, ids))
        return self.parse_text_to_nodes(text)


def _claim(id_: str) -> str:
    claim = CLAIMS[id_]
    word, said = overall(id_, records())
    studies = [
        study
        for study, record in records().items()
        if any(verdict.claim == id_ for verdict in record.verdicts)
    ]
    lines = [
        f"::::{{container}} claim {word.replace(' ', '-')}",
        f"**{id_}** {_text(claim.text)}",
        "",
        f"[{_text(spelled(word, said))}]{{.verdict}} "
        f"{_text(deciding_numbers(word, said))}",
    ]
    where = [f"{{py:obj}}`{name}`" for name in CODE.get(id_, ())]
    tested = [f"[{study}](../claims/{study}.md)" for study in studies]
    last = []
    literature, differs = of(id_)
    last.append(_text(f"Literature: {literature} {differs}".rstrip()))
    if where:
        last.append(f"In code: {', '.join(where)}.")
    if tested:
        last.append(f"Tested by {', '.join(tested)}.")
    return "\n".join([*lines, "", " ".join(last), "::::"])


def _text(text: str) -> str:
    for special in "\\|*_[]<>":
        text = text.replace(special, f"\\{special}")
    return text


class DrawingDirective(SphinxDirective):
    """Show figures of `drawings`: charts that follow the colours of the page."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        """Return the figures of one function as HTML; the content is the caption."""
        name = self.arguments[0]
        self.env.note_dependency(drawings.__file__)
        made = getattr(drawings, name)()
        if isinstance(made, str):
            body = made
        else:
            body = "".join(
                _figure(title, chart, alt, f"{name}-{i}")
                for i, (title, chart, alt) in enumerate(made)
            )
        found: list[nodes.Node] = [
            nodes.raw("", f'<div class="drawings">{body}</div>', format="html")
        ]
        if self.content:
            caption = nodes.container(classes=["caption"])
            caption += self.parse_content_to_nodes()
            found.append(caption)
        return found


def _figure(title: str, chart: Any, alt: str, prefix: str) -> str:
    swatches = "".join(
        f'<li><span class="swatch {entry.shape}" style="--colour:var({entry.colour})">'
        f"</span>{html.escape(entry.name)}</li>"
        for entry in legend(chart)
    )
    columns, rows = summary(chart)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(format_value(v))}</td>' for v in row)}</tr>"
        for row in rows
    )
    return (
        f'<figure class="drawing"><figcaption>{html.escape(title)}</figcaption>'
        f'<div role="img" aria-label="{html.escape(alt)}">{draw(chart, prefix)}</div>'
        f'<ul class="legend">{swatches}</ul><details><summary>Numbers</summary>'
        f'<div class="table-wrapper"><table class="docutils"><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div></details></figure>"
    )


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("claims", ClaimsDirective)
    app.add_directive("drawing", DrawingDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

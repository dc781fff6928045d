"""Pages whose text lies outside docs/, such as the changelog and the benchmarks.

A page that holds nothing but `<!-- text: ../CHANGELOG.md -->` shows that file. Its
links and pictures are relative to the file: those to a page of the site lead there,
those to another file offer it, and those to a folder become plain text.

`pages_below` of the configuration names the pages below a page that has no list of
them: they are then in the navigation of the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_MARK = re.compile(r"\s*<!-- text: (\S+) -->\s*")
_LINK = re.compile(r"\[([^\]\[]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_IMAGE = re.compile(r'<img src="([^"]+)"[^>]*alt="([^"]*)"[^>]*>')


def shown(page: Path, docs: Path) -> tuple[str, Path | None]:
    """Return the Markdown of a page of the site, and the file that it came from."""
    text = page.read_text(encoding="utf-8")
    found = _MARK.fullmatch(text)
    if found is None:
        return text, None
    file = (page.parent / found[1]).resolve()
    pages = {_source(other): other for other in docs.rglob("*.md")}

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        aim = (file.parent / target).resolve()
        aim = pages.get(aim, aim)
        if aim.is_dir():
            return words
        return f"[{words}]({os.path.relpath(aim, page.parent)}{anchor})"

    def image(match: re.Match[str]) -> str:
        aim = os.path.relpath(file.parent / match[1], page.parent)
        return f"![{match[2].replace('&quot;', chr(34))}]({aim})"

    body = file.read_text(encoding="utf-8")
    return _IMAGE.sub(image, _LINK.sub(link, body)), file


def _source(page: Path) -> Path:
    found = _MARK.fullmatch(page.read_text(encoding="utf-8"))
    return (page.parent / found[1] if found else page).resolve()


def _read(app: Any, docname: str, source: list[str]) -> None:
    page = Path(app.env.doc2path(docname))
    if page.suffix == ".md":
        text, file = shown(page, Path(app.srcdir))
        if file is not None:
            source[0] = text
            app.env.note_dependency(str(file))
    below = [
        pattern
        for pattern in app.config.pages_below.get(docname, ())
        if any(other != page for other in page.parent.glob(f"{pattern}.md"))
    ]
    if below:
        source[0] += "\n\n```{toctree}\n:hidden:\n:glob:\n\n" + "\n".join(below)
        source[0] += "\n```\n"


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_config_value("pages_below", {}, "env")
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

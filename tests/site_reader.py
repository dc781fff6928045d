"""What a page of the built site holds: its links, its anchors, what it loads."""

from html.parser import HTMLParser
from pathlib import Path

# Made by Sphinx, with nothing to read.
MADE = {"genindex", "py-modindex", "search"}


class Reader(HTMLParser):
    """Collect the links, anchors and sources of one page.

    Attributes:
        links: Every `href` of an `<a>`.
        own_links: Those inside the page's own text.
        ids: Every anchor.
        sources: What the browser loads with the page.
    """

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.own_links: list[str] = []
        self.ids: set[str] = set()
        self.sources: list[str] = []
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("article", "main"):
            self._depth += 1
        if found.get("id"):
            self.ids.add(found["id"] or "")
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
            if self._depth:
                self.own_links.append(found["href"] or "")
        for name in ("src", "data"):
            if found.get(name) and tag in ("img", "script", "iframe", "object"):
                self.sources.append(found[name] or "")
        if tag == "link" and found.get("href"):
            self.sources.append(found["href"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("article", "main"):
            self._depth -= 1


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader

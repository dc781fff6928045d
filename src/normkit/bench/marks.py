"""The text between two marks of a page, which a command writes."""

from __future__ import annotations

from pathlib import Path

from normkit.errors import ArgumentError

__all__ = ["around", "between", "marks", "written"]


def marks(command: str) -> tuple[str, str]:
    """Return the two lines around the text that `command` writes."""
    return f"<!-- begin: {command} -->", f"<!-- end: {command} -->"


def between(page: str, command: str) -> str:
    """Return the text between the marks of `command` in a page's text."""
    begin, end = marks(command)
    return page.split(begin)[1].split(end)[0].strip()


def written(path: Path, command: str, text: str) -> str:
    """Return the page at `path` with `text` between the marks of `command`.

    Raises:
        ArgumentError: It has no such marks.
    """
    begin, end = marks(command)
    head, tail = around(path, command)
    return f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}"


def around(path: Path, command: str) -> tuple[str, str]:
    """Return the texts before and after the marks of `command` in the page at `path`.

    Raises:
        ArgumentError: It has no such marks.
    """
    page = path.read_text(encoding="utf-8")
    begin, end = marks(command)
    if begin not in page or end not in page.split(begin)[1]:
        raise ArgumentError(
            f"{path} has no line '{begin}' with '{end}' after it; add both where the "
            "table belongs"
        )
    head, rest = page.split(begin)
    return head, rest.split(end)[1]

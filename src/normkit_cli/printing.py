"""Printing of the commands, with control characters removed."""

from __future__ import annotations

from rich.console import Console

__all__ = ["printable", "wide_console"]

# Wider lines are hard to follow.
MAX_COLUMNS = 120


def printable(text: object) -> str:
    """Return `text` without control characters: a layer's name may hold some."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"
        for c in str(text)
    )


def wide_console() -> Console:
    """Return a console for tables, at most `MAX_COLUMNS` wide."""
    console = Console(highlight=False)
    console.width = min(console.width, MAX_COLUMNS)
    return console

"""What the commands print: text of models is shown, never obeyed."""

from __future__ import annotations

from rich.console import Console

__all__ = ["printable", "wide_console"]

# Wider than this, a line is hard to follow.
MOST_COLUMNS = 120


def printable(text: object) -> str:
    """`text` without control characters: a layer may be named to move the cursor."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"
        for c in str(text)
    )


def wide_console() -> Console:
    """Where tables are printed, as wide as a reader can follow."""
    console = Console(highlight=False)
    console.width = min(console.width, MOST_COLUMNS)
    return console

"""Progress bars for calls that take longer than a moment: on stderr, by rich."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["progress_bar", "tracked"]

T = TypeVar("T")


@contextmanager
def progress_bar(
    task: str, total: int | None, *, shown: bool = True
) -> Generator[Callable[[], None]]:
    """Show a bar that moves by one with each call of the function it yields.

    Args:
        task: What is done, in a word or two.
        total: Number of calls until it is done; None where it is not known.
        shown: False shows nothing.
    """
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    if console.is_jupyter:
        # rich's own display in notebooks needs ipywidgets. A notebook shows what a
        # terminal would, as long as it is one line.
        console = Console(
            file=sys.stderr, force_jupyter=False, force_terminal=True, width=80
        )
    with Progress(console=console) as progress:
        number = progress.add_task(task, total=total)
        yield lambda: progress.advance(number)


def tracked(
    values: Iterable[T], task: str, total: int | None = None, *, shown: bool = True
) -> Generator[T]:
    """Yield `values` under a progress bar, which ends when the iteration does.

    Args:
        values: What to iterate over.
        task: What is done, in a word or two.
        total: The most values that are taken; by default their length, where they
            have one.
        shown: False shows nothing.
    """
    if shown and hasattr(values, "__len__"):
        length = len(values)  # type: ignore[arg-type]
        total = length if total is None else min(length, total)
    with progress_bar(task, total, shown=shown) as advance:
        for value in values:
            yield value
            advance()

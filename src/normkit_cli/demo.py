"""`normkit demo`: the whole life cycle on real digits, with a report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from normkit_cli.arguments import check_folder
from normkit_cli.printing import wide_console

if TYPE_CHECKING:
    from normkit.demo import DemoResult

EXAMPLES = "Example: `normkit demo --seed 3 --out /tmp/digits`"


def command(
    seed: Annotated[
        int, typer.Option(help="Random seed of the data split, weights and batches.")
    ] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for report.html and demo.json.")
    ] = Path("normkit-demo"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Train for fewer steps, with the same checks."),
    ] = False,
) -> int:
    """Train, watch, break, diagnose, calibrate and fold networks on real digits.

    A deep sigmoid network is trained without and with batch norm, and a residual CNN.
    The CNN is broken on purpose, the doctor names the cause, calibration repairs it,
    and its batch norms are folded away. Every number is measured in this run. The exit
    code is 0 only if every check held.
    """
    from normkit.demo import run_demo

    check_folder("--out", out)
    out.mkdir(parents=True, exist_ok=True)
    with _progress() as tell:
        result = run_demo(seed=seed, quick=quick, on_progress=tell)
    report, data = result.write(out)
    console = wide_console()
    _print_checks(result, console)
    console.print(result.summary(), style="bold", markup=False)
    # Not through the console: a path must not be wrapped.
    print(f"report   {report.resolve()}")
    print(f"numbers  {data.resolve()}")
    return 0 if result.held else 1


@contextmanager
def _progress() -> Generator[Callable[[str, float], None]]:
    """Show a bar on a terminal, one line per stage in a log."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        printed: set[str] = set()

        def tell(text: str, share: float) -> None:
            if text not in printed:
                printed.add(text)
                print(text, file=sys.stderr, flush=True)

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading the digits", total=1.0)
        yield lambda text, share: progress.update(
            task, description=text, completed=share
        )


def _print_checks(result: DemoResult, console: Console) -> None:
    for number, step in enumerate(result.steps, start=1):
        console.print(f"{number}. {step.title}", style="bold", markup=False)
        table = Table(box=None, show_header=False, pad_edge=False, expand=True)
        table.add_column(width=6)
        table.add_column(ratio=5)
        table.add_column(ratio=3, justify="right")
        table.add_column(ratio=5)
        for check in step.checks:
            mark = "[green]ok[/green]" if check.held else "[bold red]FAILED[/bold red]"
            table.add_row(mark, check.what, check.shown, check.required)
        console.print(table)

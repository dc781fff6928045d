"""`normkit bench`: normkit measured beside torch.nn, one command per quantity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normkit.bench.numerics import BEGIN, END, numerics
from normkit.errors import ArgumentError

app = typer.Typer(
    help="Measure normkit beside torch.nn: how exact it is.", no_args_is_help=True
)


@app.command(
    "numerics",
    epilog="Example: `normkit bench numerics --write docs/numerics.md`",
)
def _numerics(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table.")
    ] = False,
    write: Annotated[
        Path | None,
        typer.Option(help="Write the table into a page, between its two marks."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
) -> None:
    """Show the largest error of every layer against float64, by layout and dtype.

    Each column is a mean of so many standard deviations; each cell the error of normkit
    and that of torch.nn, relative where the output is above 1.
    """
    page = None if write is None else write.read_text(encoding="utf-8")
    if page is not None and (BEGIN not in page or END not in page):
        raise ArgumentError(
            f"{write} has no line '{BEGIN}' with '{END}' after it; add both where the "
            "table belongs"
        )
    found = numerics(seed=seed)
    if write is not None and page is not None:
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        write.write_text(head + found.to_markdown() + tail, encoding="utf-8")
    print(found.to_json() if as_json else found.to_text())

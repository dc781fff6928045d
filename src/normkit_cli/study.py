"""`normkit study`: run the experiments on claims about batch norm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from normkit_cli.arguments import check_folder

if TYPE_CHECKING:
    from normkit.studies import Record

__all__ = ["app"]

EXAMPLES = "Example: `normkit study run S01 S03 --quick`"

_OUT = typer.Option(
    Path("normkit-studies"), "--out", help="Folder for records, figures and pages."
)

app = typer.Typer(
    help="Test claims about batch norm: each study prints a verdict.",
    epilog=EXAMPLES,
    no_args_is_help=True,
)


@app.command("list")
def list_command() -> None:
    """List the studies: question and cost of each."""
    from normkit import studies

    table = Table(box=None, pad_edge=False)
    for heading in ("id", "study", "question", "claims", "minutes"):
        table.add_column(heading, no_wrap=heading in ("id", "minutes"))
    for study in studies.all_studies():
        claims = " ".join(study.claims)
        table.add_row(
            study.id, study.title, study.question, claims, f"{study.minutes:g}"
        )
    Console().print(table)


@app.command("run", epilog=EXAMPLES)
def run_command(
    names: list[str] | None = typer.Argument(  # noqa: B008
        None, help="Ids of studies, e.g. S01 S03."
    ),
    run_all: bool = typer.Option(False, "--all", help="Run every study."),
    quick: bool = typer.Option(False, "--quick", help="Seconds each, few seeds."),
    cpu: bool = typer.Option(False, "--cpu", help="Minutes each; the default."),
    gpu: bool = typer.Option(False, "--gpu", help="Larger, on a CUDA device."),
    out: Path = _OUT,
    data: Path | None = typer.Option(  # noqa: B008
        None, "--data", help="Folder with mnist.npz, …; default: $NORMKIT_DATA."
    ),
    jobs: int = typer.Option(
        0, "--jobs", min=0, help="Number of parallel trials; 0 is one per core."
    ),
    seeds: int = typer.Option(
        0, "--seeds", min=0, help="Number of seeds; 0 is the scale's."
    ),
    fresh: bool = typer.Option(False, "--fresh", help="Run finished seeds again."),
) -> None:
    """Run studies and write their verdicts, a record and a figure of each.

    An interrupted run continues with the missing seeds.
    """
    from normkit import studies
    from normkit.errors import ArgumentError

    check_folder("--out", out)
    if sum((quick, cpu, gpu)) > 1:
        raise ArgumentError("--quick, --cpu and --gpu exclude one another; choose one")
    scale = "quick" if quick else "gpu" if gpu else "cpu"
    chosen = list(names or [])
    if run_all:
        chosen = [study.id for study in studies.all_studies()]
    if not chosen:
        raise ArgumentError(
            "no study was named; name some (normkit study list) or pass --all"
        )
    console = Console()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
    ) as progress:
        tasks = {}

        def on_start(study: str, count: int) -> None:
            tasks[study] = progress.add_task(study, total=count)

        records = studies.run(
            chosen,
            scale=scale,
            out=out,
            data=studies.data_folder(data),
            jobs=jobs or os.cpu_count() or 1,
            seeds=seeds or None,
            fresh=fresh,
            on_start=on_start,
            on_trial=lambda study: progress.advance(tasks[study]),
        )
    for record in records:
        console.print(_table(record))
    console.print(f"records and figures: {out}")


@app.command("report")
def report_command(
    out: Path = _OUT,
    figures: bool = typer.Option(True, help="Draw the figures again, too."),
) -> None:
    """Write the pages from the records: all claims, each study, corrections."""
    from normkit import studies

    check_folder("--out", out)
    written = studies.write_report(out, figures=figures)
    noun = "page" if len(written) == 1 else "pages"
    print(f"{len(written)} {noun}: {written[0]}")


def _table(record: Record) -> Table:
    from normkit import studies

    study = studies.find(record.study)
    table = Table(
        title=f"{study.id} {study.title} ({record.cpu_seconds:.0f} s of one core)",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for heading in ("claim", "verdict", "measured", "median [interval]", "predicted"):
        table.add_column(heading)
    for said in record.verdicts:
        for i, part in enumerate(said.parts):
            head = (said.claim, said.word) if i == 0 else ("", "")
            # As text, not markup: an interval looks like a tag.
            cells = (*head, part.text, str(part.interval), part.wanted)
            table.add_row(*(Text(cell) for cell in cells))
    return table

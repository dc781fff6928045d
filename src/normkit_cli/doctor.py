"""`normkit doctor TARGET`: find what is wrong with a model's normalization."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from normkit_cli.arguments import TARGET, AsJson, check_file, notes
from normkit_cli.printing import printable, wide_console

if TYPE_CHECKING:
    from normkit.doctor import Diagnosis
    from normkit_cli.target import Target

EXAMPLES = (
    "Example: `normkit doctor train.py:make --checkpoint best.pt --report doctor.html`"
)

_COLOUR = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def command(
    target: Annotated[str, typer.Argument(help=TARGET)],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights to load into the model first.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of training steps to watch; weights are restored."
        ),
    ] = None,
    batches: Annotated[
        int, typer.Option(min=1, help="Maximum number of batches.")
    ] = 50,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Repair what can be repaired, and diagnose again."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="With --fix: file for the repaired weights."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the findings as one HTML page.")
    ] = None,
    as_json: AsJson = False,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> int:
    """Name what is wrong with a model's normalization, layer by layer.

    The batches of the target go through the model in training and in eval mode; the
    weights do not move. With a loss, the fix of each alarm is tried on a copy.
    `--steps` adds the checks that need training (D14, D24, D25, D27): with `loss_fn`
    and `optimizer` in the target, copies are trained; with `train`, a function that
    trains for a number of steps, your own loop is watched (also D08, D09, D15). Under
    `torchrun` each process examines its part of the data, and the first one shows the
    findings of all. Exit code 1 where there is an error (with `--fix`: where one is
    left), for CI.
    """
    from normkit.errors import ArgumentError
    from normkit.report import check_installed
    from normkit_cli.checkpoint import Checkpoint
    from normkit_cli.ranks import all_ranks, launched
    from normkit_cli.target import read_target

    if out is not None and not fix:
        raise ArgumentError("--out saves repaired weights, and needs --fix; add --fix")
    check_file("--out", out)
    check_file("--report", report, makes_folder=True)
    if report is not None:
        check_installed()
    with launched() as is_first:
        if fix and all_ranks() is not None:
            raise ArgumentError(
                "--fix repairs by the data of one process; run it alone, or measure "
                "running statistics over all of them by `normkit calibrate`"
            )
        found = read_target(target, checkpoint)
        found.needs("model", "loader")
        if steps is not None and found.train is None:
            found.needs("loss_fn", "optimizer")
        progress = sys.stderr.isatty() and not as_json and is_first
        diagnosis = _diagnosed(found, batches, steps, seed, progress=progress)
        repaired = diagnosis.repair(progress=progress) if fix else None
        if repaired:
            diagnosis = _diagnosed(found, batches, steps, seed, progress=progress)
    if not is_first:
        return 0
    if report is not None:
        given = [target] if checkpoint is None else [target, str(checkpoint)]
        diagnosis.to_html(report, source=" ".join(given))
    if as_json:
        print(diagnosis.to_json())
    else:
        _show(diagnosis, wide_console())
    stream = notes(as_json)
    if repaired is not None:
        print(repaired.to_text(), file=stream)
        if repaired and out is None:
            print(
                "in memory; --out saves the repaired weights",
                file=stream,
            )
    if out is not None:
        kept = Checkpoint({}) if checkpoint is None else Checkpoint.read(checkpoint)
        kept.save(found.model, out)
        print(f"weights  {out.resolve()}", file=stream)
    if report is not None:
        print(f"report   {report.resolve()}", file=stream)
    return 1 if diagnosis.errors else 0


def _diagnosed(
    target: Target, batches: int, steps: int | None, seed: int, *, progress: bool
) -> Diagnosis:
    from normkit.doctor import diagnose
    from normkit_cli.ranks import all_ranks

    assert target.loader is not None
    diagnosis = diagnose(
        target.model,
        target.loader,
        target.loss_fn,
        forward=target.forward,
        targets=target.targets,
        metric=target.metric,
        max_batches=batches,
        seed=seed,
        process_group=all_ranks(),
        progress=progress,
    )
    if diagnosis.named and diagnosis.statistics.evaluation is not None:
        diagnosis = diagnosis.confirm(progress=progress)
    if steps is not None:
        diagnosis = diagnosis.train(
            steps, target.optimizer, target.train, progress=progress
        )
    return diagnosis


def _show(diagnosis: Diagnosis, console: Console) -> None:
    console.print(printable(diagnosis.verdict()), style="bold", markup=False)
    if not diagnosis.findings:
        return
    console.print()
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "layers"):
        table.add_column(heading, overflow="fold")
    for heading in ("value", "threshold"):
        table.add_column(heading, justify="right", no_wrap=True)
    for finding in diagnosis.findings:
        table.add_row(
            Text(finding.severity, _COLOUR[finding.severity]),
            Text(f"{'  ' * bool(finding.follows)}{finding.id} {finding.name}"),
            Text(printable(finding.where)),
            f"{finding.value:.3g}",
            f"{finding.threshold:.3g}",
        )
    console.print(table)
    console.print()
    for finding in diagnosis.findings:
        follows = f" (follows from {finding.follows})" if finding.follows else ""
        line = f"{finding.id}{follows}: {finding.evidence}\n  fix: {finding.fix}"
        console.print(printable(line), markup=False)
    for confirmation in diagnosis.confirmations:
        console.print(confirmation.to_text(), markup=False)

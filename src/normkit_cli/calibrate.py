"""`normkit calibrate TARGET`: measure the running statistics of a checkpoint again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normkit_cli.arguments import TARGET, AsJson, check_file, notes
from normkit_cli.printing import printable

if TYPE_CHECKING:
    from normkit_cli.target import Target

EXAMPLES = (
    "Example: `normkit calibrate train.py:make --checkpoint in.pt --out out.pt --order "
    "eval`; over several processes, `torchrun --nproc-per-node 4 -m normkit_cli "
    "calibrate …`"
)


def command(
    target: Annotated[str, typer.Argument(help=TARGET)],
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="File with the weights, of torch.save or .safetensors; only plain "
            "tensors are read."
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="File to save to; may be the same.")
    ],
    mode: Annotated[
        str, typer.Option(help="Estimator: exact, average or running.")
    ] = "exact",
    order: Annotated[
        str,
        typer.Option(
            help="Mode of earlier layers: train (one pass), eval (a pass per layer)."
        ),
    ] = "train",
    batches: Annotated[
        int | None, typer.Option(min=1, help="Use no more batches than these.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Stop once every layer's standard error is below this."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Measure the running statistics of every layer again, and save the checkpoint.

    Only running statistics change; the file keeps its structure and other contents. It
    is written atomically. If the target has a `metric`, or the outputs are class
    scores, the metric in eval mode is printed before and after, on the first 50
    batches. Under `torchrun` each process measures its part of the data (a `loader`
    with a DistributedSampler, say), and the first one writes the file.
    """
    from normkit.calibrate import calibrate
    from normkit_cli.checkpoint import Checkpoint
    from normkit_cli.ranks import all_ranks, launched
    from normkit_cli.target import read_target

    check_file("--out", out)
    with launched() as is_first:
        found = read_target(target)
        found.needs("model", "loader")
        assert found.loader is not None
        file = Checkpoint.read(checkpoint)
        file.load_into(found.model)
        before = _metric(found)
        report = calibrate(
            found.model,
            found.loader,
            mode=mode,
            order=order,
            forward=found.forward,
            max_batches=batches,
            tolerance=tolerance,
            process_group=all_ranks(),
            progress=sys.stderr.isatty() and not as_json and is_first,
        )
        if is_first:
            file.save(found.model, out)
        report = replace(report, metric_before=before, metric_after=_metric(found))
    if not is_first:
        return 0
    print(report.to_json() if as_json else printable(report.to_text()))
    print(f"weights  {out.resolve()}", file=notes(as_json))
    return 0


def _metric(target: Target) -> float | None:
    """Evaluate the metric in eval mode; None without one or with one-pass batches."""
    from normkit.doctor.examination.case import measured, open_case

    loader = target.loader
    if loader is None or isinstance(loader, Iterator):
        return None
    return measured(
        open_case(
            target.model,
            loader,
            forward=target.forward,
            targets=target.targets,
            metric=target.metric,
            verb="calibrate",
        )
    )

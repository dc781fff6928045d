"""`normkit init TARGET`: draw the weights, and show the variance of every layer."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from normkit_cli.arguments import TARGET, AsJson, check_file, notes
from normkit_cli.printing import printable, wide_console

if TYPE_CHECKING:
    from normkit.init import InitReport
    from normkit_cli.target import Target

EXAMPLES = "Example: `normkit init train.py:make --scheme auto --plot --out start.pt`"

# Columns of a bar, and decades that it spans.
WIDTH, DECADES = 40, 8


def command(
    target: Annotated[str, typer.Argument(help=TARGET)],
    scheme: Annotated[
        str,
        typer.Option(
            help="auto, lsuv, kaiming, xavier, orthogonal, normal or constant."
        ),
    ] = "auto",
    plot: Annotated[
        bool,
        typer.Option("--plot", help="Draw the mean square of each layer's output."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File to save the weights to.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Initialize a model, and show n·Var[w] per layer as intended and as drawn.

    With the target's `example_inputs` or its loader, the mean square of every layer's
    outputs and gradients is predicted and measured as well. Exit code 1 if one of them
    is off by a factor of 1,000 or more, or not finite.
    """
    import torch

    from normkit.init import initialize
    from normkit_cli.checkpoint import Checkpoint
    from normkit_cli.target import read_target

    check_file("--out", out)
    found = read_target(target)
    inputs = _example_inputs(found, scheme)
    source = torch.Generator().manual_seed(seed)
    forward = None if found.example_inputs is not None else found.forward
    report = initialize(
        *(found.model, scheme),
        example_inputs=inputs,
        forward=forward,
        generator=source,
        progress=sys.stderr.isatty() and not as_json,
    )
    if as_json:
        print(report.to_json())
    else:
        print(printable(report.to_text()))
        if plot:
            _draw(report, wide_console())
    if out is not None:
        Checkpoint({}).save(found.model, out)
        print(f"weights  {out.resolve()}", file=notes(as_json))
    return 0 if _is_sound(report) else 1


def _example_inputs(target: Target, scheme: str) -> Any:
    from normkit.errors import TargetError
    from normkit.modeling.batch import inputs_of

    if target.example_inputs is not None or target.loader is None:
        if target.example_inputs is None and scheme in ("auto", "lsuv"):
            raise TargetError(
                f"--scheme {scheme} runs the model: let the target return "
                "{'model': …, 'example_inputs': x}, or a loader, or choose --scheme "
                "kaiming"
            )
        return target.example_inputs
    batch = target.first_batch()
    if batch is None:
        raise TargetError(
            "the target's loader gave no batch; give example_inputs, or a loader that "
            "can be iterated again"
        )
    return inputs_of(batch) if target.forward is None else batch


def _is_sound(report: InitReport) -> bool:
    """Return whether every measured size is within a factor of 1,000 of 1."""
    for line in report.lines:
        for value in (line.signal_measured, line.gradient_measured):
            if value is not None and not 1e-6 <= value <= 1e6:
                return False
    return True


def _draw(report: InitReport, console: Console) -> None:
    """Draw bars on a logarithmic scale around 1, which is marked."""
    lines = [line for line in report.lines if line.signal_measured is not None]
    if not lines:
        print("nothing to draw: without inputs no signal is measured")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    # A Text, for in a plain string [y²] is markup.
    table.add_column(Text("E[y²] measured"), justify="right", no_wrap=True)
    table.add_column(f"1e-{DECADES // 2} … │1 … 1e{DECADES // 2}", no_wrap=True)
    for line in lines:
        assert line.signal_measured is not None
        table.add_row(
            Text(printable(line.label)),
            f"{line.signal_measured:.3g}",
            Text(_bar(line.signal_measured)),
        )
    console.print(table)


def _bar(value: float) -> str:
    """Draw a bar from the mark of 1 to the value, clipped to the scale."""
    middle = WIDTH // 2
    place = middle
    if value > 0 and math.isfinite(value):
        step = round(math.log10(value) / DECADES * WIDTH)
        place = min(max(middle + step, 0), WIDTH)
    elif not math.isnan(value):
        place = WIDTH if value > 0 else 0
    low, high = sorted((place, middle))
    cells = ["█" if low <= i < high else " " for i in range(WIDTH + 1)]
    cells[middle] = "│"
    return "".join(cells)

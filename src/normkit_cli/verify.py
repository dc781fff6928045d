"""`normkit verify A B`: are two models the same function, and where do they part."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import is_zipfile

import typer

from normkit_cli.arguments import TARGET, AsJson, check_file, notes
from normkit_cli.printing import printable

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from normkit_cli.target import Target

EXAMPLES = (
    "Examples: `normkit verify model.onnx optimized.onnx`, `normkit verify "
    "train.py:make model.onnx --checkpoint last.pt`, `normkit verify train.py:make "
    "quantized.py:make --report parts.html`"
)

_WEIGHTS = (".pt", ".pth", ".safetensors")


def command(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="The model that is right: a file that ends in .onnx (or, with "
            f"--trust, .pt2), or {TARGET}",
        ),
    ],
    b: Annotated[
        str,
        typer.Argument(
            metavar="B",
            help="The model in question: likewise, or a .pt, .pth or .safetensors file "
            "with other weights for A.",
        ),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights to load first into A, and into B if it is Python."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative difference that counts as rounding."),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Load .pt2 files (torch.export), which may run code that is in them: "
            "for files of your own.",
        ),
    ] = False,
    as_json: AsJson = False,
    report: Annotated[
        Path | None, typer.Option(help="File for a page that shows where they part.")
    ] = None,
) -> int:
    """Run two models in float64 on the same inputs and compare what they compute.

    Python targets are put into eval mode, and give the inputs: their
    `example_inputs`, or the first batch of their loader. Two ONNX files are run on
    random inputs. Exit code 1 if they differ; then the place where they part is
    printed.
    """
    import normkit
    from normkit.errors import ArgumentError, TargetError
    from normkit_cli.checkpoint import Checkpoint
    from normkit_cli.target import Target

    check_file("--report", report)
    left = _read(a, checkpoint, trust=trust)
    if b.endswith(_WEIGHTS):
        if not isinstance(left, Target):
            raise ArgumentError(f"{b} holds weights alone, and A, {a}, is no Python")
        right: Any = Target(copy.deepcopy(left.model))
        Checkpoint.read(Path(b)).load_into(right.model)
    else:
        right = _read(b, checkpoint, trust=trust)
    targets = [side for side in (left, right) if isinstance(side, Target)]
    inputs = next((i for i in map(_inputs, targets) if i is not None), None)
    if targets and inputs is None and len(targets) == 2:
        raise TargetError(
            "neither target gave example_inputs nor a loader, and two torch models "
            "need them; let a factory return a dict with example_inputs"
        )
    one, two = (
        side.model.eval() if isinstance(side, Target) else side
        for side in (left, right)
    )
    progress = sys.stderr.isatty() and not as_json
    verdict = normkit.verify(one, two, inputs, tolerance=tolerance, progress=progress)
    print(verdict.to_json() if as_json else printable(verdict.to_text()))
    if report is not None:
        verdict.to_html(report)
        print(f"page  {report.resolve()}", file=notes(as_json))
    return 0 if verdict else 1


def _read(
    text: str, checkpoint: Path | None, *, trust: bool
) -> str | ExportedProgram | Target:
    from normkit.errors import ArgumentError
    from normkit_cli.target import read_target

    if text.endswith(".pt2"):
        # First: of another file torch logs a traceback.
        if not is_zipfile(text):
            raise ArgumentError(
                f"{text} is no file of torch.export.save, or there is none; give the "
                "path of one"
            )
        if not trust:
            raise ArgumentError(
                f"{text} is an exported program, and loading one may run code that is "
                "in the file; pass --trust if the file is your own"
            )
        import torch

        return torch.export.load(text)
    return text if text.endswith(".onnx") else read_target(text, checkpoint)


def _inputs(target: Target) -> Any:
    from normkit.modeling.batch import inputs_of

    if target.example_inputs is not None:
        return target.example_inputs
    batch = target.first_batch()
    return None if batch is None else inputs_of(batch)

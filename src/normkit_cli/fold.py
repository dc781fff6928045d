"""`normkit fold`: fold an ONNX file, or a torch model with its weights."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from normkit_cli.arguments import TARGET, check_file, notes
from normkit_cli.printing import printable

if TYPE_CHECKING:
    from normkit.fold import FoldLedger

EXAMPLES = (
    "Examples: `normkit fold model.onnx -o folded.onnx`, "
    "`normkit fold train.py:make --checkpoint last.pt -o folded.pt2`"
)

_ENDINGS = (".onnx", ".pt2", ".pt", ".pth", ".safetensors")


def command(
    target: Annotated[
        str, typer.Argument(help="A file that ends in .onnx, or " + TARGET)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            *("-o", "--out", "--export"),
            help="File for the folded model: .onnx, and of Python code also .pt2 "
            "(torch.export), .pt or .safetensors (weights alone).",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights to load first; no code in it is run."),
    ] = None,
    verify: Annotated[
        int, typer.Option(min=1, help="Number of inputs to compare an ONNX model on.")
    ] = 2,
    fixed_weights: Annotated[
        bool,
        typer.Option(
            "--fixed-weights",
            help="Weights that the ONNX graph also lists as inputs are constants.",
        ),
    ] = False,
    norms: Annotated[
        str,
        typer.Option(
            help="batch: remove batch norms. all: also move weight and bias of layer, "
            "RMS, group and instance norms into the layers that read them."
        ),
    ] = "batch",
    layer_to_rms: Annotated[
        bool,
        typer.Option(
            "--layer-to-rms",
            help="With --norms all: make layer norms RMS norms where it is exact.",
        ),
    ] = False,
    materialize: Annotated[
        bool,
        typer.Option(
            "--materialize",
            help="Store weights that modules compute in each forward (weight norm, "
            "spectral norm, pruning) as they are now.",
        ),
    ] = False,
    equalize: Annotated[
        bool,
        typer.Option(
            "--equalize",
            help="Make the ranges of channels alike by positive scales, exactly, for "
            "quantizers with one scale per weight.",
        ),
    ] = False,
    time_limit: Annotated[
        float,
        typer.Option(help="Seconds that one run of an ONNX model may take."),
    ] = 60.0,
    memory_limit: Annotated[
        float,
        typer.Option(help="Gigabytes that the values of one such run may take."),
    ] = 4.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the ledger as JSON.")
    ] = False,
    pictures: Annotated[
        bool,
        typer.Option("--pictures", help="Draw the network around each that stays."),
    ] = False,
) -> int:
    """Fold norms into the weights around them, proven in float64.

    The ledger gives for each one where it went or why it stayed. A target of Python
    code needs `example_inputs`, or a loader whose batches start with them. Exit code 1
    if the model has norms and none could be folded.
    """
    from normkit.errors import ArgumentError
    from normkit.fold import fold_onnx

    check_file("-o", out)
    batch = ""
    progress = sys.stderr.isatty() and not as_json
    if target.endswith(".onnx"):
        if checkpoint is not None:
            raise ArgumentError(
                f"{target} is an ONNX file, which holds its weights; leave out "
                "--checkpoint"
            )
        if layer_to_rms or materialize or equalize:
            raise ArgumentError(
                f"{target} is an ONNX file, which takes no --layer-to-rms, "
                "--materialize, --equalize; fold the torch model before it is exported"
            )
        _, ledger = fold_onnx(
            target,
            out,
            inputs=verify,
            fixed_weights=fixed_weights or None,
            time_limit=time_limit,
            memory_limit=memory_limit,
            norms=_norms(norms),
            progress=progress,
        )
    else:
        ledger, batch = _fold_target(
            target,
            checkpoint,
            out,
            norms=_norms(norms),
            layer_to_rms=layer_to_rms,
            materialize=materialize,
            equalize=equalize,
            progress=progress,
        )
    if as_json:
        print(ledger.to_json())
    else:
        print(printable(ledger.to_text(pictures=pictures)))
    if out is not None:
        print(f"model  {out.resolve()}", file=notes(as_json))
    if batch:
        print(f"batch  {batch}", file=notes(as_json))
    return 1 if ledger.entries and not any(e.how for e in ledger.entries) else 0


def _norms(text: str) -> Literal["batch", "all"]:
    from normkit.errors import ArgumentError

    if text == "batch" or text == "all":
        return text
    raise ArgumentError(f"--norms must be batch or all, got {text}")


def _fold_target(
    text: str, checkpoint: Path | None, out: Path | None, **settings: Any
) -> tuple[FoldLedger, str]:
    """Return the ledger, and what batch size the exported file takes."""
    from normkit.errors import ArgumentError, DependencyError, TargetError
    from normkit.fold import fold
    from normkit.modeling.batch import inputs_of
    from normkit_cli.checkpoint import Checkpoint
    from normkit_cli.exporting import export_model
    from normkit_cli.target import read_target

    if out is not None and out.suffix not in _ENDINGS:
        raise ArgumentError(f"-o {out} must end in one of {', '.join(_ENDINGS)}")
    if out is not None and out.suffix == ".onnx":
        lacking = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
        if lacking:
            raise DependencyError(
                f"torch's ONNX exporter needs {' and '.join(lacking)}, not installed "
                "here; pip install 'normkit[onnx]'"
            )
    target = read_target(text, checkpoint)
    inputs = target.example_inputs
    if inputs is None:
        if target.loader is None:
            raise TargetError(
                "the target gave no example_inputs and no loader; let the factory "
                'return {"model": model, "example_inputs": x}, or a loader as well'
            )
        batch = target.first_batch()
        if batch is None:
            raise TargetError("the target's loader gave no batch; give example_inputs")
        inputs = inputs_of(batch)
    folded, ledger = fold(target.model.eval(), inputs, **settings)
    batch = ""
    if out is not None and out.suffix in (".onnx", ".pt2"):
        batch = export_model(folded, inputs, out)
    elif out is not None:
        Checkpoint({}).save(folded, out)
    return ledger, batch

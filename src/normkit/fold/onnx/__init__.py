"""Fold the batch norms of an ONNX model; the one place of normkit that imports onnx.

`folding` calls the others: `files` reads and writes model files, `loading` checks them,
`inputs` draws inputs,
`evaluate` runs the model in float64 within `limits`, `reading`, `operators` and
`norm_operators` turn it into the graph of `ir`, `norms` finds its norms, `writing`
applies the plan, `subgraphs` folds branches and bodies, `runtime` compares in
onnxruntime.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from normkit.errors import DependencyError
from normkit.fold.ledger import FoldLedger

if TYPE_CHECKING:
    import onnx

__all__ = ["fold_onnx"]


def fold_onnx(
    model: str | PathLike[str] | onnx.ModelProto,
    out: str | PathLike[str] | None = None,
    *,
    example_inputs: dict[str, Any] | None = None,
    inputs: int = 2,
    fixed_weights: bool | None = None,
    time_limit: float = 60.0,
    memory_limit: float = 4.0,
    norms: Literal["batch", "all"] = "batch",
    progress: bool = False,
) -> tuple[onnx.ModelProto, FoldLedger]:
    """Remove each batch norm of an ONNX model that can go; say why others stay.

    The algebra and the ledger are those of `fold`. Operators of opset 7 and newer are
    read; nothing is moved past an unknown one.

    Args:
        model: A file, or a model in memory, which is not changed.
        out: File to write the folded model to; none by default. If the weights of the
            model are in files of their own, so are those of `out`: in `out` + `.data`,
            or under another name if a model still reads that file.
        example_inputs: An array per input, for models that random ones do not fit.
        inputs: Number of inputs to compare on, 1 or more.
        fixed_weights: True: a weight that is also an input of the graph is a
            constant, and no input of the folded model. False: it is a default that
            callers may replace, and stays as it is. By default as in onnxruntime: a
            constant up to IR version 3, where each weight has to be an input (and
            stays one), a default from version 4 on.
        time_limit: Seconds that one run of the model may take.
        memory_limit: Gigabytes (10⁹ bytes) that the values of one run may take, in
            float64. The process takes up to as much again, and more for the weights.
        norms: "batch" removes batch norms. "all" also moves weight and bias of layer,
            RMS, group and instance norms into the layers that read them, as `fold`
            does: of LayerNormalization, RMSNormalization, SkipLayerNormalization, and
            of the same written out.
        progress: Show a progress bar.

    Returns:
        The folded model and the `FoldLedger`.

    Raises:
        FoldError: the file is no ONNX model that the checker accepts, names data
            outside its folder, cannot be run, or is above `time_limit` or
            `memory_limit`; or `out` is a data file of another model.
        DependencyError: onnx, onnx-ir or onnxruntime is not installed.

    Numerics:
        The algebra is in float64 and rounded once, to the type of each weight. The
        model is compared before and after in float64 on random inputs by onnx's
        reference evaluator, value by value; folds that differ are undone. Convolution,
        pooling and batch norm run there as torch and numpy operations in float64. The
        result passes `onnx.checker` with full checks, and loads and runs in
        onnxruntime, or `FoldError` is raised.
    """
    try:
        from normkit.fold.onnx.folding import fold_model
        from normkit.fold.onnx.limits import limits_of_runs
    except ImportError as error:
        raise DependencyError(
            f"fold_onnx needs onnx, onnx-ir and onnxruntime ({error}); "
            "pip install 'normkit[onnx]'"
        ) from error
    with limits_of_runs(time_limit, memory_limit):
        return fold_model(
            *(model, out, example_inputs, inputs, fixed_weights, norms),
            progress=progress,
        )

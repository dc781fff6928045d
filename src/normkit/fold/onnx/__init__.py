"""Fold the batch norms of an ONNX model; the one place of normkit that imports onnx.

`files` reads what may come from anywhere, `drawing` finds inputs for it, `evaluate`
runs it in float64 within the limits of `budget`, `reading` turns it into the graph that
every front end shares (`operators` says what each operation is), `writing` puts the
result back, `inside` does the same for branches and bodies, `folding` leads the way.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

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
) -> tuple[onnx.ModelProto, FoldLedger]:
    """Remove each batch norm of an ONNX model that can go; say why others stay.

    The algebra and the ledger are those of `fold`. Operators of opset 7 and newer are
    read; what is unknown is left alone and nothing is moved past it.

    Args:
        model: A file, or a model in memory, which is not changed.
        out: Where to write the folded model; nowhere by default. A model whose
            weights lay beside it gets them beside it again, as `out` + `.data`.
        example_inputs: An array per input, for models that random ones do not fit.
        inputs: On how many inputs to compare, 1 or more.
        fixed_weights: Whether a weight that is also an input of the graph is a
            constant, which then is an input no more, or a default that callers may
            replace, which keeps it as it is. By default what onnxruntime takes it
            for: a constant up to IR version 3, where each weight has to be an input
            (and stays one), a default from version 4 on.

    Returns:
        The folded model and the `FoldLedger`.

    Raises:
        FoldError: the file is no ONNX model that the checker accepts, points outside
            its folder, or cannot be run.
        DependencyError: onnx, onnx-ir or onnxruntime is not installed.

    Numerics:
        The algebra is in float64 and rounded once, to the type of each weight. The
        model is compared before and after in float64 on random inputs by onnx's
        reference evaluator, value by value; what differs is undone. Convolution,
        pooling and batch norm run there as torch and numpy operations in float64. The
        result passes `onnx.checker` with full checks, and loads and runs in
        onnxruntime, or it is not handed out.
    """
    try:
        from normkit.fold.onnx.folding import fold_model
    except ImportError as error:
        raise DependencyError(
            f"fold_onnx needs onnx, onnx-ir and onnxruntime ({error}); "
            "pip install 'normkit[onnx]'"
        ) from error
    return fold_model(model, out, example_inputs, inputs, fixed_weights)

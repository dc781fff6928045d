"""A model of unknown origin, read and checked before anything in it runs."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import onnx
from onnx.inliner import inline_local_functions

from normkit.errors import FoldError
from normkit.fold.onnx import files
from normkit.fold.onnx.rejection import RejectedModelError

__all__ = ["Loaded", "check", "loaded"]

# The first version of the format in which a weight need not be an input as well.
_FIRST_WITH_DEFAULTS = 4


@dataclass(frozen=True)
class Loaded:
    """A model that `onnx.checker` accepts.

    Attributes:
        original: The model as given, weights included.
        model: The same without local functions, and without inputs that are constants.
        sources: The data files that hold its weights.
        opset: The version of ONNX's own operators.
        is_old: True if each weight has to be an input as well.
    """

    original: onnx.ModelProto
    model: onnx.ModelProto
    sources: set[Path]
    opset: int
    is_old: bool


def loaded(
    model: str | PathLike[str] | onnx.ModelProto, fixed_weights: bool | None = None
) -> Loaded:
    """Return `model` checked; see `normkit.fold_onnx` for `fixed_weights`.

    Raises:
        FoldError: No file, no ONNX model, a damaged one, or an opset that is too old.
    """
    sources: set[Path] = set()
    if isinstance(model, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
    else:
        path = Path(fspath(model))
        if not path.is_file():
            raise FoldError(f"there is no file {path}; name an ONNX model")
        proto, sources = files.read(path)
    files.check_sizes(proto)
    files.check_functions(proto)
    opset = _opset(proto)
    check(proto, "the model given")
    original = proto
    if proto.functions:
        proto = inline_local_functions(proto)
    is_old = proto.ir_version < _FIRST_WITH_DEFAULTS
    if fixed_weights or (fixed_weights is None and is_old):
        proto = _without_defaults(proto)
    return Loaded(original, proto, sources, opset, is_old)


def check(model: onnx.ModelProto, what: str) -> None:
    """Raise `RejectedModelError` if `onnx.checker` rejects `model`, called `what`."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        told = str(error).strip().splitlines()[0]
        raise RejectedModelError(f"onnx.checker rejects {what}: {told}") from error


def _without_defaults(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` in which no weight is an input as well."""
    held = {tensor.name for tensor in model.graph.initializer}
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    del copied.graph.input[:]
    copied.graph.input.extend(v for v in model.graph.input if v.name not in held)
    return copied


def _opset(model: onnx.ModelProto) -> int:
    for each in model.opset_import:
        if each.domain in ("", "ai.onnx"):
            if each.version < files.FIRST_OPSET:
                raise FoldError(
                    f"the model uses opset {each.version}, fold_onnx reads opset "
                    f"{files.FIRST_OPSET} and newer; convert it with "
                    "onnx.version_converter.convert_version"
                )
            return each.version
    raise FoldError("the model names no opset of ONNX; export it again")

"""Files of a model in the formats of torch.export and ONNX, for any batch size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import ShapesCollection
from torch.utils import _pytree as pytree

from normkit.modeling.batch import arguments_of

__all__ = ["export_model"]

# Above it the weights of an ONNX model must be in a file of their own.
_MAX_IN_ONE_FILE = 2**31 - 2**20


def export_model(model: nn.Module, inputs: Any, path: Path) -> str:
    """Export a model to a file that ends in .pt2 or .onnx.

    The batch size stays open where torch can keep it so: the first size of the first
    tensor, and of all tensors that have the same.

    Args:
        model: In eval mode.
        inputs: Example inputs.
        path: The file.

    Returns:
        What batch size the file takes, in words; "" where the inputs have none.
    """
    args, kwargs = arguments_of(inputs)
    size = _batch_size(args, kwargs)
    program, shapes = None, None
    if size is not None:
        program, shapes = _with_open_batch(model, args, kwargs, size)
    if path.suffix == ".onnx":
        _write_onnx(model, program, shapes, args, kwargs, path)
    else:
        torch.export.save(program or torch.export.export(model, args, kwargs), path)
    if size is None:
        return ""
    if program is None:
        return (
            f"{size} only, as in the example inputs: torch cannot export this model "
            "with the batch size left open"
        )
    return "any size"


def _with_open_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int
) -> tuple[ExportedProgram, Any] | tuple[None, None]:
    """Return the program for any batch size and its sizes by name; None without."""
    if size == 1:
        # torch.export takes a size of 1 for a constant.
        args, kwargs = pytree.tree_map_only(Tensor, _twice, (args, kwargs))
    shapes = ShapesCollection()
    batch = Dim("batch")
    for tensor in _tensors(args, kwargs):
        if tensor.dim() and len(tensor) == max(size, 2):
            shapes[tensor] = {0: batch}
    try:
        # Not by torch.onnx.export: it leaves the size open in the file's header, too,
        # where the model computes with the number.
        named = shapes.dynamic_shapes(model, args, kwargs)
        return torch.export.export(model, args, kwargs, dynamic_shapes=named), named
    except Exception:  # torch.export raises errors of many types
        return None, None


def _twice(tensor: Tensor) -> Tensor:
    is_single = tensor.dim() > 0 and len(tensor) == 1
    return torch.cat([tensor, tensor]) if is_single else tensor


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    leaves = pytree.tree_leaves((args, kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    return next((len(t) for t in _tensors(args, kwargs) if t.dim()), None)


def _write_onnx(
    model: nn.Module,
    program: ExportedProgram | None,
    shapes: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: Path,
) -> None:
    stored = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The exporter warns about its own code.
        torch.onnx.export(
            model if program is None else program,
            args,
            str(path),
            kwargs=kwargs,
            dynamo=True,
            verbose=False,
            dynamic_shapes=shapes,  # a program has them; here they name the sizes
            external_data=stored > _MAX_IN_ONE_FILE,
        )

"""Inputs to run a model on: the caller's arrays, or random ones that fit."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from normkit.errors import FoldError
from normkit.fold.onnx.evaluate import run_once
from normkit.fold.onnx.limits import check_count

__all__ = ["drawn_inputs", "redrawn"]

# Sizes to try for a dimension without one, after the batch.
_SIZES = (16, 64, 224)

_ARRAYS: dict[int, Any] = {
    TensorProto.DOUBLE: np.float64,
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
    TensorProto.INT8: np.int8,
    TensorProto.UINT8: np.uint8,
    TensorProto.BOOL: np.bool_,
}


def drawn_inputs(
    wide: onnx.ModelProto, example: dict[str, Any] | None, count: int
) -> list[dict[str, Any]]:
    """Return `count` dicts with an array per input, floats in float64."""
    held = {tensor.name for tensor in wide.graph.initializer}
    wanted = [value for value in wide.graph.input if value.name not in held]
    if example is not None:
        missing = {value.name for value in wanted} - set(example)
        if missing:
            raise FoldError(
                f"example_inputs lacks {sorted(missing)}; pass an array for each of "
                f"{[value.name for value in wanted]}"
            )
        first = {
            value.name: np.asarray(example[value.name]).astype(
                _ARRAYS.get(value.type.tensor_type.elem_type, np.float64)
            )
            for value in wanted
        }
        _must_run(wide, first)
        return [first, *(redrawn(first, seed) for seed in range(1, count))]
    problems = []
    for size in _SIZES:
        drawn = [_drawn(wanted, size, seed) for seed in range(count)]
        try:
            run_once(wide, drawn[0])
        except FoldError:
            raise
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
            continue
        return drawn
    raise FoldError(
        f"the model does not run on random inputs ({problems[0]}); pass "
        f"example_inputs, an array for each of {[value.name for value in wanted]}"
    )


def _must_run(wide: onnx.ModelProto, first: dict[str, Any]) -> None:
    try:
        run_once(wide, first)
    except FoldError:
        raise
    except Exception as error:
        raise FoldError(
            f"the model failed on example_inputs ({type(error).__name__}: {error}); "
            "pass arrays that it accepts"
        ) from error


def _drawn(wanted: list[Any], size: int, seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    named: dict[str, int] = {}
    shapes: dict[str, list[int]] = {}
    for value in wanted:
        shape = shapes[value.name] = []
        for i, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value"):
                if dim.dim_value < 0:
                    raise FoldError(
                        f"input {value.name!r} has a dimension of size "
                        f"{dim.dim_value}; a size is 0 or more, or has a name"
                    )
                shape.append(dim.dim_value)
            else:
                known = named.setdefault(dim.dim_param, size if i else 2)
                shape.append(known)
    # A size of 0 does not make up for the others: numpy multiplies these, too.
    sizes = (math.prod(max(n, 1) for n in shape) for shape in shapes.values())
    check_count(sum(sizes), "the inputs")
    inputs = {}
    for value in wanted:
        kind, shape = value.type.tensor_type, shapes[value.name]
        dtype = _ARRAYS.get(kind.elem_type, np.float64)
        if dtype == np.float64:
            inputs[value.name] = draw.standard_normal(shape)
        else:
            inputs[value.name] = draw.integers(0, 2, shape).astype(dtype)
    return inputs


def redrawn(first: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return other inputs like `first`: floats get noise, the rest stays."""
    draw = np.random.default_rng(seed)
    again = copy.copy(first)
    for name, array in first.items():
        if array.dtype == np.float64:
            again[name] = array + draw.standard_normal(array.shape)
    return again

"""How much memory a run of a model from anywhere may take.

A file of a hundred bytes can ask for any amount: by a shape, by repeats, by doubling a
tensor forty times. So before each node runs, onnx's own shape inference says from what
it is about to read how much it will make; both one result and all of a run together
are limited.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from normkit.errors import FoldError

__all__ = ["BoundedEvaluator", "check_count", "limited"]

# 8 GiB in float64, for one run with all that it makes.
MAX_ELEMENTS = 2**30
# Longer ones hold values, not shapes; inference need not read them.
_LONGEST_SHAPE = 256

_taken: ContextVar[list[float] | None] = ContextVar("_taken", default=None)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """What all nodes make inside it is counted together."""
    token = _taken.set([0.0])
    try:
        yield
    finally:
        _taken.reset(token)


def check_count(count: float, what: str) -> None:
    """Refuse to make `count` elements more than the limit."""
    taken = _taken.get()
    total = count
    if taken is not None:
        taken[0] += count
        total = taken[0]
    if total > MAX_ELEMENTS:
        raise FoldError(
            f"{what} would make {count:.0f} elements, {total:.0f} in this run; at most "
            f"{MAX_ELEMENTS} are computed here; pass example_inputs that are smaller"
        )


class BoundedEvaluator(ReferenceEvaluator):
    """Runs a model, or an inner graph of one, node by node within the limits."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for node in self.rt_nodes_:
            node.run = self._bounded(node.onnx_node, node.run)

    def _bounded(
        self, node: onnx.NodeProto, run: Callable[..., Any]
    ) -> Callable[..., Any]:
        version = self.opsets.get(node.domain)
        if version is None or not onnx.defs.has(node.op_type, version, node.domain):
            return run
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)

        def bounded(*inputs: Any, **more: Any) -> Any:
            made = _elements_made(schema, node, inputs, version)
            check_count(made, f"{node.op_type} '{node.name or node.output[0]}'")
            return run(*inputs, **more)

        return bounded


def _elements_made(
    schema: onnx.defs.OpSchema, node: onnx.NodeProto, inputs: Any, version: int
) -> float:
    """How many elements the node makes of these inputs; 0 if only running tells.

    That are nodes with inner graphs, whose own nodes are counted, and those that pick
    out of what they read, such as NonZero.
    """
    if any(attribute.HasField("g") for attribute in node.attribute):
        return 0
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for name, array in zip(node.input, inputs, strict=False):
        if not name:
            continue
        if not isinstance(array, np.ndarray | np.generic):
            return 0  # A sequence holds what was counted when it was made.
        array = np.asarray(array)
        if node.op_type in ("Resize", "Upsample") and name != node.input[0]:
            # Its factors, which the standard wants short.
            array = array.astype(np.float32) if array.dtype == np.float64 else array
        try:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        except (KeyError, ValueError):
            return 0
        types[name] = helper.make_tensor_type_proto(kind, array.shape)
        if array.ndim <= 1 and array.size <= _LONGEST_SHAPE:
            data[name] = numpy_helper.from_array(array, name)
    try:
        made = shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=[helper.make_opsetid("", version)]
        )
    except shape_inference.InferenceError:
        return 0
    return sum(_count(kind.tensor_type) for kind in made.values())


def _count(kind: onnx.TypeProto.Tensor) -> float:
    if not kind.HasField("shape"):
        return 0
    sizes = [dim.dim_value for dim in kind.shape.dim if dim.HasField("dim_value")]
    return float(math.prod(sizes)) if len(sizes) == len(kind.shape.dim) else 0.0

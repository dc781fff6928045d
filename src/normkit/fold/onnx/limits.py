"""Limits of memory and time for running a model of unknown origin.

A file of a hundred bytes can ask for any amount of memory: by a shape, by repeats, by
doubling a tensor forty times. Before each node runs, onnx's own shape inference gives
the size of its results; one result and all of a run together are limited. So is the
time of a run, which is checked before each node: a `Loop` may never end.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from normkit.errors import ArgumentError, FoldError

__all__ = [
    "BoundedEvaluator",
    "TimeLimitError",
    "check_count",
    "elements",
    "limited",
    "limits_of_runs",
    "seconds",
]

# Longer ones hold values, not shapes; inference need not read them.
_LONGEST_SHAPE = 256
# Multiplications per second; slower than any machine in use, for one node at a time.
_SPEED = 1e10


@dataclass
class _Usage:
    elements: float
    end: float


# The limit of all results of one run: 8 GiB in float64.
elements: ContextVar[float] = ContextVar("elements", default=2.0**30)
# The time limit of a run, in seconds.
seconds: ContextVar[float] = ContextVar("seconds", default=60.0)
_usage: ContextVar[_Usage | None] = ContextVar("_usage", default=None)


class TimeLimitError(FoldError):
    """A run took longer than the time limit."""


@contextlib.contextmanager
def limits_of_runs(time_limit: float, memory_limit: float) -> Iterator[None]:
    """Limit each run inside to so many seconds and gigabytes of values in float64."""
    if not time_limit > 0:
        raise ArgumentError(f"time_limit must be above 0 seconds, got {time_limit}")
    if not memory_limit > 0:
        raise ArgumentError(f"memory_limit must be above 0 GB, got {memory_limit}")
    old_time = seconds.set(time_limit)
    old_memory = elements.set(memory_limit * 1e9 / 8)
    try:
        yield
    finally:
        seconds.reset(old_time)
        elements.reset(old_memory)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Count the elements and the time of all nodes that run inside it together."""
    token = _usage.set(_Usage(0.0, time.monotonic() + seconds.get()))
    try:
        yield
    finally:
        _usage.reset(token)


def check_count(count: float, what: str) -> None:
    """Raise `FoldError` if `count` elements more are above the limit of the run."""
    usage = _usage.get()
    total = count
    if usage is not None:
        usage.elements += count
        total = usage.elements
    if total > elements.get():
        raise FoldError(
            f"{what} would make {count:.0f} elements, {total:.0f} in this run; at most "
            f"{elements.get():.0f} are computed here; pass example_inputs that are "
            "smaller or a larger memory_limit (--memory-limit)"
        )


def _check_time(what: str, more: float = 0.0) -> None:
    """Raise `TimeLimitError` if `more` seconds from now are above the limit."""
    usage = _usage.get()
    if usage is not None and time.monotonic() + more > usage.end:
        raise TimeLimitError(
            f"{what} is not done within the {seconds.get():g} s that one run of the "
            "model may take, and may never end; pass smaller example_inputs or a "
            "larger time_limit (--time-limit)"
        )


class BoundedEvaluator(ReferenceEvaluator):
    """Run a model, or an inner graph of one, node by node within the limits."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for node in self.rt_nodes_:
            node.run = self._bounded(node.onnx_node, node.run)

    def run(self, *args: Any, **settings: Any) -> Any:
        """Run it; the body of a `Loop` may hold no node that checks the time."""
        _check_time("a loop")
        return super().run(*args, **settings)

    def _bounded(
        self, node: onnx.NodeProto, run: Callable[..., Any]
    ) -> Callable[..., Any]:
        version = self.opsets.get(node.domain)
        name = f"{node.op_type} '{node.name or node.output[0]}'"
        schema: onnx.defs.OpSchema | None = None
        if version and onnx.defs.has(node.op_type, version, node.domain):
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)

        def bounded(*inputs: Any, **more: Any) -> Any:
            work = 0.0
            if schema is not None and version is not None:
                made = _elements_made(schema, node, inputs, version)
                check_count(made, name)
                work = made * _terms(node, inputs)
            _check_time(name, work / _SPEED)
            return run(*inputs, **more)

        return bounded


def _terms(node: onnx.NodeProto, inputs: Any) -> float:
    """Return the number of products that a matrix product or convolution sums up."""
    if node.op_type in ("MatMul", "Gemm") and np.ndim(inputs[0]):
        return float(max(np.shape(inputs[0])))
    if node.op_type in ("Conv", "ConvTranspose") and np.ndim(inputs[1]):
        return float(math.prod(np.shape(inputs[1])[1:]))
    return 1.0


def _elements_made(
    schema: onnx.defs.OpSchema, node: onnx.NodeProto, inputs: Any, version: int
) -> float:
    """Return the number of elements that the node makes of these inputs.

    0 if only running tells: for nodes with inner graphs, whose own nodes are counted,
    and for those that select elements of their inputs, such as NonZero.
    """
    if any(attribute.HasField("g") for attribute in node.attribute):
        return 0
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for name, array in zip(node.input, inputs, strict=False):
        if not name:
            continue
        if not isinstance(array, np.ndarray | np.generic):
            return 0  # The elements of a sequence were counted when it was made.
        array = np.asarray(array)
        is_factor = node.op_type in ("Resize", "Upsample") and name != node.input[0]
        if array.dtype == np.float64 and (is_factor or "Linear" in node.op_type):
            # Factors, and all that is quantized: the standard allows no double.
            array = array.astype(np.float32)
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

"""An ONNX model as one side of a comparison."""

from __future__ import annotations

import ast
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.audit.recording import Recording, Step, kept
from normkit.errors import ArgumentError
from normkit.fold.onnx.evaluate import jittered_weights, run_once, to_float64
from normkit.fold.onnx.inputs import drawn_inputs
from normkit.fold.onnx.loading import loaded
from normkit.fold.onnx.runtime import run
from normkit.modeling.batch import arguments_of
from normkit.modeling.pytree import tensors_in

__all__ = ["OnnxSide"]

# Where torch's exporter stores the modules around a node, outermost first.
_SCOPES = "pkg.torch.onnx.name_scopes"


class OnnxSide:
    """An ONNX model that can be run in float64, in its own types, in onnxruntime.

    Args:
        model: A file or a model in memory, which is not changed.

    Raises:
        FoldError: `onnx.checker` rejects it, or the file is damaged.
    """

    def __init__(self, model: str | PathLike[str] | Any) -> None:
        self.kind = "ONNX model"
        read = loaded(model)
        self.original, self.model = read.original, read.model
        self.wide = to_float64(read.model)
        self._steps = _described(self.model)
        held = {tensor.name for tensor in self.model.graph.initializer}
        self.input_names = [
            v.name for v in self.model.graph.input if v.name not in held
        ]
        self.output_names = [value.name for value in self.model.graph.output]

    def drawn(self) -> dict[str, Tensor]:
        """Return a random input of each name, floats in float64."""
        (first,) = drawn_inputs(self.wide, None, 1)
        return {name: torch.from_numpy(array) for name, array in first.items()}

    def run(
        self, inputs: Any, *, in_float64: bool, jittered: bool = False
    ) -> Recording:
        """Run the model once on `inputs` and record every value.

        `jittered` moves the weights by up to one rounding, in float64 alone.
        """
        model = self.wide if in_float64 else self.model
        if jittered:
            model = jittered_weights(self.model, self.wide)
        found = run_once(model, self._fed(inputs, in_float64=in_float64))
        steps: list[Step] = []
        position: dict[str, int] = {}
        for label, names, read, made in self._steps:
            sources = sorted({position[name] for name in read if name in position})
            for name in made:
                value = found.get(name)
                is_array = isinstance(value, np.ndarray | np.generic)
                shape = np.shape(value) if is_array else ()
                values = _kept(np.asarray(value)) if is_array else None
                position[name] = len(steps)
                steps.append(Step(label, [*names, name], sources, shape, values))
        outputs = [_comparable(np.asarray(found[name])) for name in self.output_names]
        return Recording(outputs, steps, [position.get(n) for n in self.output_names])

    def run_in_runtime(self, inputs: Any, *, optimized: bool) -> list[Tensor]:
        """Return the outputs as onnxruntime computes them, in the model's own types."""
        given = self._fed(inputs, in_float64=True)
        answers = run(self.original, given, optimized=optimized)
        return [_comparable(np.asarray(answer)) for answer in answers]

    def _fed(self, inputs: Any, *, in_float64: bool) -> dict[str, Any]:
        """Return an array per input: by name if `inputs` has the names, else in order.

        Raises:
            ArgumentError: `inputs` holds another number of tensors.
        """
        args, kwargs = arguments_of(inputs)
        if not args and set(self.input_names) <= set(kwargs):
            given = [kwargs[name] for name in self.input_names]
        else:
            given = list(tensors_in((args, kwargs)))
        if len(given) != len(self.input_names):
            raise ArgumentError(
                f"example_inputs hold {len(given)} tensors, and the ONNX model has "
                f"{len(self.input_names)} inputs, {self.input_names}; pass one for each"
            )
        types = {value.name: value for value in self.wide.graph.input}
        fed = {}
        for name, value in zip(self.input_names, given, strict=True):
            array = np.asarray(
                value.detach().cpu() if isinstance(value, Tensor) else value
            )
            if np.issubdtype(array.dtype, np.floating):
                array = array.astype(np.float64 if in_float64 else np.float32)
            elif types[name].type.tensor_type.elem_type == _DOUBLE:
                array = array.astype(np.float64)
            fed[name] = array
        return fed


# TensorProto.DOUBLE.
_DOUBLE = 11


def _described(model: Any) -> list[tuple[str, list[str], list[str], list[str]]]:
    """Return (label, names of modules, values read, values made) of each node.

    Nodes that read constants alone are left out.
    """
    fixed = {tensor.name for tensor in model.graph.initializer}
    nodes = []
    last: dict[str, int] = {}
    for node in model.graph.node:
        read = [name for name in node.input if name]
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                read += [name for inner in graph.node for name in inner.input if name]
        made = [name for name in node.output if name]
        if all(name in fixed for name in read) and not _is_random(node):
            fixed.update(made)
            continue
        scopes = _scopes(node)
        for scope in scopes:
            last[scope] = len(nodes)
        where = f" in '{scopes[-1]}'" if scopes else f" '{node.name or made[0]}'"
        nodes.append((f"{node.op_type}{where}", scopes, read, made))
    # The value of a module is that of its last node.
    return [
        (label, [s for s in scopes if last[s] == i], read, made)
        for i, (label, scopes, read, made) in enumerate(nodes)
    ]


def _scopes(node: Any) -> list[str]:
    """Return the paths of the modules that torch's exporters name for a node."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            try:
                listed = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                return []
            # The last one is the node itself.
            return [str(scope) for scope in listed[:-1] if scope]
    # The older exporter names a node /layer1/layer1.0/conv1/Conv.
    parts = node.name.split("/")
    return [part for part in parts[1:-1] if part] if node.name.startswith("/") else []


def _is_random(node: Any) -> bool:
    return node.op_type.startswith(("Random", "Bernoulli", "Multinomial"))


def _kept(array: Any) -> Tensor | None:
    if array.dtype.kind not in "fiubc":
        return None
    return kept(torch.from_numpy(np.array(array)))


def _comparable(array: Any) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.double() if tensor.is_floating_point() else tensor

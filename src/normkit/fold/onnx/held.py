"""Samples and shapes of a run, kept so that memory holds one run at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from normkit.fold.equivalence import sampled

__all__ = ["SampledRun", "sampled_run", "without_contents"]

# Shapes and other values that decide on shapes are shorter.
_SHORT = 4096


@dataclass(frozen=True)
class SampledRun:
    """Values of a run that are compared.

    Attributes:
        samples: (shape, some elements) of each float value, by name.
        outputs: The outputs of the model, whole.
    """

    samples: dict[str, tuple[tuple[int, ...], Tensor]]
    outputs: dict[str, Any]


def sampled_run(found: dict[str, Any], outputs: list[str]) -> SampledRun:
    """Return what is compared of a run.

    Args:
        found: Every value by name.
        outputs: The names of the outputs.
    """
    samples = {}
    for name, array in found.items():
        if isinstance(array, np.ndarray) and array.dtype.kind == "f":
            # Data files are read-only, and torch warns of it.
            whole = array if array.flags.writeable else array.copy()
            some = sampled(torch.from_numpy(whole))
            if some is not None:
                samples[name] = tuple(array.shape), some.clone()
    return SampledRun(samples, {name: found[name] for name in outputs})


def without_contents(found: dict[str, Any], model: onnx.ModelProto) -> dict[str, Any]:
    """Return the values of a run, long ones that depend on inputs as shapes alone."""
    held = {tensor.name for tensor in model.graph.initializer}
    changing = {value.name for value in model.graph.input} - held
    kept = dict(found)
    for node in model.graph.node:
        has_graphs = any(a.HasField("g") or a.graphs for a in node.attribute)
        if not has_graphs and not changing & set(node.input):
            continue
        changing.update(node.output)
    for name in changing:
        array = found.get(name)
        if isinstance(array, np.ndarray) and array.size > _SHORT:
            kept[name] = np.broadcast_to(np.zeros((), array.dtype), array.shape)
    return kept

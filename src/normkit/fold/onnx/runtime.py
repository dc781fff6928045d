"""Runs in onnxruntime: a second opinion on the folded model."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from normkit.errors import FoldError
from normkit.fold.equivalence import difference
from normkit.fold.onnx.evaluate import tensors_among
from normkit.fold.onnx.limits import seconds

__all__ = ["agrees", "run"]


def agrees(
    model: onnx.ModelProto,
    folded: onnx.ModelProto,
    given: dict[str, Any],
    expected: dict[str, Any],
) -> bool:
    """Return False if onnxruntime cannot run `model`; raise if `folded` is worse.

    Args:
        model: The original.
        folded: The folded model.
        given: An array for each input.
        expected: Every value of the original's run in float64.
    """
    truth = tensors_among(expected, [output.name for output in model.graph.output])
    gaps = []
    for each in (model, folded):
        try:
            answers = run(each, given)
        except Exception as error:
            if each is model:
                return False  # It supports less than the reference does.
            raise FoldError(
                f"onnxruntime runs the original but not the folded model ({error}); "
                "please report the model"
            ) from error
        wide = [torch.as_tensor(np.array(a)) for a in answers]
        wide = [t.double() if t.is_floating_point() else t for t in wide]
        gaps.append(difference(truth, wide))
    # Rounding alone can reach 1e-2 of the largest value in deep random networks.
    if np.isfinite(gaps[0]) and not gaps[1] <= 1e-2 + 100 * gaps[0]:
        raise FoldError(
            f"in onnxruntime the folded model is {gaps[1]:.1e} from the exact answer, "
            f"the original {gaps[0]:.1e}; please report the model"
        )
    return True


def run(
    model: onnx.ModelProto, given: dict[str, Any], *, optimized: bool = False
) -> list[Any]:
    """Return the outputs of `model` in onnxruntime.

    Args:
        model: The model.
        given: An array for each input; floats become the type of the input.
        optimized: Let onnxruntime rewrite the graph, as it does by default.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    kinds = {i.name: i.type for i in session.get_inputs()}
    feed = {
        name: array.astype(names.get(kinds[name], array.dtype))
        for name, array in given.items()
        if name in kinds
    }
    limit = onnxruntime.RunOptions()
    timer = threading.Timer(seconds.get(), setattr, (limit, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        return list(session.run(None, feed, limit))
    finally:
        timer.cancel()

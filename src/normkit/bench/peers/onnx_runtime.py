"""ONNX Runtime: forward of a one-operator model, on values in its own memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.bench.call_cases import GROUPS, CallCase
from normkit.bench.peers.peer import Given, Peer

__all__ = ["PEER"]

_OPERATORS = {
    "batch": "BatchNormalization",
    "group": "GroupNormalization",
    "layer": "LayerNormalization",
    "RMS": "RMSNormalization",
    "instance": "InstanceNormalization",
}
# Group norm came with 21, RMS norm with 23.
_OPSET, _OPSET_OF_RMS = 21, 23


def _version() -> str | None:
    try:
        metadata.version("onnx")
        return metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        return None


def _serves(case: CallCase, training: bool) -> bool:
    if training or case.layout == "channels_last":
        return False
    from onnx.defs import onnx_opset_version

    return case.layer != "RMS" or onnx_opset_version() >= _OPSET_OF_RMS


def _call(given: Given) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        _model(given), options, providers=["CPUExecutionProvider"]
    )
    x = onnxruntime.OrtValue.ortvalue_from_numpy(given.x.detach().numpy())

    def run() -> Any:
        return session.run_with_ort_values(["y"], {"x": x})

    return run


def _model(given: Given) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    opset = _OPSET_OF_RMS if given.case.layer == "RMS" else _OPSET
    names = ["weight", "bias", "running_mean", "running_var"]
    state = {k: t for k, t in given.layer.state_dict().items() if k in names}
    attributes: dict[str, Any] = {"epsilon": given.layer.eps}
    if given.case.layer == "RMS":
        attributes["epsilon"] = given.layer.eps or torch.finfo(torch.float32).eps
    if given.case.layer == "group":
        attributes["num_groups"] = GROUPS
    constants = [
        numpy_helper.from_array(state[n].numpy().astype(np.float32), n)
        for n in names
        if n in state
    ]
    x, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, list(given.x.shape))
        for n in "xy"
    )
    node = helper.make_node(
        _OPERATORS[given.case.layer],
        ["x", *(c.name for c in constants)],
        ["y"],
        **attributes,
    )
    graph = helper.make_graph([node], "normalization", [x], [y], constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10
    )
    return model.SerializeToString()


def _tensors(found: Any) -> list[Tensor]:
    return [torch.from_numpy(value.numpy()) for value in found]


PEER = Peer("ONNX Runtime", _version, _serves, _call, _tensors)

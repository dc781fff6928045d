"""Layers in ONNX files: the nodes that torch.nn's layers become, and their numbers."""

import io
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normkit.nn as n

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is missing")

Pair = tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]
PAIRS: dict[str, Pair] = {
    "batch 1-d": (lambda: n.BatchNorm1d(6), lambda: nn.BatchNorm1d(6), (5, 6)),
    "batch 2-d": (lambda: n.BatchNorm2d(6), lambda: nn.BatchNorm2d(6), (2, 6, 4, 5)),
    "batch 3-d": (lambda: n.BatchNorm3d(6), lambda: nn.BatchNorm3d(6), (2, 6, 2, 3, 4)),
    "batch without affine": (
        lambda: n.BatchNorm2d(6, affine=False),
        lambda: nn.BatchNorm2d(6, affine=False),
        (2, 6, 4, 5),
    ),
    "sync": (lambda: n.SyncBatchNorm(6), lambda: nn.SyncBatchNorm(6), (2, 6, 4, 5)),
    "frozen": (lambda: n.FrozenBatchNorm(6), lambda: nn.BatchNorm2d(6), (2, 6, 4, 5)),
    "layer": (lambda: n.LayerNorm(6), lambda: nn.LayerNorm(6), (2, 5, 6)),
    "layer, two sizes": (
        lambda: n.LayerNorm((5, 6)),
        lambda: nn.LayerNorm((5, 6)),
        (2, 5, 6),
    ),
    "group": (lambda: n.GroupNorm(3, 6), lambda: nn.GroupNorm(3, 6), (2, 6, 4, 5)),
    "instance": (
        lambda: n.InstanceNorm2d(6),
        lambda: nn.InstanceNorm2d(6),
        (2, 6, 4, 5),
    ),
    "instance, tracking": (
        lambda: n.InstanceNorm2d(6, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        (2, 6, 4, 5),
    ),
    "rms": (lambda: n.RMSNorm(6, eps=1e-5), lambda: nn.RMSNorm(6, eps=1e-5), (2, 5, 6)),
}
EXPECTED = {
    "batch": "BatchNormalization",
    "sync": "BatchNormalization",
    "frozen": "BatchNormalization",
    "layer": "LayerNormalization",
    "instance": "InstanceNormalization",
}


def exported(
    model: nn.Module, x: Tensor, *, dynamo: bool, opset: int | None = None
) -> "onnx.ModelProto":
    file = io.BytesIO()
    # The older exporter passes None for keyword-only arguments of the model itself.
    model = nn.Sequential(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (x,),
            None if dynamo else file,
            dynamo=dynamo,
            opset_version=opset,
            verbose=False,
        )
    if dynamo:
        return program.model_proto
    return onnx.load_from_string(file.getvalue())


def operators(model: "onnx.ModelProto") -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def given_state(layer: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
            assert name
    return layer.eval()


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_layer_becomes_the_nodes_of_torchs_layer(name: str, dynamo: bool) -> None:
    """With the numbers of the layer, in onnxruntime."""
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    elif name == "rms":
        pytest.skip("torch's older exporter knows no aten::rms_norm")
    ours, theirs, shape = PAIRS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    layer, reference = given_state(ours()), given_state(theirs())
    file = exported(layer, x, dynamo=dynamo)
    wanted = operators(exported(reference, x, dynamo=dynamo))
    assert operators(file) == wanted
    kind = EXPECTED.get(name.split(",")[0].split(" ")[0])
    if kind is not None and name != "instance, tracking":
        assert operators(file)[kind] == 1
    session = onnxruntime.InferenceSession(
        file.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, layer(x).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_an_activation_is_one_more_node(dynamo: bool) -> None:
    layer = given_state(n.BatchNorm2d(6, activation="relu"))
    x = torch.randn(2, 6, 4, 5)
    found = operators(exported(layer, x, dynamo=dynamo))
    assert found["BatchNormalization"] == found["Relu"] == 1
    assert sum(found.values()) == 2


def test_channels_last_is_a_norm_between_two_transposes() -> None:
    layer = given_state(n.BatchNorm1d(6, channel_dim=-1))
    found = operators(exported(layer, torch.randn(4, 5, 6), dynamo=True))
    assert found == {"Transpose": 2, "BatchNormalization": 1}


def test_an_exported_program_holds_torchs_operator_and_folds() -> None:
    """Backends that read exported programs know `aten.batch_norm`."""
    import normkit

    model = nn.Sequential(nn.Conv2d(3, 6, 3), n.BatchNorm2d(6)).eval()
    given_state(model)
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,))
    kinds = [str(node.target) for node in program.graph.nodes]
    assert kinds.count("aten.batch_norm.default") == 1
    _, ledger = normkit.fold(program, x)
    assert len(ledger.folded) == 1


def test_training_is_exported_as_the_layer_computes_it() -> None:
    """Torch's operator would let a batch with NaN into the running statistics."""
    layer = n.BatchNorm1d(6).train()
    x = torch.randn(5, 6)
    module = torch.export.export(layer, (x,)).module()
    bad = x.clone()
    bad[0, 0] = float("nan")
    module(bad)
    found = dict(module.named_buffers())
    assert all(bool(t.isfinite().all()) for t in found.values())

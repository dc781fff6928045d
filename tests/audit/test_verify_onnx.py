"""ONNX files as one side or both: names across formats, other tools' mistakes."""

import copy
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normkit

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(6 * 64, 5),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def exported(model: nn.Module, x: Tensor, *, dynamo: bool) -> "onnx.ModelProto":
    file = io.BytesIO()
    # The older exporter fuses batch norms into convolutions in eval mode.
    more = {} if dynamo else {"training": torch.onnx.TrainingMode.PRESERVE}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            *(model, (x,), None if dynamo else file),
            dynamo=dynamo,
            verbose=False,
            **more,
        )
    if dynamo:
        return program.model_proto
    return onnx.load_from_string(file.getvalue())


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_an_export_is_the_model_and_a_change_is_found_at_its_module(
    dynamo: bool,
) -> None:
    model = net()
    file = exported(model, X, dynamo=dynamo)
    verdict = normkit.verify(model, file, X)
    assert verdict
    assert verdict.max_difference < 1e-7
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1][0].weight *= 1.01
    verdict = normkit.verify(other, file, X)
    assert not verdict
    # torch's newer exporter folds batch norms itself: '1.0' is in '1.1' there.
    assert verdict.parting.place == ("'1.1'" if dynamo else "'1.0'")
    assert verdict.parting.last[-1][0] == "relu in '0.2'"
    # And the other way round: the first model is the file.
    assert not normkit.verify(file, other, X)


def test_two_files_are_compared_on_random_inputs(tmp_path: Path) -> None:
    file = exported(net(), X, dynamo=True)
    path, out = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(file, str(path))
    normkit.fold_onnx(path, out)
    verdict = normkit.verify(path, out)
    assert verdict
    assert any("onnxruntime on b" in note for note in verdict.notes)


def gemm(beta: float, weight: np.ndarray, bias: np.ndarray, *norm: np.ndarray):
    """Gemm, then BatchNormalization if its parameters are given."""
    names = ("gamma", "shift", "mean", "var")
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["g"], "gemm", beta=beta)]
    held = {"w": weight, "b": bias, **dict(zip(names, norm, strict=False))}
    if norm:
        nodes.append(helper.make_node("BatchNormalization", ["g", *names], ["y"], "bn"))
    else:
        nodes[0].output[0] = "y"
    nodes.append(helper.make_node("Relu", ["y"], ["z"], "relu"))
    graph = helper.make_graph(
        nodes,
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, 3])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in held.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_onnxscript_3027_beta_of_gemm_is_forgotten() -> None:
    draw = np.random.default_rng(0)
    w, b = draw.standard_normal((4, 3)), draw.standard_normal(3)
    gamma, shift, mean = draw.standard_normal((3, 3))
    var = draw.uniform(0.5, 2, 3)
    scale = gamma / np.sqrt(var + 1e-5)
    a = gemm(2.0, w, b, gamma, shift, mean, var)
    right = gemm(1.0, w * scale, (2 * b - mean) * scale + shift)
    wrong = gemm(2.0, w * scale, (b - mean) * scale + shift)
    x = torch.randn(8, 4)
    assert normkit.verify(a, right, x)
    verdict = normkit.verify(a, wrong, x)
    assert not verdict
    assert verdict.parting.place == "'y'"
    assert verdict.parting.pair.label_b == "Gemm 'gemm'"
    assert "scales 1 to 1" in verdict.parting.pair.relation


def written_out(scale: np.ndarray) -> "onnx.ModelProto":
    """A layer norm of one value in its operations, then a Mul that broadcasts."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], "m", axes=[-1], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["centred"], "sub"),
        helper.make_node("Pow", ["centred", "two"], ["square"], "pow"),
        helper.make_node("ReduceMean", ["square"], ["var"], "v", axes=[-1], keepdims=1),
        helper.make_node("Add", ["var", "eps"], ["shifted"], "add"),
        helper.make_node("Sqrt", ["shifted"], ["std"], "sqrt"),
        helper.make_node("Div", ["centred", "std"], ["normal"], "div"),
        helper.make_node("Mul", ["scale", "normal"], ["out"], "mul"),
    ]
    held = {"two": np.array(2.0), "eps": np.array(1e-5), "scale": scale}
    return _model(nodes, held, scale.shape[-1])


def fused(scale: np.ndarray) -> "onnx.ModelProto":
    """The same with the Mul inside the norm, whose scale has another size than x."""
    nodes = [helper.make_node("LayerNormalization", ["x", "scale"], ["out"], "norm")]
    return _model(nodes, {"scale": scale}, scale.shape[-1])


def _model(nodes: list, held: dict, size: int) -> "onnx.ModelProto":
    graph = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, size])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in held.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_onnxruntime_31980_a_scale_of_another_size_is_fused_into_a_norm() -> None:
    """It broadcasts in numpy, so the float64 run agrees; onnxruntime refuses it."""
    scale = np.array([0.5, 2.0])
    a, b = written_out(scale), fused(scale)
    verdict = normkit.verify(a, b)
    assert not verdict
    assert "onnx.checker rejects b" in verdict.failure
    assert "node name: norm" in verdict.failure
    # Without the declared size the checker sees nothing wrong.
    b.graph.output[0].type.tensor_type.shape.dim[1].ClearField("dim_value")
    verdict = normkit.verify(a, b)
    assert not verdict
    assert verdict.max_difference < 1e-6
    assert "onnxruntime cannot run b" in verdict.failure
    assert "norm" in verdict.failure
    # Of the first file onnxruntime makes the second one itself, up to this version.
    if any("cannot run a with its optimizations" in note for note in verdict.notes):
        assert normkit.verify(a, a).notes
    one = np.array([0.5])
    assert normkit.verify(written_out(one), fused(one))


def test_a_file_of_another_graph_is_told_by_its_values(tmp_path: Path) -> None:
    """No name in common: the values say where they part."""
    model = net()
    a = exported(model, X, dynamo=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1][1].eps = 1e-2
    b = exported(other, X, dynamo=True)
    for node in b.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = f"{name}_" if name else ""
        for i, name in enumerate(node.output):
            node.output[i] = f"{name}_" if name else ""
        node.name += "_"
        del node.metadata_props[:]
    for held in (
        b.graph.initializer,
        b.graph.input,
        b.graph.output,
        b.graph.value_info,
    ):
        for value in held:
            value.name += "_"
    verdict = normkit.verify(a, b)
    assert not verdict
    assert verdict.parting.place == "Conv in '1.1'"
    assert verdict.parting.last == (("Relu in '0.2'", "Relu 'node_relu_'"),)
    assert verdict.parting.region_b[0].startswith("Conv")


def test_the_number_of_inputs_is_checked_in_words() -> None:
    from normkit.errors import ArgumentError

    file = exported(net(), X, dynamo=True)
    with pytest.raises(
        ArgumentError, match=r"hold 2 tensors, and the ONNX model has 1"
    ):
        normkit.verify(file, file, (X, X))

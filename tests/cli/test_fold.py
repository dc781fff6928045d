"""`normkit fold`: an ONNX file, or a model of Python code with its checkpoint."""

import json
import sys

import pytest
import torch
from torch import nn

import normkit_cli as cli

FACTORY = """
import torch
from torch import nn

def make():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU())
    return {"model": net, "example_inputs": torch.randn(2, 3, 8, 8)}

class Sized(nn.Sequential):
    def forward(self, x):
        return super().forward(x).reshape(2, -1)

def sized():
    net = Sized(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return {"model": net, "example_inputs": torch.randn(2, 3, 8, 8)}

def single():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return {"model": net, "example_inputs": torch.randn(1, 3, 8, 8)}

def stays():
    net = nn.Sequential(nn.GELU(), nn.BatchNorm2d(3), nn.GELU())
    return {"model": net, "loader": [(torch.randn(2, 3, 8, 8), torch.zeros(2))]}

def rows():
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    nn.init.normal_(net[1].weight)
    return {"model": net, "example_inputs": torch.randn(2, 6)}

def bare():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

def computed():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    net = nn.Sequential(conv, nn.BatchNorm2d(4))
    return {"model": net, "example_inputs": torch.randn(2, 3, 8, 8)}
"""


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "folding_factory.py"
    path.write_text(FACTORY)
    return path


def trained():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU())
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2.0)
    return net.eval()


def test_a_checkpoint_is_loaded_folded_and_exported(capsys, factory, tmp_path):
    net, out = trained(), tmp_path / "folded.pt2"
    torch.save(net.state_dict(), tmp_path / "last.pt")
    code, text, _ = run(
        capsys, "fold", f"{factory}:make", "--checkpoint", tmp_path / "last.pt",
        "--export", out,
    )  # fmt: skip
    assert code == 0
    assert "1 of 1 batch norms folded" in text
    assert text.endswith("batch  any size\n")
    program = torch.export.load(out)
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 8, 8)
        assert torch.allclose(program.module()(x), net(x), atol=1e-5)
    assert "batch_norm" not in str(program.graph)


def test_a_model_is_folded_and_exported_to_onnx(capsys, factory, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is missing")
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    net, out = trained(), tmp_path / "folded.onnx"
    torch.save(net.state_dict(), tmp_path / "last.pt")
    code, text, err = run(
        capsys, "fold", f"{factory}:make", "--checkpoint", tmp_path / "last.pt",
        "--export", out, "--json",
    )  # fmt: skip
    assert code == 0
    assert err.endswith("batch  any size\n")
    assert json.loads(text)["folded"] == 1
    model = onnx.load_model(out)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    session = runtime.InferenceSession(out)
    assert session.get_inputs()[0].shape == ["batch", 3, 8, 8]
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 8, 8)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert torch.allclose(torch.from_numpy(y), net(x), atol=1e-5)


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_a_model_that_holds_its_batch_size_is_exported_for_that_one(
    capsys, factory, tmp_path, ending
):
    """torch.onnx.export would write a header that takes any size."""
    if ending == ".onnx":
        pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    out = tmp_path / f"folded{ending}"
    code, text, _ = run(capsys, "fold", f"{factory}:sized", "--export", out)
    assert code == 0
    assert "batch  2 only, as in the example inputs" in text


def test_one_example_is_exported_for_any_number(capsys, factory, tmp_path):
    """torch.export takes a size of 1 for a constant."""
    out = tmp_path / "folded.pt2"
    code, text, _ = run(capsys, "fold", f"{factory}:single", "--export", out)
    assert code == 0
    assert text.endswith("batch  any size\n")
    x = torch.randn(5, 3, 8, 8)
    assert torch.export.load(out).module()(x).shape == (5, 4, 6, 6)


def test_an_export_to_onnx_without_its_package_says_what_to_install(
    capsys, factory, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = run(
        capsys, "fold", f"{factory}:make", "--export", tmp_path / "folded.onnx"
    )
    assert code == 2
    assert "needs onnxscript" in err
    assert "pip install 'normkit[onnx]'" in err


def test_a_checkpoint_with_code_in_it_is_refused(capsys, factory, tmp_path):
    torch.save(trained(), tmp_path / "whole.pt")
    code, _, err = run(
        capsys, "fold", f"{factory}:make", "--checkpoint", tmp_path / "whole.pt"
    )
    assert code == 2
    assert "cannot be read as tensors and plain data: it holds objects of " in err


def test_json_is_the_ledger(capsys, factory):
    code, text, _ = run(capsys, "fold", f"{factory}:make", "--json")
    assert code == 0
    assert json.loads(text)["folded"] == 1


def test_a_model_of_which_nothing_folds_exits_with_1_and_is_drawn(capsys, factory):
    code, text, _ = run(capsys, "fold", f"{factory}:stays", "--pictures")
    assert code == 1
    assert "'1'   ← stays" in text


def test_an_ending_that_no_format_has_is_refused(capsys, factory):
    code, _, err = run(capsys, "fold", f"{factory}:make", "--export", "net.keras")
    assert code == 2
    assert "must end in one of .onnx, .pt2" in err


def test_an_onnx_file_is_folded_into_another(capsys, tmp_path):
    pytest.importorskip("onnx_ir", reason="the extra `onnx` is not installed")
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    from fold.test_onnx import saved

    path, out = saved(tmp_path), tmp_path / "folded.onnx"
    code, text, _ = run(capsys, "fold", path, "-o", out, "--verify", "3")
    assert code == 0
    assert "on 3 inputs" in text
    kinds = [node.op_type for node in onnx.load_model(out).graph.node]
    assert kinds == ["Conv", "Sigmoid"]
    code, _, err = run(capsys, "fold", path, "--checkpoint", out)
    assert code == 2
    assert "holds its weights; leave out --checkpoint" in err


def test_the_weights_of_layer_norms_fold_when_asked(capsys, factory):
    code, text, _ = run(capsys, "fold", f"{factory}:rows")
    assert code == 0
    assert "no batch norm" in text
    code, text, _ = run(
        capsys, "fold", f"{factory}:rows", "--norms", "all", "--layer-to-rms"
    )
    assert code == 0
    assert "1 of 1 norms folded" in text
    assert "into '2' after it; it is an RMS norm now" in text
    code, _, err = run(capsys, "fold", f"{factory}:rows", "--norms", "layer")
    assert code == 2
    assert "--norms must be batch or all, got layer" in err


def test_the_flag_that_stores_computed_weights_is_named_first(capsys, factory):
    code, text, _ = run(capsys, "fold", f"{factory}:computed")
    assert code == 1
    assert "--materialize" in text.splitlines()[0]
    code, text, _ = run(capsys, "fold", f"{factory}:computed", "--materialize")
    assert code == 0
    assert text.startswith("1 of 1 batch norms folded")


def test_the_flag_that_fixes_open_weights_is_named_first(capsys, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnx_ir", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    from fold.test_onnx import saved

    path = saved(tmp_path)
    model = onnx.load_model(path)
    for tensor in model.graph.initializer:
        kind = onnx.helper.make_tensor_value_info(
            tensor.name, tensor.data_type, tensor.dims
        )
        model.graph.input.append(kind)
    onnx.save_model(model, path)
    code, text, _ = run(capsys, "fold", path)
    assert code == 1
    assert "--fixed-weights" in text.splitlines()[0]
    code, text, _ = run(capsys, "fold", path, "--fixed-weights", "--norms", "all")
    assert code == 0
    code, _, err = run(capsys, "fold", path, "--materialize")
    assert code == 2
    assert "takes no --layer-to-rms, --materialize, --equalize" in err


def test_a_target_without_inputs_is_told_to_give_some(capsys, factory):
    code, _, err = run(capsys, "fold", f"{factory}:bare")
    assert code == 2
    assert "no example_inputs and no loader" in err

"""`normkit verify`: exit codes, checkpoints, files and pages."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from normkit_cli import main

FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model[1].running_mean.normal_()
    return {"model": model, "example_inputs": torch.randn(2, 3, 8, 8)}

def bare():
    return nn.ReLU()

def changed():
    made = make()
    made["model"][0].bias.data += 0.5
    return made
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "verified_target.py"
    path.write_text(FACTORY)
    return str(path)


def test_the_same_model_is_exit_code_0(
    factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", f"{factory}:make", f"{factory}:make"]) == 0
    assert "the same function" in capsys.readouterr().out


def test_another_one_is_exit_code_1_with_the_place_and_the_page(
    factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    words = ["verify", f"{factory}:make", f"{factory}:changed", "--report", str(page)]
    assert main(words) == 1
    assert "they part at '0'" in capsys.readouterr().out
    assert "Where they part" in page.read_text()
    assert main([*words[:3], "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["parting"]["place"] == "'0'"
    assert main([*words[:3], "--tolerance", "10"]) == 0


def test_weights_alone_are_the_first_model_with_them(
    factory: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model[1].running_mean.normal_()
    same, other = tmp_path / "same.pt", tmp_path / "other.pth"
    torch.save(model.state_dict(), same)
    model[1].bias.data += 1
    torch.save(model.state_dict(), other)
    assert main(["verify", f"{factory}:make", str(same)]) == 0
    assert main(["verify", f"{factory}:make", str(other)]) == 1


def test_what_cannot_be_compared_is_exit_code_2(
    factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", f"{factory}:bare", f"{factory}:bare"]) == 2
    assert "neither target gave example_inputs" in capsys.readouterr().err
    assert main(["verify", f"{factory}:make", str(tmp_path / "no.onnx")]) == 2
    assert main(["verify", "no.onnx", "weights.pt"]) == 2
    assert "is no Python" in capsys.readouterr().err


def test_a_file_of_the_model_is_the_model(factory: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    out = tmp_path / "model.onnx"
    assert main(["fold", f"{factory}:make", "--export", str(out)]) == 0
    assert main(["verify", f"{factory}:make", str(out)]) == 0
    assert main(["verify", f"{factory}:changed", str(out)]) == 1
    assert main(["verify", str(out), str(out)]) == 0


def test_an_exported_program_is_loaded_where_it_is_trusted(
    factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folded.pt2"
    words = ["verify", f"{factory}:make", str(out)]
    assert main([*words, "--trust"]) == 2
    assert "no file of torch.export.save, or there is none" in capsys.readouterr().err
    assert main(["fold", f"{factory}:make", "-o", str(out)]) == 0
    assert main(words) == 2
    assert "pass --trust" in capsys.readouterr().err
    assert main([*words, "--trust"]) == 0
    assert main(["verify", f"{factory}:changed", str(out), "--trust"]) == 1

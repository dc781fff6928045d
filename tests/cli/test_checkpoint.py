"""A checkpoint saved again differs where tensors changed, and only there."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from normkit.errors import TargetError
from normkit_cli.checkpoint import Checkpoint


@pytest.mark.parametrize("place", ["", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_what_changed_is_written(
    dtype: torch.dtype, place: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    weights = model.to(dtype).state_dict()
    weights["0.bias"][0] = torch.nan  # equal to nothing, and unchanged all the same
    weights["0.bias"][1] = 1 / 3
    weights["0.weight"] += torch.rand(()).to(dtype) / 3  # float32 cannot hold it
    content = {"epoch": 3, place: weights} if place else weights
    torch.save(content, tmp_path / "in.pt")
    file = Checkpoint.read(tmp_path / "in.pt")
    model.float()
    file.load_into(model)
    model[1].running_var.fill_(7)
    file.save(model, tmp_path / "out.pt")
    saved = torch.load(tmp_path / "out.pt", weights_only=True)
    found = saved[place] if place else saved
    assert not place or saved["epoch"] == 3
    assert type(found) is OrderedDict
    assert list(found) == list(weights)
    assert found._metadata == weights._metadata
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype
        if name == "1.running_var":
            assert (found[name] == 7).all()
        else:
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name
            )


def test_a_damaged_file_gives_one_clear_error(tmp_path: Path) -> None:
    torch.save(nn.BatchNorm1d(40).state_dict(), tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(good)
        for _ in range(3):
            at = int(torch.randint(len(damaged), (), generator=generator))
            damaged[at] = int(torch.randint(256, (), generator=generator))
        (tmp_path / "bad.pt").write_bytes(bytes(damaged))
        try:
            Checkpoint.read(tmp_path / "bad.pt")
        except TargetError:  # anything else fails the test
            refused += 1
    assert refused > 10


DAMAGES = {
    "sparse": (lambda t: t.to_sparse(), "is a sparse tensor"),
    "meta": (lambda t: t.to("meta"), "has no values"),
    "complex": (lambda t: t.to(torch.complex64), "is complex"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "is quantized",
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch announces changes of quantized tensors
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_tensor_that_cannot_be_copied_loads_nothing(
    kind: str, tmp_path: Path
) -> None:
    """load_state_dict loads the others first, and of complex numbers the real part."""
    damage, told = DAMAGES[kind]
    weights = nn.Linear(2, 3).state_dict()
    weights["bias"] = damage(weights["bias"])
    torch.save(weights, tmp_path / "in.pt")
    model = nn.Linear(2, 3)
    before = model.weight.detach().clone()
    with pytest.raises(TargetError, match=f"bias {told}"):
        Checkpoint.read(tmp_path / "in.pt").load_into(model)
    assert torch.equal(model.weight, before)


def test_keys_that_are_no_names_are_no_weights(tmp_path: Path) -> None:
    torch.save({0: torch.ones(2), ("a", 1): torch.ones(2)}, tmp_path / "in.pt")
    with pytest.raises(TargetError, match="no mapping from names to tensors"):
        Checkpoint.read(tmp_path / "in.pt")


def test_safetensors_stay_safetensors(tmp_path: Path) -> None:
    """With their metadata; a head that shares the embedding's weight is there once."""
    files = pytest.importorskip("safetensors.torch", reason="safetensors is missing")

    def made() -> nn.Module:
        model = nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
        model[2].weight = model[0].weight
        return model

    model, again = made(), made()
    state = {"model." + k: v for k, v in model.state_dict().items() if k != "2.weight"}
    files.save_file(state, tmp_path / "in.safetensors", {"format": "pt", "by": "us"})
    file = Checkpoint.read(tmp_path / "in.safetensors")
    file.load_into(again)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    again[1].running_var.fill_(7)
    file.save(again, tmp_path / "out.safetensors")
    found = files.load_file(tmp_path / "out.safetensors")
    assert set(found) == set(state)
    assert (found.pop("model.1.running_var") == 7).all()
    for name, value in found.items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    out = Checkpoint.read(tmp_path / "out.safetensors")
    assert out.metadata == {"format": "pt", "by": "us"}
    Checkpoint({}).save(again, tmp_path / "new.safetensors")
    Checkpoint.read(tmp_path / "new.safetensors").load_into(made())
    file.save(again, tmp_path / "out.pt")
    saved = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(saved) == {*state, "model.2.weight"}


def test_safetensors_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is missing")
    model = nn.Linear(2, 2)
    torch.save({"epoch": 3, "model": model.state_dict()}, tmp_path / "in.pt")
    file = Checkpoint.read(tmp_path / "in.pt")
    with pytest.raises(TargetError, match=r"weights alone.*save to a file in \.pt"):
        file.save(model, tmp_path / "out.safetensors")
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "in.pt").read_bytes())
    with pytest.raises(TargetError, match="no file of safetensors, or was cut off"):
        Checkpoint.read(tmp_path / "bad.safetensors")

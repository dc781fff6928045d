"""What a TARGET names, and what a checkpoint may hold."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from normkit.errors import TargetError
from normkit_cli.checkpoint import Checkpoint
from normkit_cli.target import Target, read_target

FACTORIES = """
from dataclasses import dataclass
from types import SimpleNamespace
import torch
from torch import nn
import beside

@dataclass
class Made:
    model: nn.Module
    loader: list

def alone(): return nn.Linear(2, 1)
def as_dict(): return {"model": nn.Linear(2, 1), "loader": [beside.BATCH]}
def as_tuple(): return nn.Linear(2, 1), [beside.BATCH], nn.MSELoss()
def as_object(): return SimpleNamespace(model=nn.Linear(2, 1), metric=max)
def as_dataclass(): return Made(nn.Linear(2, 1), [beside.BATCH])
def misspelt(): return {"model": nn.Linear(2, 1), "loder": []}
def no_model(): return {"loader": []}
def too_many(): return 1, 2, 3, 4
def fails(): return 1 / 0
def takes_one(x): return x
def normed(): return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
def parses():
    import argparse
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=2)
    return nn.Linear(parser.parse_args().width, 1)
def leaves(): raise SystemExit(3)
number = 3
made = nn.Linear(2, 1)
made_dict = {"model": nn.Linear(2, 1), "loader": [beside.BATCH]}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of factories and a module beside it."""
    (tmp_path / "factories_of_test.py").write_text(FACTORIES)
    (tmp_path / "beside.py").write_text("import torch\nBATCH = torch.zeros(4, 2)\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("beside", "factories_of_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path / "factories_of_test.py"
    for name in ("beside", "factories_of_test"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("alone", {"model"}),
        ("as_dict", {"model", "loader"}),
        ("as_tuple", {"model", "loader", "loss_fn"}),
        ("as_object", {"model", "metric"}),
        ("as_dataclass", {"model", "loader"}),
        ("made", {"model"}),
        ("made_dict", {"model", "loader"}),
    ],
)
def test_every_form_of_a_factory_is_read(place: Path, name: str, given) -> None:
    found = read_target(f"{place}:{name}")
    assert {key for key, value in vars(found).items() if value is not None} == given
    assert isinstance(found.model, nn.Linear)


def test_a_module_is_found_from_the_working_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.parent)
    assert isinstance(read_target("factories_of_test:alone").model, nn.Linear)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "names no factory"),
        ("{}:nope", "alone, as_dict"),
        ("{}:number", "has a int named 'number', no model and no function; its functi"),
        ("{}:misspelt", "loder"),
        ("{}:no_model", "holds no torch.nn.Module as its model"),
        ("{}:too_many", "4 values"),
        ("{}:fails", "ZeroDivisionError: division by zero"),
        ("{}:takes_one", "without arguments"),
        ("{}x.py:alone", "there is no file"),
        ("no.such.module:alone", "there is no module no.such.module"),
    ],
)
def test_what_is_wrong_with_a_target_is_said(place: Path, text: str, told) -> None:
    with pytest.raises(TargetError, match=told):
        read_target(text.format(place))


def test_a_file_that_does_not_load_says_why_and_leaves_no_module(tmp_path) -> None:
    (tmp_path / "broken_target.py").write_text("import no_such_thing_at_all\n")
    with pytest.raises(TargetError, match="no_such_thing_at_all"):
        read_target(f"{tmp_path / 'broken_target.py'}:x")
    assert "broken_target" not in sys.modules


def test_a_target_says_what_it_lacks() -> None:
    with pytest.raises(TargetError, match="no loader and no loss_fn"):
        Target(nn.Linear(1, 1)).needs("model", "loader", "loss_fn")


@pytest.mark.parametrize(
    "prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module.model."]
)
@pytest.mark.parametrize("key", ["", "state_dict", "ema"])
def test_weights_are_found_and_saved_in_their_form(
    place: Path, tmp_path: Path, prefix: str, key: str
) -> None:
    saved = read_target(f"{place}:normed").model
    weights = {prefix + n: v + 1 for n, v in saved.state_dict().items()}
    if prefix:
        weights["n_averaged"] = torch.tensor(5)  # of AveragedModel
    content = {key: weights, "epoch": 3} if key else weights
    torch.save(content, tmp_path / "in.pt")
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    found = Checkpoint.read(tmp_path / "in.pt")
    found.load_into(model)
    assert torch.equal(model[0].weight, saved[0].weight + 1)
    found.save(model, tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert out.get("epoch") == (3 if key else None)
    out = out[key] if key else out
    assert list(out) == list(weights)
    assert all(torch.equal(out[n], weights[n]) for n in weights)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self):
            return (tmp_path.joinpath("harmed").touch, ())

    torch.save({"weight": Harm()}, tmp_path / "bad.pt")
    with pytest.raises(TargetError, match="tensors and plain data"):
        Checkpoint.read(tmp_path / "bad.pt")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("0.bias"), "lacks: 0.bias"),
        (lambda w: w.update({"2.bias": torch.ones(1)}), "too much: 2.bias"),
        (lambda w: w.update({"0.bias": torch.ones(4)}), r"0.bias \(4,\) for \(3,\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, change, told) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    weights = {n: v + 1 for n, v in before.items()}
    change(weights)
    torch.save(weights, tmp_path / "in.pt")
    with pytest.raises(TargetError, match=told):
        Checkpoint.read(tmp_path / "in.pt").load_into(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_checkpoint_without_counts_of_batches_loads(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    weights = {n: v for n, v in model.state_dict().items() if "tracked" not in n}
    torch.save(weights, tmp_path / "in.pt")
    Checkpoint.read(tmp_path / "in.pt").load_into(model)


def test_a_program_that_parses_its_arguments_gets_none(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["normkit", "doctor", f"{place}:parses", "--json"]
    monkeypatch.setattr(sys, "argv", given)
    assert read_target(f"{place}:parses").model.in_features == 2
    assert sys.argv is given
    with pytest.raises(TargetError, match="exited with 3 while it was read"):
        read_target(f"{place}:leaves")
    assert sys.argv is given

"""Progress bars: on stderr alone, only when asked for, in a notebook too."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import normkit
from normkit.progress import progress_bar, tracked


def test_the_bar_is_on_stderr_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("measure", 3) as advance:
        for _ in range(3):
            advance()
    printed = capsys.readouterr()
    assert "measure" in printed.err
    assert "100%" in printed.err
    assert not printed.out


def test_nothing_is_printed_unless_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked([1, 2], "measure", shown=False)) == [1, 2]
    printed = capsys.readouterr()
    assert not printed.err
    assert not printed.out


def test_values_of_unknown_number_pass_through() -> None:
    assert list(tracked(iter("abc"), "read")) == list("abc")


def test_a_notebook_without_widgets_sees_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Console.__init__

    def in_a_notebook(self: Console, **options: object) -> None:
        plain(self, **{"force_jupyter": True, **options})  # type: ignore[arg-type]

    monkeypatch.setattr(Console, "__init__", in_a_notebook)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert list(tracked(range(2), "measure")) == [0, 1]
    printed = capsys.readouterr()
    assert "measure" in printed.err
    assert "100%" in printed.err


def _small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network whose running statistics are stale, and its batches."""
    draw = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(20, 16, 4, generator=draw)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.001), nn.ReLU(), nn.Linear(8, 2)
    )
    batches = [(batch, (batch[:, 0] > 5).long()) for batch in x]
    for batch, _ in batches:
        model(batch)
    return model, batches


def _diagnosis(*, progress: bool = False) -> normkit.doctor.Diagnosis:
    model, batches = _small()
    loss = nn.functional.cross_entropy
    return normkit.diagnose(model, batches, loss, max_batches=12, progress=progress)


def _trained(*, progress: bool) -> str:
    found = _diagnosis()
    assert found.case is not None
    optimizer = torch.optim.SGD(found.case.model.parameters(), 0.1)
    return found.train(3, optimizer, progress=progress).to_json()


def _repaired(*, progress: bool) -> str:
    return repr(_diagnosis().repair(progress=progress))


def _gap(*, progress: bool) -> str:
    model, batches = _small()
    return normkit.explain_gap(model, batches, progress=progress).to_text()


def _folded(*, progress: bool) -> str:
    torch.manual_seed(0)
    # A batch norm that stays, one that goes, and a norm whose weight goes.
    model = nn.Sequential(
        *(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 8), nn.BatchNorm1d(8)),
        *(nn.LayerNorm(8), nn.Linear(8, 2)),
    )
    model[0].weight.data[0] = -1.0
    x = torch.randn(3, 4)
    folded, ledger = normkit.fold(model.eval(), x, norms="all", progress=progress)
    assert [entry.folded for entry in ledger.entries] == [False, True, True]
    return f"{ledger.to_json()}{folded(x).tolist()}"


def _folded_onnx(*, progress: bool) -> str:
    onnx = pytest.importorskip("onnx")
    numbers = {"w": torch.ones(3, 2, 1, 1), **{n: torch.ones(3) for n in "smbv"}}
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "w"], ["y"]),
            onnx.helper.make_node(
                "BatchNormalization", ["y", *"sbmv"], ["z"], name="bn"
            ),
        ],
        "small",
        [onnx.helper.make_tensor_value_info("x", 1, [2, 2, 4, 4])],
        [onnx.helper.make_tensor_value_info("z", 1, [2, 3, 4, 4])],
        [onnx.numpy_helper.from_array(t.numpy(), n) for n, t in numbers.items()],
    )
    opset = [onnx.helper.make_opsetid("", 15)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    folded, ledger = normkit.fold_onnx(model, progress=progress)
    return f"{ledger.to_json()}{folded.SerializeToString()!r}"


def _verified(*, progress: bool) -> str:
    model, batches = _small()
    model.eval()
    return normkit.verify(model, model, batches[0][0], progress=progress).to_json()


VERBS = {
    "diagnose": (
        lambda progress: _diagnosis(progress=progress).to_json(),
        ("read batches", "examine"),
    ),
    "confirm": (
        lambda progress: _diagnosis().confirm(progress=progress).to_json(),
        ("confirm",),
    ),
    "explain": (
        lambda progress: _diagnosis().explain(progress=progress).to_json(),
        ("explain_gap",),
    ),
    "train": (lambda progress: _trained(progress=progress), ("train",)),
    "repair": (lambda progress: _repaired(progress=progress), ("confirm",)),
    "explain_gap": (
        lambda progress: _gap(progress=progress),
        ("read batches", "examine", "explain_gap"),
    ),
    "fold": (
        lambda progress: _folded(progress=progress),
        ("trace", "search", "prove"),
    ),
    "fold_onnx": (
        lambda progress: _folded_onnx(progress=progress),
        ("run", "search", "prove"),
    ),
    "verify": (lambda progress: _verified(progress=progress), ("verify",)),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_shows_its_progress_when_asked_and_gives_the_same(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call, tasks = VERBS[verb]
    quiet = call(False)
    assert not any(capsys.readouterr())
    assert call(True) == quiet
    printed = capsys.readouterr()
    assert not printed.out
    shown = dict(re.findall(r"^(\w[\w ]*?) +━.* +(\d+)%", printed.err, re.MULTILINE))
    assert list(shown) == list(tasks)
    # The least number of passes is not known before explain_gap has made them.
    assert {shown[t] for t in tasks if t != "explain_gap"} <= {"100"}

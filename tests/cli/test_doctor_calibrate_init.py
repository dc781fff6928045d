"""`normkit doctor`, `calibrate` and `init` on a file with factories."""

import json
import sys
from pathlib import Path

import pytest
import torch

import normkit_cli as cli

PROGRAMS = """
import torch
from torch import nn
from torch.nn import functional as F

def data():
    source = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(20, 32, 6, generator=source)
    return [(b, (b[:, 0] > 5).long()) for b in x]

def net(momentum=0.1):
    torch.manual_seed(0)
    body = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 24),
                         nn.BatchNorm1d(24, momentum=momentum), nn.ReLU())
    return nn.Sequential(body, nn.Linear(24, 2))

def trained(momentum):
    model = net(momentum)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):
        for x, y in data():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return {"model": model, "loader": data(), "loss_fn": F.cross_entropy}

def healthy(): return trained(0.1)
def stale(): return trained(0.001)
def accumulating():
    made = trained(0.1)
    model = made["model"]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    def train(steps):
        for index in range(steps):
            x, y = made["loader"][index % 20]
            F.cross_entropy(model(x[:8]), y[:8]).backward()
            if index % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
    return made | {"optimizer": optimizer, "train": train}
def fast(rate=1e3):
    made = trained(0.1)
    made["optimizer"] = torch.optim.SGD(
        made["model"].parameters(), rate, weight_decay=1e-2)
    return made
def slow(): return fast(0.05)
def fresh(): return {"model": net(), "loader": data()}
def alone(): return net()
def triples():
    made = trained(0.1)
    return made | {
        "loader": [(x, torch.ones(1), y) for x, y in made["loader"]],
        "forward": lambda model, batch: model(batch[0] * batch[1]),
        "targets": lambda batch: batch[2],
    }
def hostile():
    made = trained(0.001)
    made["model"].add_module("\\x1b[31m[red]<b>", nn.BatchNorm1d(2, momentum=0.001))
    return made
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "programs_of_test.py").write_text(PROGRAMS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("programs_of_test", None)
    yield str(tmp_path / "programs_of_test.py")
    sys.modules.pop("programs_of_test", None)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_doctor_finds_nothing_in_a_healthy_model(capsys, place: str) -> None:
    code, out, err = run(capsys, "doctor", f"{place}:healthy")
    assert (code, err) == (0, "")
    assert "error" not in out


def test_doctor_names_the_cause_and_the_layer_and_fails(capsys, place: str) -> None:
    code, out, _ = run(capsys, "doctor", f"{place}:stale")
    assert code == 1
    assert "cause      D04 momentum_convention in 0.2" in out.splitlines()
    assert "fix: set momentum=0.1" in " ".join(out.split())
    assert "D04: its fix helps" in out


def test_doctor_repairs_what_it_can_and_then_passes(
    capsys, place: str, tmp_path: Path
) -> None:
    repaired = tmp_path / "repaired.pt"
    code, out, _ = run(
        capsys, "doctor", f"{place}:stale", "--fix", "--out", str(repaired)
    )
    assert code == 0
    assert "applied  D04" in out
    assert torch.load(repaired, weights_only=True)["0.2.running_mean"].abs().max() > 0.1
    words = ("doctor", f"{place}:stale", "--checkpoint", str(repaired), "--json")
    code, out, _ = run(capsys, *words)
    found = json.loads(out)["findings"]
    assert "D01" not in {f["id"] for f in found}


@pytest.mark.parametrize("json_alone", [False, True])
@pytest.mark.parametrize(
    ("command", "task"), [("doctor", "examine"), ("fold", "search")]
)
def test_a_terminal_sees_the_progress_unless_json_is_asked_for(
    capsys, monkeypatch, place: str, command: str, task: str, json_alone: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    words = (command, f"{place}:stale", *["--json"] * json_alone)
    _, out, err = run(capsys, *words)
    assert (task in err) is not json_alone
    assert task not in out


def test_doctor_says_that_repairs_are_lost_without_out(capsys, place: str) -> None:
    code, out, _ = run(capsys, "doctor", f"{place}:stale", "--fix")
    assert code == 0
    assert "in memory; --out saves" in out


def test_doctor_prints_nothing_but_json(capsys, place: str, tmp_path: Path) -> None:
    page = tmp_path / "doctor.html"
    code, out, err = run(
        capsys, "doctor", f"{place}:stale", "--json", "--report", str(page)
    )
    assert code == 1
    assert json.loads(out)["schema"].startswith("normkit.diagnosis/")
    assert err == f"report   {page}\n"
    assert "<h1>" in page.read_text()


def test_doctor_shows_the_name_of_a_layer_and_does_not_obey_it(
    capsys, place: str
) -> None:
    _, out, _ = run(capsys, "doctor", f"{place}:hostile")
    assert "\x1b" not in out


def readings(out: str) -> dict[str, str]:
    found = json.loads(out)
    every = [f for name in ("findings", "not_judged", "clear") for f in found[name]]
    worst = ("clear", "not_judged", "info", "warning", "error")
    every.sort(key=lambda f: worst.index(f["severity"]))
    return {f["id"]: f["severity"] for f in every}


def test_doctor_watches_a_few_steps_of_a_copy(capsys, place: str) -> None:
    words = ("--json", "--steps", "25")
    _, out, _ = run(capsys, "doctor", f"{place}:fast", *words)
    found = readings(out)
    assert (found["D27"], found["D14"]) == ("warning", "warning")
    # They are about the program's own loop, which is not this one.
    assert {found[i] for i in ("D08", "D09", "D15")} == {"not_judged"}
    _, out, _ = run(capsys, "doctor", f"{place}:slow", *words)
    assert readings(out)["D27"] == "clear"


def test_doctor_watches_the_target_s_own_loop(capsys, place: str) -> None:
    words = ("doctor", f"{place}:accumulating", "--json", "--steps", "24")
    _, out, _ = run(capsys, *words)
    found = readings(out)
    assert found["D15"] == "warning"
    assert (found["D08"], found["D09"]) == ("clear", "clear")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("doctor", "{}:healthy", "--steps", "9"), "the target gave no optimizer"),
        (("doctor", "{}:alone"), "the target gave no loader"),
        (("doctor", "{}:fresh", "--out", "x.pt"), "add --fix"),
        (("doctor", "{}:fresh", "--checkpoint", "nope.pt"), "no checkpoint nope.pt"),
        (("doctor", "{}:fresh", "--steps", "0"), "--steps"),
        (("doctor", "{}:fresh", "--report", "/"), "--report / is a folder"),
        (("calibrate", "{}:fresh", "--out", "x.pt"), "--checkpoint"),
        (
            ("calibrate", "{0}:fresh", "--checkpoint", "{0}", "--out", "x"),
            "no file of torch.save",
        ),
        (("init", "{}:fresh", "--out", "/"), "--out / is a folder"),
        (("init", "{}:alone"), "let the target return"),
        (("init", "{}:fresh", "--scheme", "magic"), "scheme='magic'"),
    ],
)
def test_what_cannot_run_is_one_line(capsys, place: str, words, told: str) -> None:
    code, out, err = run(capsys, *(word.format(place) for word in words))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert told in err


def test_calibrate_changes_the_statistics_and_nothing_else(
    capsys, place: str, tmp_path: Path
) -> None:
    before, after = tmp_path / "in.pt", tmp_path / "out.pt"
    run(capsys, "init", f"{place}:fresh", "--out", str(before))
    weights = torch.load(before, weights_only=True)
    torch.save({"state_dict": weights, "epoch": 7}, before)
    words = ("--checkpoint", str(before), "--out", str(after))
    code, out, err = run(capsys, "calibrate", f"{place}:fresh", *words)
    assert (code, err) == (0, "")
    assert f"weights  {after}" in out
    assert "metric " in out
    saved = torch.load(after, weights_only=True)
    assert saved["epoch"] == 7
    found = saved["state_dict"]
    changed = {n for n in weights if not torch.equal(weights[n], found[n])}
    kinds = {name.rpartition(".")[2] for name in changed}
    assert kinds == {"running_mean", "running_var", "num_batches_tracked"}
    # 640 samples of N(5, 3²).
    torch.testing.assert_close(
        found["0.0.running_mean"], torch.full((6,), 5.0), atol=0.5, rtol=0
    )


def test_calibrate_prints_json(capsys, place: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    run(capsys, "init", f"{place}:fresh", "--out", str(file))
    words = ("--checkpoint", str(file), "--out", str(file), "--json", "--batches", "3")
    code, out, err = run(capsys, "calibrate", f"{place}:fresh", *words)
    assert (code, err) == (0, f"weights  {file}\n")
    found = json.loads(out)
    assert found["batches"] == 3
    # The shape of CalibrationReport.to_json, with or without a metric.
    assert "metric" not in found
    assert found["metric_before"] != found["metric_after"]


def test_init_shows_predicted_and_measured_and_draws(capsys, place: str) -> None:
    code, out, err = run(capsys, "init", f"{place}:fresh", "--plot")
    assert (code, err) == (0, "")
    assert "auto: n·Var[w], predicted and measured" in out
    assert out.count("│") >= 3
    assert "█" in out or "0.1" in out
    assert "E[y²] measured  1e-4" in out


def test_init_is_the_same_for_the_same_seed(capsys, place, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        file = tmp_path / f"{name}.pt"
        words = ("--seed", str(seed), "--out", str(file), "--json")
        _, out, _ = run(capsys, "init", f"{place}:fresh", *words)
        assert json.loads(out)["scheme"] == "auto"
        found.append(torch.load(file, weights_only=True)["1.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_init_fails_where_signals_vanish(capsys, place: str) -> None:
    code, _, _ = run(capsys, "init", f"{place}:fresh", "--scheme", "constant")
    assert code == 1


def test_a_target_says_what_its_batches_are(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / "start.pt"
    assert cli.main(["init", f"{place}:triples", "--out", str(start)]) == 0
    assert cli.main(["doctor", f"{place}:triples", "--batches", "4", "--json"]) in (
        0,
        1,
    )
    options = ["--checkpoint", str(start), "--out", str(tmp_path / "out.pt"), "--json"]
    capsys.readouterr()
    assert cli.main(["calibrate", f"{place}:triples", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["batches"] == 20
    assert told["metric_before"] is not None

"""The demo: every step held to what it says, every number in the JSON, repeatable."""

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import normkit_cli as cli
from normkit.errors import DependencyError
from normkit.report import format_value

pytest.importorskip("sklearn", reason="the demo needs normkit[demo]")
pytest.importorskip("jinja2", reason="report pages need normkit[demo]")
pytest.importorskip("matplotlib", reason="report pages need normkit[demo]")

from normkit.demo import DemoResult, run, run_demo
from normkit.demo.digits import load_digits
from normkit.demo.networks import deep_sigmoid_network, residual_cnn


@pytest.fixture(scope="module")
def result() -> DemoResult:
    return run_demo(seed=0, quick=True)


@pytest.fixture(scope="module")
def folder(result: DemoResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    result.write(folder)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "demo.json").read_text())


@dataclass(frozen=True)
class Hasty:
    """Two runs with one seed, so short that nothing can be learned."""

    first: dict[str, Any]
    second: dict[str, Any]
    left_random_state_alone: bool
    shares: list[float]
    folder: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Hasty:
    folder = tmp_path_factory.mktemp("hasty") / "made" / "for it"
    shares: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "QUICK", run.Length(6, 4, batches=2, rounds=2))
        before = torch.get_rng_state()
        first = run_demo(
            seed=1, quick=True, on_progress=lambda text, share: shares.append(share)
        )
        after = torch.get_rng_state()
        torch.manual_seed(99)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            words = ["demo", "--quick", "--seed", "1", "--out", str(folder)]
            code = cli.main(words)
    return Hasty(
        first=json.loads(first.to_json()),
        second=json.loads((folder / "demo.json").read_text()),
        left_random_state_alone=torch.equal(before, after),
        shares=shares,
        folder=folder,
        code=code,
        out=out.getvalue(),
        err=err.getvalue(),
    )


def test_every_step_does_what_it_says(result: DemoResult) -> None:
    assert [check.what for check in result.checks if not check.held] == []
    assert result.held
    assert len(result.checks) >= 14


def test_batch_norm_is_all_that_differs_between_the_sigmoid_networks() -> None:
    plain = deep_sigmoid_network(is_normalized=False, seed=3)
    normalized = deep_sigmoid_network(is_normalized=True, seed=3)
    ours, theirs = dict(plain.named_parameters()), dict(normalized.named_parameters())
    assert set(theirs) - set(ours) == {n for n in theirs if n.startswith("norm")}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_fault_leaves_the_weights_as_they_are(result: DemoResult) -> None:
    assert result.repair.has_healthy_weights


def test_the_broken_network_is_as_good_as_the_healthy_one_by_batch_statistics(
    result: DemoResult,
) -> None:
    assert abs(result.repair.target - result.train.cnn.accuracy) < 0.03
    assert result.repair.before < 0.9


def test_test_images_are_not_among_the_training_images() -> None:
    digits = load_digits(seed=5)
    train = {tuple(image.flatten().tolist()) for image in digits.train_images}
    shared = [
        i
        for i, image in enumerate(digits.test_images)
        if tuple(image.flatten().tolist()) in train
    ]
    assert not shared
    assert len(digits.train_images) + len(digits.test_images) == 1797
    var, mean = torch.var_mean(digits.train_images.double())
    assert abs(float(mean)) < 1e-6
    assert abs(float(var) - 1) < 1e-5


NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?%?")


class Cells(HTMLParser):
    """The text of every cell, every figure to notice and every amount."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.depth = 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag in ("td", "dd"):
            self.depth += 1
            self.cells.append("")

    def handle_endtag(self, tag):
        if tag in ("td", "dd"):
            self.depth -= 1

    def handle_data(self, text):
        if self.depth:
            self.cells[-1] += text


def every_value(data: Any) -> list[Any]:
    if isinstance(data, dict):
        return [v for item in data.values() for v in every_value(item)]
    if isinstance(data, list):
        return [v for item in data for v in every_value(item)]
    return [data]


def test_every_number_on_the_page_is_in_the_json(
    folder: Path, data: dict[str, Any]
) -> None:
    html = (folder / "report.html").read_text()
    values = every_value(data)
    numbers = [v for v in values if isinstance(v, int | float)]
    shown = {v for v in values if isinstance(v, str)}
    shown |= {format_value(v) for v in numbers}
    shown |= {format_value(100 * v) for v in numbers}
    shown |= {f"{100 * v:.1f}%" for v in numbers}
    shown |= {f"{v:.2f}" for v in numbers} | {f"{v:,.0f}" for v in numbers}
    cells = [cell for cell in Cells(html).cells if re.search(r"\d", cell)]
    assert len(cells) > 100
    known = {number for text in shown for number in NUMBER.findall(text)}
    unknown = [
        (number, cell)
        for cell in cells
        if cell not in shown
        for number in NUMBER.findall(cell)
        if number not in known
    ]
    assert unknown == []


def test_the_json_keeps_its_schema(data: dict[str, Any]) -> None:
    assert data["schema"] == "normkit.demo/1"
    assert data["held"] is True
    assert data["quick"] is True
    assert data["seed"] == 0
    assert data["environment"]["torch"] == torch.__version__
    for step in data["steps"]:
        assert set(step) == {"title", "seconds", "held", "checks", "data"}
        for check in step["checks"]:
            assert set(check) == {"what", "value", "shown", "required", "held"}


def test_the_report_shows_every_check(folder: Path, result: DemoResult) -> None:
    import html

    page = html.unescape((folder / "report.html").read_text())
    for check in result.checks:
        assert check.what in page
        assert check.required in page


def test_a_check_that_did_not_hold_shows_and_fails_the_run(
    result: DemoResult, tmp_path: Path
) -> None:
    wrong = replace(result, fold=replace(result.fold, difference=1e-3))
    assert not wrong.held
    assert wrong.summary() == "1 of 14 checks did not hold."
    assert "FAIL  largest difference" in wrong.to_text()
    report, data = wrong.write(tmp_path)
    assert "failed</span>" in report.read_text()
    assert json.loads(data.read_text())["held"] is False


def test_the_command_fails_where_a_step_does(hasty: Hasty) -> None:
    assert hasty.code == 1
    assert hasty.second["held"] is False
    assert "FAILED" in hasty.out
    assert "did not hold" in hasty.out


def test_the_command_says_where_the_report_is(hasty: Hasty) -> None:
    report, data = hasty.folder / "report.html", hasty.folder / "demo.json"
    assert report.exists()
    assert hasty.out.splitlines()[-2:] == [f"report   {report}", f"numbers  {data}"]


def test_progress_goes_to_stderr_a_line_per_stage_in_a_log(hasty: Hasty) -> None:
    assert hasty.err.splitlines() == [
        "training without and with batch norm",
        "breaking, diagnosing, calibrating",
        "folding",
    ]


def without_times(data: dict[str, Any]) -> dict[str, Any]:
    data = json.loads(json.dumps(data))
    for part in (data, *data["steps"]):
        del part["seconds"]
    for name in ("speed", "speed_quartiles"):
        del data["steps"][-1]["data"][name]
    return data


def test_the_same_seed_gives_the_same_numbers(hasty: Hasty) -> None:
    assert without_times(hasty.first) == without_times(hasty.second)


def test_another_seed_gives_another_split_weights_and_order() -> None:
    first, second = load_digits(1), load_digits(2)
    assert not torch.equal(first.test_labels, second.test_labels)
    orders = [next(iter(first.batches(64, seed=seed)))[1] for seed in (1, 2)]
    assert not torch.equal(*orders)
    nets = [residual_cnn(seed=seed).state_dict()["conv.weight"] for seed in (1, 2)]
    assert not torch.equal(*nets)


def test_the_global_random_state_is_left_alone(hasty: Hasty) -> None:
    assert hasty.left_random_state_alone


def test_progress_only_grows_and_ends_at_one(hasty: Hasty) -> None:
    assert hasty.shares == sorted(hasty.shares)
    assert hasty.shares[-1] == 1.0


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DependencyError, match=r"scikit-learn.*pip install"):
        load_digits(0)


def test_the_cnn_has_a_batch_norm_after_every_convolution() -> None:
    kinds = [type(module).__name__ for module in residual_cnn(seed=0).modules()]
    assert kinds.count("Conv2d") == kinds.count("BatchNorm2d") == 8

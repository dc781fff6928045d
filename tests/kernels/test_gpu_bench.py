"""The GPU bench without a GPU: its dry run, and what is left of a run that is cut."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join(str(ROOT / part) for part in ("src", "tests", "."))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None
    or tuple(map(int, version("triton").split(".")[:2])) < (3, 6),
    reason="triton 3.6 or newer is not installed",
)


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@needs_triton
@pytest.mark.timeout(600)
def test_every_case_of_every_stage_runs_in_the_interpreter(tmp_path: Path) -> None:
    path = tmp_path / "dry.json"
    options = ("--dry-run", "--budget", "500", "--out", str(path))
    process = start("-m", "benchmarks.gpu", *options)
    text, _ = process.communicate()
    assert process.returncode == 0, text[-5000:]
    stages = json.loads(path.read_text())["stages"]
    assert list(stages) == ["machine", "smoke", "bytes", "network", "tiles", "sync"]
    for name, entry in stages.items():
        assert entry["status"] == "done", name
        assert entry["done"] == entry["planned"], name
        assert not entry["errors"], name
        assert len(entry["rows"]) >= len(entry["planned"]) > 0, name
    # Each form, against torch eager and torch.compile, both directions.
    assert len(stages["bytes"]["rows"]) == 7 * 2 * 2
    measured = [row for e in stages.values() for row in e["rows"] if "times" in row]
    assert all(time > 0 for row in measured for time in row["times"].values())
    table = text[text.index("share") :].splitlines()[1:]
    for row, line in zip(measured, table, strict=False):
        assert line.startswith(row["what"][:30])
        assert row["pass"] in line


TOY = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.report import is_good, to_text
from benchmarks.gpu.stages import Case, Stage, run_stages
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

def row(name):
    return Case(name, lambda: [{"check": name, "error": 0.0, "limit": 1.0}])

def last(name, act):
    return Case(name, lambda: (print("begun", flush=True), act(), [])[2])

acts = {
    "raises": lambda: 1 / 0,
    "dies": lambda: os.kill(os.getpid(), 9),
    "hangs": lambda: time.sleep(600),
}
def stages(*names):
    return [
        Stage(n, 1, lambda record, n=n: [row("a"), last(n, acts[n]), row("b")])
        for n in names
    ]
run_stages(stages(*sys.argv[3:]), Path(sys.argv[1]), float(sys.argv[2]))
"""


def record(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text())["stages"]


def names(entry: dict) -> list[str]:
    return [row["check"] for row in entry["rows"]]


def test_a_stage_that_raises_dies_or_hangs_costs_the_others_nothing(tmp_path) -> None:
    path = tmp_path / "toy.json"
    process = start("-c", TOY, str(path), "9", "raises", "dies", "hangs", "raises")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    raises, dies, hangs = (record(path)[n] for n in ("raises", "dies", "hangs"))
    assert names(raises)[-2:] == ["a", "b"]
    assert "ZeroDivisionError" in raises["errors"]["raises"]
    assert names(dies) == ["a"]
    assert dies["status"] == "died (exit code -9)"
    assert names(hangs) == ["a"]
    assert hangs["status"] == "cut"
    assert hangs["planned"] == ["a", "hangs", "b"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_every_row_before(tmp_path: Path, how) -> None:
    path = tmp_path / "toy.json"
    with start("-c", TOY, str(path), "500", "hangs") as process:
        assert process.stdout is not None
        while "begun" not in process.stdout.readline():
            assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(how)
        process.wait(timeout=30)
        assert time.monotonic() - begin < 20
        if how == signal.SIGKILL:
            # Its stage ends with the case that it is at.
            os.killpg(process.pid, signal.SIGKILL)
    entry = record(path)["hangs"]
    assert names(entry) == ["a"]
    assert entry["status"] == ("cut" if how == signal.SIGTERM else "running")


def test_a_wrong_check_an_error_and_a_crash_are_not_good() -> None:
    from benchmarks.gpu.report import is_good, to_text

    entry = {"status": "done", "planned": [], "done": [], "errors": {}, "rows": []}
    check = {"check": "y", "error": 0.5, "limit": 1.0}
    assert is_good({"stages": {"smoke": {**entry, "rows": [check]}}})
    for wrong in (
        {"rows": [{**check, "error": 2.0}]},
        {"rows": [{**check, "error": float("nan")}]},
        {"errors": {"case": "trace"}},
        {"status": "died (exit code 1)"},
        {"status": "not run"},
    ):
        data = {"stages": {"smoke": {**entry, **wrong}}}
        assert not is_good(data), wrong
        assert "smoke" in to_text(data)

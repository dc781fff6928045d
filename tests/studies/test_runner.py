"""Running, interrupting, resuming, recording."""

import ast
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from normkit.errors import ArgumentError
from normkit.studies import record as recording
from normkit.studies import registry, runner
from normkit.studies.record import (
    Record,
    is_afterwards,
    read_json,
    run_key,
    write_json,
)
from normkit.studies.study import Scale, Study, Trial
from normkit.studies.verdict import at_least, verdict

RAN: list[int] = []


def measure(trial: Trial, *, size: int) -> dict:
    RAN.append(trial.seed)
    if trial.seed in FAILING:
        raise KeyboardInterrupt
    draw = torch.rand(size, generator=trial.generator())
    torch.rand(1)  # the global generator belongs to the caller, too
    return {"value": draw.mean().item(), "never": math.inf}


FAILING: set[int] = set()


def evaluate(results: list[dict]) -> list:
    return [verdict("C1", at_least("mean", [r["value"] for r in results], 0.4))]


def draw(figure, results: list[dict]) -> None:
    figure.subplots().plot([r["value"] for r in results])


FAKE = Study(
    id="S99",
    title="fake",
    question="?",
    prediction="!",
    seen="a dot",
    meaning="nothing",
    arms=("one",),
    metric="mean",
    criterion="0.4",
    claims=("C1",),
    minutes=0,
    scales={name: Scale(3, {"size": 1000}) for name in ("quick", "cpu", "gpu")},
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)


@pytest.fixture(autouse=True)
def only_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find", lambda name: FAKE)
    RAN.clear()
    FAILING.clear()


def run(out: Path, **options) -> Record:
    (record,) = runner.run(["S99"], scale="quick", out=out, **options)
    return record


def test_a_run_leaves_a_record_and_a_figure(tmp_path: Path) -> None:
    record = run(tmp_path)
    assert record.verdicts[0].word == "supported"
    assert [len(record.results), record.settings] == [3, {"size": 1000}]
    assert {"torch", "processor", "threads_per_trial"} <= set(record.environment)
    stored = Record.read(tmp_path / "records" / "S99.json")
    assert stored.verdicts == record.verdicts
    assert stored.results[0]["never"] == math.inf
    for suffix in ("svg", "png"):
        assert (tmp_path / "figures" / f"S99.{suffix}").stat().st_size > 1000
    assert not (tmp_path / ".unfinished").exists()


def test_a_record_shows_its_verdicts_and_not_its_numbers(tmp_path: Path) -> None:
    record = run(tmp_path)
    assert repr(record) == str(record) == record.to_text()
    assert record.to_text().startswith("S99, scale quick: 1 claim, 3 seeds")
    assert "C1: supported" in str(record)
    assert "predicted" in str(record)
    assert len(str(record)) < 400
    (row,) = record.to_rows()
    assert (row["claim"], row["verdict"]) == ("C1", "supported")
    assert "<td>C1</td>" in record._repr_html_()


def test_an_interrupt_while_workers_start_waits_for_their_end() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached, leave = [], threading.Event()
    # A thread that blocks nothing takes the signal in place of the caller's.
    other = threading.Thread(target=leave.wait)
    other.start()

    def start_workers() -> None:
        with runner._interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            reached.append("the end")

    try:
        with pytest.raises(KeyboardInterrupt):
            start_workers()
        assert reached
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        leave.set()
        other.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.5])
def test_an_interrupt_at_any_time_ends_the_run(tmp_path: Path, seconds: float) -> None:
    words = ["study", "run", "S02", "--jobs", "2", "--out", str(tmp_path)]
    # As a terminal leaves it: a shell starts programs in the background without SIGINT.
    code = "import signal, sys; from normkit_cli import main; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "print(flush=True); "
    code += f"sys.exit(main({words!r}))"
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    program.stdout.readline()
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    while program.poll() is None and not children.read_text():
        time.sleep(0.02)
    time.sleep(seconds)
    os.killpg(program.pid, signal.SIGINT)
    try:
        _, told = program.communicate(timeout=60)
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
            program.communicate()
    assert program.returncode == 130
    assert told.strip() == "normkit: stopped"


def test_an_interrupted_run_keeps_the_seeds_that_finished(tmp_path: Path) -> None:
    FAILING.add(2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    FAILING.clear()
    RAN.clear()
    record = run(tmp_path)
    assert RAN == [2]
    assert record.results == run(tmp_path / "anew").results


def test_a_finished_study_is_not_run_again_unless_asked(tmp_path: Path) -> None:
    first = run(tmp_path)
    RAN.clear()
    assert run(tmp_path).results == first.results
    assert RAN == []
    run(tmp_path, fresh=True)
    assert RAN == [0, 1, 2]


def test_more_seeds_run_again(tmp_path: Path) -> None:
    run(tmp_path)
    assert len(run(tmp_path, seeds=4).results) == 4


def test_random_numbers_and_threads_of_the_caller_are_left_alone(
    tmp_path: Path,
) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_trial_repeats_and_its_streams_differ() -> None:
    one, same, other = Trial(0), Trial(0), Trial(1)
    draw = torch.rand(8, generator=one.generator())
    assert torch.equal(draw, torch.rand(8, generator=same.generator()))
    assert not torch.equal(draw, torch.rand(8, generator=one.generator(1)))
    assert not torch.equal(draw, torch.rand(8, generator=other.generator()))


def test_the_key_changes_with_settings_and_data_and_not_with_the_rule(
    tmp_path: Path,
) -> None:
    key = run_key(FAKE, "quick", None)
    (tmp_path / "mnist.npz").touch()
    assert run_key(FAKE, "quick", tmp_path) != key
    assert run_key(FAKE, "cpu", None) != key


def test_the_key_does_not_change_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)

    def key(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return run_key(
            replace(FAKE, measure=import_module(name).measure), "quick", None
        )

    plain = 'def measure(trial):\n    return {"value": 1.0}\n'
    first = key("study_plain", plain)
    worded = plain.replace(":\n", ':\n    """Measure it."""  # a word\n', 1)
    assert key("study_worded", worded) == first
    assert key("study_other", plain.replace("1.0", "2.0")) != first


def test_the_key_changes_with_a_file_that_the_study_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = registry.all_studies()[1]  # S02 imports the replicas
    key = recording.code_key(study, "quick")
    # The files are read under the folder of the module: of another, with a change.
    there = Path(recording.__file__).parent
    for path in there.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(recording, "__file__", str(tmp_path / "record.py"))
    assert recording.code_key(study, "quick") == key
    (tmp_path / "figure.py").write_text("A = 1")
    assert recording.code_key(study, "quick") == key
    with (tmp_path / "replicas.py").open("a") as file:
        file.write("\nB = 2\n")
    assert recording.code_key(study, "quick") != key


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("from normkit.studies.training import cnn", ["training"]),
        ("from normkit.studies import training, verdict as rules", ["training"]),
        ("from normkit.studies.verdict import Part", []),
        ("from normkit.nn import BatchNorm2d", []),
    ],
)
def test_the_key_covers_the_files_of_both_forms_of_import(
    line: str, files: list[str]
) -> None:
    assert recording._of_this_package(line) == files


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("from normkit.studies.figure import bars", False),
        ("from normkit.studies import verdict as rules", False),
        ("from normkit.studies import training, verdict", True),
        ("from normkit.nn import BatchNorm2d", True),
        ("def _evaluated(x): ...", False),
        ("def draw(x): ...", False),
        ("def measure(x): ...", True),
        ("_RATES = (0.1,)", True),
    ],
)
def test_what_serves_the_rule_and_the_figure_is_left_out_of_the_key(
    line: str, counts: bool
) -> None:
    (node,) = ast.parse(line).body
    assert is_afterwards(node) is not counts


def test_unknown_scales_and_missing_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="must be one of quick, cpu, gpu"):
        runner.run(["S99"], scale="huge", out=tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match="CUDA"):
            runner.run(["S99"], scale="gpu", out=tmp_path)


def test_a_data_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="does not exist"):
        runner.data_folder(tmp_path / "none")


def test_json_keeps_what_it_has_no_word_for(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "value.json"
    write_json(path, {"a": [math.inf, -math.inf, 1.5], "b": {"c": math.nan}})
    json.loads(path.read_text(), parse_constant=pytest.fail)
    back = read_json(path)
    assert back["a"] == [math.inf, -math.inf, 1.5]
    assert math.isnan(back["b"]["c"])

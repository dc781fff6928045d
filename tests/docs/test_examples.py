"""The scripts and notebooks of examples/ do what they say."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_says_how_it_is_run(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) < 80
    assert f"python examples/{script.name}" in text.split('"""')[1]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(notebook: Path) -> None:
    for cell in json.loads(notebook.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def run_main(name: str, *args):
    pytest.importorskip("sklearn", reason="the examples need normkit[demo]")
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](*args)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_takes_a_minute_at_most(script: Path) -> None:
    pytest.importorskip("sklearn", reason="the examples need normkit[demo]")
    start = os.times()
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    end = os.times()
    assert (done.returncode, done.stderr) == (0, "")
    # Of the processor: two cores run it in a minute of time.
    spent = end.children_user + end.children_system
    spent -= start.children_user + start.children_system
    assert spent < 120


@pytest.mark.slow
def test_the_doctor_finds_the_momentum_and_repairs_it() -> None:
    found = run_main("diagnose")
    assert found["mended"] > found["broken"] + 0.1
    assert "D04" in found["repaired"]


@pytest.mark.slow
def test_a_cnn_is_shipped_without_norms_and_as_it_was(tmp_path: Path) -> None:
    found = run_main("ship_a_cnn", tmp_path / "folded.pt2")
    assert found["norms"] == 0
    assert found["off"] < 1e-4
    assert found["accuracy"] > 0.9


@pytest.mark.slow
def test_a_transformer_learns_and_gives_a_sample_its_own_bits() -> None:
    found = run_main("ship_a_transformer")
    assert found["right"] > 0.95
    assert found["same"]


@pytest.mark.slow
def test_averaged_weights_need_statistics_of_their_own() -> None:
    found = run_main("average_weights")
    assert found["average, calibrated"] > found["average, old statistics"] + 0.02


@pytest.mark.slow
def test_batches_of_two_want_frozen_statistics() -> None:
    found = run_main("fine_tune")
    assert found["frozen"] > found["before"]
    assert found["frozen"] > found["batch statistics"] + 0.02


@pytest.mark.slow
def test_two_ranks_as_one_batch_are_right_and_alone_are_not() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "two_ranks.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    off = re.findall(
        r"([\d.]+) off alone, ([\de.-]+) off as SyncBatchNorm", done.stdout
    )
    assert len(off) == 2
    assert all(float(alone) > 0.1 > 1e-5 > float(sync) for alone, sync in off)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_first_to_last_cell(notebook: Path) -> None:
    pytest.importorskip("sklearn", reason="the notebooks need normkit[demo]")
    nbclient = pytest.importorskip("nbclient", reason="runs the notebooks")
    pytest.importorskip("ipykernel", reason="runs the notebooks")
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(content, timeout=120, kernel_name="python3").execute()
    printed = [
        output["text"]
        for cell in content.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    ]
    assert printed

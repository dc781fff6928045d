"""The scripts and notebooks of examples/ do what they say."""

import json
import os
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
    assert found["broken"] < 0.6
    assert found["mended"] > 0.85
    assert found["repaired"]


@pytest.mark.slow
def test_a_cnn_is_shipped_without_norms_and_as_it_was() -> None:
    pass


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

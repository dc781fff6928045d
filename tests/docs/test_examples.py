"""The scripts and notebooks of examples/ do what they say."""

import json
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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


# What each script's `main` must find.
FINDINGS = {
    "diagnose": lambda found: (
        found["fixed"] > found["broken"] + 0.1 and "D04" in found["repaired"]
    ),
    "ship_a_cnn": lambda found: (
        found["norms"] == 0 and found["off"] < 1e-4 and found["accuracy"] > 0.9
    ),
    "ship_a_transformer": lambda found: found["right"] > 0.9 and found["same"],
    "average_weights": lambda found: (
        found["average, calibrated"] > found["average, old statistics"] + 0.02
    ),
    "fine_tune": lambda found: (
        found["frozen"] > max(found["before"], found["batch statistics"])
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_finds_what_it_says_in_a_minute(script: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the examples need normkit[demo]")
    if script.stem == "two_ranks":
        pytest.skip("its ranks are processes, in the test below")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other tests a second one waits for the first
    start = time.process_time()
    try:
        main = runpy.run_path(str(script))["main"]
        found = main(*[tmp_path / "folded.pt2"] * (script.stem == "ship_a_cnn"))
    finally:
        torch.set_num_threads(threads)
    assert FINDINGS[script.stem](found), found
    assert time.process_time() - start < 60


@pytest.mark.slow
def test_two_ranks_as_one_batch_are_right_and_alone_are_not() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "two_ranks.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    told = r"([\d.]+) off alone, ([\de.-]+) off as SyncBatchNorm"
    off = re.findall(told, done.stdout)
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

"""The bench of the kernels alone, which no command of normkit runs."""

import runpy
from pathlib import Path

import pytest
import torch

from normkit.kernels.cpu.loading import library

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.mark.skipif(library() is None, reason="no native library")
def test_the_bench_of_the_kernels_measures_a_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "0.01"])
    measure = runpy.run_path(str(SCRIPT))["measure"]
    row = measure("small", torch.randn(4, 8, 6, 6), (0, 2, 3), 1, "relu")
    name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "small"
    assert len(cells) == 2
    assert all(float(cell.split()[0]) > 0 for cell in cells)

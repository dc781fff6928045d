"""The bench of layouts, which no command of normkit runs."""

import runpy
from pathlib import Path

from normkit.bench.marks import between

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "layouts.py"


def test_the_bench_of_layouts_measures_what_its_page_names() -> None:
    found = runpy.run_path(str(SCRIPT))
    for name, (_, values) in found["CASES"].items():
        assert not values().is_contiguous(), name
    row = found["measure"]("batch, sequence seen as channels", 0.01)
    _, *cells = (cell.strip() for cell in row.strip("|").split("|"))
    assert len(cells) == 4
    assert all(float(cell.split()[0]) > 0 for cell in cells)
    page = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
    table = between(page, found["COMMAND"])
    assert all(f"| {name} |" in table for name in found["CASES"])

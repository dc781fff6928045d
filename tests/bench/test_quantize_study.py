"""The table of the quantization study."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from normkit.bench.marks import between

ROOT = Path(__file__).parents[2]


def study():
    path = ROOT / "benchmarks" / "quantize" / "study.py"
    spec = importlib.util.spec_from_file_location("quantize_study", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_the_table_of_the_record() -> None:
    module = study()
    kept = between(module.PAGE.read_text(), module.COMMAND)
    assert kept == module.block(module.records()).strip()


def test_the_record_has_each_seed_once() -> None:
    module = study()
    digits = [r for r in module.records() if r["data"] == "digits"]
    seeds = [r["seed"] for r in digits]
    assert len(set(seeds)) == len(seeds) >= 6  # Fewer have no interval.
    assert all(0 <= r[name] <= 100 for r in digits for name in module.ROWS)

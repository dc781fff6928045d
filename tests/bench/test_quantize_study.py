"""The table of the quantization study, and its intervals."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

from normkit.bench.marks import between
from normkit.errors import ArgumentError
from normkit.studies.interval import order_statistics

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


@pytest.mark.parametrize("n", [6, 8, 9, 10, 12, 20, 41])
def test_the_interval_covers_the_median_and_a_shorter_one_would_not(n: int) -> None:
    found = order_statistics(range(1, n + 1))
    k = int(found.low)
    assert found.high == n + 1 - k

    def covered(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, j) for j in range(k)) / 2**n

    assert covered(k) >= 0.95 > covered(k + 1)


def test_five_seeds_cannot_cover_it() -> None:
    with pytest.raises(ArgumentError, match="needs 6 seeds, got 5"):
        order_statistics([1.0] * 5)
    with pytest.raises(ArgumentError, match="one number per seed"):
        order_statistics([float("nan")] * 8)

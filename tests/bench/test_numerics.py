"""`normkit bench numerics` and the page it writes."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import normkit_cli as cli
from normkit.bench.gradients import LAYERS, SHAPES, gradient_errors
from normkit.bench.numerics import (
    BEGIN,
    CASES,
    DTYPES,
    END,
    RATIOS,
    Case,
    Numerics,
    numerics,
)

# The package exports the function under the same name.
room = importlib.import_module("normkit.bench.numerics")
PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> tuple[Case, ...]:
    """Two layouts where torch is far off, and nothing else."""
    kept = tuple(
        c for c in CASES if c.layout == "channels_last" and "group" in c.layer
    ) + tuple(c for c in CASES if c.layout == "NC" and "training" in c.layer)
    assert len(kept) == 2
    monkeypatch.setattr(room, "CASES", kept)
    monkeypatch.setattr(room, "SHAPES", ((4, 8, 6, 1),))
    return kept


def tables_of(page: str) -> list[list[list[str]]]:
    """The cells of the two tables: outputs, gradients."""
    block = page.split(BEGIN)[1].split(END)[0]
    tables = [t for t in block.strip().split("\n\n") if t.startswith("|")]
    assert len(tables) == 2
    return [
        [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
        for lines in (t.splitlines() for t in tables)
    ]


def table_of(page: str) -> tuple[list[str], dict[tuple[str, ...], list[list[float]]]]:
    head, _, *body = tables_of(page)[0]
    return head, {
        tuple(row[:3]): [[float(v) for v in cell.split("/")] for cell in row[3:]]
        for row in body
    }


def test_the_page_has_a_row_for_every_case_and_a_column_for_every_ratio() -> None:
    """Stale when a layer, layout, dtype or ratio is added; the digits may differ."""
    head, rows = table_of(PAGE.read_text(encoding="utf-8"))
    assert head[3:] == [f"mean/std {ratio:g}" for ratio in RATIOS]
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    assert list(rows) == [(c.layer, c.layout, n) for c in CASES for n in names]
    assert "normkit bench numerics --write docs/numerics.md" in PAGE.read_text()


def test_the_page_keeps_the_contract() -> None:
    _, rows = table_of(PAGE.read_text(encoding="utf-8"))
    limits = {"float32": 2e-6, "bfloat16": 2**-8 * 1.05, "float16": 2**-11 * 1.05}
    for key, cells in rows.items():
        for ours, _ in cells:
            assert ours <= limits[key[2]], key


def test_the_page_has_the_gradients_of_every_layer_and_shape() -> None:
    head, _, *body = tables_of(PAGE.read_text(encoding="utf-8"))[1]
    assert head[1:] == [str(shape) for shape in SHAPES]
    assert [row[0] for row in body] == list(LAYERS)
    cells = [[float(v) for v in c.split("/")] for row in body for c in row[1:]]
    assert all(ours <= 1e-6 or math.isnan(ours) for ours, _ in cells)
    # The reason for the table: torch is wrong by the size of the gradient.
    assert max(theirs for _, theirs in cells if not math.isnan(theirs)) > 1


def test_an_operator_that_mistakes_layouts_would_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(LAYERS, "torch's", lambda _: torch.nn.BatchNorm2d(8))
    ours, theirs = gradient_errors("torch's", (4, 8, 6, 1))
    assert ours == theirs > 1


def test_what_is_measured_keeps_the_contract_where_torch_does_not(few) -> None:
    found = numerics(seed=1)
    assert len(found.errors) == len(few) * len(DTYPES)
    for key, pairs in found.errors.items():
        if key[2] == "float32":
            assert max(ours for ours, _ in pairs) <= 2e-6
            assert max(theirs for _, theirs in pairs) > 1e-3


def test_a_rounded_mean_would_show(few, monkeypatch) -> None:
    """The measure itself can fail: a layer that forgets the low half of its centre."""
    from normkit.kernels import reference

    monkeypatch.setattr(reference, "split", lambda c, dtype: (c.to(dtype), None))
    import normkit

    with normkit.backend("reference"):
        found = numerics()
    assert max(p[0] for pairs in found.errors.values() for p in pairs) > 1e-5


def test_the_generators_of_torch_are_left_alone(few) -> None:
    before = torch.get_rng_state()
    numerics()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_command_writes_the_block_and_leaves_the_rest(
    few, tmp_path: Path, capsys
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert cli.main(["bench", "numerics", "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"above\n{BEGIN}\n| layer |")
    assert text.endswith(f"{END}\nbelow\n")
    assert "old" not in text
    assert len(table_of(text)[1]) == 6
    assert "channels_last" in capsys.readouterr().out


def test_json_has_every_number_unrounded(few, capsys) -> None:
    assert cli.main(["bench", "numerics", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 6
    for row in found["rows"]:
        assert row["mean_over_std"] == list(RATIOS)
        assert len(row["normkit"]) == len(row["torch"]) == len(RATIOS)


def test_a_page_without_marks_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    module = sys.modules["normkit.bench.numerics"]
    monkeypatch.setattr(module, "numerics", lambda **_: pytest.fail("measured"))
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    assert cli.main(["bench", "numerics", "--write", str(page)]) == 2
    assert "add both where the table belongs" in capsys.readouterr().err
    assert page.read_text() == "nothing here\n"


@pytest.mark.slow
def test_every_case_keeps_the_contract_with_another_seed() -> None:
    found: Numerics = numerics(seed=7)
    for key, pairs in found.errors.items():
        if key[2] == "float32":
            assert max(ours for ours, _ in pairs) <= 2e-6, key

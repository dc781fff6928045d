"""The tables of the page are those of the newest records."""

from pathlib import Path

import pytest

from normkit.bench.page import CALLS, SMALL, SPEED, Block, figure, renew
from normkit.errors import ArgumentError

PAGE = Path(__file__).parents[2] / "benchmarks" / "README.md"


def test_the_page_shows_the_newest_records() -> None:
    """Renew it by `normkit bench page`."""
    text = PAGE.read_text(encoding="utf-8")
    assert SPEED.begin in text
    assert SMALL.begin in text
    assert CALLS.begin in text
    assert text == renew(PAGE)


def test_the_figure_is_that_of_the_newest_record_and_the_page_shows_it() -> None:
    """Renew it by `normkit bench page`."""
    drawn = figure(PAGE)
    assert drawn is not None
    path, svg = drawn
    assert path.read_text(encoding="utf-8") == svg
    assert f'<img src="{path.name}"' in PAGE.read_text(encoding="utf-8")


def test_only_a_record_of_calls_has_a_figure(tmp_path: Path) -> None:
    results = PAGE.parent / "results"
    page = tmp_path / "README.md"
    page.write_text(f"{SPEED.begin}\n{SPEED.end}\n")
    assert figure(page) is None
    assert figure(page, SMALL.newest(results)) is None
    drawn = figure(page, CALLS.newest(results))
    assert drawn is not None
    assert drawn[0] == tmp_path / "calls.svg"
    assert drawn[1].startswith("<svg")


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("no marks")
    with pytest.raises(ArgumentError, match="has no line"):
        renew(page)


@pytest.mark.parametrize("block", [SPEED, SMALL, CALLS], ids=lambda block: block.name)
def test_a_record_fills_its_own_marks(block: Block, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{block.begin}\nold\n{block.end}\nafter")
    with pytest.raises(ArgumentError, match="holds no record"):
        renew(page)
    record = block.newest(PAGE.parent / "results")
    assert renew(page, record) == f"before\n{block.generated(record)}\nafter"
    for other in {SPEED, SMALL, CALLS} - {block}:
        with pytest.raises(ArgumentError, match=f"bench {other.name}"):
            renew(page, other.newest(PAGE.parent / "results"))

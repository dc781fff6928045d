"""The tables of the page are those of the newest records."""

from pathlib import Path

import pytest

from normkit.bench.page import SMALL, SPEED, Block, renew
from normkit.errors import ArgumentError

PAGE = Path(__file__).parents[2] / "benchmarks" / "README.md"


def test_the_page_shows_the_newest_records() -> None:
    """Renew it by `normkit bench page`."""
    text = PAGE.read_text(encoding="utf-8")
    assert SPEED.begin in text
    assert SMALL.begin in text
    assert text == renew(PAGE)


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("no marks")
    with pytest.raises(ArgumentError, match="has no line"):
        renew(page)


@pytest.mark.parametrize("block", [SPEED, SMALL], ids=lambda block: block.name)
def test_a_record_fills_its_own_marks(block: Block, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{block.begin}\nold\n{block.end}\nafter")
    with pytest.raises(ArgumentError, match="holds no record"):
        renew(page)
    record = block.newest(PAGE.parent / "results")
    assert renew(page, record) == f"before\n{block.generated(record)}\nafter"
    (other,) = {SPEED, SMALL} - {block}
    with pytest.raises(ArgumentError, match=f"bench {other.name}"):
        renew(page, other.newest(PAGE.parent / "results"))

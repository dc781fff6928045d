"""The guide runs, and the page of the command line is the command line's."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_the_examples_of_the_guide_run(page: Path) -> None:
    pytest.importorskip("jinja2", reason="report pages need normkit[demo]")
    pytest.importorskip("matplotlib", reason="charts need normkit[demo]")
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    found = doctest.testfile(str(page), module_relative=False, optionflags=flags)
    assert found.failed == 0
    assert found.attempted == page.read_text().count(">>> ")


@pytest.mark.parametrize("page", ["command_line", "checks"])
def test_the_page_is_up_to_date(page: str) -> None:
    done = subprocess.run(
        [sys.executable, f"docs/{page}.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_guide_names_every_key_of_the_demos_json() -> None:
    from normkit.demo import Check, DemoResult

    page = (ROOT / "docs" / "guide" / "demo.md").read_text()
    for name in Check.__dataclass_fields__:
        assert f"`{name}`" in page
    keys = {"is_quick": "quick"}
    for name in DemoResult.__dataclass_fields__:
        if name in ("train", "watch", "repair", "fold"):
            continue
        assert f"`{keys.get(name, name)}`" in page

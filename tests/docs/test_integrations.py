"""The pages of docs/integrations run, where their package is installed."""

import doctest
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "integrations").glob("*.md"))
NEEDS = {"trackers": "tensorboard", "README": "normkit"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore")
def test_the_examples_of_an_integration_run(page: Path) -> None:
    package = NEEDS.get(page.stem, page.stem)
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if page.stem in ("timm", "transformers"):
        from integrations.networks import library

        library(package)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    with warnings.catch_warnings():
        found = doctest.testfile(str(page), module_relative=False, optionflags=flags)
    assert found.failed == 0
    assert found.attempted == page.read_text().count(">>> ")


def test_every_page_is_on_the_first_one_and_its_links_lead_somewhere() -> None:
    linked: set[str] = set()
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            linked |= {target} if page.stem == "README" else set()
    assert {page.name for page in PAGES} - {"README.md"} == linked


def test_the_pages_name_every_option_of_the_callbacks() -> None:
    import inspect

    from normkit.integrations.schedule import Schedule

    text = (ROOT / "docs" / "integrations" / "README.md").read_text()
    for name in inspect.signature(Schedule).parameters:
        assert f"`{name}=" in text

"""What the README shows runs, and what it names exists."""

import doctest
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_examples_of_the_readme_run() -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    with torch.random.fork_rng():
        found = doctest.testfile(
            str(ROOT / "README.md"), module_relative=False, optionflags=flags
        )
    assert found.attempted > 20
    assert found.failed == 0


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"`normkit ([a-z]+)", README)))
)
def test_the_commands_of_the_readme_exist(command: str) -> None:
    from normkit_cli import app

    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/why.md"]
)
def test_the_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_every_public_name_is_in_the_glossary_or_the_readme() -> None:
    import normkit

    glossary = (ROOT / "docs" / "glossary.md").read_text()
    for name in set(normkit.__all__) - {"__version__"}:
        assert name in README or name in glossary, f"{name} is nowhere explained"

"""The READMEs say the same, what they show runs, and what they name exists."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)


def targets(text: str) -> list[str]:
    """Return what the links and pictures of a page lead to, but the other README."""
    found = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    return [target for target in found if not target.startswith("README")]


def test_both_readmes_show_the_same_code_and_lead_to_the_same_pages() -> None:
    assert len(blocks(README)) >= 4
    assert blocks(README) == blocks(CHINESE)
    assert targets(README) == targets(CHINESE)
    assert README.count("\n## ") == CHINESE.count("\n## ")
    assert README.count("\n| ") == CHINESE.count("\n| ")


def test_the_doctor_says_what_the_readmes_show() -> None:
    """Also keeps the picture: it holds the findings that it shows."""
    pytest.importorskip("sklearn", reason="train.py of the README needs normkit[demo]")
    pytest.importorskip("matplotlib", reason="charts need normkit[demo]")
    done = subprocess.run(
        [sys.executable, "docs/readme.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_old_text_of_the_doctor_is_found() -> None:
    pytest.importorskip("PIL", reason="the picture needs pillow, of normkit[demo]")
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    shown = README.split(readme.BEGIN)[1].split(readme.END)[0]
    verdict = shown.strip().removesuffix("```").partition("\n$ ")[2].partition("\n")[2]
    assert readme.with_block(README, verdict.strip()) == README
    other = readme.with_block(README, verdict.strip().replace("momentum", "eps"))
    assert readme.words(other) != readme.words(README)
    assert readme.words("21.4 points") == readme.words("21.6 points")


def test_the_make_targets_of_the_readme_exist() -> None:
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M))
    assert {"demo", "test", "docs"} <= named <= there


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"`normkit ([a-z]+)", README)))
)
def test_the_commands_of_the_readme_exist(command: str) -> None:
    from normkit_cli import app

    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_extras_of_the_readme_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r"pip install '\.\[(\w+)\]'", README)
    assert named
    for extra in named:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


@pytest.mark.parametrize(
    "page",
    ["README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/why.md"],
)
def test_the_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_every_public_name_is_in_the_glossary_or_the_examples() -> None:
    import normkit

    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    examples = (ROOT / "docs" / "guide" / "examples.md").read_text(encoding="utf-8")
    for name in set(normkit.__all__) - {"__version__"}:
        known = name in README or name in glossary or name in examples
        assert known, f"{name} is nowhere explained"

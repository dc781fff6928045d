"""Every file exists that a README of the sources or the architecture page names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "normkit"
READMES = [*sorted(SOURCE.rglob("README.md")), ROOT / "docs" / "architecture.md"]


def missing(page: str, folder: Path) -> list[str]:
    """Return the named files and folders that do not exist.

    A name is relative to the folder, to its parent, to the package or the repository;
    a bare name that is not in the folder lies somewhere below it.
    """
    named = re.findall(r"`([\w./]+(?:\.(?:py|cpp|hpp)|/))`", page)
    bases = (folder, folder.parent, SOURCE, ROOT)
    return [
        name
        for name in named
        if not any((base / name).exists() for base in bases)
        and ("/" in name[:-1] or not any(folder.rglob(name.rstrip("/"))))
    ]


@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_a_folder_readme_names_exists(path: Path) -> None:
    page = path.read_text()
    assert re.search(r"`[\w./]+\.(?:py|cpp)`", page), "names no file"
    assert missing(page, path.parent) == []


def test_a_renamed_file_is_found() -> None:
    folder = SOURCE / "kernels" / "gpu"
    page = "`config.py`, `launchers/rows.py`, `launchers/`; `table.py`, `passes/`"
    assert missing(page, folder) == ["table.py", "passes/"]

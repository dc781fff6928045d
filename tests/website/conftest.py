"""The built site. `make docs` builds it and runs these tests on it."""

import os
from pathlib import Path

import pytest

from site_reader import Reader, read


@pytest.fixture(scope="session")
def site() -> Path:
    folder = os.environ.get("NORMKIT_SITE")
    if not folder:
        pytest.skip("there is no built site; make docs builds one and runs this")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, Reader]:
    """Return what each page holds, by its path from the site's root."""
    return {
        path.relative_to(site).as_posix(): read(path)
        for path in sorted(site.rglob("*.html"))
        if "_static" not in path.parts
    }

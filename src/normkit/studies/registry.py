"""Registry of the studies: every file `sNN_….py` of this package."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from pathlib import Path

from normkit.errors import ArgumentError
from normkit.studies.study import Study

__all__ = ["all_studies", "find"]


@functools.cache
def all_studies() -> tuple[Study, ...]:
    """Return every study, by id."""
    folder = str(Path(__file__).parent)
    files = [m.name for m in pkgutil.iter_modules([folder])]
    named = sorted(name for name in files if re.fullmatch(r"s\d\d_\w+", name))
    return tuple(
        importlib.import_module(f"normkit.studies.{name}").STUDY for name in named
    )


def find(name: str) -> Study:
    """Return the study with this id, in either case, or with this title.

    Raises:
        ArgumentError: There is none.
    """
    for study in all_studies():
        if name.lower() in (study.id.lower(), study.title.lower()):
            return study
    known = ", ".join(study.id for study in all_studies())
    raise ArgumentError(f"there is no study {name!r}; there are {known}")

"""Docstrings as Sphinx expects them.

A docstring of normkit is plain text: `code` in backticks, formulas as indented lines,
Google's headings. reStructuredText gives `*`, `|` and a trailing `_` a meaning, and
sets indented lines as a quotation. This extension escapes the first and marks the
second as literal, before napoleon reads the headings, and links public names.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache
from typing import Any

import normkit

_SECTION = re.compile(
    r"(Args|Attributes|Example|Examples|Note|Numerics|Raises|References|Returns|"
    r"Yields):$"
)
# Sections whose indented lines continue an entry.
_LISTS = {"Args", "Attributes", "Raises", "Returns", "Yields"}
_CODE = re.compile(r"`[^`]*`")
_SPECIAL = re.compile(r"[*|\\]|_(?![A-Za-z0-9_])")


def plain_to_rst(lines: list[str]) -> list[str]:
    """Return the lines of a docstring as reStructuredText."""
    out: list[str] = []
    section, base, in_doctest, in_literal = "", 0, False, False
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            in_doctest = False
            out.append("")
            continue
        if in_literal and indent > base:
            out.append(line)
            continue
        in_literal = False
        found = _SECTION.match(line)
        if found or (section and indent == 0):
            section, base = (found[1], 4) if found else ("", 0)
        if text.startswith(">>>"):
            in_doctest = True
        if found or in_doctest:
            out.append(line)
            continue
        begins = not out or not out[-1]
        if begins and indent > base and section not in _LISTS:
            out += [f"{' ' * base}::", ""]
            in_literal = True
            out.append(line)
            continue
        out.append(_escaped(line))
    return out


def _escaped(line: str) -> str:
    """Escape what has a meaning in reStructuredText, outside of `code`."""
    parts, end = [], 0
    for code in _CODE.finditer(line):
        parts.append(_SPECIAL.sub(r"\\\g<0>", line[end : code.start()]))
        name = code[0][1:-1]
        full = _public_names().get(name)
        parts.append(f":py:obj:`{name} <{full}>`" if full else code[0])
        end = code.end()
    return "".join([*parts, _SPECIAL.sub(r"\\\g<0>", line[end:])])


@cache
def _public_names() -> dict[str, str]:
    """Return the full name of each public name that is no ordinary word."""
    found: dict[str, str] = {}
    for info in pkgutil.iter_modules(normkit.__path__):
        module = importlib.import_module(f"normkit.{info.name}")
        for name in getattr(module, "__all__", ()):
            if "_" in name.strip("_") or not name.islower():
                found.setdefault(name, f"{module.__name__}.{name}")
    for name in normkit.__all__:
        found[f"normkit.{name}"] = f"normkit.{name}"
        if name in found:
            found[name] = f"normkit.{name}"
    return found


def _process(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = plain_to_rst(lines)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx, before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

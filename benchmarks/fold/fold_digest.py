"""A digest of the code that folds a model of torch, to tell which records are of it.

The last commit of a folder does not tell: one that changes a docstring would make every
record stale, and one that changes `normkit.affine`, with which the fold computes, none.
So the digest is of syntax trees, without docstrings and comments, of the fold's entry
for modules and of all that it imports, directly or through others.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["digest", "digest_of", "modules"]

SOURCE = Path(__file__).parents[2] / "src"

# The entry, and what compares the two models.
_ENTRIES = ("normkit.fold.torch.module", "normkit.fold.equivalence")

# The layers of normkit, known to the fold, but in no model of another library: their
# code does not run. tests/fold/test_coverage_record.py holds that.
_LAYERS = ("nn", "functional", "kernels", "sync")


@functools.cache
def digest() -> str:
    """Return the digest of the present code."""
    return digest_of([path.read_text() for _, path in sorted(modules().items())])


def digest_of(sources: list[str]) -> str:
    """Return the digest of the syntax trees of `sources`, without docstrings."""
    trees = "".join(ast.dump(_without_docstrings(s)) for s in sources)
    return hashlib.sha256(trees.encode()).hexdigest()[:10]


def modules() -> dict[str, Path]:
    """Return the file of each module that the digest covers."""
    found: dict[str, Path] = {}
    ahead = list(_ENTRIES)
    while ahead:
        name = ahead.pop()
        path = _file(name)
        if name in found or path is None:
            continue
        found[name] = path
        ahead.extend(_imported(path))
    return found


def _imported(path: Path) -> Iterator[str]:
    """Yield the modules of normkit that a file imports, layers left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from package import module` runs the module; any other name is its own.
            names = [each if _file(each) else str(node.module) for each in inner]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "normkit" and rest.split(".")[0] not in ("", *_LAYERS):
                yield name


def _file(name: str) -> Path | None:
    path = SOURCE.joinpath(*name.split("."))
    choices = (path / "__init__.py", path.with_suffix(".py"))
    return next((each for each in choices if each.is_file()), None)


def _without_docstrings(source: str) -> ast.AST:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        # A string alone is a docstring, of an attribute, too.
        node.body = [each for each in body if not _is_text(each)] or [ast.Pass()]
    return tree


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


if __name__ == "__main__":
    print(digest(), *sorted(modules()), sep="\n")

"""The site is complete: every page is reached, every link leads somewhere."""

import ast
import importlib
import os.path
import pkgutil
import re
import zlib
from pathlib import Path
from urllib.parse import unquote

import pytest

import normkit
from normkit.studies import CLAIMS
from site_reader import MADE, Reader

# Packages whose names only the library itself uses.
INTERNAL = {
    "integrations": "read from the sources, below",
    "affine": "normkit.Affine is the public name",
    "moments": "normkit.Moments and normkit.moments are the public names",
    "cli": "the command line has a page of its own",
    "environment": "normkit env prints it",
    "masks": "serves the layers",
    "modeling": "serves the verbs",
    "progress": "serves the verbs",
    "torch_state": "torch's private names",
    "views": "serves the layers",
}


def target_of(page: str, link: str) -> tuple[str, str]:
    """Return the page and the anchor that a link of `page` leads to."""
    path, _, anchor = link.partition("#")
    if not path:
        return page, unquote(anchor)
    aim = os.path.join(os.path.dirname(page), unquote(path))
    return os.path.normpath(aim), unquote(anchor)


def is_outside(link: str) -> bool:
    return bool(re.match(r"[a-z]+:", link))


def broken_links(site: Path, pages: dict[str, Reader]) -> list[str]:
    broken = []
    for page, reader in pages.items():
        for link in [*reader.links, *reader.sources]:
            if is_outside(link):
                continue
            path, anchor = target_of(page, link.partition("?")[0])
            if not (site / path).is_file():
                broken.append(f"{page}: {link}")
            elif anchor and path in pages and anchor not in pages[path].ids:
                broken.append(f"{page}: {link} (no such anchor)")
    return broken


def test_every_link_of_the_site_leads_somewhere(site, pages) -> None:
    assert sum(len(reader.links) for reader in pages.values()) > 5000
    assert broken_links(site, pages) == []


def test_a_broken_link_is_found(site, pages) -> None:
    reader = Reader()
    reader.links = ["why.html", "nowhere.html", "why.html#no-such-heading"]
    found = broken_links(site, {**pages, "made-up.html": reader})
    assert [line.partition(": ")[2] for line in found] == [
        "nowhere.html",
        "why.html#no-such-heading (no such anchor)",
    ]


def clicks(pages: dict[str, Reader], start: str = "index.html") -> dict[str, int]:
    """Return the number of clicks from `start` to each page, on links in texts."""
    found, newest = {start: 0}, [start]
    while newest:
        reached = {
            target_of(page, link)[0]
            for page in newest
            for link in pages[page].own_links
            if not is_outside(link)
        }
        newest = sorted((reached & pages.keys()) - found.keys())
        distance = max(found.values()) + 1
        found |= dict.fromkeys(newest, distance)
    return found


def test_every_page_is_two_clicks_from_the_landing_page(pages) -> None:
    wanted = {page for page in pages if page.removesuffix(".html") not in MADE}
    assert len(wanted) > 70
    far = {page: clicks(pages).get(page) for page in wanted}
    assert {page: n for page, n in far.items() if n is None or n > 2} == {}


def test_nothing_is_loaded_from_a_network(site, pages) -> None:
    for page, reader in pages.items():
        assert [
            s for s in reader.sources if is_outside(s) and s[:5] != "data:"
        ] == [], page
    for style in site.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import )[\"']?(\w+:[^\"')]+)", style.read_text())
        assert [url for url in urls if not url.startswith("data:")] == [], style


def inventory(site: Path) -> set[str]:
    """Return the names of the reference, from Sphinx's own list."""
    raw = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(raw).decode().splitlines()
    return {line.split()[0] for line in lines if line.split()[1].startswith("py:")}


def public_names() -> dict[str, object]:
    """Return every public name of normkit with its module, and what it is."""
    found: dict[str, object] = {}
    names = [info.name for info in pkgutil.iter_modules(normkit.__path__)]
    modules = [
        importlib.import_module(f"normkit.{name}")
        for name in names
        if name not in INTERNAL
    ]
    for module in (normkit, *modules):
        for name in getattr(module, "__all__", ()):
            found[f"{module.__name__}.{name}"] = getattr(module, name)
    return found


def documented(names: set[str]) -> set[int]:
    """Return the identities of all objects that the reference names."""
    found = set()
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            found.add(id(getattr(importlib.import_module(module), attribute)))
        except (ImportError, AttributeError):
            continue  # a method or an attribute of a class
    return found


def test_every_public_name_is_in_the_reference(site) -> None:
    names = inventory(site)
    objects = documented(names)
    public = public_names()
    assert len(public) > 150
    missing = [
        name
        for name, value in public.items()
        if name not in names
        and id(value) not in objects
        and not name.endswith(".__version__")
        and not isinstance(value, type(normkit))
    ]
    assert missing == []


def test_every_integration_is_in_the_reference(site) -> None:
    """Read from the sources: each imports a program that need not be installed."""
    names = inventory(site)
    folder = Path(normkit.__file__).parent / "integrations"
    found = 0
    for path in folder.glob("[!_]*.py"):
        exported = re.search(r"^__all__ = (\[.*?\])", path.read_text(), re.M | re.S)
        assert exported is not None, path
        for name in ast.literal_eval(exported[1]):
            found += 1
            assert f"normkit.integrations.{path.stem}.{name}" in names
    assert found >= 5


def test_a_name_that_the_reference_lacks_is_found(site) -> None:
    names = inventory(site) - {"normkit.calibrate"}
    assert id(normkit.calibrate) not in documented(names)


@pytest.mark.parametrize("article", ["A0", "A1", "A2", "A3", "A4"])
def test_every_claim_of_an_article_is_on_its_page(site: Path, article: str) -> None:
    page = {
        "A0": "normalizing",
        "A1": "paper",
        "A2": "initialization",
        "A3": "batch-and-layer",
        "A4": "practice",
    }[article]
    text = (site / "learn" / f"{page}.html").read_text(encoding="utf-8")
    shown = set(re.findall(r"<strong>(C\d+)</strong>", text))
    assert shown == {c.id for c in CLAIMS.values() if article in c.sources.split()}


def test_the_search_knows_words_of_guides_and_reference(site: Path) -> None:
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    for stem in ("momentum_convent", "satur", "batchnormlstm", "onnxruntim"):
        assert stem in index.lower()


def test_no_command_of_a_tutorial_failed(site: Path) -> None:
    """A cell that raises ends the build; a command of a shell only prints why."""
    signs = (
        "Traceback (most recent call last)",
        "command not found",
        "No module named",
    )
    for page in sorted((site / "tutorials").glob("*.html")):
        text = page.read_text(encoding="utf-8")
        assert [sign for sign in signs if sign in text] == [], page.name

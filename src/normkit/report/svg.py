"""Convert a drawing of matplotlib to SVG for inclusion in a page.

Sentinel colours become CSS variables; ids are made unique.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping

__all__ = ["FONT", "HEIGHT", "WIDTH", "css_name", "inlined", "sentinel"]

# CSS pixels; at this size 11-pixel text is still 10 pixels on a 400-pixel phone.
WIDTH, HEIGHT, FONT = 400, 230, 11

# Sentinel colours: #e5 and the family, then the index.
FAMILIES = {"hue": "e1", "ramp": "e2", "ink": "e3"}


def sentinel(family: str, index: int) -> str:
    """Return the drawing colour that becomes the CSS variable `css_name`."""
    return f"#e5{FAMILIES[family]}{index:02x}"


def css_name(family: str, index: int) -> str:
    """Return the CSS variable of one colour of a family: hue, ramp or ink."""
    return f"--{family}-{index}"


_COLOUR = re.compile(r"#e5(e[123])([0-9a-f]{2})")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_FONT = re.compile(r"font(?:-family|-size|-weight|-style)?:[^;]*(?:;\s*|$)")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FAMILY_OF = {code: family for family, code in FAMILIES.items()}


def inlined(document: str, prefix: str, titles: Mapping[str, str]) -> str:
    """Convert matplotlib's SVG document to an element for an HTML page.

    Args:
        document: What matplotlib wrote.
        prefix: Prefix of every id.
        titles: Id of an element → what the pointer shows on it.
    """
    root = ElementTree.fromstring(document)
    for parent in list(root.iter()):
        for child in list(parent):
            # The document's own style rule would apply to the whole page.
            if _bare(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in list(root.iter()):
        element.tag = _bare(element.tag)
        element.attrib = {
            _bare(name): _LONG_NUMBER.sub(_round, value)
            if name in ("d", "x", "y", "transform", "points")
            else value
            for name, value in element.attrib.items()
        }
        if "style" in element.attrib:
            style = _COLOUR.sub(_to_variable, element.attrib["style"])
            element.attrib["style"] = _FONT.sub("", style).strip()
        element.text = (element.text or "").strip() or None
        element.tail = None
        if element.get("id") in titles:
            title = ElementTree.Element("title")
            title.text = titles[element.attrib["id"]]
            element.insert(0, title)
    _rename_ids(root, prefix)
    root.attrib = {
        "viewBox": f"0 0 {WIDTH} {HEIGHT}",
        "aria-hidden": "true",
        "focusable": "false",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    used: set[str] = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            used.update(_REFERENCE.findall(value))
            if name == "href":
                used.add(value.removeprefix("#"))
    names = {old: f"{prefix}-{i}" for i, old in enumerate(sorted(used))}
    for element in root.iter():
        if element.attrib.get("id") in names:
            element.attrib["id"] = names[element.attrib["id"]]
        else:
            element.attrib.pop("id", None)
        for name, value in element.attrib.items():
            if name == "href":
                value = f"#{names[value.removeprefix('#')]}"
            element.attrib[name] = _REFERENCE.sub(
                lambda found: f"url(#{names[found[1]]})", value
            )


def _bare(tag: str) -> str:
    return tag.rpartition("}")[2]


def _round(found: re.Match[str]) -> str:
    return f"{float(found[0]):.1f}".removesuffix(".0")


def _to_variable(found: re.Match[str]) -> str:
    return f"var({css_name(_FAMILY_OF[found[1]], int(found[2], 16))})"

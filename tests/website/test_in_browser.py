"""The site in a real browser: a telephone and a desk, light and dark, search."""

from pathlib import Path
from typing import Any

import pytest

from demo.test_page_in_browser import MIN_CONTRAST, SCHEMES, WIDTHS, browser, show
from demo.test_page_in_browser import pytestmark as pytestmark
from site_reader import MADE

__all__ = ["browser"]

# One page of each kind.
SAMPLES = (
    "index.html",
    "tutorials/debug.html",
    "guide/doctor.html",
    "guide/command-line.html",
    "learn/normalizing.html",
    "learn/sliders.html",
    "claims/README.html",
    "benchmarks/index.html",
    "reference/nn.html",
    "why.html",
)

# Elements that stick out to the right and do not lie in something that scrolls.
TOO_WIDE = """
const scrolls = e => {
  for (; e && e !== document.body; e = e.parentElement) {
    const x = getComputedStyle(e).overflowX;
    if (x === 'auto' || x === 'scroll' || x === 'hidden') return true;
  }
  return false;
};
return [...document.querySelectorAll('article *, main *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e)
    && e.getBoundingClientRect().width > 0)
  .map(e => e.outerHTML.slice(0, 120)).slice(0, 3);
"""


def texts(site: Path) -> list[str]:
    return [
        path.relative_to(site).as_posix()
        for path in sorted(site.rglob("*.html"))
        if not {"_static", "_modules"} & set(path.relative_to(site).parts)
        and path.stem not in MADE
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_the_window_and_the_console_is_empty(
    browser: Any, site: Path, width: int
) -> None:
    wrong = {}
    for page in texts(site):
        show(browser, site / page, width=width)
        inner, scroll = browser.execute_script(
            "return [innerWidth, document.documentElement.scrollWidth]"
        )
        assert inner == width
        found = browser.execute_script(TOO_WIDE)
        if scroll > inner or found:
            wrong[page] = [f"{scroll} of {inner}", *found]
        if log := browser.get_log("browser"):
            wrong[page] = [entry["message"] for entry in log]
    assert wrong == {}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("page", SAMPLES)
def test_all_text_can_be_read(browser: Any, site: Path, page: str, scheme: str) -> None:
    show(browser, site / page, width=1280, scheme=scheme)
    assert browser.get_log("browser") == []
    # WCAG 2.2, 1.4.3 (AA).
    ratio, element = browser.execute_script(MIN_CONTRAST)
    assert ratio >= 4.5, f"{ratio:.2f} in {element}"


def test_the_search_finds_pages_without_a_network(browser: Any, site: Path) -> None:
    show(browser, site / "index.html", width=1280)
    browser.get(f"{(site / 'search.html').as_uri()}?q=ghost")
    wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
    # Results appear one after the other.
    wait(browser, 20).until(
        lambda b: b.find_elements("css selector", "ul.search a[href*='accumulation']")
    )
    assert browser.get_log("browser") == []

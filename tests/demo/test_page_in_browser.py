"""The report in a real browser: nothing overflows, nothing runs, nothing is faint."""

import base64
import io
import re
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from every_block import ENEMY, page_of_every_block

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytest.importorskip("jinja2", reason="report pages need normkit[demo]")
image = pytest.importorskip("matplotlib.image", reason="charts need normkit[demo]")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)

WIDTHS = (400, 1280)
SCHEMES = ("light", "dark")

# The least contrast of text against what lies behind it, over all text on the page.
MIN_CONTRAST = """
const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const luminance = c =>
  .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    let c = getComputedStyle(e).backgroundColor;
    if (c.startsWith('color(')) c = 'rgb(' + parse(c).map(v => 255 * v).join() + ')';
    const p = parse(c);
    if (p.length === 3 || p[3] > 0) return p;
  }
  return [255, 255, 255];
};
let least = [Infinity, ''];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.textContent.trim();
  const element = walker.currentNode.parentElement;
  if (!text || element.closest('.unseen, .skip, script, style, title')) continue;
  const style = getComputedStyle(element);
  const ink = parse(element.closest('svg') ? style.fill : style.color);
  const [a, b] = [luminance(ink), luminance(behind(element))];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < least[0]) least = [ratio, element.outerHTML.slice(0, 120)];
}
return least;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Generator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_of_every_block().write(tmp_path_factory.mktemp("page") / "page.html")


def show(browser: Any, path: Path, *, width: int, scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    # Without smooth scrolling, or a screenshot is taken on the way.
    media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": n, "value": v} for n, v in media.items()]},
    )
    browser.get_log("browser")
    browser.get(path.as_uri())


def open_details(browser: Any) -> None:
    browser.execute_script(
        "document.querySelectorAll('details').forEach(d => d.open = true)"
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(browser: Any, path: Path, width: int) -> None:
    show(browser, path, width=width)
    for _ in range(2):
        inner, scroll = browser.execute_script(
            "return [innerWidth, document.documentElement.scrollWidth]"
        )
        assert inner == width
        assert scroll <= inner
        # A page may hide an overflow that a reader still meets: look at the parts.
        too_wide = browser.execute_script(
            "return [...document.querySelectorAll('main *')]"
            ".filter(e => !e.closest('.scroll, pre, svg, .unseen')"
            " && e.getBoundingClientRect().right > innerWidth + 1)"
            ".map(e => e.outerHTML.slice(0, 100))"
        )
        assert not too_wide
        open_details(browser)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_console_stays_empty(browser: Any, path: Path, scheme: str) -> None:
    show(browser, path, width=1280, scheme=scheme)
    assert browser.get_log("browser") == []


def test_nothing_of_an_enemys_name_runs(browser: Any, path: Path) -> None:
    show(browser, path, width=1280)
    shown = ENEMY.replace("\x07", "\ufffd").replace("\u202e", "\ufffd")
    assert browser.title == shown
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.execute_script("return document.images.length") == 0
    assert browser.execute_script("return document.querySelector('h1').innerText") == (
        shown
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_text_can_be_read(browser: Any, path: Path, scheme: str) -> None:
    show(browser, path, width=1280, scheme=scheme)
    open_details(browser)
    ratio, element = browser.execute_script(MIN_CONTRAST)
    # WCAG 2.2, 1.4.3 (AA).
    assert ratio >= 4.5, f"{ratio:.2f} in {element}"


def test_the_page_follows_light_and_dark(browser: Any, path: Path) -> None:
    papers = []
    for scheme in SCHEMES:
        show(browser, path, width=1280, scheme=scheme)
        colour = browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        )
        papers.append(sum(map(int, re.findall(r"\d+", colour)[:3])))
    light, dark = papers
    assert light > 700
    assert dark < 100


def test_the_keyboard_reaches_the_content_first_and_then_all_that_scrolls(
    browser: Any, path: Path
) -> None:
    show(browser, path, width=400)
    browser.find_element("tag name", "body").send_keys(webdriver.Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the content"
    unreachable = browser.execute_script(
        "return [...document.querySelectorAll('main *')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0"
        " && getComputedStyle(e).overflowX === 'auto').length"
    )
    assert unreachable == 0


def test_charts_are_drawn(browser: Any, path: Path) -> None:
    """The pixels of a chart hold more than its background."""
    show(browser, path, width=1280)
    chart = browser.find_elements("css selector", ".chart")[0]
    picture = io.BytesIO(base64.b64decode(chart.screenshot_as_base64))
    pixels = image.imread(picture)[..., :3].reshape(-1, 3)
    coloured = (pixels.max(1) - pixels.min(1) > 0.1).mean()
    assert coloured > 0.05

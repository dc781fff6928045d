"""The doctor's own pages in a real browser, from a phone to a desk, light and dark."""

import copy
import dataclasses
import html
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from demo.test_page_in_browser import (
    MIN_CONTRAST,
    SCHEMES,
    WIDTHS,
    browser,
    open_details,
    show,
)
from demo.test_page_in_browser import pytestmark as pytestmark
from doctor.models import batches, build, moments_of
from normkit.doctor import Diagnosis, Statistics, checks, diagnose, watch
from normkit.doctor.channel_statistics import Histogram
from normkit.doctor.measurements import LayerStatistics

__all__ = ["browser"]

ENEMY = "<img src=x onerror=alert(1)><script>alert(2)</script>"
PAGES = ("diagnosis", "watched")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    model = build("mlp", momentum=0.001)
    hostile = nn.Sequential()
    for index, module in enumerate(model):
        hostile.add_module(f"{index}{ENEMY}", module)
    optimizer = torch.optim.SGD(hostile.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    with watch(hostile, optimizer, every=4) as seen:
        for x, y in batches()[:24]:
            optimizer.zero_grad()
            loss = loss_fn(hostile(x), y)
            loss.backward()
            optimizer.step()
            seen.log(**{ENEMY: loss.item()})
    found = {name: folder / f"{name}.html" for name in PAGES}
    diagnosis = diagnose(hostile, batches()[:10], loss_fn).confirm().explain()
    diagnosis.to_html(found["diagnosis"])
    seen.report(found["watched"])
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_report_fits_the_window(browser: Any, pages, name: str, width: int) -> None:
    show(browser, pages[name], width=width)
    for _ in range(2):
        inner, scroll = browser.execute_script(
            "return [innerWidth, document.documentElement.scrollWidth]"
        )
        assert scroll <= inner == width
        open_details(browser)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("name", PAGES)
def test_every_chart_of_a_report_is_drawn_and_told_in_words(
    browser: Any, pages, name: str
) -> None:
    show(browser, pages[name], width=1280)
    charts = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map(c =>"
        " [c.querySelectorAll('svg path').length, c.getAttribute('aria-label'),"
        "  c.getBoundingClientRect().height])"
    )
    assert len(charts) >= (5 if name == "diagnosis" else 4)
    for paths, words, height in charts:
        assert paths > 3
        assert len(words) > 20
        assert height > 100
    headings = browser.execute_script(
        "return [...document.querySelectorAll('h2')].map(h => h.innerText)"
    )
    wanted = {
        "diagnosis": {
            "Findings",
            "Fixes tried on a copy",
            "Causes of the train/eval gap",
            "Before and after normalization",
            "Layer by layer",
        },
        "watched": {
            "Findings",
            "Logged",
            "Inputs over time",
            "Gradients over time",
            "Before and after normalization",
        },
    }
    assert wanted[name] <= set(headings)


@pytest.mark.parametrize("name", PAGES)
def test_a_layer_named_as_a_script_is_shown_as_text(
    browser: Any, pages, name: str
) -> None:
    show(browser, pages[name], width=1280)
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.execute_script("return document.images.length") == 0
    open_details(browser)
    assert ENEMY in browser.find_element("tag name", "main").text
    assert html.escape(ENEMY) in pages[name].read_text()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PAGES)
def test_all_text_of_a_report_can_be_read(
    browser: Any, pages, name: str, scheme: str
) -> None:
    show(browser, pages[name], width=1280, scheme=scheme)
    open_details(browser)
    ratio, element = browser.execute_script(MIN_CONTRAST)
    assert ratio >= 4.5, f"{ratio:.2f} in {element}"


def test_a_network_of_a_thousand_layers_opens_in_a_second(
    browser: Any, tmp_path: Path
) -> None:
    values = moments_of(64_000, 0.1, 1.0)
    shape = Histogram(-4.0, 4.0, torch.arange(48.0))
    hidden = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    small = diagnose(hidden, [torch.randn(64, 4) for _ in range(4)]).statistics
    layers: list[LayerStatistics] = []
    while len(layers) < 1000:
        for layer in small.layers:
            layers.append(
                dataclasses.replace(
                    copy.copy(layer),
                    name=f"a.rather.long.name.of.a.block.{len(layers)}",
                    input=values,
                    output=values,
                    gradient_norm=(1e-3, 2e-3),
                    before=shape if layer.before else None,
                    after=shape if layer.after else None,
                )
            )
    statistics = Statistics(tuple(layers), samples=256, batches=4)
    readings = checks.run(statistics)
    assert len(readings) > 1000
    path = tmp_path / "deep.html"
    Diagnosis(readings, statistics).to_html(path)
    assert path.stat().st_size < 5e6
    show(browser, path, width=1280)
    # The browser answers once the document is complete; the end of the load
    # event may still be ahead, and then reads 0.
    milliseconds = browser.execute_async_script(
        "const done = arguments[0];"
        "const look = () => {"
        "  const n = performance.getEntriesByType('navigation')[0];"
        "  if (n.loadEventEnd > 0) done(n.loadEventEnd - n.startTime);"
        "  else setTimeout(look, 5);"
        "};"
        "look();"
    )
    assert milliseconds < 1000

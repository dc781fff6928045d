"""The page with sliders computes what the library does, and reads without scripts."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import normkit
from demo.test_page_in_browser import browser, show
from demo.test_page_in_browser import pytestmark as pytestmark
from normkit.init import gaussian_mean
from normkit.init.theory import activation_function

__all__ = ["browser"]

PAGE = "learn/sliders.html"
MAX_SLOPE = {"sigmoid": 0.25, "tanh": 1.0, "relu": 1.0, "gelu": 1.1289}
SETTINGS = (
    {"mean": -6.0, "spread": 1.0, "weight": 1.0, "bias": 0.0, "activation": "sigmoid"},
    {"mean": 2.0, "spread": 0.5, "weight": 2.0, "bias": -1.0, "activation": "tanh"},
    {"mean": 1.0, "spread": 3.0, "weight": 1.5, "bias": 0.5, "activation": "gelu"},
    {"mean": -1.0, "spread": 2.0, "weight": 1.0, "bias": -0.5, "activation": "relu"},
)


def slope_of(activation: str, z: torch.Tensor) -> torch.Tensor:
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(activation_function(activation)(z).sum(), z)
    return slope


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s["activation"])
def test_what_meets_the_activation_without_a_norm(
    browser: Any, site: Path, setting: dict
) -> None:
    show(browser, site / PAGE, width=1280)
    found = browser.execute_script(
        "return measure({...arguments[0], batch: 64}).plain", setting
    )
    activation, mean, std = (setting[k] for k in ("activation", "mean", "spread"))

    def over(function: Any) -> float:
        return gaussian_mean(lambda n: function(slope_of(activation, mean + std * n)))

    assert found["mean"] == pytest.approx(mean, abs=2e-3)
    assert found["std"] == pytest.approx(std, rel=2e-3)
    assert found["slope"] == pytest.approx(over(lambda s: s), rel=0.01)
    assert found["gradient"] == pytest.approx(over(torch.square) ** 0.5, rel=0.02)
    limit = 0.05 * MAX_SLOPE[activation]
    share = over(lambda s: (s < limit).double())
    assert found["saturated"] == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("batch", [2, 8, 256])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s["activation"])
def test_what_batch_norm_makes_of_it(
    browser: Any, site: Path, setting: dict, batch: int
) -> None:
    """Statistics and gradient of the same batches, by normkit and by autograd."""
    show(browser, site / PAGE, width=1280)
    draws, found = browser.execute_script(
        "return [NORMAL, measure({...arguments[0], batch: arguments[1]}).normed]",
        setting,
        batch,
    )
    x = setting["mean"] + setting["spread"] * torch.tensor(draws).double()
    weight = torch.tensor([setting["weight"]]).double()
    bias = torch.tensor([setting["bias"]]).double()
    act = activation_function(setting["activation"])

    def layer(part: torch.Tensor) -> torch.Tensor:
        return normkit.functional.batch_norm(
            part[:, None], None, None, weight, bias, training=True
        )[:, 0]

    parts = x.split(batch)
    z = torch.cat([layer(part) for part in parts])
    assert found["mean"] == pytest.approx(z.mean().item(), abs=1e-6)
    assert found["std"] == pytest.approx(z.std(correction=0).item(), rel=1e-6)
    few = parts[: max(1, 512 // batch)]
    whole = torch.cat(few)
    share = browser.execute_script(
        "NORMAL.splice(arguments[1]); "
        "const s = measure({...arguments[0], batch: arguments[2]}).normed;"
        "return s.gradient",
        setting,
        len(whole),
        batch,
    )
    squares = [
        torch.autograd.functional.jacobian(lambda p: act(layer(p)), part)  # type: ignore[arg-type]
        .square()
        .sum()
        .item()
        for part in few
    ]
    expected = (sum(squares) / len(whole)) ** 0.5
    assert share == pytest.approx(expected, rel=1e-3, abs=1e-4)


def move(browser: Any, name: str, value: float | str) -> None:
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true}))",
        name,
        value,
    )


def number(browser: Any, row: int, column: int) -> float:
    text = browser.execute_script(
        "return document.querySelector('#numbers tbody')"
        ".rows[arguments[0]].cells[arguments[1]].innerText",
        row,
        column,
    )
    return float(text.replace("−", "-"))


def test_sliders_move_the_numbers_and_the_curves(browser: Any, site: Path) -> None:
    show(browser, site / PAGE, width=400)
    picture = "return document.getElementById(arguments[0]).innerHTML"
    before = {
        name: browser.execute_script(picture, name)
        for name in ("plain", "normed", "outputs", "batches")
    }
    assert number(browser, 2, 1) > 90
    move(browser, "mean", 0)
    assert number(browser, 2, 1) < 5
    move(browser, "bias", -6)
    assert number(browser, 2, 2) > 90
    move(browser, "batch", 1)
    # Of two values each is one spread away from their mean.
    assert number(browser, 1, 2) == pytest.approx(1, abs=0.02)
    move(browser, "activation", "tanh")
    for name, old in before.items():
        assert browser.execute_script(picture, name) != old
    assert browser.get_log("browser") == []


def test_the_page_is_whole_without_scripts(site: Path) -> None:
    text = (site / PAGE).read_text(encoding="utf-8")
    bare = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert bare.count("<svg") == 4
    assert "<!-- " not in bare
    assert "<noscript>" in bare
    rows = re.findall(r"<tr><th scope=\"row\">([^<]+)</th>", bare)
    assert "saturated, %" in rows
    assert sum("N(" in row for row in rows) == 16
    assert not re.search(r"(?:src|href)=\"(?!data:|index\.html)", bare)

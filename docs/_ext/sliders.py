"""The page with sliders: docs/learn/sliders.html, with figures for who runs no scripts.

The page computes in the reader's browser. This extension fills in what is seen without
scripts, from the library, and puts the finished file beside the pages of Learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import normkit
from normkit.init import gaussian_mean
from normkit.init.theory import activation_function
from normkit.report.charts import Lines
from normkit.report.drawing import draw
from normkit.report.page import format_value

PAGE = Path(__file__).parents[1] / "learn" / "sliders.html"
# As in the doctor's checks: a slope below 5 % of the largest.
SATURATED = 0.05
MAX_SLOPE = {"sigmoid": 0.25, "tanh": 1.0, "relu": 1.0, "gelu": 1.1289}


def slope(activation: str, z: Tensor) -> Tensor:
    """Return the slope of an activation at `z`."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(activation_function(activation)(z).sum(), z)
    return found


def told(activation: str, mean: float, std: float) -> dict[str, float]:
    """Return what a large batch of N(mean, std²) meets in an activation."""

    def over(function: Any) -> float:
        return gaussian_mean(lambda n: function(slope(activation, mean + std * n)))

    limit = SATURATED * MAX_SLOPE[activation]
    return {
        "mean": mean,
        "std": std,
        "saturated": over(lambda s: (s < limit).double()),
        "slope": over(lambda s: s),
        "gradient": over(lambda s: s.square()) ** 0.5,
    }


def page() -> str:
    """Return the page, complete."""
    text = PAGE.read_text(encoding="utf-8")
    filled = {**_pictures(), "numbers": _numbers(), "settings": _settings()}
    for name, body in filled.items():
        mark = f"<!-- {name} -->"
        assert text.count(mark) == 1, mark
        text = text.replace(mark, body)
    return text


def _pictures() -> dict[str, str]:
    generator = torch.Generator().manual_seed(0)
    x = -6 + torch.randn(256, 64, 1, generator=generator)
    layer = normkit.nn.BatchNorm1d(1)
    z = torch.stack([layer(part).detach() for part in x])
    grid = torch.linspace(-12, 12, 121)
    share = (slope("sigmoid", grid) / MAX_SLOPE["sigmoid"]).tolist()
    means = (x.mean((1, 2)) + 6).flatten()
    slopes = ("--ink-2", (grid.tolist(), share))
    charts = {
        "plain": [("--hue-0", _density(x, -12, 12)), slopes],
        "normed": [("--hue-1", _density(z, -12, 12)), slopes],
        "outputs": [
            (f"--hue-{i}", _density(torch.sigmoid(values), 0, 1))
            for i, values in enumerate((x, z))
        ],
        "batches": [("--hue-2", _density(means, -3, 3))],
    }
    return {name: _drawn(name, parts) for name, parts in charts.items()}


def _drawn(name: str, parts: list[tuple[str, tuple]]) -> str:
    """Draw lines in colours of their own, as the scripts do."""
    svg = draw(Lines({str(i): line for i, (_, line) in enumerate(parts)}), name)
    for i in range(len(parts)):
        svg = svg.replace(f"var(--hue-{i})", f"var(--part-{i})")
    for i, (colour, _) in enumerate(parts):
        svg = svg.replace(f"var(--part-{i})", f"var({colour})")
    return svg


def _density(values: Tensor, low: float, high: float) -> tuple[list[float], list]:
    counts = torch.histc(values.flatten(), 60, low, high)
    middle = low + (high - low) / 60 * (torch.arange(60) + 0.5)
    return middle.tolist(), (counts / counts.max()).tolist()


def _numbers() -> str:
    sides = (told("sigmoid", -6, 1), told("sigmoid", 0, 1))
    names = {
        "mean": "mean",
        "std": "spread",
        "saturated": "saturated, %",
        "slope": "mean slope",
        "gradient": "gradient that goes on",
    }
    return "\n".join(
        _row(
            words,
            *(side[key] * (100 if key == "saturated" else 1) for side in sides),
        )
        for key, words in names.items()
    )


def _settings() -> str:
    return "\n".join(_setting_rows())


def _setting_rows() -> Iterator[str]:
    for activation in MAX_SLOPE:
        normed = told(activation, 0.0, 1.0)
        for mean, std in ((0.0, 1.0), (-3.0, 1.0), (-6.0, 1.0), (0.0, 4.0)):
            plain = told(activation, mean, std)
            yield _row(
                f"{activation}, N({mean:g}, {std:g}²)".replace("-", "−"),
                f"{100 * plain['saturated']:.1f} %",
                f"{100 * normed['saturated']:.1f} %",
                plain["gradient"],
                normed["gradient"] / std,
            )


def _row(words: str, *values: Any) -> str:
    cells = "".join(f"<td>{format_value(value)}</td>" for value in values)
    return f'<tr><th scope="row">{words}</th>{cells}</tr>'


def _write(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        target = Path(app.outdir) / "learn" / "sliders.html"
        target.parent.mkdir(exist_ok=True)
        target.write_text(page(), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

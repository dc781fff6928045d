"""S05: what normalizing does to a distribution, and what it leaves alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from normkit.moments import moments
from normkit.nn import BatchNorm1d
from normkit.studies import verdict as rules
from normkit.studies.figure import color
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measure(trial: Trial, *, values: int) -> Result:
    """Normalize samples of known and of skewed laws; measure their shape."""
    generator = trial.generator()
    normal = torch.randn(values, generator=generator, dtype=torch.float64)
    skewed = torch.empty(values, dtype=torch.float64).exponential_(generator=generator)
    layer = BatchNorm1d(1, affine=False).double().train()
    var = moments(skewed, 0).var
    out = layer(skewed[:, None])[:, 0]
    kept = (1 / (1 + layer.eps / var)).item()
    # The article means the variance by its 0.5.
    shifted = layer((-2 + math.sqrt(0.5) * normal)[:, None])[:, 0]
    exact = (normal - normal.mean()) / normal.std(correction=0)
    low, middle = _slope(normal - 6), _slope(normal)
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    relu, squashed = torch.relu(normal), torch.sigmoid(normal)
    middle_part = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    return {
        **_linearity(middle_part),
        "entropies": _entropies(),
        "mean_error": abs(out.mean().item()),
        "var_error": abs(moments(out, 0).var.item() - kept),
        "skewness": _standard_moment(out, 3),
        "excess_kurtosis": _standard_moment(out, 4) - 3,
        "shape_change": max(
            abs(_standard_moment(out, k) / _standard_moment(skewed, k) - 1)
            for k in (3, 4)
        ),
        "within_1": (normal.abs() < 1).double().mean().item(),
        "within_2": (normal.abs() < 2).double().mean().item(),
        "shift_error": (shifted - exact).abs().max().item(),
        "slope_max": _slope_of(torch.linspace(-8, 8, 4001)).max().item(),
        "slope_saturated": low,
        "slope_normal": middle,
        "density_integral": torch.trapezoid(density, grid).item(),
        "relu_mean": relu.mean().item(),
        "sigmoid_std": squashed.std().item(),
        "histograms": {
            "edges": np.linspace(-6, 6, 61).tolist(),
            "before": _histogram(skewed * 2 - 4),
            "after": _histogram(out),
            "normal": _histogram(normal),
        },
    }


def _linearity(z: Tensor) -> dict[str, float]:
    """Compare the sigmoid on `z` with its best line, and its slopes there."""
    y = torch.sigmoid(z) - 0.5  # odd: the best line goes through 0
    lines = torch.linspace(0.1, 0.25, 301, dtype=z.dtype)[:, None] * z
    error = (lines - y).abs().amax(1).min() / (y.max() - y.min())
    slopes = _slope_of(z)
    return {
        "line_error": error.item(),
        "slope_left": (slopes.min() / slopes.max()).item(),
    }


def _entropies() -> dict[str, float]:
    """Return the entropies, in nats, of laws of variance 1."""
    laws = {
        "normal": torch.distributions.Normal(0.0, 1.0),
        "uniform": torch.distributions.Uniform(-math.sqrt(3), math.sqrt(3)),
        "Laplace": torch.distributions.Laplace(0.0, math.sqrt(0.5)),
        "exponential": torch.distributions.Exponential(1.0),
        "Gumbel": torch.distributions.Gumbel(0.0, math.sqrt(6) / math.pi),
    }
    return {name: law.entropy().item() for name, law in laws.items()}


def _standard_moment(x: Tensor, order: int) -> float:
    return ((x - x.mean()) / x.std(correction=0)).pow(order).mean().item()


def _slope_of(z: Tensor) -> Tensor:
    y = torch.sigmoid(z)
    return y * (1 - y)


def _slope(z: Tensor) -> float:
    return _slope_of(z).mean().item()


def _histogram(x: Tensor) -> list[float]:
    counts, _ = np.histogram(x.numpy(), bins=60, range=(-6, 6), density=True)
    return counts.tolist()


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def column(name: str) -> list[float]:
        return [r[name] for r in results]

    gain = [r["slope_normal"] / r["slope_saturated"] for r in results]
    return [
        rules.verdict(
            "C6",
            rules.at_most(
                "skewness of a normalized skewed law",
                column("skewness"),
                0.1,
                about="skewness",
            ),
            rules.at_most(
                "its excess kurtosis", column("excess_kurtosis"), 0.1, about="kurtosis"
            ),
            rules.reported(
                "relative change of both by normalizing", column("shape_change")
            ),
            rules.reported("|mean| after normalizing", column("mean_error")),
            rules.reported(
                "|variance − var/(var + eps)| after it", column("var_error")
            ),
            note="Mean and variance become 0 and var/(var + eps); the shape does not "
            "move. Standardized, not made Gaussian.",
        ),
        rules.verdict(
            "C7",
            rules.within(
                "share within 1 standard deviation",
                column("within_1"),
                0.635,
                0.645,
                about="64 % within one",
            ),
            rules.within(
                "share within 2",
                column("within_2"),
                0.945,
                0.965,
                about="95 % within two",
            ),
            note="68.27 % within one; the 95 % is right.",
        ),
        rules.verdict(
            "C8",
            rules.within(
                "largest slope of the sigmoid", column("slope_max"), 0.2499, 0.25
            ),
            rules.within("mean slope at N(0, 1) over that at N(−6, 1)", gain, 45, 57),
        ),
        rules.verdict(
            "C9",
            rules.at_most("largest error against N(0, 1)", column("shift_error"), 2e-4),
            note="0.5 is the variance; eps makes the result inexact.",
        ),
        rules.verdict(
            "C36",
            rules.at_most(
                "|mean| of ReLU of N(0, 1)", column("relu_mean"), 0.05, about="ReLU"
            ),
            rules.at_least(
                "standard deviation of sigmoid of it",
                column("sigmoid_std"),
                0.95,
                about="sigmoid",
            ),
        ),
        rules.verdict(
            "C37",
            rules.within(
                "integral of the density", column("density_integral"), 0.9999, 1.0001
            ),
        ),
        rules.verdict(
            "C69",
            rules.at_most(
                "largest distance from the best line over [−2, 2] / range",
                column("line_error"),
                0.05,
                about="the values",
            ),
            rules.at_least(
                "slope at ±2 / slope at 0",
                column("slope_left"),
                0.8,
                none=0.5,
                about="the slope, which the gradient meets",
            ),
        ),
        rules.verdict(
            "C74",
            rules.at_least(
                "entropy of the normal law − the largest of four others, nats",
                [
                    r["entropies"]["normal"]
                    - max(v for k, v in r["entropies"].items() if k != "normal")
                    for r in results
                ],
                0,
            ),
            note="Of laws of the same variance, on the whole line. Uniform, Laplace, "
            "exponential and Gumbel law are compared.",
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw a skewed distribution before and after, and the slope of the sigmoid."""
    left, right = figure.subplots(1, 2)
    found = results[0]["histograms"]
    edges = found["edges"][:-1]
    names = ("skewed, before", "skewed, normalized", "normal law")
    for i, (key, name) in enumerate(
        zip(("before", "after", "normal"), names, strict=True)
    ):
        left.step(edges, found[key], where="post", color=color(i), label=name)
    left.set(title="Normalizing keeps the shape", ylabel="density")
    left.set_xlabel("value")
    left.legend()
    z = torch.linspace(-10, 5, 400)
    right.plot(z, _slope_of(z), color="black", label="slope of the sigmoid")
    for i, centre in enumerate((-6, 0)):
        law = torch.exp(-(z - centre).square() / 2) * 0.1
        right.fill_between(
            z,
            law,
            color=color(i),
            alpha=0.4,
            lw=0,
            label=f"N({centre}, 1), not to scale".replace("-", "−"),
        )
    right.set(title="Where the sigmoid has a slope", xlabel="input")
    right.legend()


STUDY = Study(
    id="S05",
    title="distributions",
    question="What does normalizing do to the distribution of a unit's input?",
    prediction="It becomes standard normal; a saturated sigmoid gets its slope back.",
    seen="Left: a skewed law is moved and scaled by normalizing, and as skewed as "
    "before. Right: the sigmoid has its slope where N(0, 1) lies, and almost none "
    "where N(−6, 1) does.",
    meaning="Normalizing sets mean and variance and nothing else. Whether a law is "
    "normal is not its business.",
    arms=("an exponential law", "normal laws", "ReLU and sigmoid of a normal law"),
    metric="Mean, variance, skewness and kurtosis before and after; shares of a normal "
    "law; the mean slope of the sigmoid.",
    criterion="C6 needs skewness and excess kurtosis below 0.1 afterwards; C7 the "
    "stated shares to half a point (one point at two deviations); C8 a slope 45 to 57 "
    "times larger; C9 an error below 2e-4; C36 mean and deviation kept to 0.05; C69 "
    "a line to 5 % of the range, and 0.8 of the slope left (below half refutes); C74 "
    "no law above the normal.",
    claims=("C6", "C7", "C8", "C9", "C36", "C37", "C69", "C74"),
    minutes=0.1,
    scales={
        "quick": Scale(2, {"values": 200_000}),
        "cpu": Scale(10, {"values": 1_000_000}),
        "gpu": Scale(10, {"values": 1_000_000}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

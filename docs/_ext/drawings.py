"""Figures of the part Learn, each computed from the library while the site is built.

A function returns charts of `normkit.report` as (title, chart, words for who cannot see
it), or finished HTML. They are drawn in the colours of the page, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import normkit
from normkit.report.charts import Chart, Lines
from normkit.studies.initial_signals import DEPTH, STARTS
from normkit.studies.replicas import ACTIVATIONS
from normkit.studies.stack import StackPass, propagate

__all__ = ["densities", "layouts", "population", "sigmoid_slope", "six_layers"]

Drawn = list[tuple[str, Chart, str]]


def _density(x: Tensor, mean: float, std: float) -> Tensor:
    return torch.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


def densities() -> Drawn:
    """Draw normal densities, and one of them before and after normalization."""
    x = torch.linspace(-6, 6, 241)
    laws = {
        f"N({mean:g}, {std:g}²)".replace("-", "−"): (x.tolist(), density.tolist())
        for mean, std in ((0.0, 1.0), (0.0, 1.5), (-2.0, 0.5), (2.0, 1.0))
        for density in (_density(x, mean, std),)
    }
    generator = torch.Generator().manual_seed(0)
    sample = -2 + 0.5 * torch.randn(100_000, 1, generator=generator)
    skewed = torch.empty(100_000, 1).exponential_(generator=generator) - 4
    layer = normkit.nn.BatchNorm1d(1, affine=False)
    moved = {}
    for name, values in (("normal", sample), ("skewed", skewed)):
        for when, shown in (("before", values), ("after", layer(values))):
            moved[f"{name}, {when}"] = _shares(shown, -6, 6, 96)
    return [
        (
            "Normal densities",
            Lines(laws, x_label="x", y_label="density"),
            "Four bell curves. The one of standard deviation 0.5 is twice as high and "
            "half as wide as that of standard deviation 1.",
        ),
        (
            "Two samples before and after batch norm",
            Lines(moved, x_label="value", y_label="density"),
            "The normal sample at −2 becomes the standard normal. The skewed one gets "
            "mean 0 and variance 1 and stays as skewed as it was.",
        ),
    ]


def _shares(values: Tensor, low: float, high: float, bins: int) -> tuple:
    counts = torch.histc(values.flatten().float(), bins, low, high)
    width = (high - low) / bins
    middle = low + width * (torch.arange(bins) + 0.5)
    return middle.tolist(), (counts / counts.sum() / width).tolist()


def sigmoid_slope() -> Drawn:
    """Draw the sigmoid, its slope, and inputs of it before and after normalization."""
    z = torch.linspace(-10, 5, 301)
    curve = torch.sigmoid(z)
    slope = curve * (1 - curve)
    generator = torch.Generator().manual_seed(0)
    before = -6 + torch.randn(100_000, 1, generator=generator)
    after = normkit.nn.BatchNorm1d(1)(before).detach()
    seen = {}
    for name, values in (("before", before), ("after", after)):
        y = torch.sigmoid(values)
        mean = float((y * (1 - y)).mean())
        seen[f"input {name}: mean slope {mean:.3f}"] = _shares(values, -10, 5, 120)
    return [
        (
            "The sigmoid and its slope",
            Lines(
                {
                    "sigmoid": (z.tolist(), curve.tolist()),
                    "slope": (z.tolist(), slope.tolist()),
                },
                x_label="z",
                y_label="",
                marks={"1/4": 0.25},
            ),
            "The sigmoid rises from 0 to 1; its slope is a bell of height 1/4 at 0.",
        ),
        (
            "Inputs of the sigmoid, before and after batch norm",
            Lines(
                {"slope": (z.tolist(), slope.tolist()), **seen},
                x_label="z",
                y_label="density; slope",
            ),
            "Before, the inputs lie around −6, where the slope is nearly 0; after, "
            "around 0, where it is largest.",
        ),
    ]


def six_layers() -> Drawn:
    """Draw the values and gradients of six layers, for each start of study S04."""
    units, batch = 1024, 256
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, units, generator=generator)
    weights = [
        torch.randn(units, units, generator=generator) / math.sqrt(units)
        for _ in range(DEPTH)
    ]
    cotangent = torch.randn(batch, units, generator=generator)
    found: Drawn = []
    for name, activation, gain in STARTS:
        act = ACTIVATIONS[activation]
        passed = propagate(x, weights, act, cotangent, gain=gain)
        found += _layers(name, activation, passed)
    return found


def _layers(name: str, activation: str, passed: StackPass) -> Drawn:
    reach = 1.0 if activation == "tanh" else 3.0
    forward = {
        f"layer {i}": _shares(h, -reach, reach, 61)
        for i, h in enumerate(passed.outputs, 1)
    }
    backward = {
        f"layer {i}": _shares(g[g != 0].abs().log10(), -4, 2, 60)
        for i, g in enumerate(passed.input_grads, 1)
    }
    first, last = passed.outputs[0].std(), passed.outputs[-1].std()
    near, far = passed.input_grads[-1].std(), passed.input_grads[0].std()
    return [
        (
            f"{name}: values",
            Lines(forward, x_label="value", y_label="density", in_order=True),
            f"Standard deviation {first:.3g} in layer 1, {last:.3g} in layer {DEPTH}.",
        ),
        (
            f"{name}: gradients",
            Lines(
                backward, x_label="log₁₀ |gradient|", y_label="density", in_order=True
            ),
            f"Standard deviation of the gradient {near:.3g} at layer {DEPTH}, "
            f"{far:.3g} at layer 1.",
        ),
    ]


def population() -> Drawn:
    """Draw the statistics of batches and their moving averages while one trains."""
    generator = torch.Generator().manual_seed(0)
    data = 3 + 2 * torch.randn(4096, 1, generator=generator)
    layers = {m: normkit.nn.BatchNorm1d(1, momentum=m) for m in (0.1, 0.01)}
    steps = list(range(1, 121))
    batches: list[float] = []
    averages: dict[float, list[float]] = {m: [] for m in layers}
    for _ in steps:
        rows = torch.randint(len(data), (16,), generator=generator)
        batches.append(float(normkit.moments(data[rows], 0).mean))
        for momentum, layer in layers.items():
            layer(data[rows])
            assert layer.running_mean is not None
            averages[momentum].append(float(layer.running_mean))
    whole = normkit.moments(data, 0)
    report = normkit.calibrate(layers[0.01], list(data.split(16)))
    assert layers[0.01].running_mean is not None
    exact = float(layers[0.01].running_mean)
    series = {"mean of the batch, 16 samples": (steps, batches)}
    for momentum, values in averages.items():
        series[f"running mean, momentum {momentum:g}"] = (steps, values)
    return [
        (
            "Statistics of the batch, their moving average, the population",
            Lines(
                series,
                x_label="batch",
                y_label="mean",
                marks={f"population ({float(whole.mean):.3f})": float(whole.mean)},
            ),
            f"The mean of a batch scatters around {float(whole.mean):.3g}. With "
            "momentum 0.1 the running mean arrives after some 30 batches, with 0.01 it "
            "is still on its way after 120. calibrate, over "
            f"{report.batches} batches, gives {exact:.3g}.",
        )
    ]


# Sizes of the drawn input: samples, channels, height and width.
_SHAPE = (3, 4, 2, 2)


def layouts() -> str:
    """Draw which values of an input share a statistic, as found by changing one.

    One value of the input is changed; every output that moves shares its mean with it.
    """
    _, c, h, w = _SHAPE
    norms: dict[str, nn.Module] = {
        "BatchNorm2d": normkit.nn.BatchNorm2d(c, affine=False),
        "LayerNorm((C, H, W))": normkit.nn.LayerNorm((c, h, w)),
        "LayerNorm(C, channel_dim=1)": normkit.nn.LayerNorm(c, channel_dim=1),
        "InstanceNorm2d": normkit.nn.InstanceNorm2d(c),
        "GroupNorm(2)": normkit.nn.GroupNorm(2, c),
        "PerActivationBatchNorm": normkit.nn.PerActivationBatchNorm((c, h, w)),
    }
    pictures = [_layout(name, _groups(norm)) for name, norm in norms.items()]
    return "".join(pictures)


def _groups(norm: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the number of the group that each value is normalized in."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_SHAPE, generator=generator)
    with torch.no_grad():
        plain = norm(x)
        groups = torch.full(_SHAPE, -1).flatten()
        for i in range(x.numel()):
            if groups[i] >= 0:
                continue
            changed = x.clone()
            changed.view(-1)[i] += 1
            groups[(norm(changed) != plain).flatten()] = int(groups.max()) + 1
    return groups.view(_SHAPE)


def _layout(name: str, groups: Tensor) -> str:
    n, c, h, w = _SHAPE
    cell, gap = 11, 7
    parts = []
    for i in range(n):
        for j in range(c):
            for k in range(h * w):
                left = j * (w * cell + gap) + (k % w) * cell
                top = i * (h * cell + gap) + (k // w) * cell
                group = int(groups[i, j].flatten()[k])
                shade = 1 - 0.3 * (group // 8 % 3)
                parts.append(
                    f'<rect x="{left}" y="{top}" width="{cell - 1}" '
                    f'height="{cell - 1}" fill="var(--hue-{group % 8})" '
                    f'fill-opacity="{shade:.1f}"/>'
                )
    width, height = c * (w * cell + gap) - gap, n * (h * cell + gap) - gap
    count = int(groups.max()) + 1
    each = groups.numel() // count
    words = f"{name}: {count} statistics of {each} values each"
    return (
        f'<figure class="drawing layout"><figcaption><code>{name}</code></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}">'
        f"{''.join(parts)}</svg><p>{count} statistics of {each} values each</p>"
        "</figure>"
    )

"""Cost of `watch` and `diagnose`: `python benchmarks/doctor overhead`.

Processor time of one thread, which other programs on the machine hardly change. Blocks
of training steps, watched and not, take turns; a diagnosis takes turns with one forward
and backward in training mode over the batches that it reads.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from normkit.doctor import diagnose, watch

__all__ = ["lines", "measured"]

STEPS, BLOCKS = 400, 5
BATCHES, SIZE, PIXELS, TURNS = 4, 16, 64, 3
DIAGNOSED = ("resnet18", "resnet50", "densenet121")

Batch = tuple[torch.Tensor, torch.Tensor]


def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Build a perceptron and a residual network, with a batch."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                *(nn.Conv2d(width, width, 3, padding=1, bias=False),),
                *(nn.BatchNorm2d(width), nn.ReLU()),
                *(nn.Conv2d(width, width, 3, padding=1, bias=False),),
                nn.BatchNorm2d(width),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.body(x)).relu()

    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()]
    perceptron = nn.Sequential(*layers, nn.Linear(256, 10))
    residual = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(Block(16) for _ in range(3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    return {
        "perceptron, batch 128": (perceptron, torch.randn(128, 256)),
        "residual network, batch 16, 32x32": (residual, torch.randn(16, 3, 32, 32)),
    }


def seconds(call: Callable[..., Any], *args: Any) -> float:
    """Return the processor time of a call."""
    began = time.process_time()
    call(*args)
    return time.process_time() - began


def train(model: nn.Module, x: torch.Tensor, every: int | None, watched: bool) -> None:
    """Make `STEPS` training steps, with a watch around them or without."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    y = torch.arange(len(x)) % 10
    seen: Any = contextlib.nullcontext()
    if watched:
        seen = watch(model, optimizer, every=every)
    with seen:
        for _ in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()


def watching(every: int | None) -> dict[str, list[float]]:
    """Return the time with a watch over that without, for pairs of blocks."""
    ratios: dict[str, list[float]] = {}
    for name, (model, x) in networks().items():
        train(model, x, every, True)
        pairs = [
            [seconds(train, model, x, every, watched) for watched in (True, False)]
            for _ in range(BLOCKS)
        ]
        ratios[name] = [with_it / without for with_it, without in pairs]
        print(name, ratios[name], flush=True)
    return ratios


def diagnosing() -> dict[str, list[float]]:
    """Return the time of a diagnosis over that of its forwards and backwards."""
    if not find_spec("torchvision"):
        return {}
    from doctor.architectures import prepare_torchvision

    prepare_torchvision()
    from torchvision import models

    draw = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(SIZE, 3, PIXELS, PIXELS, generator=draw),
            torch.randint(0, 10, (SIZE,), generator=draw),
        )
        for _ in range(BATCHES)
    ]

    def plain(model: nn.Module) -> None:
        for x, y in batches:
            cross_entropy(model(x), y).backward()
            model.zero_grad()

    ratios: dict[str, list[float]] = {}
    for name in DIAGNOSED:
        torch.manual_seed(0)
        model = models.get_model(name, weights=None, num_classes=10).train()
        plain(model)
        pairs = [
            [
                seconds(diagnose, model, batches, cross_entropy),
                seconds(plain, model),
            ]
            for _ in range(TURNS)
        ]
        ratios[name] = [diagnosis / alone for diagnosis, alone in pairs]
        print(name, ratios[name], flush=True)
    return ratios


PARTS: dict[str, Callable[[], dict[str, list[float]]]] = {
    "diagnose": diagnosing,
    "watch": functools.partial(watching, None),
    "watch every step": functools.partial(watching, 1),
}


def measured(wanted: list[str], before: dict[str, Any] | None) -> dict[str, Any]:
    """Measure the parts of these names, or all; others are kept from `before`."""
    kept = before if wanted and before else {}
    return {
        name: measure() if not wanted or name in wanted else kept[name]
        for name, measure in PARTS.items()
        if not wanted or name in wanted or name in kept
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the outcome in Markdown."""
    rows = [
        f"| {what} | {name} | {statistics.median(values):.2f} | {min(values):.2f} to "
        f"{max(values):.2f} |"
        for what in found
        for name, values in found[what].items()
    ]
    return [
        "## Time",
        "",
        f"`diagnose` on {BATCHES} batches of {SIZE} images of {PIXELS} pixels, over",
        f"one forward and backward on them; `watch` over {STEPS} steps, by its",
        "default and at every step, over the same steps without it. Processor time,",
        "one thread.",
        "",
        "| | network | times | least to most |",
        "| --- | --- | --- | --- |",
        *rows,
    ]

"""What `watch` costs: `python benchmarks/doctor/overhead.py`.

Blocks of training steps, watched and not, take turns; the processor time of one thread
is compared, which other programs on the machine hardly change.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from normkit.doctor import watch

EVERY, STEPS, BLOCKS = 50, 200, 5


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


def seconds(model: nn.Module, x: torch.Tensor, *, is_watched: bool) -> float:
    """Processor time of `STEPS` training steps, and of a watch around them."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    y = torch.arange(len(x)) % 10
    seen: Any = contextlib.nullcontext()
    if is_watched:
        seen = watch(model, optimizer, every=EVERY)
    began = time.process_time()
    with seen:
        for _ in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return time.process_time() - began


def main() -> None:
    """Print the ratio per network: median, least and most over pairs of blocks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, (model, x) in networks().items():
        seconds(model, x, is_watched=True)
        ratios = []
        for _ in range(BLOCKS):
            plain = seconds(model, x, is_watched=False)
            ratios.append(seconds(model, x, is_watched=True) / plain)
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{name}: {middle:.3f} ({low:.3f} to {high:.3f}) at every={EVERY}")


if __name__ == "__main__":
    main()

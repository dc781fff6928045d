"""Common parts of the healthy programs of steady_runs.py: register, names, scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from calm_base import Data
from quiet_base import Training, feed
from torch import Tensor, nn

__all__ = ["PROGRAMS", "explained", "names", "program"]

PROGRAMS: dict[str, Callable[[], Training]] = {}


def program(build: Callable[[], Training]) -> Callable[[], Training]:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build


def names(n: int) -> list[str]:
    """Return names of two to four syllables; a syllable follows from the last vowel."""
    starts = ["br", "m", "k", "l", "n", "s", "t", "r", "d", "v"]
    vowels = "aeiou"
    chance = (2.0 * torch.randn(6, len(starts))).softmax(1)
    sound = (1.5 * torch.randn(len(starts), 5)).softmax(1)
    found = []
    for _ in range(n):
        name, last = "", 5
        for _ in range(int(torch.randint(2, 5, ()))):
            start = int(torch.multinomial(chance[last], 1))
            last = int(torch.multinomial(sound[start], 1))
            name += starts[start] + vowels[last]
        found.append(name + ("n" if last in (0, 2) else ""))
    return found


def explained(model: nn.Module, data: Data) -> float:
    """Return the share of the variance explained in eval mode; restore the mode."""
    was = model.training
    model.eval()
    with torch.no_grad():
        left = (feed(model, data) - data[1]).square().mean()
    model.train(was)
    y: Tensor = data[1]
    return float(1 - left / (y - y.mean(0)).square().mean())

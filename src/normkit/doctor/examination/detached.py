"""Layers that the loss depends on, and that no gradient reaches.

As behind `.detach()`, `.data`, `.item()` or a trip through NumPy in the forward. What a
layer gives may be read by nothing, too, as the pooler of a transformer that labels
tokens, and then gets no gradient either. So the weights are changed, and the loss tells
whether anything reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn

__all__ = ["detached"]

# Change of the loss, relative to it, that is no rounding.
CHANGED = 1e-3
# Layers that are tried one by one, from the last; in a chain the last one answers.
MOST = 8


def detached(
    loss: Callable[[], float], layers: dict[str, nn.Module]
) -> tuple[str, ...]:
    """Return the names of the layers that the loss depends on, in their order.

    All up to the last one whose weights change the loss.

    Args:
        loss: The loss of one batch, the same at every call.
        layers: Layers that run with gradients enabled and get none, in their order.
    """
    if not layers:
        return ()
    with suppress(Exception):  # the user's functions, with weights they never had
        return _read(loss, layers)
    return ()


def _read(loss: Callable[[], float], layers: dict[str, nn.Module]) -> tuple[str, ...]:
    was = loss()
    if not math.isfinite(was):
        return ()

    def is_read(changed: Iterable[nn.Module]) -> bool:
        with _changed(changed):
            now = loss()
        return not abs(now - was) <= CHANGED * abs(was)

    if not is_read(()) and is_read(layers.values()):
        names = list(layers)
        for last in reversed(range(len(names))[-MOST:]):
            if is_read([layers[names[last]]]):
                return tuple(names[: last + 1])
    return ()


@contextmanager
def _changed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Add noise of their own size to the weights of the modules, for the time being.

    By other tensors in their place: a write would count in `_version`, and fail the
    backward of a graph that is still alive.
    """
    held = {id(p): p for m in modules for p in m.parameters(recurse=False)}
    before = [(p, p.data) for p in held.values() if p.numel()]
    try:
        for p, value in before:
            size = value.abs().square().mean().sqrt()
            p.data = value + torch.randn_like(value) * size
        yield
    finally:
        for p, value in before:
            p.data = value

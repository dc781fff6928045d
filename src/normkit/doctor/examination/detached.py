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

# Change of the loss, relative to it, of layers that matter to it.
CHANGED = 1e-3


def detached(
    loss: Callable[[], float], layers: dict[str, nn.Module]
) -> tuple[str, ...]:
    """Return the names of the layers that the loss depends on, in their order.

    All up to the last one whose weights change the loss, however little.

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
    names, was = list(layers), loss()

    def changed_by(some: list[str]) -> float:
        with _changed(layers[name] for name in some):
            return abs(loss() - was)

    is_repeated = math.isfinite(was) and changed_by([]) == 0
    if not is_repeated or changed_by(names) <= CHANGED * abs(was):
        return ()
    # The longest end that changes nothing at all is read by nothing. The last layers
    # may matter little, as those of a branch that starts at a scale of 1e-6.
    unread, read = 0, len(names)
    while read - unread > 1:
        middle = (unread + read) // 2
        if changed_by(names[-middle:]):
            read = middle
        else:
            unread = middle
    return tuple(names[: len(names) - unread])


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

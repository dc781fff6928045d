"""Leave everything as it was: random numbers, modes, buffers, gradients."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Snapshot", "preserved_random", "snapshot"]


@contextmanager
def preserved_random(
    model: nn.Module, *, seed: int | None = None, others: Iterable[Any] = ()
) -> Iterator[None]:
    """Put every random state back after the block: torch, Python, NumPy.

    Args:
        model: Its devices' generators are preserved, beside the CPU's.
        seed: Start the block from this seed; None to go on from where it was.
        others: Objects that may hold a `torch.Generator` under `generator`, such as
            a data loader and its sampler.
    """
    generators = [g for o in others if isinstance(g := _generator(o), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    python_state = random.getstate()
    cuda = sorted(
        {t.get_device() for t in model.parameters() if t.is_cuda}
        | {t.get_device() for t in model.buffers() if t.is_cuda}
    )
    try:
        with torch.random.fork_rng(devices=cuda):
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                if numpy_random is not None:
                    numpy_random.seed(seed)
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generator(holder: Any) -> Any:
    return getattr(holder, "generator", None)


@dataclass(frozen=True)
class Snapshot:
    """Modes, buffers and gradients of a model at one moment.

    Attributes:
        modes: Each module with its `training` flag.
        buffers: Each module with the name, the object and a copy of each buffer.
        gradients: Each parameter with its `.grad`.
    """

    modes: list[tuple[nn.Module, bool]]
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]
    gradients: list[tuple[nn.Parameter, Tensor | None]]

    def restore_buffers(self) -> None:
        """Put the buffers back: the same objects with the same bytes."""
        with torch.no_grad():
            for module, name, buffer, copy in self.buffers:
                # Untouched buffers stay untouched, for autograd counts their changes.
                # It does not count those of batch norm's own kernel, so bytes decide.
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)
                module._buffers[name] = buffer

    def restore_modes(self) -> None:
        """Put every `training` flag back, past any override of `train()`."""
        for module, training in self.modes:
            module.training = training

    def restore(self) -> None:
        """Put everything back."""
        self.restore_buffers()
        self.restore_modes()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient


def snapshot(model: nn.Module) -> Snapshot:
    """Remember the modes, buffers and gradients of `model`."""
    return Snapshot(
        modes=[(module, module.training) for module in model.modules()],
        buffers=[
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ],
        gradients=[(p, p.grad) for p in model.parameters()],
    )

"""All optimizers that make steps: the parameters they hold, and gradients they find."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from normkit.doctor.probes.hook import Hook
from normkit.doctor.probes.tensor_statistics import is_traced

__all__ = ["EveryOptimizer", "held_by", "is_readable"]


class EveryOptimizer:
    """Record the parameters that the optimizers of one model hold, and gradients.

    Args:
        model: The model.
        watched: The optimizer whose steps are measured; None for none.

    Attributes:
        held_by_others: Ids of the parameters that other optimizers hold, and the
            watched one does not.
        steps: Steps of optimizers that hold parameters of the model to be trained,
            until one of them had a gradient other than zero.
        found_gradients: In one of these steps a parameter had a gradient.
        found_nonzero: One had a gradient that was not zero throughout.
    """

    def __init__(self, model: nn.Module, watched: Optimizer | None) -> None:
        self.held_by_others: set[int] = set()
        self.steps = 0
        self.found_gradients = False
        self.found_nonzero = False
        # The parameters themselves: the id of one that is gone may be given again.
        self._own = {id(p): p for p in model.parameters()}
        self._watched = watched
        # The groups that were seen, of optimizers that are not kept alive.
        self._seen = weakref.WeakKeyDictionary[Optimizer, int]()

    @property
    def steps_without_gradient(self) -> int:
        """The steps, where no gradient was found in any that was not zero; else 0."""
        return 0 if self.found_nonzero else self.steps

    def register(self, after: Callable[[], None]) -> list[Any]:
        """Register hooks around each step, and return their handles.

        Args:
            after: Called after each step.

        Gradients are looked for before and after it: a closure makes them in between,
        and an optimizer may drop them there.
        """
        before = Hook(lambda optimizer, *_: self._look(optimizer))
        end = Hook(lambda optimizer, *_: self._add(optimizer, after))
        return [
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(end),
        ]

    def _add(self, optimizer: Optimizer, after: Callable[[], None]) -> None:
        after()
        self._look(optimizer)
        if self._watched not in (None, optimizer):
            groups = len(optimizer.param_groups)
            if self._seen.get(optimizer) != groups:
                self._seen[optimizer] = groups
                held = held_by(optimizer) & self._own.keys()
                self.held_by_others |= held - held_by(self._watched)
        if not self.found_nonzero:
            self.steps += self._is_of_model(optimizer)

    def _is_of_model(self, optimizer: Optimizer) -> bool:
        held = held_by(optimizer)
        return any(p.requires_grad for key, p in self._own.items() if key in held)

    @torch.no_grad()
    def _look(self, optimizer: Optimizer) -> None:
        # Most trainings end it after a single tensor of the first step.
        if self.found_nonzero or not self._is_of_model(optimizer):
            return
        for group in optimizer.param_groups:
            for gradient in (parameter.grad for parameter in group["params"]):
                if gradient is None:
                    continue
                self.found_gradients = True
                if not is_readable(gradient) or bool(gradient.any()):
                    self.found_nonzero = True
                    return


def held_by(optimizer: Optimizer | None) -> set[int]:
    """Return the ids of the parameters in the groups of an optimizer; none of None."""
    if optimizer is None:
        return set()
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def is_readable(gradient: Tensor) -> bool:
    """Return True where a value can be read: not while a CUDA graph is captured.

    Nor of parts over ranks, where each would wait for the others.
    """
    return (
        type(gradient) is Tensor
        and gradient.layout is torch.strided
        and not is_traced(gradient)
        and not (gradient.is_cuda and torch.cuda.is_current_stream_capturing())
    )

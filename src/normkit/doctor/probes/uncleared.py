"""Steps whose gradients still hold those of the step before: no zero_grad."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from normkit.doctor.probes.every_optimizer import held_by, is_readable
from normkit.doctor.probes.hook import Hook

__all__ = ["Uncleared"]


class Uncleared:
    """Count the steps since which the gradient of one weight was never cleared.

    A gradient that arrives at the weight is added to the one that is there: between two
    steps that is none, or zero, at least once. The first time ends the record, in most
    trainings in their second step.

    Args:
        model: The model. Its last trained parameter is read: a head without gradients
            is rare.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
        self._weight = trained[-1] if trained else None
        self._handles: list[Any] = []
        self._steps = 0
        self._has_stepped = self._was_added_to = self._was_cleared = False

    @property
    def steps(self) -> int:
        """The number of these steps; 0 where the gradient was cleared once."""
        return 0 if self._was_cleared else self._steps

    def attach(self) -> None:
        """Register the hooks."""
        if self._weight is not None:
            end = Hook(lambda optimizer, *_: self._end_step(optimizer))
            self._handles = [
                self._weight.register_hook(Hook(self._arrive)),
                register_optimizer_step_post_hook(end),
            ]

    def detach(self) -> None:
        """Remove the hooks; the number stays."""
        while self._handles:
            self._handles.pop().remove()

    def _arrive(self, _: Tensor) -> None:
        """Look at the gradient that another is about to be added to."""
        if not self._has_stepped or self._weight is None:
            return
        present = self._weight.grad
        if present is None or not is_readable(present) or not bool(present.any()):
            self._was_cleared = True
            self.detach()
        self._was_added_to = True

    def _end_step(self, optimizer: Optimizer) -> None:
        if id(self._weight) in held_by(optimizer):
            self._steps += self._was_added_to
            self._has_stepped, self._was_added_to = True, False

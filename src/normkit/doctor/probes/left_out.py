"""Parameters that get gradients and that no optimizer moves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normkit.doctor.probes.every_optimizer import held_by
from normkit.doctor.probes.tensor_statistics import version_of

__all__ = ["LeftOut"]


class LeftOut:
    """The parameters of a model as they are when a training begins.

    torch counts the writes to each: one that was written to belongs to some optimizer.

    Args:
        model: The model.
        optimizer: The optimizer of its training; None for none.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self._before = {
            name: (parameter, version_of(parameter))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        # What a training before has left: of a head that is not called any more, say.
        self._left_over = {
            name: (parameter.grad, version_of(parameter.grad))
            for name, (parameter, _) in self._before.items()
            if parameter.grad is not None
        }
        # One that holds none of them may hold flattened copies, which share memory with
        # them: writes to those are not counted.
        self._sums: dict[str, Tensor] = {}
        if optimizer is not None and not self._is_held(optimizer):
            self._sums = {name: _sum(p) for name, (p, _) in self._before.items()}

    def _is_held(self, optimizer: torch.optim.Optimizer) -> bool:
        owned = held_by(optimizer)
        return any(id(p) in owned for p, _ in self._before.values())

    def _stands_still(self) -> bool:
        """Return True where nothing moves the parameters, held or not."""
        return bool(self._sums) and all(
            _is_same(parameter, self._sums[name])
            for name, (parameter, _) in self._before.items()
        )

    @torch.no_grad()
    def names(
        self, optimizer: torch.optim.Optimizer, held_by_others: set[int]
    ) -> tuple[str, ...]:
        """Return the names of those that the optimizer should hold and does not."""
        owned = held_by(optimizer) | held_by_others
        if not self._is_held(optimizer) and not self._stands_still():
            return ()
        return tuple(
            name
            for name, (parameter, version) in self._before.items()
            if id(parameter) not in owned
            and parameter.requires_grad
            and version_of(parameter) == version >= 0
            and self._got_gradient(name, parameter)
        )

    def _got_gradient(self, name: str, parameter: Tensor) -> bool:
        """Return True for a gradient that is not zero, and was not there before."""
        grad = parameter.grad
        if grad is None or not grad.any():
            return False
        before, version = self._left_over.get(name, (None, 0))
        return grad is not before or version_of(grad) != version


@torch.no_grad()
def _sum(x: Tensor) -> Tensor:
    """Return a number that another content hardly has; nan of parts over ranks."""
    if type(x.data) is not Tensor or not x.is_floating_point():
        return torch.tensor(torch.nan)
    return x.sum(dtype=torch.float32)


def _is_same(x: Tensor, before: Tensor) -> bool:
    return bool(_sum(x).to(before.device) == before)

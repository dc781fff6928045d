"""Parameters that get gradients and that no optimizer moves."""

from __future__ import annotations

import torch
from torch import nn

from normkit.doctor.probes.tensor_statistics import version_of

__all__ = ["LeftOut"]


class LeftOut:
    """The parameters of a model as they are when a training begins.

    torch counts the writes to each: one that was written to belongs to some optimizer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = {
            name: (parameter, version_of(parameter))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def names(self, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
        """Return the names of those that the optimizer should hold and does not.

        None where it holds no parameter of the model, as one of flattened weights.
        """
        groups = optimizer.param_groups
        owned = {id(p) for group in groups for p in group["params"]}
        if not any(id(p) in owned for p, _ in self._before.values()):
            return ()
        return tuple(
            name
            for name, (parameter, version) in self._before.items()
            if id(parameter) not in owned
            and parameter.requires_grad
            and version_of(parameter) == version >= 0
            and parameter.grad is not None
            and bool(parameter.grad.any())
        )

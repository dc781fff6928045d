"""The training loop, recorded by the calls of the model and of the optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normkit.doctor.measurements import TrainingStatistics
from normkit.doctor.probes.optimizer import Rates, optimizer_statistics
from normkit.doctor.probes.repeats import Repeats
from normkit.doctor.probes.roles import role_of
from normkit.modeling.norm_types import holds_constant_statistics, is_batch_norm

__all__ = ["Loop"]


class Loop:
    """Counts of the calls and steps, by their order."""

    def __init__(self) -> None:
        self.forwards = 0
        self.samples = 0.0
        self.updates = 0
        self.updates_in_eval = 0
        self.updates_before_eval = 0
        self.idle_bursts = 0
        self._rates = Rates()
        self._repeats = Repeats()
        self._idle_calls = 0
        # Mode of the last call with gradients since the last update.
        self._called_in_training: bool | None = None

    def add_call(
        self, model: nn.Module, args: Any, kwargs: Any, *, is_grad: bool
    ) -> None:
        """Record a call of the model."""
        if not is_grad:
            self._idle_calls += _is_averaging(model)
            # A single such call may belong to a step: a generator feeds its critic,
            # and does so again after the critic's step.
            self.idle_bursts += self._idle_calls == 2
            return
        self._idle_calls = 0
        self._called_in_training = model.training
        if model.training:
            self.forwards += 1
            self.samples += _samples(args, kwargs)
            self._repeats.add(args, kwargs)

    def add_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Record a step of the optimizer."""
        self.updates += 1
        self._rates.add(optimizer)
        if self._called_in_training is False:
            if not self.updates_in_eval:
                self.updates_before_eval = self.updates - 1
            self.updates_in_eval += 1
        self._called_in_training = None

    def add_any_update(self) -> None:
        """Record a step of some optimizer, of this model or of another.

        A validation makes none between its batches.
        """
        self._idle_calls = 0

    def statistics(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> TrainingStatistics:
        """Return the counts so far."""
        decay, is_decoupled, per_step = _decay_on_norms(model, optimizer)
        return TrainingStatistics(
            forwards=self.forwards,
            updates=None if optimizer is None else self.updates,
            updates_in_eval=self.updates_in_eval,
            updates_before_eval=self.updates_before_eval,
            idle_bursts=self.idle_bursts,
            samples=self.samples / max(self.forwards, 1),
            compared_calls=self._repeats.calls,
            compared_samples=self._repeats.samples,
            different_samples=self._repeats.repeated,
            order=self._repeats.order(),
            input_dims=self._repeats.dims,
            weight_decay=decay,
            is_decoupled=is_decoupled,
            decay_per_step=per_step,
            optimizer=None
            if optimizer is None
            else optimizer_statistics(optimizer, self._rates),
        )


def _samples(args: Any, kwargs: Any) -> float:
    """Return the samples of a call, by its first tensor; nan without one.

    Those of a list, as of images, are its items.
    """
    given = next(iter(args), None)
    if isinstance(given, Tensor):
        return given.shape[0] if given.dim() else math.nan
    if isinstance(given, list) and all(isinstance(x, Tensor) for x in given):
        return len(given)
    tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
    first = next(tensors, None)
    return math.nan if first is None or not first.dim() else first.shape[0]


def _is_averaging(model: nn.Module) -> bool:
    """Return True where a call changes running averages, as no calibration does."""
    norms: list[Any] = [
        module
        for module in model.modules()
        if is_batch_norm(module) and not holds_constant_statistics(module)
    ]
    if not norms:
        return model.training
    return any(n.training and getattr(n, "momentum", 0.1) is not None for n in norms)


def _decay_on_norms(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[float | None, bool, float]:
    """Return the largest weight decay on parameters of normalization layers.

    And whether it is decoupled, and the share that it takes in a step then.
    """
    if optimizer is None:
        return None, False, 0.0
    own = {
        id(parameter)
        for module in model.modules()
        if role_of(module) == "norm"
        for parameter in module.parameters(recurse=False)
    }
    decays = [
        (
            float(group.get("weight_decay", 0.0)),
            _is_decoupled(optimizer, group),
            float(group.get("weight_decay", 0.0)) * float(group.get("lr", 0.0)),
        )
        for group in optimizer.param_groups
        if any(id(parameter) in own for parameter in group["params"])
    ]
    decay, is_decoupled, per_step = max(decays, default=(0.0, False, 0.0))
    return decay, is_decoupled, per_step if is_decoupled else 0.0


def _is_decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    known = group.get("decoupled_weight_decay")
    return type(optimizer).__name__.endswith("W") if known is None else bool(known)

"""Gradients and changes of the weights in one observed training step.

A step lasts from the call of the model to the first optimizer step after it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn

from normkit.doctor.probes.every_optimizer import held_by
from normkit.doctor.probes.hook import Hook
from normkit.doctor.probes.layer_probe import LayerProbe
from normkit.doctor.probes.tensor_statistics import norm_of

__all__ = ["Updates"]

HALF = (torch.float16, torch.bfloat16)


class Updates:
    """The weights of the probed layers: norms, gradients and changes in one step.

    Args:
        probes: Probes of the layers.
        optimizer: The optimizer that moves their weights; None for none.
        held_by_others: Ids of the weights that other optimizers move, kept up to date.

    Attributes:
        numbers: ‖w‖, ‖dL/dw‖ and ‖Δw‖/‖w‖ of the current step as scalars on the device
            of the weight, by (layer, "weight_norm" | "weight_gradient_norm" |
            "update_ratio"); with the share of updates that round to nothing,
            (layer, "lost"), of weights in half precision.
        constant: Layers whose weight was one value throughout, and not zero, in the
            first step.
    """

    def __init__(
        self,
        probes: Iterable[LayerProbe],
        optimizer: torch.optim.Optimizer | None = None,
        held_by_others: Set[int] = frozenset(),
    ) -> None:
        self._optimizer = optimizer
        self._held_by_others = held_by_others
        self.numbers: dict[tuple[str, str], Tensor] = {}
        self._weights = {
            probe.name: weight
            for probe in probes
            if probe.role == "weight"
            # Not `module.weight`: reading a parametrized weight runs its
            # parametrization, and spectral norm's changes a buffer.
            and isinstance(
                weight := probe.module._parameters.get("weight"), nn.Parameter
            )
            and not weight.is_meta
        }
        self._old: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._has_gradients = False
        self._awaits_update = False
        self.constant: set[str] = set()

    def left_out(self) -> set[str]:
        """Return the layers whose weight is in no group of the optimizer."""
        if self._optimizer is None:
            return set()
        owned = held_by(self._optimizer) | self._held_by_others
        return {name for name, w in self._weights.items() if id(w) not in owned}

    def rates(self) -> dict[str, float]:
        """Return the learning rates of the layers' weights, where they are numbers."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        by_id = {
            id(parameter): group.get("lr")
            for group in groups
            for parameter in group["params"]
        }
        found = {name: by_id.get(id(weight)) for name, weight in self._weights.items()}
        return {n: float(lr) for n, lr in found.items() if isinstance(lr, int | float)}

    def elsewhere(self) -> set[str]:
        """Return the layers whose weight another optimizer moves: not measured."""
        held = self._held_by_others
        return {name for name, w in self._weights.items() if id(w) in held}

    def open(self) -> None:
        """Begin a step: record its gradients, and wait for its update."""
        self._remove_hooks()
        if not self.numbers:  # the first step
            self.constant = {n for n, w in self._weights.items() if _is_constant(w)}
        self._has_gradients, self._awaits_update = False, True
        self.numbers = {
            (name, "weight_norm"): norm_of(weight.detach())
            for name, weight in self._weights.items()
        }
        for name, weight in self._weights.items():
            if weight.requires_grad:
                hook = Hook(functools.partial(self._record_gradient, name))
                handle = weight.register_post_accumulate_grad_hook(hook)
                self._handles.append(handle)

    def called_again(self) -> None:
        """End the step's gradients where there are some: the model is called again."""
        if self._has_gradients:
            self._remove_hooks()

    def before(self) -> None:
        """Copy the weights before the optimizer changes them."""
        if self._awaits_update:
            # A frozen weight has no update to judge, nor one that moves elsewhere.
            self._old = {
                name: weight.detach().clone()
                for name, weight in self._weights.items()
                if weight.requires_grad and id(weight) not in self._held_by_others
            }

    def after(self) -> None:
        """Record how far the optimizer moved the weights."""
        if not self._awaits_update:
            return
        self._awaits_update = False
        self._remove_hooks()
        for name, old in self._coarse().items():
            weight = self._weights[name]
            has_gradient = weight.grad != 0
            still = has_gradient & (old == weight.detach())
            share = still.sum() / has_gradient.sum()  # nan without a gradient
            self.numbers[name, "lost"] = share.float()
        for name, old in self._old.items():
            # The sign does not matter, and memory for the change is there.
            change = norm_of(old.sub_(self._weights[name].detach()))
            # The weight was measured as the step began, and has changed since only by
            # this update.
            before = self.numbers[name, "weight_norm"]
            self.numbers[name, "update_ratio"] = change / before
        self._old.clear()

    def close(self) -> None:
        """Remove the hooks from the weights; keep the numbers."""
        self._remove_hooks()
        self._old.clear()

    def _coarse(self) -> dict[str, Tensor]:
        """Return the old weights in half precision that the optimizer itself moves.

        Other libraries' optimizers may keep what is rounded off, or a copy in float32.
        """
        optimizer = self._optimizer
        coarse = {n: old for n, old in self._old.items() if old.dtype in HALF}
        if optimizer is None or not coarse:
            return {}
        if not type(optimizer).__module__.startswith("torch.optim"):
            return {}
        owned = held_by(optimizer)
        return {
            name: old
            for name, old in coarse.items()
            if id(self._weights[name]) in owned and self._weights[name].grad is not None
        }

    def _record_gradient(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            norm = norm_of(parameter.grad.detach())
            self.numbers[name, "weight_gradient_norm"] = norm
            self._has_gradients = True

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()


@torch.no_grad()
def _is_constant(weight: Tensor) -> bool:
    """Return True for units of several inputs that all have one weight."""
    if not weight.requires_grad or weight.is_meta or type(weight) is not nn.Parameter:
        return False
    if len(weight) < 2 or weight[0].numel() < 2:
        return False
    first = weight.flatten()[0]
    return bool(first != 0) and bool((weight == first).all())

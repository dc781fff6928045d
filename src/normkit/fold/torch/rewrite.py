"""Edits of a torch module, by name: they apply to every copy and can be undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.fold.ir.graph import Slot

__all__ = ["SetParameter", "exchange", "like", "places_of"]


@dataclass(frozen=True)
class SetParameter:
    """Set the parameter or buffer `name` of the module at `path` to `tensor`."""

    path: str
    name: str
    tensor: Tensor

    @classmethod
    def of(cls, slot: Slot, tensor: Tensor) -> SetParameter:
        """Return the edit that fills `slot`."""
        path, _, name = slot.name.rpartition(".")
        return cls(path, name, tensor)

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Apply it, rounding once to the dtype there; return a function to undo it."""
        module = model.get_submodule(self.path)
        held: dict[str, Any] = module._parameters
        if self.name in module._buffers:
            held = module._buffers
        old = held[self.name]
        model_on = like(module, self.name)
        new = self.tensor.to(model_on.device, model_on.dtype)
        if self.name in module._parameters:
            new = nn.Parameter(new, requires_grad=model_on.requires_grad)
        held[self.name] = new

        def undo() -> None:
            held[self.name] = old

        return undo

    def overflows_in(self, model: nn.Module) -> bool:
        """Return True if a number is not finite in the dtype there, or a NaN."""
        module = model.get_submodule(self.path)
        model_on = like(module, self.name)
        low, high = map(float, self.tensor.aminmax())
        return not max(-low, high) <= torch.finfo(model_on.dtype).max


def like(module: nn.Module, name: str) -> Tensor:
    """Return `name`, or a tensor to model it on: the weight, a statistic."""
    held = {**module._parameters, **module._buffers}
    ranked = [held.get(name), held.get("weight"), *held.values()]
    return next(t for t in ranked if t is not None and t.is_floating_point())


def exchange(
    model: nn.Module, places: tuple[tuple[str, str], ...], new: nn.Module
) -> Callable[[], None]:
    """Put `new` into each place (path of the parent, name); return the undo."""
    held = [(model.get_submodule(parent)._modules, name) for parent, name in places]
    before = [modules[name] for modules, name in held]
    for modules, name in held:
        modules[name] = new

    def undo() -> None:
        for (modules, name), old in zip(held, before, strict=True):
            modules[name] = old

    return undo


def places_of(model: nn.Module) -> dict[nn.Module, list[tuple[str, str]]]:
    """Return each (path of the parent, name) under which a module is held."""
    places: dict[nn.Module, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for name, child in module._modules.items():
            if child is not None:
                places.setdefault(child, []).append((path, name))
    return places

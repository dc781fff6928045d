"""The modules that a program calls: the model, or parts of it; layers in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from normkit.doctor.probes.hook import Hook
from normkit.torch_state import has_transforms

__all__ = ["CalledInEval", "Entries"]


class Entries:
    """Report each call of an outermost module: of the model, or of a part of it.

    A program may call `model(x)`, or only `model.net(x)`. Every module has a hook until
    a module around it is called in training; a model that is called itself then has
    the only one.

    Args:
        model: The model.
        before: Called with the module and its arguments as the call begins.

    Attributes:
        was_called: A module was called.
        was_transformed: One was called inside a transform of torch.func, where nothing
            is measured and no step is counted.
    """

    def __init__(
        self, model: nn.Module, before: Callable[[nn.Module, Any, Any], None]
    ) -> None:
        self.was_called = False
        self.was_transformed = False
        self._model = model
        self._before = before
        self._active: nn.Module | None = None
        self._handles: dict[nn.Module, list[Any]] = {}

    def attach(self) -> None:
        """Register the hooks."""
        enter, leave = Hook(self._enter, in_transforms=True), Hook(self._leave)
        for module in self._model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks
            self._handles[module] = [
                module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
                module.register_forward_hook(leave, always_call=True),
            ]

    def detach(self) -> None:
        """Remove the hooks."""
        self._remove(*self._handles)
        self._active = None

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # An interrupt may have left the module active: it begins anew.
        if self._active not in (None, module):
            return
        self.was_called = True
        if has_transforms():
            self.was_transformed = True
            return
        self._active = module
        if len(self._handles) > 1 and module.training and torch.is_grad_enabled():
            self._remove(*(part for part in module.modules() if part is not module))
        self._before(module, args, kwargs)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._active is module:
            self._active = None

    def _remove(self, *modules: nn.Module) -> None:
        for module in modules:
            for handle in self._handles.pop(module, ()):
                handle.remove()


class CalledInEval:
    """The layers that ran in the first calls in eval mode, before the next step.

    Args:
        layers: The layers, by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._ran: set[str] | None = None
        self._handles: list[Any] = []

    def attach(self, module: nn.Module) -> None:
        """Begin to record, from inside the call of `module`; once."""
        if self._ran is not None:
            return
        self._ran = ran = {n for n, layer in self._layers.items() if layer is module}
        for name, layer in self._layers.items():
            add = Hook(lambda *_, name=name: ran.add(name))
            self._handles.append(layer.register_forward_pre_hook(add))

    def detach(self) -> None:
        """Stop recording."""
        while self._handles:
            self._handles.pop().remove()

    def ran(self, name: str) -> bool | None:
        """Return whether the layer ran; None where nothing was called in eval mode."""
        return None if self._ran is None else name in self._ran

"""Modules that run beside a model: a critic, a loss with centers, a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from normkit.modeling.snapshot import preserved
from normkit.torch_state import is_compiling, is_jit_tracing

__all__ = ["OtherModules", "backward_into", "leaves_of", "others_preserved"]


class OtherModules:
    """The modules that were called beside a model and its parts.

    Attributes:
        own_ran: The model, or a part of it, was called.
    """

    def __init__(self, model: nn.Module, kept: ExitStack) -> None:
        self.own_ran = False
        self._known = {*model.modules()}
        self._own = frozenset(self._known)
        self._kept = kept

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Take a snapshot of a module that is called for the first time."""
        if is_compiling() or is_jit_tracing():
            return
        self.own_ran = self.own_ran or module in self._own
        if module not in self._known:
            self._known.update(module.modules())
            self._kept.enter_context(preserved(module))


@contextmanager
def others_preserved(model: nn.Module) -> Iterator[OtherModules]:
    """Restore the modules beside `model` that the block calls, as `preserved` does.

    A loss may call a critic, whose batch norms then count the batch, or hold centers
    that it moves. For gradients see `backward_into`.
    """
    with ExitStack() as kept:
        others = OtherModules(model, kept)
        handle = register_module_forward_pre_hook(others)
        kept.callback(handle.remove)
        yield others


def backward_into(model: nn.Module, loss: Tensor) -> None:
    """Run `loss.backward()`; parameters of others keep the gradients they have.

    Such as those of a critic, or of the model that `model` is a copy of, in a penalty
    on its weights. `backward(inputs=…)` fails with reentrant checkpointing.
    """
    own = set(map(id, model.parameters()))
    others = [(t, t.grad) for t in leaves_of(loss) if id(t) not in own]
    for tensor, _ in others:
        tensor.grad = None
    try:
        loss.backward()
    finally:
        for tensor, gradient in others:
            tensor.grad = gradient


def leaves_of(output: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that require gradients and from which `output` is made."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += (parent for parent, _ in node.next_functions)

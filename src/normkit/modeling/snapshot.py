"""Modes, buffers, gradients and random states: taken, and put back bit for bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Snapshot", "preserved", "preserved_random"]

# Attributes that a forward may change. Others stay as it left them: a flag may say that
# hooks are there, and None may stand for what the first call makes.
_KEPT = (int, float, tuple, Tensor)


@contextmanager
def preserved_random(
    model: nn.Module, *, seed: int | None = None, others: Iterable[Any] = ()
) -> Iterator[None]:
    """Restore every random state after the block: torch, Python, NumPy.

    Args:
        model: Its devices' generators are preserved, beside the CPU's.
        seed: Start the block from this seed; None to go on from where it was.
        others: Objects that may hold a `torch.Generator` under `generator`, such as
            a data loader and its sampler.
    """
    held = (getattr(holder, "generator", None) for holder in others)
    generators = [g for g in held if isinstance(g, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    python_state = random.getstate()
    tensors = (*model.parameters(), *model.buffers())
    devices = {t.device for t in tensors if t.device.type in ("cuda", "xpu")}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices}:
            ids = sorted(d.index or 0 for d in devices if d.type == kind)
            fork = torch.random.fork_rng(devices=ids, device_type=kind)
            stack.enter_context(fork)
        try:
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


@dataclass(frozen=True)
class Snapshot:
    """Modes, buffers and gradients of a model at one moment.

    Attributes:
        modes: Each module with its `training` flag.
        buffers: Each module with its buffers by name, the objects themselves.
        gradients: Each parameter with its `.grad`, the object itself.
        copies: Each tensor whose values are put back, with a copy of them.
    """

    modes: list[tuple[nn.Module, bool]]
    buffers: list[tuple[nn.Module, dict[str, Tensor | None]]]
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    copies: list[tuple[Tensor, Tensor]]

    @classmethod
    def take(cls, model: nn.Module, *, parameters: bool = False) -> Snapshot:
        """Take a snapshot of `model`.

        Args:
            model: The model.
            parameters: Copy the values of parameters and gradients, too.
        """
        values = list(model.buffers())
        # Those of a scripted module are no leaves, and asking for .grad warns.
        gradients = [(p, p.grad) for p in model.parameters() if p.is_leaf]
        if parameters:
            values += model.parameters()
            values += [gradient for _, gradient in gradients if gradient is not None]
        return cls(
            modes=[(module, module.training) for module in model.modules()],
            # Code in TorchScript cannot replace a buffer that Python holds.
            buffers=[
                (module, dict(module._buffers))
                for module in model.modules()
                if not isinstance(module, torch.jit.ScriptModule)
            ],
            gradients=gradients,
            copies=[(t, t.detach().clone()) for t in values if not is_lazy(t)],
        )

    def restore_values(self, *, but: Iterable[Tensor] = ()) -> None:
        """Restore the buffers: the same objects under the same names, the same bytes.

        A forward may have written into a buffer, or put another tensor in its place.

        Args:
            but: Tensors that keep the values they have now.
        """
        kept = {id(tensor) for tensor in but}
        for module, own in self.buffers:
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for tensor, copy in self.copies:
                # Untouched ones stay untouched, for autograd counts their changes. It
                # does not count those of batch norm's own kernel, so bytes decide.
                if id(tensor) not in kept and not torch.equal(tensor, copy):
                    tensor.copy_(copy)

    def restore_modes(self) -> None:
        """Restore every `training` flag, past any override of `train()`."""
        for module, training in self.modes:
            module.training = training

    def restore(self, *, but: Iterable[Tensor] = ()) -> None:
        """Restore everything; see `restore_values` for `but`."""
        try:
            self.restore_values(but=but)
        finally:
            self.restore_modes()
            for parameter, gradient in self.gradients:
                parameter.grad = gradient


@contextmanager
def preserved(model: nn.Module, *, seed: int | None = None) -> Iterator[Snapshot]:
    """Restore modes, buffers, gradients and random states after the block.

    And the numbers and tensors that modules hold beside their buffers: counters, the
    queue of a momentum encoder, the window of Swin.

    Args:
        model: The model.
        seed: As in `preserved_random`.

    Yields:
        The snapshot that is restored.
    """
    before = Snapshot.take(model)
    with preserved_random(model, seed=seed), _attributes_kept(model):
        try:
            yield before
        finally:
            before.restore()


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    held = [
        (vars(module), name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) in _KEPT
    ]
    tensors = {id(v): v for _, _, v in held if isinstance(v, Tensor) and not is_lazy(v)}
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    try:
        yield
    finally:
        for attributes, name, value in held:
            if name in attributes and attributes[name] is not value:
                attributes[name] = value
        with torch.no_grad():
            for tensor, copy in copies:
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)

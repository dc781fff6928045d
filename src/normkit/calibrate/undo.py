"""A model on loan: whatever happens, it comes back as it was, or calibrated.

Training flags, hooks, the buffers of every module, gradient mode and the generators
of random numbers are put back in `__exit__`. The running statistics are swapped for
scratch tensors while layers are measured and written, in place, only by `commit`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normkit.calibrate.layers import Layer

__all__ = ["Loan", "same_random_numbers", "unwrapped"]


class Loan:
    """A model in eval mode whose running statistics are free to use.

    Attributes:
        hooks: Handles to remove at the end.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.model = model
        self.layers = layers
        self.hooks: list[RemovableHandle] = []
        self._stack = ExitStack()
        self._is_committed = False

    def __enter__(self) -> Loan:
        self._flags = [(module, module.training) for module in self.model.modules()]
        self._buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self._own = [(layer.module, dict(layer.buffers)) for layer in self.layers]
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(same_random_numbers(self.model))
        self._stack.enter_context(_eager(self.model))
        # The flag alone: eval() may be overridden to do more (merge, switch, refuse).
        for module, _ in self._flags:
            module.training = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.put_back()
            is_kept = self._is_committed and error is None
            kept = {
                id(buffer)
                for _, own in self._own
                for buffer in (own.values() if is_kept else ())
            }
            for buffer, before in self._buffers:
                if id(buffer) not in kept and not torch.equal(buffer, before):
                    buffer.copy_(before)
        finally:
            for module, training in self._flags:
                module.training = training
            self._stack.close()

    def put_back(self) -> None:
        """Remove the hooks and the scratch tensors; the layers have their own again."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        for module, own in self._own:
            for name, buffer in own.items():
                module._buffers[name] = buffer
        for module, _ in self._flags:
            module.training = False

    def try_out(self, values: Mapping[str, Mapping[str, Tensor | int]]) -> None:
        """Let layers use statistics until `put_back`, without writing their own."""
        for layer in self.layers:
            own = layer.buffers
            for name, value in values.get(layer.name, {}).items():
                if name in own:
                    layer.module._buffers[name] = _shaped_as(own[name], value)

    def commit(self, values: Mapping[str, Mapping[str, Tensor | int]]) -> None:
        """Write statistics into the layers' own buffers, by layer and buffer name."""
        self.put_back()
        for layer in self.layers:
            own = layer.buffers
            for name, value in values.get(layer.name, {}).items():
                if name in own:
                    own[name].copy_(_shaped_as(own[name], value))
        self._is_committed = True


def _shaped_as(buffer: Tensor, value: Tensor | int) -> Tensor:
    new = torch.as_tensor(value, device=buffer.device, dtype=buffer.dtype)
    return new.reshape(buffer.shape)


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Give back every generator (torch, Python, NumPy) as it was."""
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    python, array = random.getstate(), np.random.get_state()
    kinds = {device.type for device in devices if device.type in ("cuda", "xpu")}
    with ExitStack() as stack:
        if not kinds:
            stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in kinds:
            ids = [device.index or 0 for device in devices if device.type == kind]
            fork = torch.random.fork_rng(devices=ids, device_type=kind)
            stack.enter_context(fork)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile.

    Their forward broadcasts buffers or runs code compiled without hooks.
    """
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run what `Module.compile()` compiled in Python, where hooks are seen."""
    calls = "_compiled_call_impl"
    if any(getattr(module, calls, None) is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield

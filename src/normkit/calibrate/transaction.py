"""The transaction of a calibration: all layers are written, or none.

Training flags, hooks, the buffers of every module, gradient mode and the generators
of random numbers are put back in `__exit__`. The running statistics are swapped for
scratch tensors while layers are measured and written, in place, only by `commit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normkit.calibrate.layers import Layer
from normkit.modeling.snapshot import Snapshot, preserved_random
from normkit.modeling.unwrap import eager

__all__ = ["Transaction"]


class Transaction:
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

    def __enter__(self) -> Transaction:
        self._before = Snapshot.take(self.model)
        self._own = [(layer.module, dict(layer.buffers)) for layer in self.layers]
        # A graph counts its batches itself, outside the layer.
        self._values = [(t, t.clone()) for _, own in self._own for t in own.values()]
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(preserved_random(self.model))
        self._stack.enter_context(eager(self.model))
        self._evaluate()
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
            written = [own.values() for _, own in self._own] if is_kept else []
            self._before.restore(but=[b for each in written for b in each])
        finally:
            self._stack.close()

    def put_back(self) -> None:
        """Remove the hooks and the scratch tensors; the layers have their own again."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        for module, own in self._own:
            module._buffers.update(own)
        for tensor, value in self._values:
            if not self._is_committed and not torch.equal(tensor, value):
                tensor.copy_(value)
        self._evaluate()

    def _evaluate(self) -> None:
        # The flag alone: eval() may be overridden to do more (merge, switch, refuse).
        for module in self.model.modules():
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

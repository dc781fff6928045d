"""Stacks of blocks and the attention inside them: the parts of a transformer.

A block is one of four or more children of one class that have children of their own, as
the layers of a transformer or the blocks of a stage. Its input and output are the
residual stream, which no layer of its own holds.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normkit.doctor.probes.attention import (
    AttentionProbe,
    Logits,
    listen,
    stop_listening,
)
from normkit.doctor.probes.hook import Hook
from normkit.doctor.probes.keys import Keys
from normkit.doctor.probes.tensor_statistics import (
    first_tensor,
    is_sum,
    is_traced,
    norm_of,
    version_of,
)
from normkit.doctor.transformer_statistics import BlockEnd
from normkit.modeling.unwrap import is_compiled

__all__ = ["BlockProbe", "Blocks"]

# As many as make a trend over the depth.
MIN_BLOCKS = 4
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


class BlockProbe:
    """One block: the rms of its input and output in the last call.

    Attributes:
        name: Dotted name.
        kind: Name of its class.
        order: Position in the order of execution; None before the first call.
        follows: The block whose unchanged output is its input; "" for none.
        end: What gives its output, as far as known: "sum", "norm" of a sum, or "".
    """

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind
        self.order: int | None = None
        self.follows = ""
        self.end: BlockEnd = ""
        self.reset()

    def reset(self) -> None:
        """Clear what one batch gave."""
        self.before: Tensor | None = None
        self.after: Tensor | None = None
        self.gradient: Tensor | None = None

    def numbers(self) -> dict[str, Tensor]:
        """Return the measurements as one-value tensors; none before a call."""
        if self.before is None or self.after is None:
            return {}
        found = {"before": self.before, "after": self.after}
        return found if self.gradient is None else {**found, "gradient": self.gradient}

    @torch.no_grad()
    def add_gradient(self, gradient: Tensor) -> None:
        """Set the gradient with respect to the output."""
        if gradient.numel() and not is_traced(gradient):
            self.gradient = norm_of(gradient.detach())


class Blocks:
    """The blocks and the attention of one model.

    Args:
        model: The model.
        is_norm_of_sum: Whether a tensor is the output of a norm of a sum, by what ran
            last.
        last_layer: Name of the layer that ran last.
        gradients: Measure gradients with respect to the outputs of blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        is_norm_of_sum: Callable[[Tensor], bool],
        last_layer: Callable[[], str],
        *,
        gradients: bool,
    ) -> None:
        self.blocks = {
            module: BlockProbe(name, type(module).__name__)
            for name, module in _stacked(model)
        }
        self.attention: dict[str, AttentionProbe] = {}
        self._is_norm_of_sum = is_norm_of_sum
        self._last_layer = last_layer
        self._gradients = gradients
        self._named = {
            module: name
            for name, module in model.named_modules()
            if module in self.blocks or _computes_attention(module)
        }
        # A compiler would compile the model again for other functions.
        self._can_listen = not any(map(is_compiled, model.modules()))
        self._is_listening = False
        self._inside: list[nn.Module] = []
        self._last: tuple[BlockProbe, Callable[[], Tensor | None], int] | None = None
        self._calls = 0

    def attach(self) -> Iterator[tuple[Any, Hook]]:
        """Register the hooks; yield each with its handle."""
        pre, post = Hook(self._before), Hook(self._after)
        for module in self._named:
            handle = module.register_forward_pre_hook(pre, with_kwargs=True)
            yield handle, pre
            yield module.register_forward_hook(post, always_call=True), post

    def enter(self) -> None:
        """Begin a forward."""
        self._inside.clear()
        self._last = None
        if self._can_listen:
            self._stop_listening()
            listen(self._add_attention)
            self._is_listening = True

    def leave(self) -> None:
        """End the forward, or whatever is left of one."""
        self._last = None
        self._stop_listening()

    def _stop_listening(self) -> None:
        # Called at every step of a watch, which rarely has begun to listen.
        if self._is_listening:
            self._is_listening = False
            stop_listening(self._add_attention)

    def reset(self) -> None:
        """Clear the measurements of all parts."""
        for probe in (*self.blocks.values(), *self.attention.values()):
            probe.reset()

    @property
    def in_order(self) -> list[BlockProbe]:
        """The blocks that were called, in the order of their first call."""
        called = [b for b in self.blocks.values() if b.order is not None]
        return sorted(called, key=lambda block: block.order or 0)

    @torch.no_grad()
    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append(module)
        block = self.blocks.get(module)
        x = first_tensor(args)
        x = first_tensor(kwargs) if x is None else x
        if block is None or x is None or is_traced(x):
            return
        if block.order is None:
            block.order = self._calls
            self._calls += 1
        block.follows = ""
        if self._last is not None:
            before, tensor, version = self._last
            if tensor() is x and version_of(x) == version:
                block.follows, block.before = before.name, before.after
                return
        block.before = _rms(x)

    @torch.no_grad()
    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._inside:
            # A part whose call raised may have left itself there.
            del self._inside[self._inside.index(module) :]
        block, y = self.blocks.get(module), first_tensor(output)
        if block is None or y is None or is_traced(y):
            return
        block.after = _rms(y)
        if self._gradients and y.requires_grad:
            y.register_hook(Hook(block.add_gradient))
        if not block.end:
            block.end = (
                "norm" if self._is_norm_of_sum(y) else "sum" if is_sum(y) else ""
            )
        self._last = block, weakref.ref(y), version_of(y)

    def _add_attention(self, read: Callable[[], Logits | Keys], dims: int) -> None:
        inside = self._inside[-1] if self._inside else None
        is_named = inside is not None and _computes_attention(inside)
        # A softmax of three dimensions elsewhere may be one over words.
        if dims < 4 and not is_named:
            return
        if inside is None:
            name = self._last_layer().rpartition(".")[0]
        else:
            name = self._named[inside]
        probe = self.attention.setdefault(name, AttentionProbe(name))
        with torch.no_grad():
            probe.add(read())


def _stacked(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module that is one of several of its class, by name."""
    for name, parent in model.named_modules():
        children = [(n, c) for n, c in parent.named_children() if c._modules]
        kinds = [type(child) for _, child in children]
        for own, child in children:
            if kinds.count(type(child)) >= MIN_BLOCKS:
                yield f"{name}.{own}" if name else own, child


def _computes_attention(module: nn.Module) -> bool:
    return bool(_ATTENTION.search(type(module).__name__))


def _rms(x: Tensor) -> Tensor:
    return norm_of(x.detach()) / x.numel() ** 0.5

"""Hooks on every layer that merge Moments and keep no tensor of the model.

Each layer gets a `LayerProbe`. Its statistics are computed inside the hooks, because
an in-place activation overwrites its input, and full backward hooks fail on such
models. Inputs are read before the layer runs, outputs after it, and gradients by a
hook on the output tensor. No activation outlives its hook.

The hooks are attached for a limited time and removed in `finally`. They enter no
autograd graph, draw no random number and write no buffer, so a run with probes is
bitwise the run without. A copy or a pickle of the model holds hooks that do nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.doctor.probes.blocks import Blocks
from normkit.doctor.probes.functions import Functions
from normkit.doctor.probes.hook import Hook
from normkit.doctor.probes.layer_probe import LayerProbe
from normkit.doctor.probes.roles import crossed_dims, role_of, unit_dim_after
from normkit.doctor.probes.tensor_statistics import (
    add_to_histogram,
    first_tensor,
    is_sum,
    is_traced,
    overall_of,
    version_of,
)
from normkit.modeling.norm_types import NORMS, is_batch_norm
from normkit.moments import Moments

__all__ = ["Probes"]


@dataclass(frozen=True)
class _Output:
    """The last output of any layer, by weak reference."""

    probe: LayerProbe
    tensor: Callable[[], Tensor | None]
    version: int
    overall: Moments


@dataclass(frozen=True)
class _Input:
    """The last input of a layer with a weight, by weak reference."""

    probe: LayerProbe
    tensor: Callable[[], Tensor | None]
    version: int

    def is_same(self, x: Tensor, version: int) -> bool:
        return self.tensor() is x and self.version == version


class Probes:
    """The probes of one model, active inside `attached()`.

    Args:
        model: The model; its layers are measured between `enter` and `leave`.
        channels: Measure the inputs of batch norms channel by channel.
        gradients: Measure gradients with respect to outputs.
        unit: The unit whose input's percentiles are measured; None for none.
        counted: Values of each normalization's input and output to count in a
            histogram per call; 0 for none.
        batch_norms_only: Measure the inputs of batch norms channel by channel, and
            nothing else.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        channels: bool = False,
        gradients: bool = True,
        unit: int | None = None,
        counted: int = 0,
        batch_norms_only: bool = False,
    ) -> None:
        self.counted = counted
        self.batch_norms_only = batch_norms_only
        self.model = model
        self.channels = channels
        self.gradients = gradients
        self.unit = unit
        # A shared module has one probe, under its first name.
        self.layers = {
            name: LayerProbe(name, module, role)
            for name, module in model.named_modules()
            if (role := role_of(module)) != "other"
            # They take no hooks.
            and not isinstance(module, torch.jit.ScriptModule)
            and (not batch_norms_only or is_batch_norm(module))
        }
        self.functions = Functions(self.layers, unit, gradients=gradients)
        self.blocks: Blocks | None = None
        if not batch_norms_only:
            self.blocks = Blocks(
                model, self._is_norm_of_sum, self._last_layer, gradients=gradients
            )
        # Forward statistics count only inside a forward: activation checkpointing runs
        # layers a second time, in backward.
        self.inside = False
        self._unit_dim = -1
        self._calls = 0
        self._last: _Output | None = None
        self._last_input: _Input | None = None
        self._samples = 0
        self._lock = threading.Lock()
        self._handles: list[tuple[Any, Hook]] = []

    def attach(self) -> None:
        """Register the hooks of all layers; call `detach` in a `finally`."""
        for probe in self.layers.values():
            for attached in self._attach_layer(probe):
                self._handles.append(attached)
        if self.blocks is not None:
            # After those of the layers, which a block's own hooks read.
            for attached in self.blocks.attach():
                self._handles.append(attached)

    def _attach_layer(self, probe: LayerProbe) -> Iterator[tuple[Any, Hook]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            probe.had_gradients |= torch.is_grad_enabled()
            self._before(probe, args, kwargs)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._after(probe, output)

        pre, post = Hook(before), Hook(after)
        yield probe.module.register_forward_pre_hook(pre, with_kwargs=True), pre
        yield probe.module.register_forward_hook(post), post

    def detach(self) -> None:
        """Remove every hook."""
        while self._handles:
            handle, hook = self._handles.pop()
            handle.remove()
            hook.retire()
        self.inside = False
        if self.blocks is not None:
            self.blocks.leave()

    @contextmanager
    def attached(self) -> Iterator[Probes]:
        """Register the hooks for the block, and remove them after it or on an error."""
        try:
            self.attach()
            yield self
        finally:
            self.detach()

    def reset(self) -> None:
        """Clear the measurements of all layers."""
        for probe in self.layers.values():
            probe.reset()
        if self.blocks is not None:
            self.blocks.reset()

    @property
    def in_order(self) -> list[LayerProbe]:
        """The layers that were called, in the order of their first call."""
        called = [p for p in self.layers.values() if p.order is not None]
        return sorted(called, key=lambda p: p.order or 0)

    def enter(self, samples: int = 0) -> None:
        """Begin to measure: a forward starts, on a batch of so many samples.

        0 where their number is not known.
        """
        self.inside = True
        self._samples = samples
        self._unit_dim = -1
        if self.blocks is not None:
            self.blocks.enter()
            self.functions.enter()

    def enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Measure the current call of `module`, from inside its forward pre-hook.

        Hooks of the layers are registered where there are none.
        """
        is_attached = bool(self._handles)
        if not is_attached:
            self.attach()
        # After the hooks of the layers, because the module may be a layer itself.
        leave = Hook(lambda module, args, output: self.leave(output))
        handle = module.register_forward_hook(leave, always_call=True)
        self._handles.append((handle, leave))
        self.enter()
        for probe in self.layers.values():
            # The new hook of a module that is one layer does not run in this call.
            if probe.module is module and not is_attached:
                probe.had_gradients |= torch.is_grad_enabled()
                self._before(probe, args, kwargs)

    def leave(self, output: Any) -> None:
        """Stop measuring: the forward gave `output`, None on an error."""
        self.inside = False
        if self.blocks is not None:
            self.blocks.leave()
            self.functions.leave(output)
        last, result = self._last, first_tensor(output)
        if last is not None and result is not None:
            y = last.tensor()
            last.probe.is_output |= y is not None and (result is y or result._base is y)
        self._last = self._last_input = None

    def _before(self, probe: LayerProbe, args: Any, kwargs: Any) -> None:
        x = first_tensor(args)
        x = first_tensor(kwargs) if x is None else x
        if not self.inside or x is None or is_traced(x):
            return
        with self._lock:
            if probe.order is None:
                probe.order = self._calls
                self._calls += 1
            probe.is_running = True
            probe.was_training |= probe.module.training
            if probe.role == "norm":
                probe.takes_sum |= is_sum(x) or kwargs.get("residual") is not None
            overall = self._known_overall(probe, x)
            x = x.detach()  # nothing below enters a graph
            if probe.is_batch_norm:
                self._unit_dim = getattr(probe.module, "channel_dim", 1)
                if self.channels and x.dim() > 1:
                    mask = kwargs.get("mask")
                    mask = mask if isinstance(mask, Tensor) else None
                    probe.had_mask |= mask is not None
                    probe.add_channels(x, mask, self._samples)
                    if overall is None and mask is None:
                        overall = probe.overall
            if self.batch_norms_only:
                return
            self.functions.begin_layer(probe)
            if probe.is_batch_norm:
                if self.unit is not None:  # while a training is watched
                    probe.add_constant(x)
            elif probe.role == "norm" and not isinstance(probe.module, NORMS):
                probe.add_sums(x)
            overall = overall_of(x) if overall is None else overall
            probe.add_input(x, overall, self._unit_dim, self.unit)
            if self.counted and probe.role == "norm":
                probe.before = add_to_histogram(probe.before, x, overall, self.counted)

    def _known_overall(self, probe: LayerProbe, x: Tensor) -> Moments | None:
        """Return the moments of x where it is the unchanged last output.

        What the layer is fed by, and the layer beside it, are recorded on the way.
        """
        version = version_of(x)
        last, beside = self._last, self._last_input
        if probe.role == "weight":
            if beside is not None and beside.is_same(x, version):
                probe.beside = beside.probe.beside or beside.probe.name
            self._last_input = _Input(probe, weakref.ref(x), version)
        output = None if last is None else last.tensor()
        if last is None or output is None:
            return None
        if probe.role == "norm" and _shares_memory(x, output):
            last.probe.is_normalized = True
        if output is not x or last.version != version:
            return None
        probe.fed_by = last.probe.name
        if probe.role == "norm":
            probe.crossed = crossed_dims(last.probe.module, probe.module, x.dim())
        return last.overall

    def _after(self, probe: LayerProbe, output: Any) -> None:
        probe.is_running = False
        y = first_tensor(output)
        if self.batch_norms_only or y is None or is_traced(y):
            return
        if self.gradients and y.requires_grad:
            probe.graph_calls += 1
            y.register_hook(Hook(lambda g: self._add_gradient(probe, g)))
        if not self.inside:
            return
        with self._lock:
            if probe.role != "activation":
                self._unit_dim = unit_dim_after(probe.module, self._unit_dim)
            values = y.detach()
            overall = overall_of(values)
            self.functions.end_layer(probe, overall, self._unit_dim)
            probe.add_output(values, overall, self._unit_dim)
            probe.add_lost_rows(values)
            if self.counted and probe.role == "norm":
                after = add_to_histogram(probe.after, values, overall, self.counted)
                probe.after = after
            self._last = _Output(probe, weakref.ref(y), version_of(y), overall)

    def _is_norm_of_sum(self, y: Tensor) -> bool:
        last = self._last
        return last is not None and last.probe.takes_sum and last.tensor() is y

    def _last_layer(self) -> str:
        return "" if self._last is None else self._last.probe.name

    def _add_gradient(self, probe: LayerProbe, gradient: Tensor) -> None:
        # Those of derivatives that a forward takes are not those of the loss.
        if gradient.numel() and not self.inside and not is_traced(gradient):
            with self._lock:
                probe.add_gradient(gradient.detach())


def _shares_memory(x: Tensor, output: Tensor) -> bool:
    """Return True where one of them is a view of the other, or both of a third."""
    bases = {id(t if t._base is None else t._base) for t in (x, output)}
    return len(bases) == 1

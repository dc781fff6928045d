"""The measurements of a training, taken by hooks step by step.

Between observed steps two small hooks on the model run, two that count the steps of its
optimizer, and two that see those of all optimizers. On an observed step every layer is
probed; the measurements become plain numbers at the next one, with one transfer from
the device.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict, deque
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normkit.doctor.examination.start import was_trained
from normkit.doctor.measurements import LayerStatistics, Statistics
from normkit.doctor.probes.entries import CalledInEval, Entries
from normkit.doctor.probes.every_optimizer import EveryOptimizer
from normkit.doctor.probes.hook import Hook
from normkit.doctor.probes.left_out import LeftOut
from normkit.doctor.probes.loop import Loop
from normkit.doctor.probes.norm_statistics import norm_statistics
from normkit.doctor.probes.parts import Parts
from normkit.doctor.probes.probes import Probes
from normkit.doctor.probes.roles import role_of
from normkit.doctor.probes.schedule import Schedule
from normkit.doctor.probes.series import (
    RECENT,
    SERIES,
    Window,
    layer_of,
    numbers_of,
    to_floats,
    with_spread,
)
from normkit.doctor.probes.uncleared import Uncleared
from normkit.doctor.probes.updates import Updates
from normkit.modeling.graph_norms import norms_as_modules
from normkit.modeling.norm_types import is_batch_norm
from normkit.torch_state import is_in_backward

__all__ = ["Recorder"]

# Values per call that a histogram counts.
MAX_COUNTED = 4096


class Recorder:
    """Measurements of every layer, between `attach` and `detach`.

    Args:
        model: The model.
        optimizer: Its optimizer; None for none.
        schedule: The steps to observe.
        unit: The unit of each layer whose percentiles are measured.

    Attributes:
        steps: Number of training steps so far, observed or not.
        observed: The steps that were observed.
        loop: The calls of the model and of the optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        schedule: Schedule,
        unit: int,
    ) -> None:
        self.model = model
        # Layers of a graph are modules until the block ends.
        self._as_modules = ExitStack()
        self._as_modules.enter_context(norms_as_modules(self.model))
        self._present = weakref.WeakSet(self.model.modules())
        self.optimizer = optimizer
        self._schedule = schedule
        self.unit = unit
        self.steps = 0
        self._probes = Probes(self.model, unit=unit, counted=MAX_COUNTED)
        self._left_out = LeftOut(self.model, optimizer)
        self._optimizers = EveryOptimizer(self.model, optimizer)
        self._uncleared = Uncleared(self.model)
        self._updates = Updates(
            self._probes.layers.values(), optimizer, self._optimizers.held_by_others
        )
        self.observed: list[int] = []
        self._series: dict[str, dict[str, list[float | None]]] = {}
        self._logged: dict[str, list[tuple[int, float]]] = {}
        self._open_step: int | None = None
        self._handles: list[Any] = []
        self._began_trained = was_trained(self.model)
        self._entries = Entries(self.model, self._before_forward)
        self._step_modules: set[nn.Module] = set()  # called in the current step
        # Numbers of the last observed steps of each layer, for the checks.
        self._recent: dict[str, deque[dict[str, float]]] = {}
        self._lost: dict[str, list[float]] = {}
        self._reached: dict[str, tuple[int, int]] = {}
        self._constant: dict[str, list[float]] = {}
        self._windows: defaultdict[str, Window] = defaultdict(Window)
        # Steps in eval and in training mode, and those of the first in which no
        # parameter was trained: gradual unfreezing has them on purpose.
        self._modes = {
            name: [0, 0, 0]
            for name, probe in self._probes.layers.items()
            if is_batch_norm(probe.module)
        }
        self.loop = Loop()
        self._parts = Parts()
        self._evaluation = CalledInEval(
            {name: self._probes.layers[name].module for name in self._modes}
        )

    @property
    def was_called(self) -> bool:
        """True after a call of a module of the model."""
        return self._entries.was_called

    @property
    def was_transformed(self) -> bool:
        """True after a call inside a transform of torch.func, which is not measured."""
        return self._entries.was_transformed

    def made_later(self) -> list[str]:
        """Return the layers that the model did not have at the start."""
        return [
            name
            for name, module in self.model.named_modules()
            if module not in self._present
            and role_of(module) in ("weight", "norm", "recurrent")
        ]

    def attach(self) -> None:
        """Register the hooks."""
        self._entries.attach()
        self._handles += self._optimizers.register(self.loop.add_any_update)
        self._uncleared.attach()
        if self.optimizer is not None:
            before = Hook(lambda *_: self._updates.before())
            after = Hook(self._after_update)
            self._handles.append(self.optimizer.register_step_pre_hook(before))
            self._handles.append(self.optimizer.register_step_post_hook(after))

    def detach(self) -> None:
        """Remove the hooks; the measurements stay."""
        self._probes.detach()
        self._entries.detach()
        self._updates.close()
        self._uncleared.detach()
        self._evaluation.detach()
        self._as_modules.close()
        while self._handles:
            self._handles.pop().remove()

    def log(self, **values: float) -> None:
        """Record numbers of the training loop at this step."""
        for name, value in values.items():
            self._logged.setdefault(name, []).append((self.steps - 1, float(value)))

    def history(self) -> dict[str, Any]:
        """Return the whole record, as plain data."""
        self.finish_step()
        self._drop_updates_elsewhere()
        return {
            "steps": list(self.observed),
            "unit": self.unit,
            "layers": {
                probe.name: {
                    "kind": probe.kind,
                    "role": probe.role,
                    **{
                        name: list(values)
                        for name, values in self._series[probe.name].items()
                    },
                }
                for probe in self._probes.in_order
                if probe.name in self._series
            },
            **self._parts.history(),
            "logged": {
                name: [[step, value] for step, value in values]
                for name, values in self._logged.items()
            },
        }

    def statistics(self) -> Statistics:
        """Return the measurements, as the checks read them."""
        self.finish_step()
        self._drop_updates_elsewhere()
        # In eval mode in every observed step: on purpose, or reported by D08.
        frozen = {
            n for n, (evals, trains, _) in self._modes.items() if evals > trains == 0
        }
        norms = {
            name: replace(norm, frozen=norm.frozen or name in frozen)
            for name, norm in norm_statistics(self.model).items()
        }
        left_out, rates = self._updates.left_out(), self._updates.rates()
        layers = []
        for probe in self._probes.in_order:
            if probe.name not in self._recent:
                continue
            norm = norms.get(probe.name)
            if norm is not None:
                in_eval, in_training, while_frozen = self._modes[probe.name]
                norm = replace(
                    norm,
                    eval_steps=in_eval - while_frozen * bool(in_training),
                    train_steps=in_training,
                    is_read_in_eval=self._evaluation.ran(probe.name),
                    constant=tuple(self._constant.get(probe.name, ())),
                )
            series, recent = self._series[probe.name], self._recent[probe.name]
            window = self._windows[probe.name]
            found = layer_of(probe, self.observed, series, recent, window, norm)
            found = replace(found, reached=self._reached.get(probe.name, (0, 0)))
            if found.weight is not None:
                lost = tuple(self._lost.get(probe.name, ()))
                is_out = None if self.optimizer is None else probe.name in left_out
                weight = replace(
                    found.weight,
                    lost=lost,
                    is_left_out=is_out,
                    rate=rates.get(probe.name),
                    began_constant=probe.name in self._updates.constant,
                )
                found = replace(found, weight=weight)
            layers.append(found)
        if not self.observed:
            # Called, but never to be trained: only the settings are known.
            layers = [
                LayerStatistics(name, self._probes.layers[name].kind, "norm", norm=norm)
                for name, norm in norms.items()
            ]
        return Statistics(
            tuple(layers),
            samples=max((layer.samples for layer in layers), default=0),
            batches=len(self.observed),
            while_training=True,
            began_trained=self._began_trained,
            training=replace(
                self.loop.statistics(self.model, self.optimizer),
                losses=tuple(self._logged.get("loss", ())),
                steps=tuple(self.observed),
                left_out=self._names_left_out(),
                steps_without_gradient=self._optimizers.steps_without_gradient,
                had_gradients=self._optimizers.found_gradients,
                uncleared_steps=self._uncleared.steps,
            ),
            blocks=self._parts.blocks(),
            attention=self._parts.attention(),
        )

    def _drop_updates_elsewhere(self) -> None:
        """Drop the updates of weights that another optimizer moves, as it turned out.

        It may have made its first step after the watched one: they read 0 till then.
        """
        for name in self._updates.elsewhere() & self._series.keys():
            series = self._series[name]
            series["update_ratio"] = [None] * len(series["update_ratio"])

    def _names_left_out(self) -> tuple[str, ...]:
        """Return the parameters that no optimizer moves, but weights with a probe.

        Of a training in eval mode no step is observed, and probes tell nothing.
        """
        if self.optimizer is None:
            return ()
        probed = {
            f"{name}.weight"
            for name, probe in self._probes.layers.items()
            if probe.role == "weight" and self.observed
        }
        others = self._optimizers.held_by_others
        names = self._left_out.names(self.optimizer, others)
        return tuple(name for name in names if name not in probed)

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        is_training = module.training and torch.is_grad_enabled()
        if is_training and self._step_modules and module not in self._step_modules:
            # Another part of the model is called in the same step.
            self._step_modules.add(module)
            if self._open_step == self.steps - 1:
                self._probes.enter_module(module, args, kwargs)
            return
        # A recomputation by activation checkpointing belongs to the step before.
        if is_in_backward():
            return
        # The layers' hooks stay registered through backward, where activation
        # checkpointing calls the layers again. Backward is over now; a second call
        # before the first backward belongs to the same step.
        self._probes.detach()
        self._updates.called_again()
        self.loop.add_call(module, args, kwargs, is_grad=torch.is_grad_enabled())
        if not is_training:
            if not module.training:
                self._evaluation.attach(module)
            return
        self._evaluation.detach()
        self._step_modules = {module}
        is_observed = self._schedule.is_observed(self.steps)
        self._schedule.begin(is_observed=is_observed)
        if is_observed:
            self.finish_step()
            self._begin_step()
            self._probes.enter_module(module, args, kwargs)
        self.steps += 1

    @torch.no_grad()
    def _begin_step(self) -> None:
        self._probes.reset()
        self._open_step = self.steps
        self._updates.open()
        for name, modes in self._modes.items():
            module = self._probes.layers[name].module
            modes[module.training] += 1
            modes[2] += not module.training and _is_frozen(module)
        # Values are counted in one of the steps that a layer is judged by: a fifth of
        # the time of all probes.
        self._probes.counted = 0
        if len(self.observed) % RECENT == 0:
            self._probes.counted = MAX_COUNTED
            for probe in self._probes.layers.values():
                probe.before = probe.after = None

    @torch.no_grad()
    def finish_step(self) -> None:
        """Turn the measurements of the last observed step into numbers."""
        if self._open_step is None:
            return
        layers = self._probes.layers
        measured = dict(zip(layers, numbers_of([*layers.values()]), strict=True))
        for (name, key), value in self._updates.numbers.items():
            measured[name][key] = value
        values = iter(
            to_floats([v for each in measured.values() for v in each.values()])
        )
        self._parts.add(self._probes.blocks)
        index = len(self.observed)
        self.observed.append(self._open_step)
        self._open_step = None
        for name, probe in layers.items():
            found = {key: next(values) for key in measured[name]}
            found |= with_spread(found)
            if not math.isnan(lost := found.pop("lost", math.nan)):
                self._lost.setdefault(name, []).append(lost)
            if not math.isnan(share := found.pop("constant", math.nan)):
                self._constant.setdefault(name, []).append(share)
            if "input.count" in found or "output.count" in found:
                found["samples"] = probe.samples
                if probe.gradient_calls:
                    self._reached[name] = probe.graph_calls, probe.gradient_calls
                if name not in self._recent:
                    self._recent[name] = deque(maxlen=RECENT)
                self._recent[name].append(found)
                self._windows[name].add(probe)
            if name not in self._series:
                self._series[name] = {key: [None] * index for key in SERIES}
            for key, values_so_far in self._series[name].items():
                values_so_far.append(found.get(key))

    def _after_update(self, *_: Any) -> None:
        self._step_modules = set()
        if self.optimizer is not None:
            self.loop.add_update(self.optimizer)
        self._updates.after()


def _is_frozen(module: nn.Module) -> bool:
    own = list(module.parameters())
    return bool(own) and not any(parameter.requires_grad for parameter in own)

"""Record measurements of every layer while a model trains.

    with normkit.watch(model, optimizer) as watch:
        train(model)
    watch.report("report.html")

Between observed steps two small hooks on the model run and two that count the
optimizer's steps. On an observed step every layer is probed; the measurements become
plain numbers at the next one, with one transfer from the device. The probes draw no
random number, write no buffer and keep no activation: the run is bitwise the run
without them.
"""

from __future__ import annotations

import json
import os
from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn

from normkit.doctor import checks
from normkit.doctor.finding import Finding, by_cause, plain
from normkit.doctor.measurements import LayerStatistics, NormStatistics, Statistics
from normkit.doctor.over_ranks import merge_readings, merged_over
from normkit.doctor.pages import watch_page
from normkit.doctor.probes.entries import CalledInEval, Entries
from normkit.doctor.probes.hook import Hook
from normkit.doctor.probes.loop import Loop
from normkit.doctor.probes.norm_statistics import norm_statistics
from normkit.doctor.probes.parts import Parts
from normkit.doctor.probes.probes import Probes
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
from normkit.doctor.probes.updates import Updates
from normkit.doctor.tensorboard import write_history
from normkit.errors import ArgumentError
from normkit.modeling.batch import check_model
from normkit.modeling.graph_norms import GraphBatchNorm, norms_as_modules
from normkit.modeling.norm_types import is_batch_norm
from normkit.modeling.unwrap import is_compiled, unwrapped, unwrapped_optimizer
from normkit.results import Result, counted
from normkit.sync.groups import Group

__all__ = ["SERIES", "Watch", "watch"]

# Values per call that a histogram counts.
MAX_COUNTED = 4096


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    every: int | None = None,
    unit: int = 0,
) -> Watch:
    """Record measurements of every layer while `model` trains inside a `with` block.

    Args:
        model: The model, or a module whose parts are called in the training loop.
        optimizer: Its optimizer, to record how far each step moves each weight.
        every: Observe every n-th training step; by default each of the first 20, and
            then every tenth (`cost` says what that adds; docs/doctor-score.md has it
            for two small networks over 400 steps). A step is one call of the model in
            training mode with gradients enabled, or of each of its parts where they
            are called one by one.
        unit: The unit (feature or channel) of each layer whose input's {15, 50, 85}
            percentiles are recorded; counted from the end when negative.

    Returns:
        The `Watch`, a context manager.

    Raises:
        ArgumentError: `every` is below 1, the optimizer has no step hooks, or `model`
            is no module.

    Example:
        >>> import torch, normkit
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Sigmoid())
        >>> with watch(model) as seen:
        ...     for _ in range(3):
        ...         model(torch.randn(16, 4)).sum().backward()
        >>> seen.history["steps"], list(seen.history["layers"])
        ([0, 1, 2], ['0', '1'])
    """
    schedule = Schedule(every)
    optimizer = None if optimizer is None else unwrapped_optimizer(optimizer)
    if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
        raise ArgumentError(
            f"a {type(optimizer).__name__} has no step hooks; pass the "
            "torch.optim.Optimizer inside it, or none"
        )
    check_model("watch", model)
    return Watch(model, optimizer, schedule, unit)


class Watch(Result):
    """The record of a training run; usable inside the block and after it.

    Attributes:
        steps: Number of training steps so far, observed or not.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        schedule: Schedule,
        unit: int,
    ) -> None:
        self.model = unwrapped(model)
        # Layers of a graph are modules until the block ends; their last statistics.
        self._as_modules = ExitStack()
        self._norms_at_end: dict[str, NormStatistics] | None = None
        self._as_modules.enter_context(norms_as_modules(self.model))
        self._is_compiled = is_compiled(model)
        self.optimizer = optimizer
        self.every = schedule.every
        self._schedule = schedule
        self.unit = unit
        self.steps = 0
        self._probes = Probes(self.model, unit=unit, counted=MAX_COUNTED)
        self._updates = Updates(self._probes.layers.values())
        self._observed: list[int] = []
        self._series: dict[str, dict[str, list[float | None]]] = {}
        self._logged: dict[str, list[tuple[int, float]]] = {}
        self._open_step: int | None = None
        self._handles: list[Any] = []
        self._entries = Entries(self.model, self._before_forward)
        self._step_modules: set[nn.Module] = set()  # called in the current step
        self._has_ended = False
        # Numbers of the last observed steps of each layer, for the checks.
        self._recent: dict[str, deque[dict[str, float]]] = {}
        self._windows = {name: Window() for name in self._probes.layers}
        self._modes = {
            name: [0, 0]
            for name, probe in self._probes.layers.items()
            if is_batch_norm(probe.module)
        }
        self._loop = Loop()
        self._parts = Parts()
        self._evaluation = CalledInEval(
            {name: self._probes.layers[name].module for name in self._modes}
        )

    def __enter__(self) -> Watch:
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._finish_step()
        finally:
            self._detach()

    def log(self, **values: float) -> None:
        """Record numbers of the training loop, such as `loss=…`, at this step."""
        for name, value in values.items():
            self._logged.setdefault(name, []).append((self.steps - 1, float(value)))

    @property
    def cost(self) -> float | None:
        """Time added by the probes so far, as a share of the run without them.

        None before there are both observed and other steps to compare.
        """
        return self._schedule.cost

    @property
    def history(self) -> dict[str, Any]:
        """The whole record, as plain data.

        `steps` lists the observed steps. `layers` holds, by dotted name in the order
        of execution, `kind`, `role` and one list per entry of `SERIES`, as long as
        `steps`, with None where nothing was measured: mean, standard deviation and rms
        of inputs and outputs; `low`, `middle`, `high`, the {15, 50, 85} percentiles of
        the input of unit `unit`; the `saturated` share of input values; the `dead`
        share of units that were zero on the whole batch; `gradient_norm`,
        ‖dL/d output‖; `weight_norm`, `weight_gradient_norm` and `update_ratio`,
        ‖Δw‖/‖w‖. `blocks` holds, of several blocks of a class, the rms
        `before` and `after` each and the `gradient` ‖dL/d output‖; `attention` the
        `largest` |logit|, `entropy` and `sharp` share of queries of each.
        `logged` holds the numbers given to `log` as `[step, value]` pairs.
        """
        self._finish_step()
        return {
            "steps": list(self._observed),
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
        self._finish_step()
        # In eval mode in every observed step: on purpose, or reported by D08.
        frozen = {
            n for n, (evals, trains) in self._modes.items() if evals > trains == 0
        }
        norms = self._norms_at_end or norm_statistics(self.model)
        norms = {
            name: replace(norm, frozen=norm.frozen or name in frozen)
            for name, norm in norms.items()
        }
        layers = []
        for probe in self._probes.in_order:
            if probe.name not in self._recent:
                continue
            norm = norms.get(probe.name)
            if norm is not None:
                in_eval, in_training = self._modes[probe.name]
                norm = replace(
                    norm,
                    eval_steps=in_eval,
                    train_steps=in_training,
                    is_read_in_eval=self._evaluation.ran(probe.name),
                )
            series, recent = self._series[probe.name], self._recent[probe.name]
            window = self._windows[probe.name]
            layers.append(layer_of(probe, series, recent, window, norm))
        if not self._observed:
            # Called, but never to be trained: only the settings are known.
            layers = [
                LayerStatistics(name, self._probes.layers[name].kind, "norm", norm=norm)
                for name, norm in norms.items()
            ]
        return Statistics(
            tuple(layers),
            samples=max((layer.samples for layer in layers), default=0),
            batches=len(self._observed),
            while_training=True,
            training=replace(
                self._loop.statistics(self.model, self.optimizer),
                losses=tuple(self._logged.get("loss", ())),
                steps=tuple(self._observed),
            ),
            blocks=self._parts.blocks(),
            attention=self._parts.attention(),
        )

    def readings(self, process_group: Group = None) -> list[Finding]:
        """Return the result of every check, `clear` and `not_judged` included.

        Args:
            process_group: The ranks that train together; all must call, and all get
                for each check and layer the result of the rank where it is worst. None
                is this rank alone.
        """
        return merged_over(self._readings, process_group, merge_readings)

    def findings(self, process_group: Group = None) -> list[Finding]:
        """Return errors, warnings and infos so far, one per cause.

        Args:
            process_group: As in `readings`.
        """
        return by_cause(self.readings(process_group))

    def _readings(self) -> list[Finding]:
        self._finish_step()
        if self._has_ended and not (self._entries.was_called or self._is_compiled):
            raise ArgumentError(
                f"no module of the watched {type(self.model).__name__} was called "
                "inside the block; watch the module that the training loop calls"
            )
        if not self._observed and not self._loop.idle_bursts:
            reason = "the model was not called in training mode inside the block"
            if self._is_compiled:
                reason = (
                    "the model is compiled, and hooks do not run inside it; watch a "
                    "few steps of the model as it was before torch.compile"
                )
            return [Finding("watch", "watch", "", "not_judged", evidence=reason)]
        return checks.run(self.statistics())

    def to_text(self) -> str:
        """Return the number of observed steps, and the findings after the block."""
        steps = counted(self.steps, "training step")
        head = f"{len(self._observed)} of {steps} observed"
        if self.cost is not None:
            head += f", which added about {self.cost:.0%} to their time"
        # The current step must not be ended by a debugger that shows the object.
        if not self._has_ended or not self._observed:
            return head
        found = self.findings()
        texts = [f.to_text() for f in found] or ["Nothing found."]
        return "\n\n".join([head, *texts])

    def to_json(self) -> str:
        """Return `history` and the findings as JSON."""
        found = [f.to_json() for f in self.findings()]
        data = {"steps": self.steps, "history": self.history, "findings": found}
        return json.dumps(plain(data), indent=2, allow_nan=False)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write the record and the findings as one self-contained page."""
        self.to_html(path)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the record and the findings as one HTML page, written to `path`."""
        page = watch_page(
            self.history, self.readings(), self.statistics(), steps=self.steps
        )
        if path is not None:
            page.write(path)
        return page.to_html()

    def to_tensorboard(self, writer: Any) -> int:
        """Write the record as scalars `normkit/SERIES/LAYER`.

        Args:
            writer: A folder, or a `torch.utils.tensorboard.SummaryWriter`.

        Returns:
            The number of scalars written.
        """
        return write_history(self.history, writer)

    def _attach(self) -> None:
        self._entries.attach()
        if self.optimizer is not None:
            before = Hook(lambda *_: self._updates.before())
            after = Hook(self._after_update)
            self._handles.append(self.optimizer.register_step_pre_hook(before))
            self._handles.append(self.optimizer.register_step_post_hook(after))

    def _detach(self) -> None:
        self._probes.detach()
        self._entries.detach()
        self._updates.close()
        self._evaluation.detach()
        self._has_ended = True
        if any(isinstance(m, GraphBatchNorm) for m in self.model.modules()):
            self._norms_at_end = norm_statistics(self.model)
        self._as_modules.close()
        while self._handles:
            self._handles.pop().remove()

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        is_training = module.training and torch.is_grad_enabled()
        if is_training and self._step_modules and module not in self._step_modules:
            # Another part of the model is called in the same step.
            self._step_modules.add(module)
            if self._open_step == self.steps - 1:
                self._probes.enter_module(module, args, kwargs)
            return
        # The layers' hooks stay registered through backward, where activation
        # checkpointing calls the layers again. Backward is over now; a second call
        # before the first backward belongs to the same step.
        self._probes.detach()
        self._updates.called_again()
        self._loop.add_call(module, args, kwargs, is_grad=torch.is_grad_enabled())
        if not is_training:
            if not module.training:
                self._evaluation.attach(module)
            return
        self._evaluation.detach()
        self._step_modules = {module}
        is_observed = self._schedule.is_observed(self.steps)
        self._schedule.begin(is_observed=is_observed)
        if is_observed:
            self._finish_step()
            self._begin_step()
            self._probes.enter_module(module, args, kwargs)
        self.steps += 1

    @torch.no_grad()
    def _begin_step(self) -> None:
        self._probes.reset()
        self._open_step = self.steps
        self._updates.open()
        for name, modes in self._modes.items():
            modes[self._probes.layers[name].module.training] += 1
        # Values are counted in one of the steps that a layer is judged by: a fifth of
        # the time of all probes.
        self._probes.counted = 0
        if len(self._observed) % RECENT == 0:
            self._probes.counted = MAX_COUNTED
            for probe in self._probes.layers.values():
                probe.before = probe.after = None

    @torch.no_grad()
    def _finish_step(self) -> None:
        """Turn the measurements of the last observed step into numbers."""
        if self._open_step is None:
            return
        measured = numbers_of(self._probes.layers)
        for (name, key), value in self._updates.numbers.items():
            measured[name][key] = value
        values = iter(
            to_floats([v for each in measured.values() for v in each.values()])
        )
        self._parts.add(self._probes.blocks)
        index = len(self._observed)
        self._observed.append(self._open_step)
        self._open_step = None
        for name, probe in self._probes.layers.items():
            found = {key: next(values) for key in measured[name]}
            found |= with_spread(found)
            if "input.count" in found:
                found["samples"] = probe.samples
                self._recent.setdefault(name, deque(maxlen=RECENT)).append(found)
                self._windows[name].add(probe)
            series = self._series.setdefault(
                name, {key: [None] * index for key in SERIES}
            )
            for key in SERIES:
                series[key].append(found.get(key))

    def _after_update(self, *_: Any) -> None:
        self._step_modules = set()
        self._loop.add_update()
        self._updates.after()

"""Record measurements of every layer while a model trains.

    with normkit.watch(model, optimizer) as watch:
        train(model)
    watch.report("report.html")

The probes draw no random number, write no buffer and keep no activation: the run is
bitwise the run without them.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import torch
from torch import nn

from normkit.doctor import checks
from normkit.doctor.finding import Finding, by_cause, plain
from normkit.doctor.measurements import Statistics
from normkit.doctor.over_ranks import merge_readings, merged_over
from normkit.doctor.pages import watch_page
from normkit.doctor.probes.schedule import Schedule
from normkit.doctor.probes.series import SERIES
from normkit.doctor.provenance import provenance
from normkit.doctor.recorder import Recorder
from normkit.doctor.tensorboard import write_history
from normkit.errors import ArgumentError
from normkit.modeling.batch import check_has_run, check_has_values, check_model
from normkit.modeling.unwrap import is_compiled, unwrapped, unwrapped_optimizer
from normkit.results import Result, counted
from normkit.sync.groups import Group

__all__ = ["SERIES", "Watch", "watch"]


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
        optimizer: Its optimizer, to record how far each step moves each weight; of
            several, one: the steps of weights that others move are not judged.
        every: Observe every n-th training step; by default each of the first 20, and
            then every fiftieth (`cost` says what that adds; docs/doctor-score.md has
            it for two small networks over 400 steps). A step is one call of the model
            in training mode with gradients enabled, or of each of its parts where they
            are called one by one; not in backward, where activation checkpointing calls
            them again, nor inside transforms of torch.func.
        unit: The unit (feature or channel) of each layer whose input's {15, 50, 85}
            percentiles are recorded; counted from the end when negative.

    Returns:
        The `Watch`, a context manager.

    Raises:
        ArgumentError: `every` is below 1, the optimizer has no step hooks, or `model`
            is no module, or one that was scripted and takes no hooks.

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
            f"a {type(optimizer).__name__} has no step hooks; pass one "
            "torch.optim.Optimizer (the steps of weights that others move are not "
            "judged), or none"
        )
    check_model("watch", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(
            f"a {type(model).__name__} takes no hooks; watch the module before "
            "torch.jit.script or torch.jit.trace"
        )
    check_has_values(
        model,
        "watch measures them: load the weights first (to_empty, load_state_dict)",
        may_fetch=True,
    )
    check_has_run(model)
    recorder = Recorder(unwrapped(model), optimizer, schedule, unit)
    return Watch(recorder, schedule, is_compiled=is_compiled(model))


class Watch(Result):
    """The record of a training run; usable inside the block and after it."""

    def __init__(
        self, recorder: Recorder, schedule: Schedule, *, is_compiled: bool
    ) -> None:
        self.model, self.optimizer = recorder.model, recorder.optimizer
        self.every, self.unit = schedule.every, recorder.unit
        self._is_compiled = is_compiled
        self._schedule = schedule
        self._recorder = recorder
        self._has_begun = self._has_ended = False
        self._at_end: Statistics | None = None
        self._late: list[str] = []

    @property
    def steps(self) -> int:
        """Number of training steps so far, observed or not."""
        return self._recorder.steps

    def __enter__(self) -> Watch:
        self._has_begun, self._has_ended, self._at_end = True, False, None
        try:
            self._recorder.attach()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._has_ended:
            return
        try:
            self._recorder.finish_step()
            self._late = self._recorder.made_later()
            # What fails here fails again where the findings are asked for, and does not
            # end a training that is over.
            with contextlib.suppress(Exception):
                self._at_end = self._recorder.statistics()
        finally:
            self._end()

    def _end(self) -> None:
        self._has_ended = True
        self._recorder.detach()

    def log(self, **values: float) -> None:
        """Record numbers of the training loop, such as `loss=…`, at this step."""
        self._recorder.log(**values)

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
        `largest` |logit|, `entropy` and `sharp` share of queries of each, and how far
        the keys that a mask lets `read`, and those `hidden`, differ between samples.
        `logged` holds the numbers given to `log` as `[step, value]` pairs.
        """
        return self._recorder.history()

    def statistics(self) -> Statistics:
        """Return the measurements, as the checks read them.

        After the block those at its end: the program may go on with the model.
        """
        return self._at_end or self._recorder.statistics()

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

        Raises:
            ArgumentError: No step was observed before the end of the block.
        """
        readings = self.readings(process_group)
        is_over = self._has_ended or not self._has_begun
        if is_over and [found.id for found in readings] == ["watch"]:
            raise ArgumentError(readings[0].evidence)
        return by_cause(readings)

    def _readings(self) -> list[Finding]:
        self._recorder.finish_step()
        if self._has_ended and not (self._recorder.was_called or self._is_compiled):
            raise ArgumentError(self._why_nothing())
        loop = self._recorder.loop
        has_calls = loop.idle_bursts or loop.updates_in_eval
        if not self._recorder.observed and not has_calls:
            reason = self._why_nothing()
            return [Finding("watch", "watch", "", "not_judged", evidence=reason)]
        return checks.run(self.statistics())

    def _why_nothing(self) -> str:
        """Return why no step was observed."""
        if not self._has_begun:
            return (
                "the watch was not entered; train inside a block of "
                "`with normkit.watch(model, optimizer) as seen:`"
            )
        if self._is_compiled:
            return (
                "the model is compiled, and hooks do not run inside it; watch a few "
                "steps of the model as it was before torch.compile"
            )
        if not self._recorder.was_called:
            return (
                f"no module of the watched {type(self.model).__name__} was called "
                "inside the block, or it was compiled there; watch the module that the "
                "training loop calls, before torch.compile"
            )
        if self._recorder.was_transformed and not self.steps:
            return (
                "the model was called inside transforms of torch.func (grad, vmap, "
                "jvp), where nothing can be measured; watch a few steps with "
                "loss.backward()"
            )
        return (
            "the model was not called in training mode with gradients enabled inside "
            "the block"
        )

    def to_text(self) -> str:
        """Return the number of observed steps, and the findings after the block."""
        steps = counted(self.steps, "training step")
        head = f"{len(self._recorder.observed)} of {steps} observed"
        if self.cost is not None:
            head += f", which added about {self.cost:.0%} to their time"
        if self._late:
            was = "was" if len(self._late) == 1 else "were"
            head += (
                f"; {counted(len(self._late), 'layer')} {was} made inside the block and"
                f" not observed ({self._late[0]} …): run the model once before"
            )
        # The current step must not be ended by a debugger that shows the object.
        if not self._has_ended:
            return head
        try:
            readings = self.readings()
        except ArgumentError as error:  # a text is printed, and must not fail
            return f"{head}: {error}"
        if [found.id for found in readings] == ["watch"]:
            return f"{head}: {readings[0].evidence}"
        texts = [f.to_text() for f in by_cause(readings)] or ["Nothing found."]
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
            self.history,
            self.readings(),
            self.statistics(),
            steps=self.steps,
            made=provenance(type(self.model).__name__),
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

"""A working copy of the examined model, run over the batches in one mode at a time."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.doctor.examination.case import Case, value_of
from normkit.doctor.examination.dependence import dependence
from normkit.doctor.examination.detached import detached
from normkit.doctor.examination.forward_pass import ForwardPass
from normkit.doctor.examination.functional_norms import (
    BatchStatistics,
    TrainingCalls,
    held_averages,
)
from normkit.doctor.examination.loss_value import loss_value
from normkit.doctor.examination.two_modes import has_two_modes, own_averages
from normkit.doctor.measurements import DependenceStatistics
from normkit.doctor.probes.probes import Probes
from normkit.doctor.probes.tensor_statistics import first_tensor
from normkit.errors import ArgumentError
from normkit.modeling.batch import device_of, num_samples, to_device
from normkit.modeling.norm_types import (
    holds_constant_statistics,
    is_batch_norm,
    is_norm,
)
from normkit.modeling.other_modules import (
    OtherModules,
    backward_into,
    others_preserved,
)
from normkit.modeling.snapshot import Snapshot, preserved

__all__ = ["Measure", "SingleValueError", "WorkingCopy", "open_working_copy"]

Measure = Literal["layers", "batch_norms", "calls", "answers"]


class SingleValueError(ArgumentError):
    """A batch norm in training mode whose batch has one value per channel.

    Attributes:
        layer: Dotted name of the batch norm.
    """

    def __init__(self, layer: str) -> None:
        super().__init__(
            f"the batch norm {layer!r} has one value per channel in a batch, and "
            "cannot normalize it in training mode; use batches of two or more"
        )
        self.layer = layer


@contextmanager
def open_working_copy(case: Case) -> Iterator[WorkingCopy]:
    """Yield a copy of the case's model in training mode.

    A model that cannot be copied is used itself; what a forward changes in it is
    restored after the block, as it is in other modules that run there, such as a critic
    in the loss.
    """
    try:
        model = copy.deepcopy(case.model)
    except Exception:  # deepcopy calls anything that a model may hold
        model = case.model
    with (
        preserved(model, seed=case.seed) as before,
        others_preserved(model) as others,
    ):
        # A model in training mode is left as it is. One in eval mode gets `train()`,
        # which a model that keeps its batch norms frozen overrides.
        if not model.training:
            model.train()
        frozen = {
            name
            for name, module in model.named_modules()
            if is_batch_norm(module)
            and (not module.training or holds_constant_statistics(module))
        }
        yield WorkingCopy(case, model, before, frozen, others)


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Switch off torch's fused attention of eval mode, inside which nothing is seen."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _arguments_given(model: nn.Module) -> Iterator[list[Any]]:
    """Yield a list that gets the arguments of each call of `model` in the block.

    It stays empty for a scripted module, which takes no hooks.
    """
    given: list[Any] = []
    if isinstance(model, torch.jit.ScriptModule):
        yield given
        return
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    try:
        yield given
    finally:
        handle.remove()


class WorkingCopy:
    """The model under examination, switched from mode to mode.

    Attributes:
        case: The case.
        model: The copy; in training mode at first.
        frozen: The batch norms that are kept frozen on purpose, by dotted name.
        has_batch_norms: Its modes differ in more than dropout: it has batch norms, or
            instance norms with running statistics.
        functional_means: The running means of batch norm calls outside these, which
            take the statistics of the batch in training; known after `find_calls`.
        advance: Called after each batch, to move a progress bar.
    """

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        before: Snapshot,
        frozen: set[str],
        others: OtherModules,
    ) -> None:
        self.case = case
        self.model = model
        self.frozen = frozen
        self._before = before
        self._others = others
        self.device = device_of(model)
        self.has_batch_norms = any(map(has_two_modes, model.modules()))
        self.functional_means: list[Tensor] = []
        self._batch_calls: Any = contextlib.nullcontext()
        # Plain attributes, which a snapshot of the buffers does not hold.
        self._averages = [
            (module, name, value.clone())
            for module in model.modules()
            for name, value in own_averages(module).items()
            if name in vars(module)
        ]
        self.advance: Callable[[], None] = lambda: None

    def find_calls(self) -> None:
        """Find the batch norm calls outside modules; the model is in training mode.

        One batch runs, and only where a module holds what may be averages.
        """
        others = [m for m in self.model.modules() if not is_batch_norm(m)]
        held = held_averages(others)
        if not held:
            return
        batch = to_device(self.case.batches[0], self.device)
        calls = TrainingCalls(held)
        # What fails here fails in the passes, which know the layer at fault.
        with contextlib.suppress(Exception), torch.no_grad(), calls:
            self.case.forward(self.model, batch)
        self.functional_means = calls.means
        self._before.restore_values()

    def use_batch_statistics(self) -> None:
        """Switch to eval mode and the original buffers, batch norms to training."""
        self.use_running_statistics()
        done = {id(mean) for mean in self.functional_means}
        for name, module in self.model.named_modules():
            if name in self.frozen or not has_two_modes(module):
                continue
            # The mode of a larger module is that of its dropout as well.
            if is_norm(module) or done.isdisjoint(map(id, module._buffers.values())):
                module.training = True
        if self.functional_means:
            self._batch_calls = BatchStatistics(self.functional_means)

    def use_running_statistics(self) -> None:
        """Switch to eval mode and the buffers that the model came with."""
        self._batch_calls = contextlib.nullcontext()
        self._before.restore_values()
        for module, name, value in self._averages:
            setattr(module, name, value.clone())
        self.model.eval()

    def run(
        self,
        measure: Measure,
        *,
        gradients: bool = False,
        evaluate: bool = True,
        counted: int = 0,
    ) -> ForwardPass:
        """Run every batch once in the current mode, and return the measurements.

        Args:
            measure: "layers": every layer, and batch norms channel by channel;
                "batch_norms": these alone; "calls": only which of these are called;
                "answers": no layer.
            gradients: Measure gradients on the first `gradient_batches` batches.
            evaluate: Compute the loss and the metric.
            counted: Values of each normalization's input and output to count in a
                histogram per call; 0 for none.
        """
        knows_need = self.case.forward.needs_gradients
        result = self._run(measure, gradients, evaluate, counted)
        if self.case.forward.needs_gradients == knows_need:
            return result
        # A forward was run again, and its layers were measured twice.
        if self.model.training:
            self._before.restore_values()
        return self._run(measure, gradients, evaluate, counted)

    def _run(
        self, measure: Measure, gradients: bool, evaluate: bool, counted: int
    ) -> ForwardPass:
        result = ForwardPass()
        torch.manual_seed(self.case.seed)  # the same dropout in every examination
        probes = None
        if measure != "answers":
            probes = Probes(
                self.model,
                channels=measure != "calls",
                gradients=gradients,
                counted=counted,
                batch_norms_only=measure != "layers",
            )
        in_eval = {
            name
            for name, probe in ({} if probes is None else probes.layers).items()
            if not probe.module.training
        }
        attached = contextlib.nullcontext() if probes is None else probes.attached()
        with attached, _attention_in_parts(), self._batch_calls:
            for index, batch in enumerate(self.case.batches):
                backward = gradients and index < self.case.gradient_batches
                # Activations that are functions are read from the graph.
                is_read = (
                    probes is not None
                    and measure == "layers"
                    and (not index or probes.functions.were_found)
                )
                with torch.set_grad_enabled(backward or is_read):
                    self._step(
                        result, probes, batch, backward=backward, evaluate=evaluate
                    )
                if probes is not None:
                    result.add_probes(probes)
                    probes.reset()
                self.advance()
        result.switched_on = frozenset(
            name
            for name, layer in result.seen.items()
            if name in in_eval and layer.probe.was_training
        )
        result.left_on = frozenset(result.seen) - in_eval
        if result.answers.targets.beyond is not None:
            result.losses.clear()  # of some batches there is none
        is_called = result.seen or result.parts.attention()
        is_called = is_called or probes is None or measure != "layers"
        # Layers of complex numbers were called, and measured nothing.
        layers = {} if probes is None else probes.layers
        is_called = is_called or any(p.had_gradients for p in layers.values())
        if layers and not is_called:
            raise self._not_run()
        return result

    def _not_run(self) -> ArgumentError:
        return ArgumentError(
            f"no layer of this {type(self.model).__name__} ran on a batch; pass the "
            "module that is called in training, or forward=lambda model, batch: … that "
            "calls the model it is given, and not one of its own"
        )

    def dependence(self) -> DependenceStatistics:
        """Return on what the answers to the first batch depend, in eval mode."""
        self.use_running_statistics()
        batch = to_device(self.case.batches[0], self.device)
        with _attention_in_parts():
            return dependence(self.case, self.model, batch)

    def detached(self, layers: dict[str, nn.Module]) -> tuple[str, ...]:
        """Return those of `layers`, which get no gradient, that the loss depends on."""
        self.use_running_statistics()
        batch = to_device(self.case.batches[0], self.device)
        targets = self.case.targets(batch)

        def loss() -> float:
            torch.manual_seed(self.case.seed)
            with torch.no_grad():
                output = self.case.forward(self.model, batch)
                found, _ = loss_value(self.case, output, targets, batch)
            return math.nan if found is None else float(found)

        return detached(loss, layers)

    def last_softmax(self) -> str:
        """Return the name of the `nn.Softmax` that gives the output; "" for none."""
        given: dict[str, Any] = {}
        handles = [
            module.register_forward_hook(
                lambda module, args, output, name=name: given.update({name: output})
            )
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Softmax) and name
        ]
        try:
            with torch.no_grad():
                batch = to_device(self.case.batches[0], self.device)
                output = first_tensor(self.case.forward(self.model, batch))
        finally:
            for handle in handles:
                handle.remove()
        return next((name for name, y in given.items() if y is output), "")

    def _step(
        self,
        result: ForwardPass,
        probes: Probes | None,
        batch: Any,
        *,
        backward: bool,
        evaluate: bool,
    ) -> None:
        batch, size = to_device(batch, self.device), num_samples(batch)
        with _arguments_given(self.model) as given:
            output = self._forward(probes, batch, size)
        if probes is not None and probes.layers and not self._others.own_ran:
            raise self._not_run()
        result.samples.append(size)
        if not evaluate:
            return
        targets = self.case.targets(batch)
        value = value_of(self.case, output, targets)
        if value is not None:
            result.metrics.append(value)
        loss, beyond = loss_value(self.case, output, targets, batch)
        result.answers.targets.beyond = beyond or result.answers.targets.beyond
        is_whole = probes is not None and not probes.batch_norms_only
        if is_whole:
            result.add_input(batch, given)
            result.answers.add(output, targets, size, batch)
        if loss is None:
            return
        result.losses.append(float(loss.detach()))
        if is_whole and self.case.loss_fn is not None:
            result.answers.add_shuffled(self.case.loss_fn, output, targets)
        if backward and loss.requires_grad:
            result.answers.add_graph(self.model, output, targets, loss)
            self.model.zero_grad(set_to_none=True)
            backward_into(self.model, loss)
            result.add_gradients(self.model)
            self.model.zero_grad(set_to_none=True)

    def _forward(self, probes: Probes | None, batch: Any, size: int) -> Any:
        if probes is None:
            return self.case.forward(self.model, batch)
        probes.enter(size)
        try:
            output = self.case.forward(self.model, batch)
        except (ValueError, RuntimeError) as error:
            for probe in reversed(probes.in_order):
                if probe.has_single_value and probe.module.training:
                    raise SingleValueError(probe.name) from error
            raise
        probes.leave(output)
        return output

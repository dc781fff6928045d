"""A working copy of the examined model, run over the batches in one mode at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.doctor.examination.case import Case, accuracy
from normkit.doctor.examination.forward_pass import ForwardPass
from normkit.doctor.probes.probes import Probes
from normkit.doctor.probes.tensor_statistics import first_tensor
from normkit.errors import ArgumentError
from normkit.modeling.batch import device_of, num_samples, to_device
from normkit.modeling.snapshot import Snapshot, preserved

__all__ = ["SingleValueError", "WorkingCopy", "open_working_copy"]


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

    A model that cannot be copied is used itself; its buffers, modes and gradients are
    restored after the block, so the block must not change anything else.
    """
    try:
        model = copy.deepcopy(case.model)
    except Exception:  # deepcopy calls anything that a model may hold
        model = case.model
    with preserved(model, seed=case.seed) as before:
        # A model in training mode is left as it is. One in eval mode gets `train()`,
        # which a model that keeps its batch norms frozen overrides.
        if not model.training:
            model.train()
        frozen = {
            name
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and not module.training
        }
        yield WorkingCopy(case, model, before, frozen)


class WorkingCopy:
    """The model under examination, switched from mode to mode.

    Attributes:
        case: The case.
        model: The copy; in training mode at first.
        frozen: The batch norms that are kept frozen on purpose, by dotted name.
    """

    def __init__(
        self, case: Case, model: nn.Module, before: Snapshot, frozen: set[str]
    ) -> None:
        self.case = case
        self.model = model
        self.frozen = frozen
        self._before = before
        self.device = device_of(model)

    def use_batch_statistics(self) -> None:
        """Switch to eval mode and the original buffers, batch norms to training."""
        self.use_running_statistics()
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and name not in self.frozen:
                module.training = True

    def use_running_statistics(self) -> None:
        """Switch to eval mode and the buffers that the model came with."""
        self._before.restore_values()
        self.model.eval()

    def run(
        self,
        *,
        channels: bool,
        gradients: bool = False,
        evaluate: bool = True,
        counted: int = 0,
    ) -> ForwardPass:
        """Run every batch once in the current mode, and return the measurements.

        Args:
            channels: Measure the inputs of batch norms channel by channel.
            gradients: Measure gradients on the first `gradient_batches` batches.
            evaluate: Compute the loss and the metric.
            counted: Values of each normalization's input and output to count in a
                histogram per call; 0 for none.
        """
        result = ForwardPass()
        torch.manual_seed(self.case.seed)  # the same dropout in every examination
        probes = Probes(
            self.model, channels=channels, gradients=gradients, counted=counted
        )
        with probes.attached():
            for index, batch in enumerate(self.case.batches):
                backward = gradients and index < self.case.gradient_batches
                with torch.set_grad_enabled(backward):
                    self._step(
                        result, probes, batch, backward=backward, evaluate=evaluate
                    )
                result.add_probes(probes)
                probes.reset()
        if probes.layers and not result.seen:
            raise ArgumentError(
                f"no layer of this {type(self.model).__name__} ran on a batch; pass "
                "the module that is called in training, or "
                "forward=lambda model, batch: … that calls the model it is given"
            )
        return result

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
        probes: Probes,
        batch: Any,
        *,
        backward: bool,
        evaluate: bool,
    ) -> None:
        batch = to_device(batch, self.device)
        result.add_input(batch)
        probes.enter()
        try:
            output = self.case.forward(self.model, batch)
        except (ValueError, RuntimeError) as error:
            for probe in reversed(probes.in_order):
                if probe.has_single_value and probe.module.training:
                    raise SingleValueError(probe.name) from error
            raise
        probes.leave(output)
        result.samples.append(num_samples(batch))
        if not evaluate:
            return
        targets = self.case.targets(batch)
        result.add_output(output, targets)
        metric = self.case.metric or accuracy
        value = metric(output, targets)
        if value is not None:
            result.metrics.append(float(value))
        if self.case.loss_fn is None:
            return
        loss = self.case.loss_fn(output, targets)
        if loss.numel() != 1:
            raise ArgumentError(
                f"loss_fn gave a tensor of shape {tuple(loss.shape)}; it must give one "
                "number, e.g. by reduction='mean'"
            )
        result.losses.append(float(loss.detach()))
        if backward and loss.requires_grad:
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            result.add_gradients(self.model)
            self.model.zero_grad(set_to_none=True)

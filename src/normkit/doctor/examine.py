"""Examine a model: several passes over the same batches with the weights held still.

    pass         modes                                    for
    training     as in training, dropout on               what the EMA should hold
    batch        batch statistics, dropout off, gradients loss, activations, gradients
    running      eval                                     the loss in eval mode

The three see the same batches, so that what differs between them is the statistics.
They run on a copy of the model, or, when it cannot be copied, on the model itself,
which is put back bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.doctor.case import Case, accuracy
from normkit.doctor.measure import MOST_COUNTED, first_tensor
from normkit.doctor.probe import Probes
from normkit.doctor.statistics import (
    DataStatistics,
    Evaluation,
    NormStatistics,
    Statistics,
)
from normkit.doctor.walk import Walk
from normkit.errors import ArgumentError
from normkit.modeling.batch import device_of, num_samples, to_device
from normkit.modeling.snapshot import Snapshot, preserved

__all__ = ["Patient", "examine", "norm_statistics", "opened"]


def examine(case: Case) -> Statistics:
    """Measure everything the checks can use on the case's model."""
    with opened(case) as patient:
        with torch.no_grad():
            training = patient.walk(streams=True, evaluate=False)
        patient.batch_statistics()
        batch = patient.walk(
            streams=True, gradients=case.loss_fn is not None, counted=MOST_COUNTED
        )
        patient.running_statistics()
        with torch.no_grad():
            running = patient.walk(streams=True)
        norms = {
            name: replace(
                norm,
                stream=training.stream(name),
                quiet=batch.stream(name),
                evaluated=running.stream(name),
                calls=training.calls(name),
                padding=training.padding(name),
            )
            for name, norm in norm_statistics(patient.model, patient.frozen).items()
        }
        layers = [
            replace(layer, norm=norms.get(layer.name), weight=batch.weight(layer.name))
            for layer in batch.layers()
        ]
        output = batch.output(case.loss_fn)
        if output is not None and output.sums_to_one:
            output = replace(output, softmax=patient.last_softmax())
    return Statistics(
        tuple(layers),
        _evaluation(batch, running),
        samples=sum(batch.samples),
        batches=len(batch.samples),
        data=DataStatistics(batch.input, case.batch_size, case.last),
        output=output,
        world_size=_world_size(),
        is_averaged=case.is_averaged,
    )


def _world_size() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def _evaluation(batch: Walk, running: Walk) -> Evaluation | None:
    if not batch.losses:
        return None
    return Evaluation(
        samples=tuple(batch.samples),
        batch_loss=tuple(batch.losses),
        running_loss=tuple(running.losses),
        batch_metric=tuple(batch.metrics),
        running_metric=tuple(running.metrics),
    )


def norm_statistics(
    model: nn.Module, frozen: set[str] | None = None
) -> dict[str, NormStatistics]:
    """The running statistics of every batch norm that keeps them, by dotted name."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or not module.track_running_stats:
            continue
        mean, var = module.running_mean, module.running_var
        if mean is None or var is None:
            continue
        tracked = module.num_batches_tracked
        momentum = module.momentum
        found[name] = NormStatistics(
            momentum=None if momentum is None else float(momentum),
            eps=float(module.eps),
            tracked=None if tracked is None else int(tracked),
            frozen=name in (frozen or ()) or momentum == 0,
            running_mean=_copied(mean),
            running_var=_copied(var),
            weight=None if module.weight is None else _copied(module.weight),
            bias=None if module.bias is None else _copied(module.bias),
            is_trainable=any(p.requires_grad for p in module.parameters()),
            dtype=str(var.dtype).removeprefix("torch."),
            takes_one_value=getattr(module, "on_small_batch", "raise") != "raise",
        )
    return found


def _copied(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64, copy=True)


@contextmanager
def opened(case: Case) -> Iterator[Patient]:
    """Give a copy of the model in training mode, or the model itself to be put back.

    Of a model that cannot be copied, buffers, modes and gradients are put back; who
    uses the patient must leave the rest alone.
    """
    try:
        model = copy.deepcopy(case.model)
    except Exception:  # deepcopy calls anything that a model may hold
        model = case.model
    with preserved(model, seed=case.seed) as before:
        # One found in training mode is left as it is. One found in eval mode gets
        # `train()`, which a model that keeps its batch norms frozen overrides.
        if not model.training:
            model.train()
        frozen = {
            name
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and not module.training
        }
        yield Patient(case, model, before, frozen)


class Patient:
    """The working copy, walked through the batches in one mode after the other.

    Attributes:
        case: What is examined.
        model: The copy; in training mode at first.
        frozen: The batch norms kept frozen on purpose, by dotted name.
    """

    def __init__(
        self, case: Case, model: nn.Module, before: Snapshot, frozen: set[str]
    ) -> None:
        self.case = case
        self.model = model
        self.frozen = frozen
        self._before = before
        self.device = device_of(model)

    def batch_statistics(self) -> None:
        """Eval mode and old buffers, but batch norms train on their batch."""
        self.running_statistics()
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and name not in self.frozen:
                module.training = True

    def running_statistics(self) -> None:
        """Eval mode and the buffers that the model came with."""
        self._before.restore_values()
        self.model.eval()

    def walk(
        self,
        *,
        streams: bool,
        gradients: bool = False,
        evaluate: bool = True,
        counted: int = 0,
    ) -> Walk:
        """Run every batch once in the present mode, and give what was seen."""
        walk = Walk()
        torch.manual_seed(self.case.seed)  # the same dropout in every examination
        probes = Probes(
            self.model, streams=streams, gradients=gradients, counted=counted
        )
        with probes.attached():
            for index, batch in enumerate(self.case.batches):
                backward = gradients and index < self.case.gradient_batches
                with torch.set_grad_enabled(backward):
                    self._step(walk, batch, backward=backward, evaluate=evaluate)
                walk.take(probes)
                probes.reset()
        return walk

    def last_softmax(self) -> str:
        """Name of the `nn.Softmax` that gives the model's output; "" for none."""
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

    def _step(self, walk: Walk, batch: Any, *, backward: bool, evaluate: bool) -> None:
        batch = to_device(batch, self.device)
        walk.take_input(batch)
        output = self.case.forward(self.model, batch)
        walk.samples.append(num_samples(batch))
        if not evaluate:
            return
        targets = self.case.targets(batch)
        walk.take_output(output, targets)
        metric = self.case.metric or accuracy
        value = metric(output, targets)
        if value is not None:
            walk.metrics.append(float(value))
        if self.case.loss_fn is None:
            return
        loss = self.case.loss_fn(output, targets)
        if loss.numel() != 1:
            raise ArgumentError(
                f"loss_fn gave a tensor of shape {tuple(loss.shape)}; it must give one "
                "number, e.g. by reduction='mean'"
            )
        walk.losses.append(float(loss.detach()))
        if backward and loss.requires_grad:
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            walk.take_weights(self.model)
            self.model.zero_grad(set_to_none=True)

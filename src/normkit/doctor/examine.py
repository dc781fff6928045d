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
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.doctor.isolation import Snapshot, preserved_random, snapshot
from normkit.doctor.probe import LayerProbe, Probes, first_tensor, norm_of
from normkit.doctor.statistics import (
    ChannelStream,
    Evaluation,
    LayerStatistics,
    NormStatistics,
    Statistics,
    WeightStatistics,
)
from normkit.errors import ArgumentError
from normkit.moments import Moments

__all__ = ["Case", "accuracy", "call_model", "examine", "norm_statistics", "open_case"]


@dataclass(frozen=True)
class Case:
    """A model with what is needed to examine it.

    Attributes:
        model: The model, which nothing here changes.
        batches: The batches every pass sees, where the loader put them.
        loss_fn: `loss_fn(output, targets)`; None when there is none.
        forward: `forward(model, batch)` gives the output.
        metric: `metric(output, targets)`, higher is better; None for accuracy where
            the output and the targets are those of a classifier.
        gradient_batches: On how many batches gradients are taken.
        seed: Of dropout and of everything else that draws numbers.
    """

    model: nn.Module
    batches: list[Any]
    loss_fn: Callable[[Any, Any], Tensor] | None
    forward: Callable[[nn.Module, Any], Any]
    metric: Callable[[Any, Any], float] | None
    gradient_batches: int = 8
    seed: int = 0
    skipped: list[str] = field(default_factory=list)


def open_case(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    metric: Callable[[Any, Any], float] | None = None,
    max_batches: int = 50,
    gradient_batches: int = 8,
    seed: int = 0,
) -> Case:
    """Draw the batches that every pass will see, without touching random states.

    Raises:
        ArgumentError: The loader gives nothing, or `max_batches` is below 1.
    """
    if max_batches < 1:
        raise ArgumentError(
            f"max_batches={max_batches} leaves nothing to look at; give 1 or more"
        )
    # A compiled model runs past hooks that were added later: the one inside does not.
    model = getattr(model, "_orig_mod", model)
    holders = [loader, getattr(loader, "sampler", None)]
    with preserved_random(model, seed=seed, others=holders):
        batches = list(itertools.islice(loader, max_batches))
    if not batches:
        raise ArgumentError(
            "the loader gave no batch; an iterator that was used up must be made anew"
        )
    return Case(
        model,
        batches,
        loss_fn,
        forward or call_model,
        metric,
        gradient_batches,
        seed,
    )


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call `model` on a batch: `(inputs, targets)`, inputs alone, or keywords.

    Of a tuple or list the first item is given to the model; a mapping is given as
    keyword arguments; anything else as it is.
    """
    if isinstance(batch, tuple | list):
        return model(batch[0])
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch)


def targets_of(batch: Any) -> Any:
    """What `loss_fn` gets beside the output: the second item, or the whole batch."""
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[1]
    return batch


def accuracy(output: Any, targets: Any) -> float | None:
    """Share of right classes; None where these are no scores and classes."""
    if not (isinstance(output, Tensor) and isinstance(targets, Tensor)):
        return None
    if output.dim() != 2 or targets.dim() != 1 or output.shape[1] < 2:
        return None
    if targets.is_floating_point() or len(output) != len(targets):
        return None
    return (output.argmax(1) == targets).double().mean().item()


def examine(case: Case) -> Statistics:
    """Measure everything the checks can use on the case's model."""
    with _working_copy(case) as (model, before):
        frozen = _set_training(model, before)
        patient = _Patient(case, model, frozen)
        with torch.no_grad():
            training = patient.walk(streams=True, evaluate=False)
        before.restore_buffers()
        patient.batch_statistics()
        batch = patient.walk(streams=True, gradients=case.loss_fn is not None)
        before.restore_buffers()
        model.eval()
        with torch.no_grad():
            running = patient.walk(streams=True)
        norms = {
            name: replace(
                norm,
                stream=training.stream(name),
                quiet=batch.stream(name),
                evaluated=running.stream(name),
            )
            for name, norm in norm_statistics(model, frozen).items()
        }
        layers = [
            replace(layer, norm=norms.get(layer.name), weight=batch.weight(layer.name))
            for layer in batch.layers()
        ]
    return Statistics(
        tuple(layers),
        _evaluation(batch, running),
        samples=sum(batch.samples),
        batches=len(batch.samples),
        notes=tuple(dict.fromkeys(patient.notes)),
    )


def _evaluation(batch: _Walk, running: _Walk) -> Evaluation | None:
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
            running_mean=mean.detach().to("cpu", torch.float64, copy=True),
            running_var=var.detach().to("cpu", torch.float64, copy=True),
        )
    return found


@contextmanager
def _working_copy(case: Case) -> Iterator[tuple[nn.Module, Snapshot]]:
    """A copy of the model, or the model itself as a transaction."""
    with preserved_random(case.model, seed=case.seed):
        try:
            model = copy.deepcopy(case.model)
        except Exception:  # deepcopy calls anything that a model may hold
            model = case.model
        before = snapshot(model)
        try:
            yield model, before
        finally:
            before.restore()


def _set_training(model: nn.Module, before: Snapshot) -> set[str]:
    """Put the model in the mode it trains in; give the layers frozen on purpose.

    A model found in training mode is left as it is. One found in eval mode gets
    `train()`, which a model that keeps its batch norms frozen overrides.
    """
    if not model.training:
        model.train()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not module.training
    }


class _Patient:
    """The working copy, walked through the batches in one mode after the other."""

    def __init__(self, case: Case, model: nn.Module, frozen: set[str]) -> None:
        self.case = case
        self.model = model
        self.frozen = frozen
        self.notes: list[str] = []
        self.device = next(
            (t.device for t in itertools.chain(model.parameters(), model.buffers())),
            torch.device("cpu"),
        )

    def batch_statistics(self) -> None:
        """Eval mode, but for the batch norms that train on their batch."""
        self.model.eval()
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and name not in self.frozen:
                module.training = True

    def walk(
        self, *, streams: bool, gradients: bool = False, evaluate: bool = True
    ) -> _Walk:
        """Run every batch once, and give what was seen."""
        walk = _Walk()
        torch.manual_seed(self.case.seed)  # the same dropout in every examination
        probes = Probes(self.model, streams=streams, gradients=gradients)
        with probes.attached():
            for index, batch in enumerate(self.case.batches):
                backward = gradients and index < self.case.gradient_batches
                with torch.set_grad_enabled(backward):
                    self._step(walk, batch, backward=backward, evaluate=evaluate)
                walk.take(probes)
                probes.reset()
        return walk

    def _step(self, walk: _Walk, batch: Any, *, backward: bool, evaluate: bool) -> None:
        batch = _moved(batch, self.device)
        output = self.case.forward(self.model, batch)
        walk.samples.append(_num_samples(batch))
        if not evaluate:
            return
        targets = targets_of(batch)
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


@dataclass
class _Seen:
    """What one walk saw of one layer."""

    kind: str
    probe: LayerProbe
    samples: int = 0
    input: Moments | None = None
    output: Moments | None = None
    gradient_norm: list[float] = field(default_factory=list)
    saturated: list[float] = field(default_factory=list)
    stream: ChannelStream | None = None


class _Walk:
    """One pass over all batches: what each layer saw, and the loss of each batch."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.losses: list[float] = []
        self.metrics: list[float] = []
        self.seen: dict[str, _Seen] = {}
        self.weight_gradients: dict[str, list[float]] = {}

    def take(self, probes: Probes) -> None:
        """Merge what the probes saw of one batch."""
        for probe in probes.in_order:
            if probe.input is None:
                continue
            seen = self.seen.setdefault(probe.name, _Seen(probe.kind, probe))
            seen.samples += probe.samples
            seen.input = _merged(seen.input, probe.input)
            if probe.output is not None:
                seen.output = _merged(seen.output, probe.output)
            if probe.stream is not None:
                stream = probe.stream.to("cpu")
                seen.stream = (
                    stream if seen.stream is None else seen.stream.merge(stream)
                )
            if probe.gradient_norm is not None:
                seen.gradient_norm.append(float(probe.gradient_norm))
            if probe.saturated_share is not None:
                seen.saturated.append(float(probe.saturated_share))

    def take_weights(self, model: nn.Module) -> None:
        """Note the norm of every weight's gradient."""
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.grad is not None:
                norms = self.weight_gradients.setdefault(name, [])
                norms.append(float(norm_of(weight.grad)))

    def stream(self, name: str) -> ChannelStream | None:
        """The per-channel stream of one layer; None when it was not called."""
        return self.seen[name].stream if name in self.seen else None

    def weight(self, name: str) -> WeightStatistics | None:
        """The weight of one layer; None when it has no matrix."""
        seen = self.seen[name]
        weight = seen.probe.module._parameters.get("weight")
        if seen.probe.role != "weight" or weight is None:
            return None
        return WeightStatistics(
            norm=float(norm_of(weight.detach())),
            gradient_norm=tuple(self.weight_gradients.get(name, ())),
        )

    def layers(self) -> list[LayerStatistics]:
        """What was seen, layer by layer in the order of execution."""
        ordered = sorted(self.seen.items(), key=lambda item: item[1].probe.order or 0)
        return [
            LayerStatistics(
                name=name,
                kind=seen.kind,
                role=seen.probe.role,
                is_output=seen.probe.is_output,
                samples=seen.samples,
                input=seen.input,
                output=seen.output,
                gradient_norm=tuple(seen.gradient_norm),
                saturated=tuple(seen.saturated),
            )
            for name, seen in ordered
        ]


def _merged(old: Moments | None, new: Moments) -> Moments:
    new = new.to(device="cpu", dtype=torch.float64)
    return new if old is None else old.merge(new)


def _moved(value: Any, device: torch.device) -> Any:
    """The batch on the model's device, in whatever it is packed."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return type(value)({key: _moved(item, device) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value


def _num_samples(batch: Any) -> int:
    x = first_tensor(batch)
    if x is None:
        x = next((t for t in _tensors(batch)), None)
    return 1 if x is None or x.dim() == 0 else x.shape[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_tensors, value.values()))
    elif isinstance(value, tuple | list):
        yield from itertools.chain.from_iterable(map(_tensors, value))

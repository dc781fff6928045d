"""Why does eval mode differ from training? The gap, split over causes and layers.

    gap = measure(batch statistics) − measure(running statistics)

Statistics are swapped one cause after the other, on the same batches and with the same
weights, and the measure is taken after each:

    running  →  without the start of the average  →  of the training data, dropout as in
    training  →  of the data measured on  →  the same with dropout off  →  of each batch

so the parts add up to the gap exactly. Without training data of its own the third is
left out. The step to the data's statistics is split further over the layers: each
layer's part is what swapping it alone brings, and what remains of the whole step is
their interaction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normkit.doctor.case import Case, accuracy, open_case
from normkit.doctor.examine import Patient, examine, opened
from normkit.doctor.finding import plain
from normkit.doctor.remedies import set_statistics
from normkit.doctor.statistics import Statistics
from normkit.errors import ArgumentError

__all__ = ["GapExplanation", "GapPart", "explain_case", "explain_gap"]


@dataclass(frozen=True)
class GapPart:
    """What one cause, or one layer, contributes to the gap.

    Attributes:
        name: The cause in words, or the dotted name of the layer.
        value: Its part, in units of the measure; positive where eval mode loses.
        error: Standard error over the batches.
    """

    name: str
    value: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, two standard errors to each side."""
        return self.value - 2 * self.error, self.value + 2 * self.error


@dataclass(frozen=True)
class GapExplanation:
    """The train/eval gap, and where it comes from.

    Attributes:
        batch: The measure with batch statistics, dropout off.
        running: The measure in eval mode.
        causes: Parts in the order of the swaps; they add up to the gap.
        layers: Parts of "stale statistics" by layer, in the order of execution.
        interaction: What the layers bring together and not one by one.
        batches: Number of batches.
    """

    batch: float
    running: float
    causes: list[GapPart]
    layers: list[GapPart]
    interaction: float
    batches: int

    @property
    def gap(self) -> float:
        """By how much eval mode is worse."""
        return self.batch - self.running

    @property
    def cause(self) -> GapPart:
        """The largest part."""
        return max(self.causes, key=lambda part: part.value)

    @property
    def layer(self) -> GapPart | None:
        """The layer with the largest part; None without batch norms."""
        return max(self.layers, key=lambda part: part.value, default=None)

    def to_text(self) -> str:
        """The parts, one per line."""
        lines = [
            f"{self.batch:.4g} with batch statistics, {self.running:.4g} in eval mode: "
            f"a gap of {self.gap:.4g} on {self.batches} batches"
        ]
        lines += [f"  {_line(part)}" for part in self.causes]
        if self.layers:
            lines.append("stale statistics, layer by layer, each swapped alone:")
            lines += [f"  {_line(part)}" for part in self.layers]
            lines.append(f"  {self.interaction:+10.4g}            interaction")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return plain(
            {
                "gap": self.gap,
                "batch": self.batch,
                "running": self.running,
                "causes": [vars(part) for part in self.causes],
                "layers": [vars(part) for part in self.layers],
                "interaction": self.interaction,
                "batches": self.batches,
            }
        )


def _line(part: GapPart) -> str:
    return f"{part.value:+10.4g} ± {2 * part.error:<8.2g} {part.name}"


def explain_gap(
    model: nn.Module,
    loader: Iterable[Any],
    metric: Callable[[Any, Any], float] | None = None,
    *,
    train_loader: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int = 50,
    seed: int = 0,
) -> GapExplanation:
    """Split the difference between training and eval mode over causes and layers.

    Args:
        model: Any module; it is left bit for bit as it was.
        loader: The batches to measure on, in the size of training: `(inputs,
            targets)`, inputs, or mappings.
        metric: `metric(output, targets)`, higher is better, so give a loss its minus;
            accuracy for scores `(N, K)` and integer targets `(N,)` unless given.
        train_loader: Batches of the training data, where `loader` gives others: what
            the two do to the statistics is then a part of its own, "domain shift".
        forward: `forward(model, batch)` gives the output.
        max_batches: The most batches to draw from a loader.
        seed: Of everything that draws numbers.

    Returns:
        The `GapExplanation`. It takes one pass per layer and cause.

    Raises:
        ArgumentError: The loader gives nothing, or there is no metric.

    Numerics:
        The layer by layer part measures each layer alone against running statistics
        elsewhere; where layers make up for each other the interaction is large, and
        the parts should be read together with it. Statistics of one rank among many
        cannot be told from stale ones by one process, and neither can those of layers
        that went on moving though frozen: both are parts of "stale statistics".
    """

    def opened_case(batches: Iterable[Any]) -> Case:
        return open_case(
            model, batches, forward=forward, metric=metric, max_batches=max_batches,
            seed=seed,
        )  # fmt: skip

    case = opened_case(loader)
    source = None if train_loader is None else examine(opened_case(train_loader))
    return explain_case(case, examine(case), source)


def explain_case(
    case: Case, statistics: Statistics, source: Statistics | None = None
) -> GapExplanation:
    """`explain_gap` of what was examined already.

    Args:
        case: What to measure on.
        statistics: What was seen of it.
        source: What was seen of the training data, where that is another.
    """
    trained_on = statistics if source is None else source
    with opened(case) as patient, torch.no_grad():
        samples, batch = _measured(patient, patient.batch_statistics)
        running = _swapped(patient, lambda: None)
        warm = _swapped(patient, lambda: _remove_start(patient.model, statistics))
        stale = _swapped(patient, lambda: _set(patient.model, trained_on))
        shifted = stale
        if source is not None:
            shifted = _swapped(patient, lambda: _set(patient.model, statistics))
        quiet = _swapped(
            patient,
            lambda: set_statistics(patient.model, statistics, lambda norm: norm.quiet),
        )
        steps = [
            ("start of the average", warm, running),
            ("stale statistics", stale, warm),
            *([] if source is None else [("domain shift", shifted, stale)]),
            ("dropout before batch norm", quiet, shifted),
            ("statistics of each batch", batch, quiet),
        ]
        causes = [_part(name, new, old, samples) for name, new, old in steps]
        layers = []
        for layer, norm in trained_on.norms:
            if norm.frozen or norm.stream is None:
                continue
            alone = _swapped(
                patient,
                lambda name=layer.name: (
                    _remove_start(patient.model, statistics),
                    _set(patient.model, trained_on, [name]),
                ),
            )
            layers.append(_part(layer.name, alone, warm, samples))
    return GapExplanation(
        batch=_mean(batch, samples),
        running=_mean(running, samples),
        causes=causes,
        layers=layers,
        interaction=causes[1].value - sum(part.value for part in layers),
        batches=len(samples),
    )


def _set(
    model: nn.Module, statistics: Statistics, names: Iterable[str] | None = None
) -> None:
    set_statistics(model, statistics, lambda norm: norm.stream, names)


def _remove_start(model: nn.Module, statistics: Statistics) -> None:
    """Take the initial mean 0 and variance 1 out of the running averages."""
    modules = dict(model.named_modules())
    for layer, norm in statistics.norms:
        if norm.frozen or not norm.momentum or not norm.tracked:
            continue
        weight = (1 - norm.momentum) ** norm.tracked
        if not 0 < weight < 1:
            continue
        module: Any = modules[layer.name]
        module.running_mean.copy_(norm.running_mean / (1 - weight))
        # Rounding may leave less than nothing of a small variance.
        var = ((norm.running_var - weight) / (1 - weight)).clamp(min=0)
        module.running_var.copy_(var)


def _swapped(patient: Patient, swap: Callable[[], Any]) -> list[float]:
    def prepare() -> None:
        patient.running_statistics()
        swap()

    return _measured(patient, prepare)[1]


def _measured(
    patient: Patient, prepare: Callable[[], None]
) -> tuple[list[int], list[float]]:
    """Samples and measure of each batch, after `prepare`."""
    prepare()
    walk = patient.walk(streams=False)
    if len(walk.metrics) != len(walk.samples):
        raise ArgumentError(
            "explain_gap needs a number per batch: these outputs and targets are not "
            f"scores and classes that {accuracy.__name__} can compare; pass metric="
        )
    return walk.samples, walk.metrics


def _mean(values: list[float], samples: list[int]) -> float:
    return sum(n * v for n, v in zip(samples, values, strict=True)) / sum(samples)


def _part(name: str, new: list[float], old: list[float], samples: list[int]) -> GapPart:
    value = _mean(new, samples) - _mean(old, samples)
    gains = [a - b for a, b in zip(new, old, strict=True)]
    if len(gains) < 2:
        return GapPart(name, value, math.nan)
    mean = sum(gains) / len(gains)
    spread = sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
    return GapPart(name, value, math.sqrt(spread / len(gains)))

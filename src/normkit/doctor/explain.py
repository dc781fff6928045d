"""Why does eval mode differ from training? The gap, split over causes and layers.

    gap = measure(batch statistics) − measure(running statistics)

Statistics are swapped one cause after the other, on the same batches and with the same
weights, and the measure is taken after each:

    running  →  what frozen layers were frozen at  →  without the start of the average
    →  of the training data, dropout as in training  →  of all its ranks  →  without
    padding  →  of the data measured on, padding as it has it  →  the same with dropout
    off  →  of each batch

so the parts add up to the gap exactly. A step for which nothing is known is left out,
and named with what it needs. The step to the data's statistics is split further over
the layers: each layer's part is what swapping it alone brings, and what remains of the
whole step is their interaction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normkit.doctor.case import Case, accuracy, open_case
from normkit.doctor.examine import Patient, examine, opened
from normkit.doctor.finding import plain
from normkit.doctor.populations import (
    Held,
    Populations,
    held,
    likely,
    populations_of,
    reference_of,
    without_start,
    write,
)
from normkit.doctor.statistics import Statistics
from normkit.errors import ArgumentError
from normkit.modeling.batch import Forward, Targets

__all__ = ["GapExplanation", "GapPart", "explain_case", "explain_gap"]

UNFROZEN, RANK, PADDING = "un-frozen statistics", "one rank's statistics", "padding"
START, STALE, DOMAIN = "start of the average", "stale statistics", "domain shift"
DROPOUT, BATCH = "dropout before batch norm", "statistics of each batch"

# What it takes to know of causes that cannot be seen in every case.
NEEDS = {
    UNFROZEN: "reference=, a state dict of what the layers were frozen at",
    RANK: "shards=, the loader of each rank",
    PADDING: "a layer called with mask=, or sequences with constant ends",
    DOMAIN: "train_loader=, where the loader gives other data",
}


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
        rank: The rank whose statistics these are, "one rank's"; None for all ranks'.
    """

    batch: float
    running: float
    causes: list[GapPart]
    layers: list[GapPart]
    interaction: float
    batches: int
    rank: int | None = None

    @property
    def gap(self) -> float:
        """By how much eval mode is worse."""
        return self.batch - self.running

    @property
    def cause(self) -> GapPart:
        """The largest part."""
        return max(self.causes, key=lambda part: part.value)

    def part(self, name: str) -> GapPart | None:
        """The part of one cause; None where nothing is known of it, which is not 0."""
        return next((part for part in self.causes if part.name == name), None)

    @property
    def absent(self) -> dict[str, str]:
        """The causes that are no part of their own here, with what it takes."""
        return {name: why for name, why in NEEDS.items() if self.part(name) is None}

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
        if self.rank is not None:
            lines.append(f"the running statistics are those of rank {self.rank}")
        if self.absent:
            lines.append("not told apart from these, for nothing is known of them:")
            lines += [f"  {name} (needs {why})" for name, why in self.absent.items()]
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
                "rank": self.rank,
                "absent": self.absent,
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
    shards: Sequence[Iterable[Any]] | None = None,
    reference: nn.Module | Mapping[str, Any] | None = None,
    forward: Forward | None = None,
    targets: Targets | None = None,
    max_batches: int = 50,
    seed: int = 0,
) -> GapExplanation:
    """Split the difference between training and eval mode over causes and layers.

    Args:
        model: Any module; it is left bit for bit as it was.
        loader: The batches to measure on, in the size of training: `(inputs,
            targets)`, inputs a tensor, a tuple of positional arguments or a mapping of
            named ones.
        metric: `metric(output, targets)`, higher is better, so give a loss its minus;
            accuracy for scores `(N, K)` and integer targets `(N,)` unless given.
        train_loader: Batches of the training data, where `loader` gives others: what
            the two do to the statistics is then a part of its own, "domain shift".
        shards: The training data rank by rank, in place of `train_loader`: what is
            lost because the running statistics are those of one rank, which saw its
            own shard alone, is then a part of its own, "one rank's statistics".
        reference: What layers that should be frozen were frozen at, a state dict or a
            model with the same names: what is lost because their statistics went on
            moving is then a part of its own, "un-frozen statistics". It is about the
            layers in it whose weight and bias do not ask for gradients, or, where
            there is none, about all in it.
        forward: `forward(model, batch)` gives the output, for any other batch.
        targets: `targets(batch)` gives the targets; by default the second item of the
            batch, or the batch itself where it has none.
        max_batches: The most batches to draw from a loader.
        seed: Of everything that draws numbers.

    Returns:
        The `GapExplanation`. It takes one pass per layer and cause.

    Raises:
        ArgumentError: The loader gives nothing, there is no metric, `reference` holds
            none of the layers, or `shards` is one alone or beside `train_loader`.

    Numerics:
        The layer by layer part measures each layer alone against running statistics
        elsewhere; where layers make up for each other the interaction is large, and
        the parts should be read together with it.

        "padding" is what is lost because the running statistics hold padding and the
        batches' do not, or the other way round, or another share of it. It is known
        where layers are called with `mask=`, or where sequences `(N, C, L)` end in
        constant positions; elsewhere the part is absent. Padding that enters both in
        the same way makes no gap. Running statistics are taken for those of one rank,
        or for those with padding counted otherwise, where they lie within half the
        distance between the two of these. All that is further off is stale.

        Layers that are in eval mode while the model trains are the same in both modes
        and have no part.
    """
    if shards is not None and (train_loader is not None or len(shards) < 2):
        given = "beside train_loader" if train_loader is not None else f"{len(shards)}"
        raise ArgumentError(
            f"shards must be the loaders of two ranks or more, in place of "
            f"train_loader, got {given}; for one rank give train_loader alone"
        )

    def examined(batches: Iterable[Any]) -> tuple[Case, Statistics]:
        case = open_case(
            model, batches, forward=forward, targets=targets, metric=metric,
            max_batches=max_batches, seed=seed, verb="explain_gap",
        )  # fmt: skip
        return case, examine(case)

    sources = shards if shards is not None else [train_loader]
    return explain_case(
        *examined(loader),
        [examined(source) for source in sources if source is not None],
        reference=reference,
    )


def explain_case(
    case: Case,
    statistics: Statistics,
    sources: Sequence[tuple[Case, Statistics]] = (),
    *,
    reference: nn.Module | Mapping[str, Any] | None = None,
) -> GapExplanation:
    """`explain_gap` of what was examined already.

    Args:
        case: What to measure on.
        statistics: What was seen of it.
        sources: The training data where that is another, and what was seen of it; of
            each rank where there are several.
        reference: What frozen layers were frozen at.
    """
    norms = {layer.name: norm for layer, norm in statistics.norms if not norm.frozen}
    returned = {} if reference is None else reference_of(statistics, reference)
    here = populations_of(case, statistics)
    ranks = [populations_of(*source) for source in sources]
    there = Populations.merge_all(ranks) if ranks else here
    is_padded = bool(there.other or here.other)

    warm = {}
    for name, norm in norms.items():
        running = Held(norm.running_mean, norm.running_var)
        warm[name] = returned.get(name) or without_start(norm) or running
    held_now, rank = likely(warm, there, ranks, [n for n in warm if n not in returned])
    # Another domain moves the values and leaves the padding where it is, so that a step
    # by way of statistics without it would lose twice what was never lost.
    by_way = is_padded and not (
        there.is_padded_like(here)
        and (rank is not None or _are_equal(held_now, held(there.own)))
    )
    quiet = {name: n.quiet.pooled for name, n in norms.items() if n.quiet is not None}

    with opened(case) as patient, torch.no_grad():

        def swapped(*populations: Mapping[str, Held]) -> list[float]:
            def prepare() -> None:
                patient.running_statistics()
                for population in populations:
                    write(patient.model, population)

            return _measured(patient, prepare)[1]

        samples, batch = _measured(patient, patient.batch_statistics)
        running = swapped()
        back = swapped(returned) if returned else running
        start = swapped(warm)
        stale = swapped(warm, held_now)
        whole = stale if rank is None else swapped(warm, held(there.own))
        # Without padding, of the training data and of the data measured on.
        own = swapped(warm, held(here.own)) if by_way or sources else whole
        valid, valid_here = whole, own
        if by_way:
            valid = swapped(warm, there.valid)
            valid_here = swapped(warm, here.valid) if sources else valid
        quieted = swapped(warm, held(quiet))
        steps: dict[str, list[tuple[list[float], list[float]]]] = {
            UNFROZEN: [(back, running)] if reference is not None else [],
            START: [(start, back)],
            STALE: [(stale, start)],
            RANK: [(whole, stale)] if len(ranks) > 1 else [],
            PADDING: [(valid, whole), (own, valid_here)] if is_padded else [],
            DOMAIN: [(valid_here, valid)] if sources else [],
            DROPOUT: [(quieted, own)],
            BATCH: [(batch, quieted)],
        }
        causes = [_part(name, gains, samples) for name, gains in steps.items() if gains]
        layers = [
            _part(name, [(swapped(warm, {name: held_now[name]}), start)], samples)
            for name in norms
            if name in held_now
        ]
    stale_part = next(part for part in causes if part.name == STALE)
    return GapExplanation(
        batch=_mean(batch, samples),
        running=_mean(running, samples),
        causes=causes,
        layers=layers,
        interaction=stale_part.value - sum(part.value for part in layers),
        batches=len(samples),
        rank=rank,
    )


def _are_equal(one: Mapping[str, Held], another: Mapping[str, Held]) -> bool:
    return all(
        torch.equal(a, b)
        for name in one
        for a, b in zip(one[name], another[name], strict=True)
    )


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


def _part(
    name: str, steps: list[tuple[list[float], list[float]]], samples: list[int]
) -> GapPart:
    """The sum over steps of what the measure gains, batch by batch `(new, old)`."""
    gains = [0.0] * len(samples)
    for new, old in steps:
        gains = [g + a - b for g, a, b in zip(gains, new, old, strict=True)]
    value = sum(_mean(new, samples) - _mean(old, samples) for new, old in steps)
    if len(gains) < 2:
        return GapPart(name, value, math.nan)
    mean = sum(gains) / len(gains)
    spread = sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
    return GapPart(name, value, math.sqrt(spread / len(gains)))

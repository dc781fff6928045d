"""Split the difference between training and eval mode over causes and layers.

    gap = measure(batch statistics) − measure(running statistics)

Statistics are swapped one cause after the other, on the same batches and with the same
weights, and the measure is taken after each swap:

    running statistics
    →  frozen layers at the statistics of their checkpoint
    →  without the initial values of the average
    →  of the training data, dropout as in training
    →  of all its ranks
    →  without padding
    →  of the measured data, with its padding
    →  the same with dropout off
    →  of each batch

so the parts add up to the gap exactly. A step that lacks its data is left out and
listed with the data it needs. The step to the training data's statistics is split over
the layers: each layer's part is the gain of swapping it alone, and the rest of the
step is their interaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normkit.doctor.examination.case import Case, accuracy, open_case
from normkit.doctor.examination.examine import examine
from normkit.doctor.examination.populations import (
    Populations,
    RunningStatistics,
    as_running,
    likely,
    populations_of,
    reference_of,
    without_start,
    write,
)
from normkit.doctor.examination.working_copy import WorkingCopy, open_working_copy
from normkit.doctor.finding import plain
from normkit.doctor.measurements import (
    Statistics,
    mean_over_samples,
    standard_error,
)
from normkit.errors import ArgumentError
from normkit.modeling.batch import Forward, Targets
from normkit.results import Result, counted

__all__ = ["GapExplanation", "GapPart", "explain_case", "explain_gap"]

UNFROZEN, RANK, PADDING = "un-frozen statistics", "one rank's statistics", "padding"
START, STALE, DOMAIN = "start of the average", "stale statistics", "domain shift"
DROPOUT, BATCH = "dropout before batch norm", "statistics of each batch"

# The data needed to measure causes that are not visible in every case.
NEEDS = {
    UNFROZEN: "reference=, a state dict of what the layers were frozen at",
    RANK: "shards=, the loader of each rank",
    PADDING: "a layer called with mask=, or sequences with constant ends",
    DOMAIN: "train_loader=, where the loader gives other data",
}


@dataclass(frozen=True)
class GapPart:
    """The contribution of one cause, or one layer, to the gap.

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


@dataclass(frozen=True, repr=False)
class GapExplanation(Result):
    """The train/eval gap, and its parts by cause and layer.

    Attributes:
        batch: The measure with batch statistics, dropout off.
        running: The measure in eval mode.
        causes: Parts in the order of the swaps; they add up to the gap.
        layers: Parts of "stale statistics" by layer, in the order of execution.
        interaction: The gain of all layers together beyond the sum of their parts.
        batches: Number of batches.
        rank: The rank that the running statistics are of; None for all ranks.
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
        """The loss of eval mode against batch statistics, in units of the measure."""
        return self.batch - self.running

    @property
    def cause(self) -> GapPart:
        """The largest part."""
        return max(self.causes, key=lambda part: part.value)

    def part(self, name: str) -> GapPart | None:
        """Return the part of one cause; None where it was not measured (not 0)."""
        return next((part for part in self.causes if part.name == name), None)

    @property
    def absent(self) -> dict[str, str]:
        """The causes that were not measured, each with the data it needs."""
        return {name: why for name, why in NEEDS.items() if self.part(name) is None}

    @property
    def layer(self) -> GapPart | None:
        """The layer with the largest part; None without batch norms."""
        return max(self.layers, key=lambda part: part.value, default=None)

    def to_text(self) -> str:
        """Return the parts, one per line."""
        lines = [
            f"{self.batch:.4g} with batch statistics, {self.running:.4g} in eval mode: "
            f"a gap of {self.gap:.4g} on "
            f"{counted(self.batches, 'batch', plural='batches')}"
        ]
        lines += [f"  {_line(part)}" for part in self.causes]
        if self.layers:
            lines.append("stale statistics, layer by layer, each swapped alone:")
            lines += [f"  {_line(part)}" for part in self.layers]
            lines.append(f"  {self.interaction:+10.4g}            interaction")
        if self.rank is not None:
            lines.append(f"the running statistics are those of rank {self.rank}")
        if self.absent:
            lines.append("not measured, and so included in the parts above:")
            lines += [f"  {name} (needs {why})" for name, why in self.absent.items()]
        return "\n".join(lines)

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per cause and layer, for tables in notebooks."""
        return [
            {"kind": kind, "name": p.name, "part": p.value, "±": 2 * p.error}
            for kind, parts in (("cause", self.causes), ("layer", self.layers))
            for p in parts
        ]

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as plain data."""
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
        metric: `metric(output, targets)`, higher is better (negate a loss); accuracy
            for scores `(N, K)` and integer targets `(N,)` unless given.
        train_loader: Batches of the training data, where `loader` gives other data:
            the effect of the difference is then the part "domain shift".
        shards: The training data of each rank, in place of `train_loader`: the loss
            because the running statistics are those of one rank, which saw only its
            shard, is then the part "one rank's statistics".
        reference: Statistics that frozen layers should have, as a state dict or a
            model with the same names: the loss because they kept changing is then the
            part "un-frozen statistics". It covers the layers in it whose weight and
            bias require no gradients, or, where there is none, all layers in it.
        forward: `forward(model, batch)` gives the output, for any other batch.
        targets: `targets(batch)` gives the targets; by default the second item of the
            batch, or the batch itself where it has none.
        max_batches: The most batches to draw from a loader.
        seed: Random seed.

    Returns:
        The `GapExplanation`, from one pass per layer and cause.

    Raises:
        ArgumentError: The loader gives nothing, there is no metric, `reference` holds
            none of the layers, or `shards` is a single one or given with
            `train_loader`.

    Numerics:
        Each layer's part is measured alone, with running statistics in all others;
        where layers compensate each other the interaction is large, and the parts
        should be read together with it.

        "padding" is the loss because the running statistics include padding and those
        of the batches do not, or the reverse, or another share of it. It is measured
        where layers are called with `mask=`, or where sequences `(N, C, L)` end in
        constant positions; elsewhere the part is absent. Padding that enters both in
        the same way causes no gap. Running statistics are attributed to one rank, or
        to the other way of counting padding, where their distance to it is less than
        half the distance between the two. Those further away are stale.

        Layers that are in eval mode while the model trains are the same in both modes
        and have no part.
    """
    if shards is not None and (train_loader is not None or len(shards) < 2):
        given = "both" if train_loader is not None else f"{len(shards)}"
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
    """Explain the gap of a case that was already examined.

    Args:
        case: The case to measure on.
        statistics: Its measurements.
        sources: Case and measurements of the training data where it is other data; one
            pair per rank where there are several.
        reference: Statistics that frozen layers should have.
    """
    norms = {layer.name: norm for layer, norm in statistics.norms if not norm.frozen}
    reference_of_frozen = (
        {} if reference is None else reference_of(statistics, reference)
    )
    here = populations_of(case, statistics)
    ranks = [populations_of(*source) for source in sources]
    there = Populations.merge_all(ranks) if ranks else here
    is_padded = bool(there.other or here.other)

    warm = {}
    for name, norm in norms.items():
        running = RunningStatistics(norm.running_mean, norm.running_var)
        warm[name] = reference_of_frozen.get(name) or without_start(norm) or running
    population, rank = likely(
        warm, there, ranks, [n for n in warm if n not in reference_of_frozen]
    )
    # Another domain changes the values and leaves the padding where it is, so a step
    # through statistics without padding would count a loss that never occurred.
    by_way = is_padded and not (
        there.is_padded_like(here)
        and (rank is not None or _are_equal(population, as_running(there.own)))
    )
    no_dropout = {
        name: norm.without_dropout.pooled
        for name, norm in norms.items()
        if norm.without_dropout is not None
    }

    with open_working_copy(case) as working, torch.no_grad():

        def swapped(*populations: Mapping[str, RunningStatistics]) -> list[float]:
            def prepare() -> None:
                working.use_running_statistics()
                for population in populations:
                    write(working.model, population)

            return _measured(working, prepare)[1]

        samples, batch = _measured(working, working.use_batch_statistics)
        running = swapped()
        back = swapped(reference_of_frozen) if reference_of_frozen else running
        start = swapped(warm)
        stale = swapped(warm, population)
        whole = stale if rank is None else swapped(warm, as_running(there.own))
        # Without padding, of the training data and of the data measured on.
        own = swapped(warm, as_running(here.own)) if by_way or sources else whole
        valid, valid_here = whole, own
        if by_way:
            valid = swapped(warm, there.valid)
            valid_here = swapped(warm, here.valid) if sources else valid
        dropout_off = swapped(warm, as_running(no_dropout))
        steps: dict[str, list[tuple[list[float], list[float]]]] = {
            UNFROZEN: [(back, running)] if reference is not None else [],
            START: [(start, back)],
            STALE: [(stale, start)],
            RANK: [(whole, stale)] if len(ranks) > 1 else [],
            PADDING: [(valid, whole), (own, valid_here)] if is_padded else [],
            DOMAIN: [(valid_here, valid)] if sources else [],
            DROPOUT: [(dropout_off, own)],
            BATCH: [(batch, dropout_off)],
        }
        causes = [_part(name, gains, samples) for name, gains in steps.items() if gains]
        layers = [
            _part(name, [(swapped(warm, {name: population[name]}), start)], samples)
            for name in norms
            if name in population
        ]
    stale_part = next(part for part in causes if part.name == STALE)
    return GapExplanation(
        batch=mean_over_samples(batch, samples),
        running=mean_over_samples(running, samples),
        causes=causes,
        layers=layers,
        interaction=stale_part.value - sum(part.value for part in layers),
        batches=len(samples),
        rank=rank,
    )


def _are_equal(
    one: Mapping[str, RunningStatistics], another: Mapping[str, RunningStatistics]
) -> bool:
    return all(
        torch.equal(a, b)
        for name in one
        for a, b in zip(one[name], another[name], strict=True)
    )


def _measured(
    working: WorkingCopy, prepare: Callable[[], None]
) -> tuple[list[int], list[float]]:
    """Return samples and measure of each batch, after `prepare`."""
    prepare()
    result = working.run(channels=False)
    if len(result.metrics) != len(result.samples):
        raise ArgumentError(
            "explain_gap needs a number per batch: these outputs and targets are not "
            f"scores and classes that {accuracy.__name__} can compare; pass metric="
        )
    return result.samples, result.metrics


def _part(
    name: str, steps: list[tuple[list[float], list[float]]], samples: list[int]
) -> GapPart:
    """Return the gain of the measure summed over steps `(new, old)` per batch."""
    gains = [0.0] * len(samples)
    for new, old in steps:
        gains = [g + a - b for g, a, b in zip(gains, new, old, strict=True)]
    return GapPart(name, mean_over_samples(gains, samples), standard_error(gains))

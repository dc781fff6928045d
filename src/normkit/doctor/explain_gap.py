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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normkit.doctor.examination.case import Case, open_case, value_of
from normkit.doctor.examination.examine import examine
from normkit.doctor.examination.populations import (
    Populations,
    RunningStatistics,
    apart,
    as_running,
    likely,
    populations_of,
    reference_of,
    without_start,
    write,
)
from normkit.doctor.examination.working_copy import (
    SingleValueError,
    WorkingCopy,
    open_working_copy,
)
from normkit.doctor.gap import (
    BATCH,
    DOMAIN,
    DROPOUT,
    PADDING,
    RANK,
    STALE,
    START,
    UNFROZEN,
    GapExplanation,
    GapPart,
)
from normkit.doctor.measurements import (
    Statistics,
    mean_over_samples,
    standard_error,
)
from normkit.errors import ArgumentError
from normkit.modeling.batch import Forward, Targets, num_samples
from normkit.progress import progress_bar

__all__ = ["GapExplanation", "GapPart", "explain_case", "explain_gap"]

# Passes over the batches, and those of them that examine the model.
MAX_PASSES, EXAMINED = 10, 3
# In standard deviations: rounding in float32 leaves 1e-6 (measured), the start of an
# average 1e-4 after 88 batches at a momentum of 0.1.
SAME = 1e-4

_NO_NUMBER = (
    "explain_gap needs a number per batch: these outputs and targets are not scores "
    "and classes that accuracy can compare; pass metric="
)


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
    progress: bool = False,
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
        shards: The training data of each rank, in place of `train_loader`. What is
            lost because the running statistics are those of one rank, which saw only
            its shard, is then the part "one rank's statistics".
        reference: Statistics that frozen layers should have, as a state dict or a
            model with the same names. What is lost because they kept changing is then
            the part "un-frozen statistics". It covers the layers in it whose weight and
            bias require no gradients, or, where there is none, all layers in it.
        forward: `forward(model, batch)` returns the output, for any other batch.
        targets: `targets(batch)` returns the targets; by default the second item of the
            batch, or the batch itself where there is none.
        max_batches: The most batches to draw from a loader.
        seed: Random seed.
        progress: Show a progress bar.

    Returns:
        The `GapExplanation`, from at most 10 passes over the batches (and those over
        the training data, of masks and of a reference, where they are given).

    Raises:
        ArgumentError: The loader is empty, there is no metric, `reference` holds
            none of the layers, `shards` is a single one or given with
            `train_loader`, or the model has no values (on meta) or a mode that is
            fixed (traced).

    Numerics:
        Each layer's part is measured alone, with running statistics in all others;
        where layers compensate each other the interaction is large, and the parts
        should be read together with it. Of many layers those whose statistics are
        farthest off are measured alone, and the others together in one pass.

        "padding" is what is lost because the running statistics include padding and
        those of the batches do not, or the reverse, or another share of it. It is
        measured where layers are called with `mask=`, or where sequences `(N, C, L)`
        end in constant positions; elsewhere the part is absent. Padding that enters
        both in the same way causes no gap. Running statistics are attributed to one
        rank, or to the other way of counting padding, where their distance to it is
        less than half the distance between the two. Those further away are stale.

        Calls of `F.batch_norm` outside batch norms, on buffers of a larger module, are
        counted in both modes; what they lose is in the part "statistics of each batch".

        Layers that are in eval mode while the model trains are the same in both modes
        and have no part.
    """
    if shards is not None and (train_loader is not None or len(shards) < 2):
        given = "both" if train_loader is not None else f"{len(shards)}"
        raise ArgumentError(
            f"shards must be the loaders of two ranks or more, in place of "
            f"train_loader, got {given}; for one rank give train_loader alone"
        )

    def opened(batches: Iterable[Any]) -> Case:
        return open_case(
            model, batches, forward=forward, targets=targets, metric=metric,
            max_batches=max_batches, seed=seed, verb="explain_gap", progress=progress,
        )  # fmt: skip

    case = opened(loader)
    # The examination measures the metric in both modes when it is a loss.
    examined = examine(
        replace(case, loss_fn=_as_loss(case), gradient_batches=0), progress=progress
    )
    sources = shards if shards is not None else [train_loader]
    others = [opened(source) for source in sources if source is not None]
    return explain_case(
        case,
        examined,
        [(other, examine(other, progress=progress)) for other in others],
        reference=reference,
        progress=progress,
    )


def _as_loss(case: Case) -> Callable[[Any, Any], Tensor]:
    def loss(output: Any, targets: Any) -> Tensor:
        value = value_of(case, output, targets)
        if value is None:
            raise ArgumentError(_NO_NUMBER)
        return torch.tensor(-value)

    return loss


def explain_case(
    case: Case,
    statistics: Statistics,
    sources: Sequence[tuple[Case, Statistics]] = (),
    *,
    reference: nn.Module | Mapping[str, Any] | None = None,
    progress: bool = False,
) -> GapExplanation:
    """Explain the gap of a case that was already examined.

    Args:
        case: The case to measure on.
        statistics: Its measurements.
        sources: Case and measurements of the training data where it is other data; one
            pair per rank where there are several.
        reference: Statistics that frozen layers should have.
        progress: Show a progress bar.
    """
    norms = {layer.name: norm for layer, norm in statistics.norms if not norm.frozen}
    reference_of_frozen = (
        {} if reference is None else reference_of(statistics, reference)
    )
    here = populations_of(case, statistics)
    ranks = [populations_of(*source) for source in sources]
    there = Populations.merge_all(ranks) if ranks else here
    is_padded = bool(there.other or here.other)

    before = {
        name: RunningStatistics(norm.running_mean, norm.running_var)
        for name, norm in norms.items()
    }
    warm = {
        name: reference_of_frozen.get(name) or without_start(norm) or before[name]
        for name, norm in norms.items()
    }
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

    with (
        open_working_copy(case) as working,
        torch.no_grad(),
        progress_bar("explain_gap", MAX_PASSES - EXAMINED, shown=progress) as advance,
    ):
        done: list[tuple[dict[str, RunningStatistics], list[float]]] = []

        def swapped(*populations: Mapping[str, RunningStatistics]) -> list[float]:
            wanted = dict(before)
            for population in populations:
                wanted |= {n: s for n, s in population.items() if n in wanted}
            for same, values in done:
                if _are_equal(wanted, same):
                    return values
            working.use_running_statistics()
            write(working.model, wanted)
            done.append((wanted, _measured(working)))
            advance()
            return done[-1][1]

        samples = [num_samples(batch) for batch in case.batches]
        batch, running = _known(statistics)
        done.append((before, running))
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
            _part(
                name, [(swapped(warm, {n: population[n] for n in of}), start)], samples
            )
            for name, of in _layer_groups(
                warm, population, EXAMINED + len(done) - 1
            ).items()
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
    """Return True where no mean and no deviation differs by more than SAME.

    Such a swap changes no measure, and needs no pass.
    """
    for name, (mean, var) in one.items():
        sd, other = var.sqrt(), another[name]
        shift = (mean - other.mean).abs() <= SAME * sd
        ratio = (other.var.sqrt() - sd).abs() <= SAME * sd
        if not bool((shift & ratio).all()):
            return False
    return True


def _known(statistics: Statistics) -> tuple[list[float], list[float]]:
    """Return the measure of each batch under batch statistics and in eval mode.

    Raises:
        ArgumentError: There is no metric.
    """
    if statistics.single_value is not None:
        raise SingleValueError(statistics.single_value)
    found = statistics.evaluation
    if found is None:
        raise ArgumentError(_NO_NUMBER)
    if found.batch_metric:
        return list(found.batch_metric), list(found.running_metric)
    return [-v for v in found.batch_loss], [-v for v in found.running_loss]


def _measured(working: WorkingCopy) -> list[float]:
    """Return the measure of each batch."""
    result = working.run("answers")
    if len(result.metrics) != len(result.samples):
        raise ArgumentError(_NO_NUMBER)
    return result.metrics


def _layer_groups(
    warm: Mapping[str, RunningStatistics],
    population: Mapping[str, RunningStatistics],
    passes: int,
) -> dict[str, list[str]]:
    """Return the layers to swap, by the name of their part.

    Args:
        warm: The running statistics.
        population: Those to swap in.
        passes: Number of passes done so far.
    """
    names = [name for name in warm if name in population]
    most = max(MAX_PASSES - passes, 1)
    if len(names) <= most:
        return {name: [name] for name in names}
    distances = {n: apart(warm, population, population, [n]) for n in names}
    nearest = sorted(names, key=lambda n: -distances[n] if distances[n] > 0 else 0.0)
    alone = set(nearest[: most - 1])
    groups = {name: [name] for name in names if name in alone}
    others = [name for name in names if name not in alone]
    return {**groups, f"{len(others)} other layers": others}


def _part(
    name: str, steps: list[tuple[list[float], list[float]]], samples: list[int]
) -> GapPart:
    """Return the gain of the measure summed over steps `(new, old)` per batch."""
    gains = [0.0] * len(samples)
    for new, old in steps:
        gains = [g + a - b for g, a, b in zip(gains, new, old, strict=True)]
    return GapPart(name, mean_over_samples(gains, samples), standard_error(gains))

"""Populations: the statistics of batch norm inputs over a set of batches.

A population is the mean and variance of every batch norm's inputs over a set of
batches, normalized as in training. Where padding is known there are two: one over the
valid positions and one over all positions. Running statistics are attributed to one
population rather than to another where their distance to it is less than half the
distance between the two; statistics near neither are stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normkit.doctor.examination.case import Case
from normkit.doctor.examination.other_padding import other_padding
from normkit.doctor.measurements import NormStatistics, Statistics
from normkit.errors import ArgumentError
from normkit.modeling.unwrap import unwrapped
from normkit.moments import Moments

__all__ = [
    "Population",
    "Populations",
    "RunningStatistics",
    "apart",
    "as_running",
    "likely",
    "populations_of",
    "reference_of",
    "without_start",
    "write",
]


# Shares of padding that differ by less count as equal: batches of 64 sequences of 20
# positions, of lengths between 8 and 20, differ by .03.
SAME_PADDING = 0.05


class RunningStatistics(NamedTuple):
    """Running mean and variance of one layer, shape `(C,)`, float64 on the CPU."""

    mean: Tensor
    var: Tensor


Population = Mapping[str, RunningStatistics]


@dataclass(frozen=True)
class Populations:
    """The statistics of all batch norm inputs over one set of batches.

    Attributes:
        own: Moments of each layer's inputs, over the values that the layer normalizes:
            those of its mask, or all.
        other: Moments with padding counted the other way in all layers: masks ignored,
            or without the constant ends of sequences where there is no mask. Empty
            where no padding is known.
        is_masked: Some layer was called with a mask, so `own` is without padding.
    """

    own: dict[str, Moments]
    other: dict[str, Moments] = field(default_factory=dict)
    is_masked: bool = False

    @property
    def valid(self) -> dict[str, RunningStatistics]:
        """Statistics without padding, as far as it is known."""
        return as_running(self.other if self.other and not self.is_masked else self.own)

    @property
    def padding(self) -> float:
        """The share of positions that are padding, as far as it is known."""
        counts = [
            # One count for all channels, or one for each.
            sorted(float(n.count.double().mean()) for n in (self.own[name], m))
            for name, m in self.other.items()
            if name in self.own
        ]
        most = sum(larger for _, larger in counts)
        return 1 - sum(smaller for smaller, _ in counts) / most if most else 0.0

    def is_padded_like(self, another: Populations) -> bool:
        """Return True where both include or exclude padding, about as much of it."""
        return (
            self.is_masked == another.is_masked
            and abs(self.padding - another.padding) < SAME_PADDING
        )

    @classmethod
    def merge_all(cls, parts: Sequence[Populations]) -> Populations:
        """Return the populations of several sets of batches, or ranks, together."""
        is_masked = any(part.is_masked for part in parts)
        other: dict[str, Moments] = {}
        if any(part.other for part in parts):
            other = _merged([part.other or part.own for part in parts])
        return cls(_merged([part.own for part in parts]), other, is_masked)


def as_running(population: Mapping[str, Moments]) -> dict[str, RunningStatistics]:
    """Return a population as running statistics: mean and unbiased variance."""
    return {
        name: RunningStatistics(m.mean, m.unbiased_var)
        for name, m in population.items()
    }


def _merged(parts: list[dict[str, Moments]]) -> dict[str, Moments]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: Moments.merge_all([part[name] for part in parts if name in part])
        for name in names
    }


def populations_of(case: Case, statistics: Statistics) -> Populations:
    """Return the populations of a case that was already examined.

    Padding is known where a layer is called with `mask=`, or where the ends of
    sequences `(N, C, L)` are constant (D12): each takes one pass over the batches.
    """
    own = {
        layer.name: norm.in_training.pooled
        for layer, norm in statistics.norms
        if norm.in_training is not None and not norm.frozen
    }
    if not own:
        return Populations({})
    if any(norm.had_mask for _, norm in statistics.norms):
        other = other_padding(case, own, drops_masks=True)
        return Populations(own, other, is_masked=True)
    if any(norm.padding is not None for _, norm in statistics.norms):
        return Populations(own, other_padding(case, own, drops_masks=False))
    return Populations(own)


def _resembles(
    running: Population, one: Population, another: Population, names: Iterable[str]
) -> bool:
    """Return True where statistics clearly are those of `one`, not of `another`.

    Args:
        running: The running statistics.
        one: The population that `running` must be near to.
        another: The alternative; half its distance to `one` is the limit.
        names: The layers, judged together.
    """
    names = list(names)
    return apart(running, one, another, names) < apart(one, another, another, names) / 2


def likely(
    running: Population,
    whole: Populations,
    ranks: Sequence[Populations],
    names: Iterable[str],
) -> tuple[dict[str, RunningStatistics], int | None]:
    """Return the population that the running statistics most likely describe.

    That of one rank where they clearly match it, all layers judged together; else,
    layer by layer, that with padding counted the other way where they clearly match
    it; else that of the whole data, as normalized in training.

    Args:
        running: The running statistics.
        whole: The populations of the training data.
        ranks: The populations of each rank; ignored when fewer than two.
        names: The layers to judge.

    Returns:
        The population, and the rank if it is that of one rank.
    """
    names, own = list(names), as_running(whole.own)
    parts = [as_running(rank.own) for rank in ranks] if len(ranks) > 1 else []
    # Averages over batches of one rank after the other exclude the spread between the
    # ranks; that must not be mistaken for a rank whose data lie in the middle.
    between = _averaged([rank.own for rank in ranks])
    found = [
        (apart(running, part, own, names), index)
        for index, part in enumerate(parts)
        if _resembles(running, part, own, names)
        and _resembles(running, part, between, names)
    ]
    if found:
        rank = min(found)[1]
        return {**own, **{n: parts[rank][n] for n in names if n in parts[rank]}}, rank
    other = as_running(whole.other)
    turned = [n for n in names if n in other and _resembles(running, other, own, [n])]
    return {**own, **{name: other[name] for name in turned}}, None


def _averaged(parts: list[dict[str, Moments]]) -> dict[str, RunningStatistics]:
    """Return the parts together, without the spread between their means."""
    found = {}
    for name, whole in _merged(parts).items():
        inside = [part[name] for part in parts if name in part]
        m2 = torch.stack([part.m2 for part in inside]).sum(0)
        count = whole.count.to(m2.dtype) - len(inside)
        found[name] = RunningStatistics(whole.mean, m2 / count)
    return found


def apart(a: Population, b: Population, unit: Population, names: list[str]) -> float:
    """Return the distance of two populations: rms over layers and channels.

    In each channel the means differ in standard deviations of `unit`, and the standard
    deviations by the logarithm of their ratio. NaN where nothing can be compared; it is
    below no limit.
    """
    squares = []
    for name in names:
        if not (name in a and name in b and name in unit):
            continue
        scale = unit[name].var
        judged = (scale > 0) & (b[name].var > 0)
        shift = (a[name].mean - b[name].mean).square() / scale
        ratio = (a[name].var / b[name].var).log() / 2
        squares.append((shift + ratio.square())[judged])
    return float(torch.cat(squares).mean().sqrt()) if squares else float("nan")


def without_start(norm: NormStatistics) -> RunningStatistics | None:
    """Return the running averages without the initial mean 0 and variance 1.

    None where nothing remains of them, or the share is unknown.
    """
    if norm.frozen or not norm.momentum or not norm.tracked:
        return None
    weight = (1 - norm.momentum) ** norm.tracked
    if not 0 < weight < 1:
        return None
    # Rounding may make a small variance negative.
    var = ((norm.running_var - weight) / (1 - weight)).clamp(min=0)
    return RunningStatistics(norm.running_mean / (1 - weight), var)


def reference_of(
    statistics: Statistics, reference: nn.Module | Mapping[str, Any]
) -> dict[str, RunningStatistics]:
    """Return the reference statistics of the layers that were meant to be frozen.

    These are the layers in `reference` whose weight and bias require no gradients
    (D07), or all layers in it where there is none. Layers in eval mode while the model
    trains are left out: they are the same in both modes.

    Raises:
        ArgumentError: `reference` holds none of the layers, or of another shape, or is
            neither a model nor a state dict.
    """
    if not isinstance(reference, nn.Module | Mapping):
        raise ArgumentError(
            f"reference is a {type(reference).__name__}; give a model or its state "
            "dict: torch.load(path)"
        )
    state: Mapping[str, Any] = (
        unwrapped(reference).state_dict()
        if isinstance(reference, nn.Module)
        else reference
    )
    found, meant = {}, {}
    for layer, norm in statistics.norms:
        prefix = f"{layer.name}." if layer.name else ""
        mean, var = (state.get(f"{prefix}running_{key}") for key in ("mean", "var"))
        if mean is None or var is None:
            continue
        if mean.shape != norm.running_mean.shape or var.shape != mean.shape:
            raise ArgumentError(
                f"reference holds statistics of shape {tuple(mean.shape)} for "
                f"{layer.name!r}, which has {tuple(norm.running_mean.shape)}; give a "
                "checkpoint of this model"
            )
        found[layer.name] = norm
        meant[layer.name] = RunningStatistics(
            *(t.detach().to("cpu", torch.float64) for t in (mean, var))
        )
    if statistics.norms and not found:
        name = statistics.norms[0][0].name
        key = f"{name}.running_mean" if name else "running_mean"
        raise ArgumentError(
            f"reference holds none of the model's running statistics, such as {key!r}; "
            "give a state dict with the model's own names"
        )
    found = {name: norm for name, norm in found.items() if not norm.frozen}
    still = {
        name
        for name, norm in found.items()
        if norm.weight is not None and not norm.is_trainable
    }
    return {name: meant[name] for name in found if not still or name in still}


def write(
    model: nn.Module, population: Population, names: Iterable[str] | None = None
) -> None:
    """Write a population into the running statistics, in place.

    Args:
        model: The model; only its batch norms' running statistics change.
        population: The values; where one is not finite the old value stays.
        names: Only these layers; all by default.
    """
    modules = dict(model.named_modules())
    wanted = set(population if names is None else names)
    with torch.no_grad():
        for name, (mean, var) in population.items():
            if name not in wanted:
                continue
            module: Any = modules[name]
            kept = var.isfinite() & mean.isfinite()
            for buffer, value in (
                (module.running_mean, mean),
                (module.running_var, var),
            ):
                old = buffer.to("cpu", torch.float64)
                buffer.copy_(torch.where(kept, value, old))

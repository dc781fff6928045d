"""Of which data the running statistics of a model may be.

A population is the mean and variance of every batch norm's inputs over a set of
batches, normalized as in training. Where padding is known there are two: one over the
positions that count and one over all. Running statistics count as those of one
population rather than of another where they lie within half the distance between the
two of the first; what is that near to neither is stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.doctor.case import Case
from normkit.doctor.examine import opened
from normkit.doctor.layer_probe import constant_ends, merged
from normkit.doctor.measure import first_tensor
from normkit.doctor.statistics import NormStatistics, Statistics
from normkit.errors import ArgumentError
from normkit.modeling.unwrap import unwrapped
from normkit.moments import Moments, moments
from normkit.nn.batch_norm_layer import BatchNormLayer

__all__ = [
    "Held",
    "Populations",
    "held",
    "likely",
    "populations_of",
    "reference_of",
    "without_start",
    "write",
]


# Shares of padding that count as the same: 64 sequences of 20 positions, of lengths
# between 8 and 20, differ by .03 from one such batch to the next.
SAME_PADDING = 0.05


class Held(NamedTuple):
    """What the running statistics of one layer hold, in float64 on the CPU."""

    mean: Tensor
    var: Tensor


Population = Mapping[str, Held]


@dataclass(frozen=True)
class Populations:
    """What the batch norms of a model see of one set of batches.

    Attributes:
        own: Moments of each layer's inputs as the batches are normalized: where a
            mask is given over its positions, else over all.
        other: The same the other way, all layers alike: the masks left out, or the
            constant ends of sequences where there is none. Empty where no padding is
            known.
        is_masked: Some layer was given a mask, so that `own` is without padding.
    """

    own: dict[str, Moments]
    other: dict[str, Moments] = field(default_factory=dict)
    is_masked: bool = False

    @property
    def valid(self) -> dict[str, Held]:
        """Without padding, as far as it is known."""
        return held(self.other if self.other and not self.is_masked else self.own)

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
        """Whether padding enters both in the same way, and about as much of it."""
        return (
            self.is_masked == another.is_masked
            and abs(self.padding - another.padding) < SAME_PADDING
        )

    @classmethod
    def merge_all(cls, parts: Sequence[Populations]) -> Populations:
        """Those of several sets of batches together, as of several ranks."""
        is_masked = any(part.is_masked for part in parts)
        other: dict[str, Moments] = {}
        if any(part.other for part in parts):
            other = _merged([part.other or part.own for part in parts])
        return cls(_merged([part.own for part in parts]), other, is_masked)


def held(population: Mapping[str, Moments]) -> dict[str, Held]:
    """The population as running statistics hold it, with the unbiased variance."""
    return {name: Held(m.mean, m.unbiased_var) for name, m in population.items()}


def _merged(parts: list[dict[str, Moments]]) -> dict[str, Moments]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: Moments.merge_all([part[name] for part in parts if name in part])
        for name in names
    }


def populations_of(case: Case, statistics: Statistics) -> Populations:
    """The populations of a case that was examined already.

    Padding is known where a layer is called with `mask=`, or where the ends of
    sequences `(N, C, L)` are constant (D12). It takes a pass over the batches, and
    with constant ends another.
    """
    own = {
        layer.name: norm.stream.pooled
        for layer, norm in statistics.norms
        if norm.stream is not None and not norm.frozen
    }
    if not own:
        return Populations({})
    if other := _the_other_way(case, own, drops_masks=True):
        return Populations(own, other, is_masked=True)
    if any(norm.padding is not None for _, norm in statistics.norms):
        return Populations(own, _the_other_way(case, own, drops_masks=False))
    return Populations(own)


def _the_other_way(
    case: Case, names: Iterable[str], *, drops_masks: bool
) -> dict[str, Moments]:
    """Moments of inputs in training without the masks, or without constant ends.

    Empty where that is no other way: no layer was given a mask, or no end is constant.
    """
    with opened(case) as patient, torch.no_grad():
        way = _OtherWay(drops_masks=drops_masks)
        with way.attached(patient.model, names):
            patient.walk(streams=False, evaluate=False)
    return way.moments if way.is_other else {}


class _OtherWay:
    """Hooks that count padding the other way, in the layers and in what is measured."""

    def __init__(self, *, drops_masks: bool) -> None:
        self.drops_masks = drops_masks
        self.is_other = False
        self.moments: dict[str, Moments] = {}
        self._found: dict[nn.Module, Moments] = {}

    @contextmanager
    def attached(self, model: nn.Module, names: Iterable[str]) -> Iterator[None]:
        modules = dict(model.named_modules())
        handles = []
        try:
            for name in names:
                module = modules[name]

                def before(
                    module: nn.Module, args: Any, kwargs: Any, name: str = name
                ) -> Any:
                    return self._before(name, module, args, kwargs)

                handles += [
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(self._after),
                ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = first_tensor(args)
        x = first_tensor(kwargs) if x is None else x
        if x is None or x.dim() < 2:
            return None
        dim = getattr(module, "channel_dim", 1)
        x = x.detach().movedim(dim, 1)
        valid = None
        is_ours = isinstance(module, BatchNormLayer)
        if self.drops_masks:
            mask = kwargs.get("mask")
            if isinstance(mask, Tensor):
                self.is_other = True
                kwargs = {**kwargs, "mask": torch.ones_like(mask)}
        elif x.dim() == 3 and (ends := constant_ends(x)).any():
            self.is_other = True
            valid = ~ends[:, None]
            if is_ours:
                kwargs = {**kwargs, "mask": valid.movedim(1, dim)}
        dims = (0, *range(2, x.dim()))
        found = moments(x, dims, None if valid is None else valid.expand(x.shape))
        if valid is not None and not is_ours:
            self._found[module] = found  # torch's layers take no mask: see `_after`
        found = found.to(device="cpu", dtype=torch.float64)
        self.moments[name] = merged(self.moments.get(name), found)
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        found = self._found.pop(module, None)
        if found is None or not isinstance(module, _BatchNorm):
            return None
        x, dtype = args[0], args[0].dtype
        weight, bias = module.weight, module.bias
        mean, var = found.mean.to(dtype), found.var.to(dtype)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, module.eps)


def _resembles(
    running: Population, one: Population, another: Population, names: Iterable[str]
) -> bool:
    """Whether statistics are clearly those of one population, not of another.

    Args:
        running: What the layers hold.
        one: Within half the distance to `another`, `running` is of this one.
        another: What they would hold otherwise.
        names: The layers, judged together.
    """
    names = list(names)
    return (
        _apart(running, one, another, names) < _apart(one, another, another, names) / 2
    )


def likely(
    running: Population,
    whole: Populations,
    ranks: Sequence[Populations],
    names: Iterable[str],
) -> tuple[dict[str, Held], int | None]:
    """The population that the running statistics are of, as far as that can be told.

    One rank's where they are clearly those of one, all layers judged together; else,
    layer by layer, those with padding counted the other way where they are clearly
    these; else those of the whole data, as they are normalized in training.

    Args:
        running: What the layers hold.
        whole: The training data.
        ranks: The same, rank by rank; fewer than two are no ranks.
        names: The layers to judge.

    Returns:
        The population, and the rank if it is that of one.
    """
    names, own = list(names), held(whole.own)
    parts = [held(rank.own) for rank in ranks] if len(ranks) > 1 else []
    # Averages over batches of one rank after the other hold nothing of what lies
    # between the ranks, and are no middle rank's for that.
    between = _averaged([rank.own for rank in ranks])
    found = [
        (_apart(running, part, own, names), index)
        for index, part in enumerate(parts)
        if _resembles(running, part, own, names)
        and _resembles(running, part, between, names)
    ]
    if found:
        rank = min(found)[1]
        return {**own, **{n: parts[rank][n] for n in names if n in parts[rank]}}, rank
    other = held(whole.other)
    turned = [n for n in names if n in other and _resembles(running, other, own, [n])]
    return {**own, **{name: other[name] for name in turned}}, None


def _averaged(parts: list[dict[str, Moments]]) -> dict[str, Held]:
    """The parts together, but for how far their means lie apart."""
    found = {}
    for name, whole in _merged(parts).items():
        inside = [part[name] for part in parts if name in part]
        m2 = torch.stack([part.m2 for part in inside]).sum(0)
        count = whole.count.to(m2.dtype) - len(inside)
        found[name] = Held(whole.mean, m2 / count)
    return found


def _apart(a: Population, b: Population, unit: Population, names: list[str]) -> float:
    """How far two populations lie apart: rms over layers and channels.

    Of each channel the means count in standard deviations of `unit`, and the standard
    deviations by their logarithm. NaN, which is near to nothing, where nothing can be
    compared.
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


def without_start(norm: NormStatistics) -> Held | None:
    """The running averages without the initial mean 0 and variance 1 in them.

    None where there is nothing to take out, or no telling how much.
    """
    if norm.frozen or not norm.momentum or not norm.tracked:
        return None
    weight = (1 - norm.momentum) ** norm.tracked
    if not 0 < weight < 1:
        return None
    # Rounding may leave less than nothing of a small variance.
    var = ((norm.running_var - weight) / (1 - weight)).clamp(min=0)
    return Held(norm.running_mean / (1 - weight), var)


def reference_of(
    statistics: Statistics, reference: nn.Module | Mapping[str, Any]
) -> dict[str, Held]:
    """What the layers that were meant to be frozen were frozen at.

    Of the layers that `reference` holds these are the ones whose weight and bias do
    not ask for gradients (D07), or all where there is none. Layers in eval mode while
    the model trains are left out: they are the same in both modes.

    Raises:
        ArgumentError: `reference` holds none of the layers, or of another shape.
    """
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
        meant[layer.name] = Held(
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
        population: What to write; values that are not finite leave the old ones.
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

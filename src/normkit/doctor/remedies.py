"""What can be done to a model without training it: one remedy per check.

Most write better running statistics, taken from what the examination measured. The
others change what a layer does with its input (D06, D07), in which precision it keeps
its numbers (D16), or leave a layer out (D34). No remedy changes a weight's value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from normkit import nn as ours
from normkit.doctor.finding import Finding
from normkit.doctor.populations import held, write
from normkit.doctor.statistics import NormStatistics, Statistics
from normkit.doctor.streams import ChannelStream

__all__ = [
    "REMEDIES",
    "Remedy",
    "as_in_training",
    "freeze",
    "has_remedy",
    "in_full_precision",
    "set_statistics",
    "take_one_value",
    "torch_momentum",
    "with_dropout_off",
    "without_softmax",
]

# Changes a model in place, as the findings of one check ask for.
Remedy = Callable[[nn.Module, Statistics, list[Finding]], None]

_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: ours.BatchNorm1d,
    nn.BatchNorm2d: ours.BatchNorm2d,
    nn.BatchNorm3d: ours.BatchNorm3d,
    **{kind: kind for kind in (ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d)},
}


def set_statistics(
    model: nn.Module,
    statistics: Statistics,
    choose: Callable[[NormStatistics], ChannelStream | None],
    names: Iterable[str] | None = None,
) -> None:
    """Write measured statistics into the running ones, in place.

    Args:
        model: The model; only its batch norms' running statistics change.
        statistics: What was measured.
        choose: Which stream of a layer to take; None leaves the layer alone.
        names: Only these layers; all that are not frozen by default.
    """
    chosen = {
        layer.name: stream.pooled
        for layer, norm in statistics.norms
        if not norm.frozen and (stream := choose(norm)) is not None
    }
    write(model, held(chosen), names)


def as_in_training(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """The statistics of all batches, as training normalizes them."""
    set_statistics(model, statistics, lambda norm: norm.stream)


def torch_momentum(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """The same, and torch's momentum where it was another convention's."""
    as_in_training(model, statistics, findings)
    for module in _modules(model, findings):
        module.momentum = 0.1


def with_dropout_off(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """The statistics that eval mode meets behind a dropout."""
    set_statistics(model, statistics, lambda norm: norm.quiet)


def take_one_value(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """A batch of one is normalized by the running statistics, and leaves them."""
    names = {name for f in findings for name in f.details.get("layers", [f.layer])}
    for name, module in model.named_modules():
        if name in names and type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
            module.on_small_batch = "running"  # type: ignore[assignment]


def freeze(model: nn.Module, statistics: Statistics, findings: list[Finding]) -> None:
    """What is frozen stays in eval mode, whatever `train()` says."""
    for module in _modules(model, findings):
        if type(module) in _PLAIN:
            module.__class__ = ours.FrozenBatchNorm
            module.freeze(parameters=True)


def in_full_precision(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """Layers with half statistics in float32, with statistics that were never half."""
    names = [f.layer for f in findings if "dtype" in f.details]
    modules = dict(model.named_modules())
    for name in names:
        modules[name].float()
    set_statistics(model, statistics, lambda norm: norm.stream, names)


def without_softmax(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """The last softmax becomes an identity: the loss has one of its own."""
    name = "" if statistics.output is None else statistics.output.softmax
    if name:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = nn.Identity()


def _modules(model: nn.Module, findings: list[Finding]) -> list[Any]:
    modules = dict(model.named_modules())
    return [modules[f.layer] for f in findings]


_OF_STATISTICS = ("D01", "D02", "D03", "D05", "D17", "D31", "D32")
# In the order to apply them: with dropout off last, for that is what eval mode sees.
REMEDIES: dict[str, Remedy] = {
    "D34": without_softmax,
    "D16": in_full_precision,
    **dict.fromkeys(_OF_STATISTICS, as_in_training),
    "D04": torch_momentum,
    "D06": take_one_value,
    "D07": freeze,
    "D11": with_dropout_off,
}


def has_remedy(finding: Finding, statistics: Statistics) -> bool:
    """Whether something can be done about this finding without training."""
    if finding.id == "D34":
        out = statistics.output
        return "softmax" in finding.details and out is not None and bool(out.softmax)
    if finding.id == "D16":
        return "dtype" in finding.details
    return finding.id in REMEDIES

"""Repairs that need no training, one function per check.

Most write better running statistics, measured by the examination. The others change
how a layer treats its input (D06, D07), the precision of its buffers (D16), or remove
a layer (D34). No repair changes the value of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from normkit import nn as ours
from normkit.doctor.channel_statistics import ChannelStatistics
from normkit.doctor.examination.populations import as_running, write
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import NormStatistics, Statistics
from normkit.results import Result

__all__ = [
    "IN_CODE",
    "REPAIRS",
    "Repair",
    "RepairResult",
    "as_in_training",
    "can_repair",
    "freeze",
    "in_full_precision",
    "set_statistics",
    "take_one_value",
    "torch_momentum",
    "with_dropout_off",
    "without_softmax",
]

# Changes a model in place, as required by the findings of one check.
Repair = Callable[[nn.Module, Statistics, list[Finding]], None]


class RepairResult(Result, list[str]):
    """The ids of the checks whose repairs were applied.

    Attributes:
        declined: The repairs that were not applied, by id, each with the reason.
        code: What the program must change as well, by id: a repaired model has another
            setting, and the program that builds it anew has the old one.
    """

    def __init__(self, applied: Iterable[str], declined: dict[str, str]) -> None:
        super().__init__(applied)
        self.declined = declined
        self.code = {id_: IN_CODE[id_] for id_ in self if id_ in IN_CODE}

    def to_text(self) -> str:
        """Return the applied and declined repairs, and what the code needs."""
        if self:
            head = f"applied  {', '.join(self)}"
        elif self.declined:
            head = "nothing was changed: no repair was shown to improve the model"
        else:
            head = "nothing was changed: no finding has an automatic repair"
        lines = [head]
        lines += [f"in code  {id_}: {line}" for id_, line in self.code.items()]
        lines += [f"declined {reason}" for reason in self.declined.values()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {"applied": list(self), "declined": self.declined, "code": self.code}


# Statistics are saved with the weights; these settings are not.
IN_CODE = {
    "D04": "where the layers are made, write the momentum that the finding gives, or "
    "leave it out: torch's default is 0.1",
    "D06": "give the loader drop_last=True, or make these layers as "
    "normkit.nn.BatchNorm…(on_small_batch='running')",
    "D07": "after the weights are loaded, call normkit.convert(model, to='frozen')",
    "D16": "after model.half() or model.bfloat16(), call .float() on the batch norms",
    "D34": "delete the last nn.Softmax where the model is built",
}


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: ours.BatchNorm1d,
    nn.BatchNorm2d: ours.BatchNorm2d,
    nn.BatchNorm3d: ours.BatchNorm3d,
    **{kind: kind for kind in (ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d)},
}


def set_statistics(
    model: nn.Module,
    statistics: Statistics,
    choose: Callable[[NormStatistics], ChannelStatistics | None],
    names: Iterable[str] | None = None,
) -> None:
    """Write measured statistics into the running ones, in place.

    Args:
        model: The model; only its batch norms' running statistics change.
        statistics: What was measured.
        choose: Selects the channel statistics of a layer; None leaves the layer
            unchanged.
        names: Only these layers; all that are not frozen by default.
    """
    chosen = {
        layer.name: channels.pooled
        for layer, norm in statistics.norms
        if not norm.frozen and (channels := choose(norm)) is not None
    }
    write(model, as_running(chosen), names)


def as_in_training(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """Write the statistics of all batches, measured in training mode."""
    set_statistics(model, statistics, lambda norm: norm.in_training)


def torch_momentum(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """Write the same, and set momentum to torch's default of 0.1."""
    as_in_training(model, statistics, findings)
    for module in _modules(model, findings):
        module.momentum = 0.1


def with_dropout_off(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """Write the statistics of all batches, measured with dropout off."""
    set_statistics(model, statistics, lambda norm: norm.without_dropout)


def take_one_value(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """Normalize a batch of one value by the running statistics, unchanged."""
    names = {name for f in findings for name in f.details.get("layers", [f.layer])}
    for name, module in model.named_modules():
        if name in names and type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
            module.on_small_batch = "running"  # type: ignore[assignment]


def freeze(model: nn.Module, statistics: Statistics, findings: list[Finding]) -> None:
    """Keep layers with frozen parameters in eval mode, also after `train()`."""
    for module in _modules(model, findings):
        if type(module) in _PLAIN:
            module.__class__ = ours.FrozenBatchNorm
            module.freeze(parameters=True)


def in_full_precision(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """Convert layers with half-precision statistics to float32, measured anew."""
    names = [f.layer for f in findings if "dtype" in f.details]
    modules = dict(model.named_modules())
    for name in names:
        modules[name].float()
    set_statistics(model, statistics, lambda norm: norm.in_training, names)


def without_softmax(
    model: nn.Module, statistics: Statistics, findings: list[Finding]
) -> None:
    """Replace the last softmax with an identity: the loss applies its own."""
    name = "" if statistics.output is None else statistics.output.softmax
    if name:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = nn.Identity()


def _modules(model: nn.Module, findings: list[Finding]) -> list[Any]:
    modules = dict(model.named_modules())
    return [modules[f.layer] for f in findings]


_OF_STATISTICS = ("D01", "D02", "D03", "D05", "D17", "D31", "D32")
# In the order to apply them: statistics without dropout last, as in eval mode.
REPAIRS: dict[str, Repair] = {
    "D34": without_softmax,
    "D16": in_full_precision,
    **dict.fromkeys(_OF_STATISTICS, as_in_training),
    "D04": torch_momentum,
    "D06": take_one_value,
    "D07": freeze,
    "D11": with_dropout_off,
}


def can_repair(finding: Finding, statistics: Statistics) -> bool:
    """Return True where a repair without training exists for the finding."""
    if finding.id == "D34":
        out = statistics.output
        return "softmax" in finding.details and out is not None and bool(out.softmax)
    if finding.id == "D16":
        return "dtype" in finding.details
    if finding.details.get("is_of_answers", False):
        return False
    return finding.id in REPAIRS

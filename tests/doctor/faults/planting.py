"""What a planted fault is, and the parts that they are made of."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from doctor.models import NETS, SEQUENCES, batches, norms, trained
from normkit.doctor import Finding, diagnose
from normkit.doctor.finding import ranked

__all__ = [
    "ALL_NETS",
    "FAULTS",
    "LOSS",
    "OFF",
    "RATE",
    "STEPS",
    "WITHOUT",
    "Fault",
    "Program",
    "data",
    "fault",
    "first_norm",
    "names_of",
    "told",
    "usual",
    "weights_of",
]

ALL_NETS = (*NETS, *SEQUENCES)
LOSS = nn.CrossEntropyLoss()
STEPS = {"mlp": 120, "cnn": 120, "residual": 150, "gru": 200, "transformer": 150}
RATE = {"mlp": 0.1, "cnn": 0.1, "residual": 0.1, "gru": 0.3, "transformer": 0.3}


@dataclass(frozen=True)
class Program:
    """What is examined: a model with its batches, or a training that was watched.

    Attributes:
        model: The model; None where the training was watched.
        data: Its batches.
        watched: What `watch` said.
        meanwhile: What holds during the examination.
        at: The layers where the fault is; "" for the model as a whole.
    """

    model: nn.Module | None = None
    data: Iterable[Any] = ()
    watched: tuple[Finding, ...] = ()
    meanwhile: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    at: frozenset[str] = frozenset({""})


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes:
        plant: `plant(net, is_bad)` makes the program.
        brings: Other checks that may raise an alarm as well, and why that is right.
        is_info: The check informs, and raises no alarm.
    """

    plant: Callable[[str, bool], Program]
    brings: Mapping[str, str] = field(default_factory=dict)
    is_info: bool = False


FAULTS: dict[str, Fault] = {}
# Check -> network -> why the fault makes no sense there.
WITHOUT: dict[str, dict[str, str]] = {}

# What follows from running statistics that are wrong.
OFF = {
    "D01": "the running statistics are not those of the inputs",
    "D02": "eval mode uses the running statistics",
}


def told(program: Program) -> list[Finding]:
    """All that diagnosis and watch report, the most severe first."""
    readings = list(program.watched)
    if program.model is not None:
        with program.meanwhile():
            readings += diagnose(program.model, program.data, LOSS).readings
    return ranked(readings)


def fault(
    id_: str,
    *,
    brings: Mapping[str, str] | None = None,
    without: Mapping[str, str] | None = None,
    is_info: bool = False,
) -> Callable[..., Any]:
    """Register a function as what plants the fault of a check."""

    def register(plant: Callable[[str, bool], Program]) -> Any:
        FAULTS[id_] = Fault(plant, brings or {}, is_info)
        WITHOUT[id_] = dict(without or {})
        return plant

    return register


def usual(net: str, **options: Any) -> nn.Module:
    """A network trained as it should be, but for the options.

    Long enough that its weights have come to rest: while they still move, running
    statistics lag, and D01 and D02 rightly say so (of the GRU at 150 steps, of the
    residual network at 120).
    """
    return trained(net, STEPS[net], **{"lr": RATE[net], **options})


def data() -> list[tuple[Tensor, Tensor]]:
    return batches()[:24]


def weights_of(model: nn.Module) -> list[Any]:
    """Linear layers and convolutions, in order; the last one gives the classes."""
    kinds = (nn.Linear, nn.Conv2d)
    return [
        m
        for m in model.modules()
        if isinstance(m, kinds) and not isinstance(m, _InsideAttention)
    ]


_InsideAttention = nn.modules.linear.NonDynamicallyQuantizableLinear


def first_norm(model: nn.Module) -> Any:
    return next(iter(norms(model).values()))


def names_of(model: nn.Module, found: Iterable[Any] | type) -> frozenset[str]:
    """Dotted names of the given modules, or of all of one class."""
    wanted = (
        [m for m in model.modules() if isinstance(m, found)]
        if isinstance(found, type)
        else list(found)
    )
    return frozenset(n for n, m in model.named_modules() if any(m is w for w in wanted))

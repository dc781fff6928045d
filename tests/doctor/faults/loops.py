"""How the training goes, seen by watching it: D08, D09, D14, D15, D24, D27."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from doctor.faults.planting import LOSS, Program, data, fault, names_of, weights_of
from doctor.models import batches, build, norms, train
from normkit.doctor import watch

__all__ = []

# Validation comes once, after so many steps that the averages are warm.
STEPS, VALIDATED = 48, 31


def looped(
    net: str,
    *,
    rate: float = 0.1,
    decay: float = 0.0,
    size: int = 64,
    accumulate: int = 1,
    validate: Callable[[nn.Module], Any] | None = None,
) -> tuple[nn.Module, Program]:
    """Train and watch."""
    model = build(net)
    optimizer = torch.optim.SGD(model.parameters(), rate, weight_decay=decay)
    model.train()
    with watch(model, optimizer) as seen:
        rounds = itertools.cycle(batches(size))
        for index, (x, y) in enumerate(itertools.islice(rounds, STEPS)):
            LOSS(model(x), y).backward()
            if index % accumulate == accumulate - 1:
                optimizer.step()
                optimizer.zero_grad()
            if validate is not None and index == VALIDATED:
                validate(model)
    return model, Program(watched=tuple(seen.readings()))


def _validated(model: nn.Module) -> None:
    x, _ = batches()[0]
    with torch.no_grad():
        model(x)
        model(x)


@fault("D08")
def stays_in_eval(net: str, is_bad: bool) -> Program:
    """After validation nobody calls train()."""

    def validate(model: nn.Module) -> None:
        model.eval()
        _validated(model)
        model.train(not is_bad)

    model, seen = looped(net, validate=validate)
    return Program(watched=seen.watched, at=frozenset(["", *norms(model)]))


@fault("D09")
def validates_in_training_mode(net: str, is_bad: bool) -> Program:
    """Before validation nobody calls eval()."""

    def validate(model: nn.Module) -> None:
        model.train(is_bad)
        _validated(model)
        model.train()

    return looped(net, validate=validate)[1]


@fault("D14")
def decayed_scales(net: str, is_bad: bool) -> Program:
    """Strong weight decay on everything."""
    return looped(net, decay=0.1 if is_bad else 0.0)[1]


@fault("D15")
def accumulated(net: str, is_bad: bool) -> Program:
    """Four batches of eight for one step."""
    return (looped(net, size=8, accumulate=4) if is_bad else looped(net))[1]


@fault("D27", brings={"D24": "weights that hardly change stand still"})
def tiny_steps(net: str, is_bad: bool) -> Program:
    """A learning rate a million times too small."""
    model, seen = looped(net, rate=1e-7 if is_bad else 0.1)
    return Program(watched=seen.watched, at=names_of(model, weights_of(model)))


@fault(
    "D24",
    brings={
        "D27": "weights that stand still hardly change",
        "D34": "without gradients nothing is learned, and answers say nothing",
    },
)
def no_gradient(net: str, is_bad: bool) -> Program:
    """Sigmoids in many layers; with few layers, or past them, steps of nothing."""
    if net in ("mlp", "cnn"):
        model = build(net, act=nn.Sigmoid, depth=6, normalized=not is_bad)
        train(model, 150)
        return Program(model, data(), at=names_of(model, weights_of(model)[:1]))
    model, seen = looped(net, rate=1e-9 if is_bad else 0.1)
    return Program(watched=seen.watched, at=names_of(model, weights_of(model)))

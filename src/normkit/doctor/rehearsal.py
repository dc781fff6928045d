"""A few steps of training under `watch`, after which everything is as it was.

Some checks need weights that move: whether a step fits the weights, whether the layers
are in the right mode, whether gradients are accumulated over small batches.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normkit.doctor import checks
from normkit.doctor.case import Case
from normkit.doctor.finding import Finding
from normkit.doctor.watcher import Watch, watch
from normkit.errors import ArgumentError
from normkit.modeling.batch import device_of, to_device
from normkit.modeling.snapshot import Snapshot, preserved_random

__all__ = ["observed", "rehearsed"]

# Observe no more than so many steps; the rest pass by.
MOST_OBSERVED = 50


def rehearsed(
    case: Case, optimizer: torch.optim.Optimizer, steps: int
) -> list[Finding]:
    """Train a copy of the model and of its optimizer in the plainest loop.

    One batch, one update, in training mode. What only the program's own loop can show
    (D08, D09, D15) is not judged.

    Raises:
        ArgumentError: There is no loss, the optimizer has other parameters than the
            model, or the two cannot be copied.
    """
    loss_fn = case.loss_fn
    if loss_fn is None:
        raise ArgumentError("steps of training need a loss; pass loss_fn= to diagnose")
    own = {id(parameter) for parameter in case.model.parameters()}
    groups = optimizer.param_groups
    if not any(id(p) in own for group in groups for p in group["params"]):
        raise ArgumentError(
            f"none of the parameters of this {type(optimizer).__name__} are the "
            "model's; make it from model.parameters()"
        )
    with preserved_random(case.model, seed=case.seed):
        try:
            # Together, so that the copy of the one holds the parameters of the other.
            model, twin = copy.deepcopy((case.model, optimizer))
        except Exception as error:  # deepcopy calls anything that a model may hold
            raise ArgumentError(
                f"the model and its optimizer cannot be copied ({error}); pass "
                "train=, a function that trains them for so many steps"
            ) from error
        device = device_of(model)
        if not model.training:
            model.train()
        with watch(model, twin, every=_every(steps)) as seen, torch.enable_grad():
            for batch in itertools.islice(itertools.cycle(case.batches), steps):
                batch = to_device(batch, device)
                twin.zero_grad()
                loss_fn(case.forward(model, batch), case.targets(batch)).backward()
                twin.step()
        return _readings(seen, is_rehearsed=True)


def observed(
    case: Case,
    train: Callable[[int], Any],
    optimizer: torch.optim.Optimizer | None,
    steps: int,
) -> list[Finding]:
    """Watch the program's own loop, and put model and optimizer back afterwards.

    Args:
        case: What is examined.
        train: `train(steps)` trains the case's model for about so many steps.
        optimizer: The optimizer that it uses.
        steps: How many to ask for.
    """
    with preserved_random(case.model), _put_back(case.model, optimizer):
        with watch(case.model, optimizer, every=_every(steps)) as seen:
            train(steps)
        return _readings(seen, is_rehearsed=False)


def _every(steps: int) -> int:
    return max(1, steps // MOST_OBSERVED)


def _readings(seen: Watch, *, is_rehearsed: bool) -> list[Finding]:
    statistics = seen.statistics()
    if not statistics.layers or statistics.training is None:
        return seen.readings()
    training = replace(statistics.training, is_rehearsed=is_rehearsed)
    return checks.run(replace(statistics, training=training))


@contextmanager
def _put_back(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[None]:
    before = Snapshot.take(model, parameters=True)
    state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    try:
        yield
    finally:
        before.restore()
        if optimizer is not None and state is not None:
            optimizer.load_state_dict(state)

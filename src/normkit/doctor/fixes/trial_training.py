"""A few steps of training under `watch`, after which everything is restored.

Some checks need weights that move: the size of a step, the modes of the layers, the
accumulation of gradients over small batches.
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
from normkit.doctor.examination.case import Case
from normkit.doctor.finding import Finding
from normkit.doctor.watch import Watch, watch
from normkit.errors import ArgumentError
from normkit.modeling.batch import device_of, to_device
from normkit.modeling.other_modules import backward_into, others_preserved
from normkit.modeling.snapshot import Snapshot, preserved_random
from normkit.progress import tracked

__all__ = ["train_copy", "watch_own_loop", "with_training"]

# The most steps to observe; the others run without probes.
MAX_OBSERVED = 50


def train_copy(
    case: Case,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    progress: bool = False,
) -> list[Finding]:
    """Train a copy of the model and of its optimizer: one batch, one update.

    The copy is in training mode. Checks of the program's own loop (D08, D09, D15) are
    not judged. `progress` shows a bar over the steps.

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
            # Together, so that the copied optimizer holds the copied parameters.
            model, twin = copy.deepcopy((case.model, optimizer))
        except Exception as error:  # deepcopy calls anything that a model may hold
            raise ArgumentError(
                f"the model and its optimizer cannot be copied ({error}); pass "
                "train=, a function that trains them for so many steps"
            ) from error
        device = device_of(model)
        if not model.training:
            model.train()
        with (
            others_preserved(model),
            watch(model, twin, every=_every(steps)) as watched,
            torch.enable_grad(),
        ):
            batches = itertools.islice(itertools.cycle(case.batches), steps)
            for batch in tracked(batches, "train", steps, shown=progress):
                batch = to_device(batch, device)
                twin.zero_grad()
                loss = loss_fn(case.forward(model, batch), case.targets(batch))
                backward_into(model, loss)
                twin.step()
        return _readings(watched, is_trial=True)


def watch_own_loop(
    case: Case,
    train: Callable[[int], Any],
    optimizer: torch.optim.Optimizer | None,
    steps: int,
) -> list[Finding]:
    """Watch the program's own loop, and restore model and optimizer afterwards.

    Args:
        case: The case that was examined.
        train: `train(steps)` trains the case's model for about so many steps.
        optimizer: The optimizer of that loop.
        steps: Number of steps to request.
    """
    with preserved_random(case.model), _restored(case.model, optimizer):
        with watch(case.model, optimizer, every=_every(steps)) as watched:
            train(steps)
        return _readings(watched, is_trial=False)


def with_training(readings: list[Finding], found: list[Finding]) -> list[Finding]:
    """Return `readings` with what training adds, in the order of the checks.

    That is what was not judged without training, and alarms of gradients (D24, D25).
    """
    judged = {f.id for f in readings if f.severity != "not_judged"}
    added = [
        f
        for f in found
        if f.id not in judged or (f.id in ("D24", "D25") and f.is_alarm)
    ]
    replaced = {f.id for f in added}
    kept = [f for f in readings if f.severity != "not_judged" or f.id not in replaced]
    return sorted([*kept, *added], key=lambda f: f.id)


def _every(steps: int) -> int:
    return max(1, steps // MAX_OBSERVED)


def _readings(watched: Watch, *, is_trial: bool) -> list[Finding]:
    statistics = watched.statistics()
    if not statistics.layers or statistics.training is None:
        return watched.readings()
    training = replace(statistics.training, is_trial=is_trial)
    return checks.run(replace(statistics, training=training))


@contextmanager
def _restored(
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

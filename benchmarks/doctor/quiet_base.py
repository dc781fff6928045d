"""Common parts of the healthy programs of quiet_runs.py: training, data, score."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "PROGRAMS",
    "Subject",
    "Training",
    "accuracy",
    "digits",
    "feed",
    "program",
    "shuffled",
    "split",
    "supervised",
]

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Subject:
    """A model that is diagnosed and watched, with the batches it is trained on."""

    model: nn.Module
    batches: Callable[[], list[Any]]
    loss_fn: Callable[[Any, Any], Tensor] | None
    optimizer: torch.optim.Optimizer | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    targets: Callable[[Any], Any] | None = None
    name: str = ""
    only_at_the_end: bool = False


@dataclass(frozen=True)
class Training:
    """A training loop that can be halted after any step.

    `step(i)` takes step i and returns its loss; `score()` is at least `goal` after
    `steps` of them where the program learns.
    """

    subjects: list[Subject]
    step: Callable[[int], float]
    steps: int
    score: Callable[[], float]
    goal: float


Program = Callable[[], Training]
PROGRAMS: dict[str, Program] = {}


def program(build: Program) -> Program:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(11))
    x = torch.tensor(x, dtype=torch.float32)[order] / 16
    return x.reshape(-1, 1, 8, 8), torch.tensor(y)[order]


def digits() -> tuple[Batch, Batch]:
    """Return 1400 digits `(N, 1, 8, 8)` in [0, 1] with labels, and 397 held out."""
    x, y = _digits()
    return (x[:1400].clone(), y[:1400].clone()), (x[1400:].clone(), y[1400:].clone())


def split(x: Any, y: Tensor, n: int) -> tuple[Batch, Batch]:
    """Return the first n samples, and the others, held out."""
    if isinstance(x, tuple):
        return (tuple(a[:n] for a in x), y[:n]), (tuple(a[n:] for a in x), y[n:])
    return (x[:n], y[:n]), (x[n:], y[n:])


def shuffled(data: Batch, size: int) -> list[Batch]:
    """Return an epoch of full batches in random order."""
    x, y = data
    order = torch.randperm(len(y))
    parts = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    if isinstance(x, tuple):
        return [(tuple(a[p] for a in x), y[p]) for p in parts]
    return [(x[p], y[p]) for p in parts]


def _endless(data: Batch, size: int) -> Iterator[Batch]:
    while True:
        yield from shuffled(data, size)


def feed(model: nn.Module, batch: Any) -> Any:
    """Call the model on the inputs of a batch, one tensor or several."""
    inputs = batch[0]
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def accuracy(model: nn.Module, data: Batch) -> float:
    """Return the accuracy in eval mode."""
    model.eval()
    with torch.no_grad():
        right = (feed(model, data).argmax(-1) == data[1]).float().mean()
    return float(right)


@dataclass
class _Loop:
    """Plain supervised training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[[Any, Any], Tensor]
    batches: Iterator[Batch]
    schedule: Any = None
    clip: float | None = None
    accumulate: int = 1
    change: Callable[[Batch], Batch] | None = None
    after: Callable[[], None] | None = None
    calls: int = field(default=0)

    def __call__(self, i: int) -> float:
        self.model.train()
        self.optimizer.zero_grad()
        total = 0.0
        for _ in range(self.accumulate):
            batch = next(self.batches)
            batch = self.change(batch) if self.change else batch
            loss = self.loss_fn(feed(self.model, batch), batch[1]) / self.accumulate
            loss.backward()
            total += float(loss.detach())
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if self.after is not None:
            self.after()
        return total


def supervised(
    model: nn.Module,
    train: Batch,
    test: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    size: int,
    steps: int,
    goal: float,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    score: Callable[[nn.Module, Batch], float] = accuracy,
    change: Callable[[Batch], Batch] | None = None,
    extra: list[Subject] | None = None,
    **options: Any,
) -> Training:
    """Return the training of `model` on batches of `train`, scored on `test`.

    Args:
        model: Any module.
        train: Inputs, one tensor or a tuple of them, and targets.
        test: The same, held out.
        optimizer: Of the model's parameters.
        size: Samples of a batch.
        steps: Steps of the optimizer.
        goal: The least score of a run that has learned.
        loss_fn: `loss_fn(output, targets)`.
        score: `score(model, test)`, higher is better.
        change: Augmentation of a batch.
        extra: Further models to examine.
        options: `schedule`, `clip`, `accumulate`, `after` of the loop.
    """
    loop = _Loop(
        model, optimizer, loss_fn, _endless(train, size), change=change, **options
    )

    def batches() -> list[Batch]:
        epoch = shuffled(train, size)[:40]
        return [change(b) for b in epoch] if change else epoch

    return Training(
        [Subject(model, batches, loss_fn, optimizer), *(extra or [])],
        loop,
        steps,
        lambda: score(model, test),
        goal,
    )

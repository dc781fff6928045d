"""Step 1: train a deep sigmoid network without and with batch norm, and a CNN."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.demo.check import Check, percent
from normkit.demo.digits import Digits
from normkit.demo.networks import deep_sigmoid_network, residual_cnn
from normkit.doctor import Watch, watch

__all__ = [
    "CHANCE",
    "Recipe",
    "TrainStep",
    "Trained",
    "accuracy",
    "accuracy_by_batch_statistics",
    "train",
    "train_networks",
]

CHANCE = 0.1
# Accuracy of a network that knows two of ten digits and guesses the others: 0.28.
STAYED_NEAR_CHANCE = 0.3
LEARNED = 0.85
BATCH_SIZE = 64

Tick = Callable[[], None]


@dataclass(frozen=True)
class Recipe:
    """Training by SGD with a learning rate that falls linearly to zero.

    Attributes:
        steps: Number of batches.
        lr: Learning rate at the start.
        momentum: Momentum of SGD.
        seed: Random seed of the order of the images.
    """

    steps: int
    lr: float
    momentum: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        name: Name in the report.
        model: The network, in eval mode.
        recipe: Training recipe.
        curve: Test accuracy in eval mode after so many steps: (step, share).
        watch: The record of the training, if it was watched.
    """

    name: str
    model: nn.Module
    recipe: Recipe
    curve: list[tuple[int, float]] = field(repr=False)
    watch: Watch | None = field(default=None, repr=False)

    @property
    def accuracy(self) -> float:
        """Test accuracy at the end, in eval mode."""
        return self.curve[-1][1]

    @property
    def num_parameters(self) -> int:
        """Number of learned parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class TrainStep:
    """The three networks.

    Attributes:
        plain: Six sigmoid layers without normalization.
        normalized: The same with batch norm before each sigmoid.
        cnn: A residual CNN with batch norm.
        seconds: Duration of the step.
    """

    plain: Trained
    normalized: Trained
    cnn: Trained
    seconds: float
    title: ClassVar[str] = "Train, without and with batch norm"

    @property
    def networks(self) -> tuple[Trained, Trained, Trained]:
        """The three, in order."""
        return self.plain, self.normalized, self.cnn

    @property
    def checks(self) -> list[Check]:
        """The network without batch norm stays near chance, the others learn."""
        plain, *learned = self.networks
        return [
            Check(
                f"test accuracy, {plain.name}",
                plain.accuracy,
                percent(plain.accuracy),
                f"below {STAYED_NEAR_CHANCE:.0%}",
                plain.accuracy < STAYED_NEAR_CHANCE,
            ),
            *(
                Check(
                    f"test accuracy, {each.name}",
                    each.accuracy,
                    percent(each.accuracy),
                    f"above {LEARNED:.0%}",
                    each.accuracy > LEARNED,
                )
                for each in learned
            ),
        ]

    def to_data(self) -> dict[str, Any]:
        """Return the numbers of the table and of the chart."""
        return {
            "networks": [
                {
                    "name": each.name,
                    "parameters": each.num_parameters,
                    "steps": each.recipe.steps,
                    "lr": each.recipe.lr,
                    "accuracy": each.accuracy,
                    "curve": each.curve,
                }
                for each in self.networks
            ]
        }


def train_networks(
    digits: Digits, *, seed: int, sigmoid_steps: int, cnn_steps: int, tick: Tick
) -> TrainStep:
    """Train the three networks; the sigmoid networks differ only in batch norm."""
    start = time.perf_counter()
    recipe = Recipe(sigmoid_steps, lr=0.5, seed=seed)
    plain, normalized = (
        train(
            name,
            deep_sigmoid_network(is_normalized=is_normalized, seed=seed),
            digits,
            recipe,
            watch_every=max(sigmoid_steps // 60, 1),
            tick=tick,
        )
        for name, is_normalized in (
            ("sigmoid network", False),
            ("sigmoid network + batch norm", True),
        )
    )
    cnn = train(
        "residual CNN + batch norm",
        residual_cnn(seed=seed),
        digits,
        Recipe(cnn_steps, lr=0.1, momentum=0.9, seed=seed),
        tick=tick,
    )
    return TrainStep(plain, normalized, cnn, time.perf_counter() - start)


def train(
    name: str,
    model: nn.Module,
    digits: Digits,
    recipe: Recipe,
    *,
    watch_every: int | None = None,
    tick: Tick,
) -> Trained:
    """Train `model` in place; watch every `watch_every` steps if given."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / recipe.steps
    )
    batches = digits.batches(BATCH_SIZE, seed=recipe.seed)
    evaluate_every = max(recipe.steps // 24, 1)
    curve = [(0, accuracy(model, digits))]

    def learn() -> None:
        step = 0
        while step < recipe.steps:
            for images, labels in batches:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                tick()
                if step % evaluate_every == 0 or step == recipe.steps:
                    curve.append((step, accuracy(model, digits)))
                if step == recipe.steps:
                    return

    model.train()
    if watch_every is None:
        learn()
        return Trained(name, model.eval(), recipe, curve)
    with watch(model, optimizer, every=watch_every) as seen:
        learn()
    return Trained(name, model.eval(), recipe, curve, seen)


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the test accuracy of `model` in eval mode."""
    was_training = model.training
    model.eval()
    try:
        return _share_right(model, digits.test_images, digits.test_labels)
    finally:
        model.train(was_training)


def accuracy_by_batch_statistics(model: nn.Module, digits: Digits) -> float:
    """Return the test accuracy in training mode, normalized by the test images."""
    return _share_right(
        copy.deepcopy(model).train(), digits.test_images, digits.test_labels
    )


@torch.no_grad()
def _share_right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return int((model(images).argmax(1) == labels).sum()) / len(labels)

"""Step 4: fold every batch norm of the CNN away and measure the difference."""

from __future__ import annotations

import copy
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkit.demo.check import Check, percent
from normkit.demo.digits import Digits
from normkit.demo.training import BATCH_SIZE, Tick, Trained, accuracy
from normkit.fold import FoldLedger, fold

__all__ = ["FoldStep", "fold_away"]

MAX_DIFFERENCE = 1e-9
# Warm-up rounds, not counted.
WARM_UP = 3


@dataclass(frozen=True)
class FoldStep:
    """The CNN before and after.

    Attributes:
        name: The network.
        ledger: The entries of the fold, one per batch norm.
        difference: The largest difference of any score of any test image, before and
            after a fold in float64.
        difference_float32: The same for the fold in float32; the other numbers are
            about this one.
        accuracy_before: Test accuracy.
        accuracy_after: Test accuracy of the folded network, in float32 as well.
        num_changed: Test images classified differently.
        speed: Median over rounds of the time before over the time after.
        speed_quartiles: The middle half of the rounds.
        seconds: Duration of the step.
    """

    name: str
    ledger: FoldLedger
    difference: float
    difference_float32: float
    accuracy_before: float
    accuracy_after: float
    num_changed: int
    speed: float
    speed_quartiles: tuple[float, float]
    seconds: float
    title: ClassVar[str] = "Fold the batch norms away"

    @property
    def checks(self) -> list[Check]:
        """All batch norms are folded and no score changes."""
        folded, total = len(self.ledger.folded), len(self.ledger.entries)
        return [
            Check(
                "batch norms folded",
                [folded, total],
                f"{folded} of {total}",
                "all",
                folded == total > 0,
            ),
            Check(
                "largest difference of a score, in float64",
                self.difference,
                f"{self.difference:.1e}",
                f"below {MAX_DIFFERENCE:.0e}",
                self.difference < MAX_DIFFERENCE,
            ),
            Check(
                "test accuracy, folded",
                self.accuracy_after,
                percent(self.accuracy_after),
                f"unchanged from {percent(self.accuracy_before)}",
                self.accuracy_after == self.accuracy_before,
            ),
        ]

    def to_data(self) -> dict[str, Any]:
        """Return the ledger and the other numbers."""
        return {
            "network": self.name,
            "ledger": json.loads(self.ledger.to_json()),
            "difference": self.difference,
            "difference_float32": self.difference_float32,
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            "named_differently": self.num_changed,
            "speed": self.speed,
            "speed_quartiles": self.speed_quartiles,
        }


def fold_away(digits: Digits, network: Trained, *, rounds: int, tick: Tick) -> FoldStep:
    """Fold `network` and compare the two on the test images."""
    start = time.perf_counter()
    model, images = network.model.eval(), digits.test_images
    folded, ledger = fold(model, images[:BATCH_SIZE])
    before, after = _scores(model, images), _scores(folded, images)
    # Folded weights are rounded to the model's dtype; the algebra shows in float64.
    exact = copy.deepcopy(model).double()
    exactly_folded, _ = fold(exact, images[:BATCH_SIZE].double())
    exactly_before = _scores(exact, images.double())
    exactly_after = _scores(exactly_folded, images.double())
    ratios = _time_ratios(model, folded, images[:BATCH_SIZE], rounds, tick)
    lower, speed, upper = statistics.quantiles(ratios, n=4)
    return FoldStep(
        name=network.name,
        ledger=ledger,
        difference=float((exactly_before - exactly_after).abs().max()),
        difference_float32=float((before - after).abs().max()),
        accuracy_before=accuracy(model, digits),
        accuracy_after=accuracy(folded, digits),
        num_changed=int((before.argmax(1) != after.argmax(1)).sum()),
        speed=speed,
        speed_quartiles=(lower, upper),
        seconds=time.perf_counter() - start,
    )


@torch.no_grad()
def _scores(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


@torch.no_grad()
def _time_ratios(
    model: nn.Module, folded: nn.Module, images: Tensor, rounds: int, tick: Tick
) -> list[float]:
    """Return the time of `model` over that of `folded`, in turns, per round."""
    ratios = []
    for i in range(WARM_UP + rounds):
        # The order alternates, so that neither always finds the caches warm.
        seconds = {}
        for each in (model, folded) if i % 2 else (folded, model):
            start = time.perf_counter()
            for _ in range(3):
                each(images)
            seconds[each is folded] = time.perf_counter() - start
        tick()
        if i >= WARM_UP:
            ratios.append(seconds[False] / seconds[True])
    return ratios

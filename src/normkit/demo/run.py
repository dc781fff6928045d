"""Run the four steps of the demo, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from normkit.demo.digits import load_digits
from normkit.demo.folding import WARM_UP, fold_away
from normkit.demo.repair import break_and_repair
from normkit.demo.result import DemoResult
from normkit.demo.training import train_networks
from normkit.demo.watching import look_back
from normkit.environment import environment
from normkit.errors import ArgumentError
from normkit.torch_state import number_of_threads

__all__ = ["run_demo"]


class Length(NamedTuple):
    """Length of a run: training steps, diagnosed batches, rounds of timing."""

    sigmoid_steps: int
    cnn_steps: int
    batches: int
    rounds: int


# The checks are the same in both.
FULL, QUICK = Length(600, 300, 20, 30), Length(120, 100, 10, 10)


def run_demo(
    *,
    seed: int = 0,
    quick: bool = False,
    on_progress: Callable[[str, float], None] | None = None,
) -> DemoResult:
    """Train, watch, break, repair and fold networks on handwritten digits.

    Args:
        seed: Random seed of the data split, the weights and the order of the images.
            The same seed on the same machine gives the same numbers except times.
        quick: Train for fewer steps, with the same checks.
        on_progress: Called with the name of the current stage and the share done.

    Returns:
        The result; `held` is True where every check held.

    Raises:
        ArgumentError: `seed` is negative.
        DependencyError: scikit-learn is not installed.
    """
    if seed < 0:
        raise ArgumentError(f"seed={seed} must not be negative; give 0 or more")
    length = QUICK if quick else FULL
    training = 2 * length.sigmoid_steps + 2 * length.cnn_steps
    ticks = _Ticks(training + WARM_UP + length.rounds, on_progress)
    start = time.perf_counter()
    # Networks this small lose more by synchronization than a second thread gains, and
    # sums that do not depend on the number of threads repeat on another machine.
    with number_of_threads(1):
        digits = load_digits(seed)
        ticks.begin("training without and with batch norm")
        trained = train_networks(
            digits,
            seed=seed,
            sigmoid_steps=length.sigmoid_steps,
            cnn_steps=length.cnn_steps,
            tick=ticks,
        )
        watched = look_back(trained.plain, trained.normalized)
        ticks.begin("breaking, diagnosing, calibrating")
        repaired = break_and_repair(
            digits, trained.cnn, batches=length.batches, tick=ticks
        )
        ticks.begin("folding")
        folded = fold_away(digits, trained.cnn, rounds=length.rounds, tick=ticks)
        return DemoResult(
            seed=seed,
            is_quick=quick,
            seconds=time.perf_counter() - start,
            environment=environment(),
            train=trained,
            watch=watched,
            repair=repaired,
            fold=folded,
        )


class _Ticks:
    """Counts the finished steps and reports the progress."""

    def __init__(
        self, total: int, on_progress: Callable[[str, float], None] | None
    ) -> None:
        self.total, self.done, self.text = total, 0, ""
        self._tell = on_progress or (lambda text, share: None)

    def begin(self, text: str) -> None:
        self.text = text
        self._tell(text, self.done / self.total)

    def __call__(self) -> None:
        self.done += 1
        self._tell(self.text, self.done / self.total)

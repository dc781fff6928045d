"""Hunts: random cases of every kind until the time is over, with seeds printed.

    PYTHONPATH=tests python -m fuzz                       every hunt, 10 minutes
    PYTHONPATH=tests python -m fuzz layers --seconds 60   one of them
    PYTHONPATH=tests python -m fuzz layers --seed 7       from that seed on
    PYTHONPATH=tests python -m fuzz layers 'LayerCase(kind="BatchNorm", shape=(2, 3))'

Hypothesis draws the cases and makes a failing one small; its repr is the last line.
"""

import itertools
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import FlakyFailure
from hypothesis.strategies import SearchStrategy

from fuzz import cases, files, layers, networks, others

# Cases that one seed draws.
BATCH = 40


@dataclass(frozen=True)
class Hunt:
    """A strategy, and the check that each of its cases must pass."""

    cases: SearchStrategy[Any]
    check: Callable[[Any], None]


@dataclass
class Outcome:
    """Outcome of a hunt."""

    name: str
    tried: int = 0
    seeds: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        """Return a line, and one for each failure."""
        seeds = f"{self.seeds[0]} to {self.seeds[-1]}" if self.seeds else "none"
        head = f"{self.name}: {self.tried} cases, seeds {seeds}, "
        return "\n".join([f"{head}{len(self.failures)} failures", *self.failures])


HUNTS = {
    "layers": Hunt(cases.layer_cases(), layers.check),
    "others": Hunt(others.other_cases(), others.check),
    "fold": Hunt(networks.network_cases, networks.check_fold),
    "convert": Hunt(networks.network_cases, networks.check_convert),
    "onnx": Hunt(files.onnx_cases, files.check_onnx),
    "checkpoints": Hunt(files.checkpoint_cases, files.check_checkpoint),
}


def hunt(
    name: str,
    *,
    seconds: float,
    first_seed: int = 0,
    most_failures: int = 5,
    shrinks: bool = True,
    strategy: SearchStrategy[Any] | None = None,
) -> Outcome:
    """Draw cases from `first_seed` on until the time is over.

    Args:
        name: One of `HUNTS`.
        seconds: Processor time for new seeds, so that a busy machine tries as much; the
            last one, and making a failure small, add to it.
        first_seed: Each seed draws `BATCH` cases.
        most_failures: Stop after that many.
        shrinks: Make a failing case small.
        strategy: Other cases for the same check.
    """
    known, outcome = HUNTS[name], Outcome(name)
    end = time.process_time() + seconds
    last: list[Any] = []
    phases = [Phase.generate, Phase.shrink] if shrinks else [Phase.generate]
    for number in itertools.count(first_seed):
        if time.process_time() > end and outcome.seeds:
            return outcome
        outcome.seeds.append(number)

        def one(case: Any) -> None:
            last[:] = [case]
            outcome.tried += 1
            known.check(case)

        run = settings(
            max_examples=BATCH,
            phases=phases,
            database=None,
            deadline=None,
            derandomize=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )(seed(number)(given(strategy or known.cases)(one)))
        try:
            run()
        except (Exception, FlakyFailure) as error:
            line = str(error).strip().splitlines() or [""]
            outcome.failures.append(
                f"  seed {number}: {type(error).__name__}: {line[0][:300]}\n"
                f"  python -m fuzz {name} {shlex.quote(repr(last[0]))}"
            )
            if len(outcome.failures) >= most_failures:
                return outcome
    raise AssertionError("unreachable")


def run_case(name: str, text: str) -> None:
    """Run the case that a failure printed."""
    known = {
        cls.__name__: cls
        for cls in (
            *(cases.LayerCase, cases.OtherCase),
            *(networks.NetworkCase, files.FileCase),
        )
    }
    HUNTS[name].check(eval(text, {"__builtins__": {}, **known}))

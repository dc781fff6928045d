"""What a run of the demo measured, and whether each step did what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normkit.environment import Environment

if TYPE_CHECKING:
    from normkit.demo.folding import FoldStep
    from normkit.demo.repair import RepairStep
    from normkit.demo.training import TrainStep
    from normkit.demo.watching import WatchStep

__all__ = ["SCHEMA", "Check", "DemoResult", "percent", "plain"]

SCHEMA = "normkit.demo/1"


@dataclass(frozen=True)
class Check:
    """One thing that a step must have done.

    Attributes:
        what: What was measured.
        value: As measured.
        shown: The value for a reader.
        required: What it has to be, for a reader.
        held: Whether it was.
    """

    what: str
    value: Any
    shown: str
    required: str
    held: bool


@dataclass(frozen=True)
class DemoResult:
    """The four steps of one run.

    Attributes:
        seed: What everything random was drawn from.
        is_quick: Whether the networks were trained for fewer steps.
        seconds: How long it took.
        environment: What it ran on.
        train: The networks, trained.
        watch: What was seen of two of them meanwhile.
        repair: The planted fault, its diagnosis, the repair.
        fold: The network without its batch norms.
    """

    seed: int
    is_quick: bool
    seconds: float
    environment: Environment
    train: TrainStep
    watch: WatchStep
    repair: RepairStep
    fold: FoldStep

    @property
    def steps(self) -> tuple[TrainStep, WatchStep, RepairStep, FoldStep]:
        """The steps, in order."""
        return self.train, self.watch, self.repair, self.fold

    @property
    def checks(self) -> tuple[Check, ...]:
        """What all steps must have done."""
        return tuple(check for step in self.steps for check in step.checks)

    @property
    def held(self) -> bool:
        """Whether every step did what it says."""
        return all(check.held for check in self.checks)

    def summary(self) -> str:
        """The outcome in one sentence."""
        failed = sum(not check.held for check in self.checks)
        if failed:
            return f"{failed} of {len(self.checks)} checks did not hold."
        return f"All {len(self.checks)} checks held, in {self.seconds:.0f} seconds."

    def to_text(self) -> str:
        """The checks as a table."""
        what = max(len(check.what) for check in self.checks)
        shown = max(len(check.shown) for check in self.checks)
        lines = []
        for step in self.steps:
            lines += ["", step.title]
            lines += [
                f"  {'ok  ' if check.held else 'FAIL'}  {check.what:<{what}}  "
                f"{check.shown:>{shown}}  {check.required}"
                for check in step.checks
            ]
        return "\n".join([self.summary(), *lines])

    def to_json(self) -> str:
        """Everything that the report shows, in the schema `normkit.demo/1`.

        An object with `schema`, `held`, `seed`, `quick`, `seconds`, `environment`, and
        `steps`: for each its `title`, `seconds`, `held`, `checks` (`what`, `value`,
        `shown`, `required`, `held`) and `data`, the numbers of its tables and charts.
        A number that is not finite is a string ("nan", "inf").
        """
        return json.dumps(
            plain(
                {
                    "schema": SCHEMA,
                    "held": self.held,
                    "seed": self.seed,
                    "quick": self.is_quick,
                    "seconds": self.seconds,
                    "environment": asdict(self.environment),
                    "steps": [
                        {
                            "title": step.title,
                            "seconds": step.seconds,
                            "held": all(check.held for check in step.checks),
                            "checks": [asdict(check) for check in step.checks],
                            "data": step.to_data(),
                        }
                        for step in self.steps
                    ],
                }
            ),
            indent=1,
            allow_nan=False,
        )

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `report.html` and `demo.json` into `folder`; give both paths."""
        from normkit.demo.page import demo_page

        report = demo_page(self).write(Path(folder) / "report.html")
        data = Path(folder) / "demo.json"
        data.write_text(self.to_json() + "\n", encoding="utf-8")
        return report, data


def percent(share: float) -> str:
    """A share of test images as percent; with 500 of them, one digit is exact."""
    return f"{100 * share:.1f}%"


def plain(value: Any) -> Any:
    """`value` with what JSON cannot hold made into lists and strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value

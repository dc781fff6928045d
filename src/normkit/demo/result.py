"""The result of a demo run: the steps, their checks, the report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from normkit.demo.check import Check
from normkit.demo.folding import FoldStep
from normkit.demo.page import demo_page
from normkit.demo.repair import RepairStep
from normkit.demo.training import TrainStep
from normkit.demo.watching import WatchStep
from normkit.doctor.finding import plain
from normkit.environment import Environment

__all__ = ["SCHEMA", "DemoResult"]

SCHEMA = "normkit.demo/1"


@dataclass(frozen=True)
class DemoResult:
    """The four steps of one run.

    Attributes:
        seed: Random seed.
        is_quick: The networks were trained for fewer steps.
        seconds: Duration of the run.
        environment: The machine and the versions.
        train: The trained networks.
        watch: The records of two of them during training.
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
        """The checks of all steps."""
        return tuple(check for step in self.steps for check in step.checks)

    @property
    def held(self) -> bool:
        """True where every check held."""
        return all(check.held for check in self.checks)

    def summary(self) -> str:
        """Return the outcome as one sentence."""
        failed = sum(not check.held for check in self.checks)
        if failed:
            return f"{failed} of {len(self.checks)} checks did not hold."
        return f"All {len(self.checks)} checks held, in {self.seconds:.0f} seconds."

    def to_text(self) -> str:
        """Return the checks as a table."""
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
        """Return the numbers of the report as JSON, in the schema `normkit.demo/1`.

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
        """Write `report.html` and `demo.json` into `folder`; return both paths."""
        command = f"normkit demo --seed {self.seed}{' --quick' * self.is_quick}"
        page = demo_page(
            *self.steps,
            summary=self.summary(),
            environment=self.environment,
            seed=self.seed,
            foot=f"Made by `{command}` in {self.seconds:.0f} seconds; every number is "
            "also in `demo.json` beside this page.",
        )
        report = page.write(Path(folder) / "report.html")
        data = Path(folder) / "demo.json"
        data.write_text(self.to_json() + "\n", encoding="utf-8")
        return report, data

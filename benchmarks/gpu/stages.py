"""Stages of a run: each in a process of its own, with a budget, flushed row by row.

A stage is a list of cases, the most wanted first. Its process is forked before CUDA is
touched; a case that raises is recorded and the next one runs; a process that crashes,
hangs or is still at work when its time is over is ended, and the next stage starts
with a fresh one. The JSON on the disk is whole after every case.
"""

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normkit.modeling.atomic_file import atomic_file

__all__ = ["Case", "Record", "Stage", "run_stages"]

Row = dict[str, Any]
SECONDS_TO_END = 5  # from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Case:
    """A part of a stage that gives rows, or raises without harm to the others."""

    name: str
    run: Callable[[], Iterable[Row]]


@dataclass(frozen=True)
class Stage:
    """Cases and their time.

    Attributes:
        name: Its name on the command line and in the record.
        seconds: Its part of the default budget.
        cases: Lists the cases, given the rows of the stages before it; called in the
            stage's own process.
    """

    name: str
    seconds: float
    cases: Callable[["Record"], list[Case]]


class Record:
    """The JSON file of a run, read again by each process that adds to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"stages": {}}
        if path.exists():
            self.data = json.loads(path.read_text())

    def stage(self, name: str) -> dict[str, Any]:
        """Return the entry of a stage, made on demand."""
        empty = {"status": "not run", "planned": [], "done": [], "errors": {}}
        return self.data["stages"].setdefault(name, {**empty, "rows": []})

    def rows(self, name: str) -> list[Row]:
        """Return the rows of a stage so far."""
        return self.data["stages"].get(name, {}).get("rows", [])

    def save(self) -> None:
        """Replace the file as a whole."""
        with atomic_file(self.path) as file:
            file.write(json.dumps(self.data, indent=1).encode())


def run_stages(stages: Sequence[Stage], path: Path, budget: float) -> None:
    """Run the stages one after the other within `budget` seconds.

    A stage may use what earlier ones left over; what later ones are promised it may
    not.

    Args:
        stages: In order.
        path: Record; replaced.
        budget: Seconds in all, shared in proportion to `Stage.seconds`.
    """
    path.unlink(missing_ok=True)
    record = Record(path)
    for stage in stages:
        record.stage(stage.name)
    record.save()
    end = time.monotonic() + budget
    share = budget / sum(stage.seconds for stage in stages)
    for index, stage in enumerate(stages):
        promised = share * sum(later.seconds for later in stages[index + 1 :])
        _run_stage(stage, path, end - promised - time.monotonic())


def _run_stage(stage: Stage, path: Path, limit: float) -> None:
    start = time.monotonic()
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(stage, path)
    )
    process.start()
    try:
        process.join(max(limit, 0))
    finally:
        # Also on a signal to this process: what is written is kept and explained.
        is_over = process.is_alive()
        if is_over:
            process.terminate()
            process.join(SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()
        record = Record(path)
        entry = record.stage(stage.name)
        entry |= {"limit_s": round(limit, 1)}
        entry["seconds"] = round(time.monotonic() - start, 1)
        if is_over:
            entry["status"] = "cut"
        elif process.exitcode:
            entry["status"] = f"died (exit code {process.exitcode})"
        record.save()
        print(f"{stage.name}: {entry['status']} after {entry['seconds']} s", flush=True)


def _work(stage: Stage, path: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent, record = os.getppid(), Record(path)
    entry = record.stage(stage.name)
    entry["status"] = "running"
    record.save()
    try:
        cases = stage.cases(record)
    except Exception:
        entry["errors"]["list of cases"] = traceback.format_exc()
        cases = []
    entry["planned"] = [case.name for case in cases]
    for case in cases:
        if os.getppid() != parent:
            return  # killed; nothing would end this process in time
        try:
            for row in case.run():
                entry["rows"].append(row)
            entry["done"].append(case.name)
        except Exception:
            entry["errors"][case.name] = traceback.format_exc()
        record.save()
    entry["status"] = "done"
    record.save()

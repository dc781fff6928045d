"""Runs of healthy programs under the doctor: quiet_runs.py and calm_runs.py.

A run is one diagnosis or one watch; it should raise no alarm. The two sets differ in
their programs, and in when a program is looked at.
"""

from __future__ import annotations

import collections
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from quiet_base import Subject, Training

from normkit.doctor import diagnose, watch

__all__ = ["Runs", "Set", "built", "early_and_late"]

SEED = 0
EARLY = 0.4
Programs = Mapping[str, Callable[[], Training]]


def built(programs: Programs, name: str) -> Training:
    """Return a program's training, from the seed of all."""
    torch.manual_seed(SEED)
    return programs[name]()


class Runs(dict[str, list[Any]]):
    """What each run of a program reported: its findings, by the name of the run."""

    def diagnose(self, label: str, subject: Subject) -> None:
        """Enter a diagnosis of the model, in the mode that it is in."""

        def findings() -> list[Any]:
            found = diagnose(
                subject.model,
                subject.batches(),
                subject.loss_fn,
                forward=subject.forward,
                targets=subject.targets,
            )
            return list(found.findings)

        self._enter(label, subject, findings)

    def watch(self, label: str, training: Training, steps: range) -> None:
        """Train over these steps, and enter a watch of each model."""
        subjects = [s for s in training.subjects if not s.only_at_the_end]
        with ExitStack() as stack:
            seen = [stack.enter_context(watch(s.model, s.optimizer)) for s in subjects]
            for i in steps:
                loss = training.step(i)
                for each in seen:
                    each.log(loss=loss)
        for subject, each in zip(subjects, seen, strict=True):
            self._enter(label, subject, lambda e=each: list(e.findings()))

    def _enter(
        self, label: str, subject: Subject, findings: Callable[[], list[Any]]
    ) -> None:
        """Enter the findings of a run; an error of the doctor counts as an alarm."""
        label = f"{label} ({subject.name})" if subject.name else label
        try:
            self[label] = findings()
        except Exception as error:
            traceback.print_exc()
            self[label] = [error]


def early_and_late(programs: Programs) -> Callable[[str], Runs]:
    """Return a function that trains a program under the doctor, twice from one seed.

    For 40 % of its steps, then diagnosed; and to its end, watched throughout, scored,
    and then diagnosed.
    """

    def examined(name: str) -> Runs:
        runs = Runs()
        early = built(programs, name)
        for i in range(int(EARLY * early.steps)):
            early.step(i)
        for subject in early.subjects:
            runs.diagnose("diagnosis at 40 %", subject)
        late = built(programs, name)
        runs.watch("watch", late, range(late.steps))
        late.score()
        for subject in late.subjects:
            runs.diagnose("diagnosis at the end", subject)
        return runs

    return examined


# Shares of the steps after which programs are diagnosed.
TIMES = {"at 20 %": 0.2, "at 50 %": 0.5, "at the end": 1.0}


def at_three_times(programs: Programs) -> Callable[[str], Runs]:
    """Return a function that trains a program three times, each for longer."""

    def examined(name: str) -> Runs:
        runs = Runs()
        for when, share in TIMES.items():
            training = built(programs, name)
            for i in range(int(share * training.steps)):
                training.step(i)
            if share == 1:
                training.score()
            for subject in training.subjects:
                if share == 1 or not subject.only_at_the_end:
                    runs.diagnose(f"diagnosis {when}", subject)
        return runs

    return examined


def _told(finding: Any) -> str | None:
    if isinstance(finding, Exception):
        return f"raised {type(finding).__name__}"
    return f"{finding.id} {finding.severity}" if finding.is_alarm else None


@dataclass(frozen=True)
class Set:
    """A set of healthy programs.

    Attributes:
        programs: By name.
        examined: From a name to what the runs of that program reported.
        title: Of its part of the page.
        about: The programs and their runs, in one sentence.
        first: Runs with an alarm, and all, when the doctor saw them for the first time.
    """

    programs: Programs
    examined: Callable[[str], Runs]
    title: str
    about: str
    first: tuple[int, int]

    def _named(self, wanted: list[str]) -> Iterator[str]:
        for name in self.programs:
            if not wanted or any(part in name for part in wanted):
                yield name

    def measured(
        self, wanted: list[str], before: dict[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Examine all programs, or those whose name holds one of `wanted`.

        Args:
            wanted: Parts of names.
            before: An earlier record; with `wanted` its other programs are kept.

        Yields:
            The record so far, after each program: for each run its alarms.
        """
        runs: dict[str, list[str]] = dict(before["runs"]) if wanted and before else {}
        for name in self._named(wanted):
            begin = time.perf_counter()
            for label, found in self.examined(name).items():
                alarms = [(t, f) for f in found if (t := _told(f))]
                runs[f"{name}: {label}"] = [t for t, _ in alarms]
                for told, finding in alarms:
                    print("   ", label, told)
                    text = finding.to_text() if hasattr(finding, "to_text") else finding
                    print("       ", str(text).replace("\n", "\n        "))
            kept = {k: v for k, v in runs.items() if k.startswith(f"{name}:") and v}
            print(name, f"{time.perf_counter() - begin:.0f} s", kept, flush=True)
            yield {"runs": runs}

    def lines(self, found: dict[str, Any] | None) -> list[str]:
        """Return the outcome in Markdown; without a record, that of first sight."""
        loud, of = self.first
        text = [
            f"## {self.title}",
            "",
            f"{len(self.programs)} healthy programs, written and committed before the "
            "doctor saw",
            f"one of them; {self.about}. At first sight {loud} of {of} runs had an",
            "alarm.",
        ]
        if found is None:
            return text
        runs: dict[str, list[str]] = found["runs"]
        by_check: dict[str, list[str]] = collections.defaultdict(list)
        for key, told in runs.items():
            for each in dict.fromkeys(told):
                by_check[each].append(key.replace("_", " "))
        loud = sum(bool(told) for told in runs.values())
        if (loud, len(runs)) != self.first:
            text += [
                f"After changes of the doctor that they led to, {loud} of {len(runs)};",
                "this is no rate on unseen programs any more.",
            ]
        if by_check:
            text += ["", "| alarm | runs | which |", "| --- | --- | --- |"]
            text += [
                f"| {k} | {len(v)} | {', '.join(v)} |" for k, v in by_check.items()
            ]
        return text

    def main(self) -> None:
        """Train without the doctor, all or those named, and print scores and goals."""
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        for name in self._named(sys.argv[1:]):
            begin = time.process_time()
            training = built(self.programs, name)
            for i in range(training.steps):
                training.step(i)
            score, spent = training.score(), time.process_time() - begin
            mark = "" if score >= training.goal else "  NOT LEARNED"
            print(
                f"{name:32}{score:9.3f} of {training.goal:6.2f} {spent:6.1f} s{mark}",
                flush=True,
            )

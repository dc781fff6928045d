"""The findings on one model: read, confirm, explain, repair and show them.

`diagnose.py` makes the value; what is done with it starts here and is carried out in
`fixes/` (copies and repairs), `explain_gap.py` and `pages.py`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import nn

from normkit.doctor import checks
from normkit.doctor.examination.case import Case
from normkit.doctor.explain_gap import GapExplanation, explain_case
from normkit.doctor.finding import Finding, by_cause, grouped, ranked
from normkit.doctor.fixes.confirm import (
    Confirmation,
    confirm,
    declined_unseen,
    repairable,
)
from normkit.doctor.fixes.repairs import REPAIRS, RepairResult
from normkit.doctor.fixes.trial_training import (
    train_copy,
    watch_own_loop,
    with_training,
)
from normkit.doctor.measurements import Statistics
from normkit.doctor.over_ranks import merge_confirmations, merge_readings, merged_over
from normkit.doctor.pages import diagnosis_page
from normkit.doctor.provenance import provenance
from normkit.errors import ArgumentError
from normkit.modeling.batch import check_function, check_model
from normkit.modeling.unwrap import unwrapped, unwrapped_optimizer
from normkit.results import Result, counted
from normkit.sync import alone
from normkit.sync.groups import Group

__all__ = ["SCHEMA", "Diagnosis"]

SCHEMA = "normkit.diagnosis/1"


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """The findings on one model, most severe first.

    Attributes:
        readings: The results of all checks, in the order of the checks.
        statistics: The measurements that the checks read.
        case: The model and its batches.
        confirmations: The effect of each repair on a copy; empty before `confirm`.
        gap: The train/eval gap by cause and layer; None before `explain`.
        process_group: The ranks whose findings these are, which then call `confirm`
            and `train` together; None for one process.
    """

    readings: list[Finding]
    statistics: Statistics
    case: Case | None = field(default=None, repr=False)
    confirmations: tuple[Confirmation, ...] = ()
    gap: GapExplanation | None = None
    process_group: Group = field(default=None, repr=False)

    @property
    def findings(self) -> list[Finding]:
        """Errors, warnings and infos, one per check and fix with all its layers.

        The most severe come first, causes before their consequences, which name them
        in `follows`.
        """
        return by_cause(self.readings)

    @property
    def errors(self) -> list[Finding]:
        """The findings of severity "error"."""
        return [f for f in self.findings if f.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """The findings of severity "warning"."""
        return [f for f in self.findings if f.severity == "warning"]

    @property
    def not_judged(self) -> list[Finding]:
        """Results of checks that had too little data, with the reason."""
        return [f for f in self.readings if f.severity == "not_judged"]

    @property
    def clear(self) -> list[Finding]:
        """Results of checks that found no fault, with the measured values."""
        return [f for f in self.readings if f.severity == "clear"]

    @property
    def named(self) -> list[str]:
        """Ids of the checks with an error or a warning, in order, each once."""
        return list(dict.fromkeys(f.id for f in self.findings if f.is_alarm))

    @property
    def is_healthy(self) -> bool:
        """True where there is neither an error nor a warning."""
        return not self.named

    @alone()
    def confirm(self, *, progress: bool = False) -> Diagnosis:
        """Try the repair of each alarm on a copy, and measure its effect.

        Faulty running statistics are replaced by those of the examination, and eval
        mode is measured on batches held out from it; where the loader had no more, on
        each tenth of the batches with the statistics of the others. Faults that eval
        mode does not show are examined again. Fixes that need training (other layers,
        other weights, another loop) are named in `fix` and not tried.

        Args:
            progress: Show a progress bar.

        Returns:
            A new diagnosis with `confirmations`, in which a warning whose repair helps
            has become an error. Findings without a repair are unchanged. Over ranks
            each tries the repairs on its own batches; the effect reported is that on a
            rank where it helps, if there is one.

        Raises:
            ArgumentError: The diagnosis holds no case, or was made without a loss.
        """
        case, found = self._case_with_loss("confirm"), ranked(self.readings)
        confirmations = merged_over(
            lambda: confirm(
                *(case, self.statistics, found, checks.CHECKS), progress=progress
            ),
            *(self.process_group, merge_confirmations),
        )
        helps = {c.id for c in confirmations if c.helps}
        readings = [
            replace(f, severity="error")
            if f.id in helps and f.severity == "warning"
            else f
            for f in self.readings
        ]
        return replace(self, readings=readings, confirmations=tuple(confirmations))

    @alone()
    def explain(self, *, progress: bool = False) -> Diagnosis:
        """Split the train/eval gap over causes and layers, as `explain_gap` does.

        This takes at most seven more passes over the batches. Without a metric the gap
        is that of the negative loss, so a positive part is a loss of eval mode.

        Args:
            progress: Show a progress bar.

        Returns:
            The same diagnosis with `gap`.

        Raises:
            ArgumentError: The diagnosis holds no case, or was made without a loss.
        """
        case = self._case_with_loss("explain")
        loss_fn, found = case.loss_fn, self.statistics.evaluation
        if found is not None and not found.batch_metric and loss_fn is not None:
            case = replace(
                case, metric=lambda out, targets: -float(loss_fn(out, targets))
            )
        return replace(self, gap=explain_case(case, self.statistics, progress=progress))

    def _case_with_loss(self, verb: str) -> Case:
        if self.case is None or self.statistics.evaluation is None:
            raise ArgumentError(
                f"{verb} needs the model, its batches and a loss; make the diagnosis "
                "by normkit.diagnose(model, loader, loss_fn)"
            )
        return self.case

    def train(
        self,
        steps: int,
        optimizer: torch.optim.Optimizer | None = None,
        train: Callable[[int], Any] | None = None,
        *,
        progress: bool = False,
    ) -> Diagnosis:
        """Watch some steps of training, for the checks that need weights that move.

        Args:
            steps: Number of steps.
            optimizer: The optimizer of the examined model. Without `train`, copies of
                both are trained on the batches of the examination.
            train: `train(steps)`, the program's own loop on the examined model. Model
                and optimizer are restored afterwards. D08, D09 and D15 judge this loop
                and are not judged without it.
            progress: Show a progress bar; with `train` there is none.

        Returns:
            A new diagnosis with the results that training adds: of checks that were
            not judged without it, and of gradients (D24, D25) during training.

        Raises:
            ArgumentError: `steps` is below 1, there is neither an optimizer nor
                `train`, or the diagnosis holds no case or no loss.
        """
        if not isinstance(steps, Integral) or steps < 1:
            raise ArgumentError(f"steps={steps!r} trains nothing; give an int from 1")
        check_function("train", train)
        if self.case is None:
            raise ArgumentError("train needs the model, and the diagnosis holds none")
        case = self.case
        inner = None if optimizer is None else unwrapped_optimizer(optimizer)
        if train is not None:
            # Not within `merged_over`: in a loop over ranks the others wait for this
            # one, so that its error has to end the process.
            own = watch_own_loop(case, train, inner, steps)
            found = merged_over(lambda: own, self.process_group, merge_readings)
        elif inner is not None:
            trial = alone()(lambda: train_copy(case, inner, steps, progress=progress))
            found = merged_over(trial, self.process_group, merge_readings)
        else:
            raise ArgumentError("train needs an optimizer, or train= for your own loop")
        return replace(self, readings=with_training(self.readings, found))

    def repair(
        self, model: nn.Module | None = None, *, progress: bool = False
    ) -> RepairResult:
        """Apply the repairs that improve the model, in place; decline the others.

        Each repair is first confirmed on a copy, as `confirm` does, on batches held
        out. It is applied only where the gain in eval mode is above two standard
        errors, or where the alarm disappears and eval mode is no worse. Without a loss
        or with a single batch nothing can be confirmed, and all repairs are declined.

        Running statistics take the values of the examination, and a momentum that D04
        names becomes torch's 0.1. A layer that D06 or D07 names becomes one of
        `normkit.nn` with the same state, which takes a batch of one or stays frozen;
        one that D16 names is converted to float32; a softmax before a loss that applies
        its own (D34) becomes an identity. No weight changes its value.

        Args:
            model: The model; the one that was examined by default.
            progress: Show a progress bar.

        Returns:
            The ids of the checks whose repairs were applied, in the order of `named`;
            its `declined` has the others, each with the reason.
        """
        if model is None and self.case is not None:
            model = self.case.model
        if model is None:
            raise ArgumentError("repair needs a model, and the diagnosis holds none")
        check_model("repair", model)
        model = unwrapped(model)
        groups = repairable(ranked(self.readings), self.statistics)
        confirmations, missing = self.confirmations, "a loss_fn is needed to confirm it"
        if groups and self.case is not None and self.statistics.evaluation is not None:
            own = replace(self, process_group=None)
            if not confirmations:
                confirmations = own.confirm(progress=progress).confirmations
            missing = "its repair is that of the other findings"
            if len(self.case.batches) < 2:
                missing = "two batches are needed to confirm it"
        confirmed = {c.id: c for c in confirmations}
        good = {id_ for id_ in groups if id_ in confirmed and confirmed[id_].improves}
        for id_, group in groups.items():
            if id_ in good:
                REPAIRS[id_](model, self.statistics, group)
        declined = declined_unseen(self.readings) | {
            id_: confirmed[id_].to_text() if id_ in confirmed else f"{id_}: {missing}"
            for id_ in self.named
            if id_ in groups and id_ not in good
        }
        return RepairResult([id_ for id_ in self.named if id_ in good], declined)

    def summary(self) -> str:
        """Return the outcome as one sentence."""
        seen = (
            f"{counted(len(self.statistics.layers), 'layer')}, "
            f"{counted(self.statistics.samples, 'sample')}"
        )
        if not self.findings:
            rest = f"; {len(self.not_judged)} not judged" if self.not_judged else ""
            return f"Nothing found in {seen}{rest}."
        causes = Counter(f.severity for f in self.findings if not f.follows)
        counts = [
            counted(causes[word], word)
            for word in ("error", "warning", "info")
            if causes[word]
        ]
        first = self.findings[0]
        what_follows = sum(bool(f.follows) for f in self.findings)
        more = f", with {counted(what_follows, 'consequence')}" if what_follows else ""
        return f"{', '.join(counts)} in {seen}{more}; first {first.id} {first.name}."

    def verdict(self) -> str:
        """Return the outcome, its cost, the first cause and its fix, one line each."""
        lines = [f"{name:10} {text}" for name, text in self._verdict()]
        return "\n".join([self.summary(), *lines])

    def _verdict(self) -> list[tuple[str, str]]:
        """Return the cost of the first cause, its fix, and what that gave on a copy."""
        if not self.named:
            return []
        first = self.findings[0]
        gaps = [f.evidence for f in self.readings if f.id == "D02" and f.threshold > 0]
        facts = [
            ("cost", gaps[0] if gaps else "not measured (D02)"),
            ("cause", f"{first.id} {first.name} in {first.where}"),
            ("fix", first.fix),
        ]
        tried = [c.to_text() for c in self.confirmations if c.id == first.id]
        return facts + [("on a copy", text) for text in tried[:1]]

    def _made(self, source: str) -> str:
        """Return the model, its data, the date and the versions in one sentence."""
        seen = [source] if source else []
        if self.case is not None:
            batches = counted(self.statistics.batches, "batch", plural="batches")
            size = counted(self.case.batch_size, "sample")
            seen.append(
                f"{type(self.case.model).__name__}, {batches} of {size}, seed "
                f"{self.case.seed}"
            )
        return provenance(*seen)

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per cause, for tables in notebooks."""
        return [
            {
                "severity": f.severity,
                "check": f"{f.id} {f.name}",
                "layer": f.where,
                "value": f.value,
                "threshold": f.threshold,
                "evidence": f.evidence,
                "fix": f.fix,
            }
            for f in self.findings
        ]

    def to_text(self) -> str:
        """Return the verdict, then the findings, one per cause."""
        lines = [self.verdict()]
        for finding in self.findings:
            lines += ["", finding.to_text()]
        if self.confirmations:
            lines += ["", *(c.to_text() for c in self.confirmations)]
        if self.gap is not None:
            lines += ["", self.gap.to_text()]
        if self.not_judged:
            lines += ["", *(f.to_text() for f in grouped(self.not_judged))]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the diagnosis as JSON, in the schema `normkit.diagnosis/1`.

        An object with `schema`, `summary`, `named` (ids, in order), `samples`,
        `batches`, and the lists `findings`, `not_judged` and `clear`. Each entry of a
        list has `id`, `name`, `layer`, `layers` (all with the same cause), `severity`,
        `follows` (id of the finding that explains it, or ""), `value`, `threshold`,
        `evidence`, `fix` and `details`. The list `confirmations` has `id`, `measure`,
        `before`, `after`, `error`, `helps`, `harms` and `improves`. `gap` is null
        before `explain`.
        A number that is not finite is a string ("nan", "inf"). docs/guide/doctor.md
        has the schema; `DIAGNOSIS` of the module `normkit.doctor.schema` is the same
        for a validator.
        """
        return json.dumps(
            {
                "schema": SCHEMA,
                "summary": self.summary(),
                "named": self.named,
                "samples": self.statistics.samples,
                "batches": self.statistics.batches,
                "findings": [f.to_json() for f in self.findings],
                "not_judged": [f.to_json() for f in self.not_judged],
                "clear": [f.to_json() for f in self.clear],
                "confirmations": [c.to_json() for c in self.confirmations],
                "gap": None if self.gap is None else self.gap.to_json(),
            },
            indent=2,
            allow_nan=False,
        )

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, source: str = ""
    ) -> str:
        """Return the diagnosis as one HTML page, written to `path` if given.

        Args:
            path: Where to write the page.
            source: Where the model came from, such as a target and a checkpoint.
        """
        page = diagnosis_page(
            *(self.summary(), self.readings, self.statistics, self.confirmations),
            gap=self.gap,
            verdict=self._verdict(),
            made=self._made(source),
        )
        if path is not None:
            page.write(path)
        return page.to_html()

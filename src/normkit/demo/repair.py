"""Step 3: break a network on purpose, let the doctor name the cause, calibrate.

The fault is a momentum of 0.001, what 0.999 means where the rate is written the other
way round. Training is not disturbed, since it normalizes by batch statistics; the
running statistics hardly move from where they began, and eval uses those.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from normkit.calibrate import CalibrationReport, calibrate
from normkit.demo.digits import Digits
from normkit.demo.networks import residual_cnn
from normkit.demo.result import Check, percent
from normkit.demo.training import (
    BATCH_SIZE,
    Tick,
    Trained,
    accuracy,
    accuracy_by_batch_statistics,
    train,
)
from normkit.doctor import Diagnosis, diagnose

__all__ = ["BROKEN_MOMENTUM", "RepairStep", "break_and_repair"]

BROKEN_MOMENTUM = 0.001
CAUSE, STALE, GAP = "D04", "D01", "D02"
# In points of test accuracy: what the fault must cost, what may remain of it.
LEAST_HARM, MOST_LEFT = 0.10, 0.02


@dataclass(frozen=True)
class RepairStep:
    """A network that is worse in eval than in training, before and after.

    Attributes:
        broken: The network, trained with the fault; calibrated by now.
        before: Its test accuracy in eval mode as it came out of training.
        target: Its test accuracy with batch statistics, as in training.
        after: Its test accuracy in eval mode, calibrated.
        has_healthy_weights: Whether its weights are bitwise those of the same network
            without the fault.
        diagnosis: What the doctor found.
        calibration: What calibrating changed.
        diagnosis_after: What the doctor finds then.
        healthy: What the doctor finds in the network without the fault.
        seconds: How long it took.
    """

    broken: Trained
    before: float
    target: float
    after: float
    has_healthy_weights: bool
    diagnosis: Diagnosis
    calibration: CalibrationReport
    diagnosis_after: Diagnosis
    healthy: Diagnosis
    seconds: float
    title: ClassVar[str] = "Break one, find the cause, repair it"

    @property
    def checks(self) -> list[Check]:
        """The fault bites, is named, and its harm goes."""
        named, left = self.diagnosis.named, self.diagnosis_after.named
        healthy = self.healthy.named
        return [
            Check(
                f"test accuracy trained with momentum={BROKEN_MOMENTUM}",
                self.before,
                percent(self.before),
                f"{100 * LEAST_HARM:.0f} points below the {percent(self.target)} "
                "by batch statistics",
                self.before <= self.target - LEAST_HARM,
            ),
            Check(
                "doctor's alarms, most urgent first",
                named,
                ", ".join(named) or "none",
                f"{CAUSE} (the momentum) first, then {STALE} and {GAP} (its effects)",
                named[:1] == [CAUSE] and {STALE, GAP} <= set(named),
            ),
            Check(
                "test accuracy, calibrated",
                self.after,
                percent(self.after),
                f"within {100 * MOST_LEFT:.0f} points of {percent(self.target)}",
                abs(self.after - self.target) <= MOST_LEFT,
            ),
            Check(
                "doctor's alarms, calibrated",
                left,
                ", ".join(left) or "none",
                f"neither {STALE} nor {GAP}",
                not {STALE, GAP} & set(left),
            ),
            Check(
                "doctor's alarms, same network, momentum=0.1",
                healthy,
                ", ".join(healthy) or "none",
                "none",
                not healthy,
            ),
        ]

    def to_data(self) -> dict[str, Any]:
        """The numbers of the tables."""
        return {
            "momentum": BROKEN_MOMENTUM,
            "accuracy": {
                "before": self.before,
                "by_batch_statistics": self.target,
                "after": self.after,
            },
            "has_healthy_weights": self.has_healthy_weights,
            "findings": [finding.to_json() for finding in self.diagnosis.findings],
            "layers_by_check": Counter(f.id for f in self.diagnosis.findings),
            "findings_after": [f.to_json() for f in self.diagnosis_after.findings],
            "layers": [
                {
                    "name": layer.name,
                    "values": layer.count,
                    "d_mean": layer.d_mean,
                    "d_var": layer.d_var,
                }
                for layer in self.calibration.layers
            ],
        }


def break_and_repair(
    digits: Digits, healthy: Trained, *, batches: int, tick: Tick
) -> RepairStep:
    """Train the CNN again with the fault, then diagnose and calibrate it.

    Args:
        digits: The data of both networks.
        healthy: The network without the fault.
        batches: How many the doctor looks at each time.
        tick: Called after each step of training.
    """
    start = time.perf_counter()
    broken = train(
        f"residual CNN, momentum={BROKEN_MOMENTUM}",
        residual_cnn(seed=healthy.recipe.seed, momentum=BROKEN_MOMENTUM),
        digits,
        healthy.recipe,
        tick=tick,
    )
    model = broken.model
    before = accuracy(model, digits)
    target = accuracy_by_batch_statistics(model, digits)

    diagnosis = _diagnose(broken, digits, batches)
    calibration = calibrate(model, digits.batches(BATCH_SIZE, seed=0))
    after = accuracy(model, digits)

    return RepairStep(
        broken=broken,
        before=before,
        target=target,
        after=after,
        has_healthy_weights=all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(
                model.parameters(), healthy.model.parameters(), strict=True
            )
        ),
        diagnosis=diagnosis,
        calibration=calibration,
        diagnosis_after=_diagnose(broken, digits, batches),
        healthy=_diagnose(healthy, digits, batches),
        seconds=time.perf_counter() - start,
    )


def _diagnose(network: Trained, digits: Digits, batches: int) -> Diagnosis:
    # As it would be trained on: the doctor looks at a model in training mode.
    model = copy.deepcopy(network.model).train()
    loader = digits.batches(BATCH_SIZE, seed=0)
    return diagnose(model, loader, F.cross_entropy, max_batches=batches)

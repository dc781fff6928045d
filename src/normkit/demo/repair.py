"""Step 3: break a network on purpose, diagnose it, calibrate it.

The fault is a momentum of 0.001: 0.999 in the convention new = 0.999·old + 0.001·batch.
Training is not affected, since it normalizes by batch statistics; the running
statistics hardly move from their initial values, and eval mode uses those.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from normkit.calibrate import CalibrationReport, calibrate
from normkit.demo.check import Check, percent
from normkit.demo.digits import Digits
from normkit.demo.networks import residual_cnn
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
# Share of test accuracy that the fault must cost, and that may remain lost.
MIN_HARM, MAX_REMAINING = 0.10, 0.02


@dataclass(frozen=True)
class RepairStep:
    """A network that is worse in eval mode than in training, before and after.

    Attributes:
        broken: The network, trained with the fault, then calibrated.
        before: Its test accuracy in eval mode after training.
        target: Its test accuracy with batch statistics, as in training.
        after: Its test accuracy in eval mode, calibrated.
        has_healthy_weights: Its weights are bitwise those of the same network without
            the fault.
        diagnosis: The diagnosis before calibration.
        calibration: The changes of the calibration.
        diagnosis_after: The diagnosis after calibration.
        healthy: The diagnosis of the network without the fault.
        seconds: Duration of the step.
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
        """The fault costs accuracy, is named, and calibration restores the accuracy."""
        named, left = self.diagnosis.named, self.diagnosis_after.named
        healthy = self.healthy.named
        return [
            Check(
                f"test accuracy trained with momentum={BROKEN_MOMENTUM}",
                self.before,
                percent(self.before),
                f"{100 * MIN_HARM:.0f} points below the {percent(self.target)} "
                "by batch statistics",
                self.before <= self.target - MIN_HARM,
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
                f"within {100 * MAX_REMAINING:.0f} points of {percent(self.target)}",
                abs(self.after - self.target) <= MAX_REMAINING,
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
        """Return the numbers of the tables."""
        return {
            "momentum": BROKEN_MOMENTUM,
            "accuracy": {
                "before": self.before,
                "by_batch_statistics": self.target,
                "after": self.after,
            },
            "has_healthy_weights": self.has_healthy_weights,
            "findings": [finding.to_json() for finding in self.diagnosis.findings],
            "layers_by_check": {f.id: len(f.layers) for f in self.diagnosis.findings},
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
        batches: Number of batches per diagnosis.
        tick: Called after each training step.
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
    # In training mode, as the network is during training.
    model = copy.deepcopy(network.model).train()
    loader = digits.batches(BATCH_SIZE, seed=0)
    return diagnose(model, loader, F.cross_entropy, max_batches=batches)

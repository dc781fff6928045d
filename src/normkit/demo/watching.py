"""Step 2: the records of the two sigmoid networks during training."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from normkit.demo.check import Check
from normkit.demo.training import Trained
from normkit.doctor import Finding, Watch

__all__ = ["Seen", "WatchStep", "look_back"]

# Sigmoid's derivative is at most 1/4, so six layers alone may cost 4^6 = 4096.
GRADIENT_GAIN = 10.0
VANISHING = "D24"

Series = list[float | None]


@dataclass(frozen=True)
class Seen:
    """The record of one network.

    Attributes:
        name: The network.
        unit: The unit whose input percentiles were recorded, in every layer.
        steps: The observed steps.
        saturated: Share of inputs where the sigmoid is flat, by layer, over the steps.
        gradient_norm: ‖dL/d output‖ by weight layer, over the steps.
        band_layer: The last hidden sigmoid.
        band: The {15, 50, 85} percentiles of the input of its unit, over the steps.
        findings: The findings on it.
    """

    name: str
    unit: int
    steps: list[int]
    saturated: dict[str, Series]
    gradient_norm: dict[str, Series]
    band_layer: str
    band: tuple[Series, Series, Series]
    findings: list[Finding]

    @property
    def alarms(self) -> list[Finding]:
        """The errors and warnings."""
        return [finding for finding in self.findings if finding.is_alarm]

    def median_gradient(self, layer: str) -> float:
        """Return the median gradient norm of one layer over the whole training."""
        values = [v for v in self.gradient_norm[layer] if v is not None]
        return statistics.median(values) if values else math.nan

    def most_saturated(self, layer: str) -> float:
        """Return the largest saturated share of one layer over the whole training."""
        values = [v for v in self.saturated[layer] if v is not None]
        return max(values, default=math.nan)

    def to_data(self) -> dict[str, Any]:
        """Return the numbers of its charts and findings."""
        low, middle, high = self.band
        return {
            "name": self.name,
            "steps": self.steps,
            "unit": self.unit,
            "band": {
                "layer": self.band_layer,
                "p15": low,
                "p50": middle,
                "p85": high,
            },
            "saturated": self.saturated,
            "most_saturated": {n: self.most_saturated(n) for n in self.saturated},
            "gradient_norm": self.gradient_norm,
            "median_gradient": {n: self.median_gradient(n) for n in self.gradient_norm},
            "findings": [finding.to_json() for finding in self.findings],
            "layers_by_check": {f.id: len(f.layers) for f in self.findings},
        }


@dataclass(frozen=True)
class WatchStep:
    """Both networks.

    Attributes:
        plain: Without normalization.
        normalized: With batch norm.
        first_layer: The layer next to the input, in both.
        seconds: Duration of the evaluation; the recording is part of step 1.
    """

    plain: Seen
    normalized: Seen
    first_layer: str
    seconds: float
    title: ClassVar[str] = "Watch both sigmoid networks learn"

    @property
    def gradient_ratio(self) -> float:
        """The gradient at the first layer with batch norm over that without."""
        plain = self.plain.median_gradient(self.first_layer)
        normalized = self.normalized.median_gradient(self.first_layer)
        return normalized / plain if plain else math.inf

    @property
    def checks(self) -> list[Check]:
        """The gradient vanishes only without batch norm, and the doctor reports it."""
        named = sorted({finding.id for finding in self.plain.alarms})
        alarms = sorted({finding.id for finding in self.normalized.alarms})
        return [
            Check(
                "gradient at the first layer, with batch norm to without",
                self.gradient_ratio,
                f"{self.gradient_ratio:,.0f} times",
                f"at least {GRADIENT_GAIN:.0f} times",
                self.gradient_ratio >= GRADIENT_GAIN,
            ),
            Check(
                "doctor's alarms, without",
                named,
                ", ".join(named) or "none",
                f"{VANISHING}, vanishing gradient, among them",
                VANISHING in named,
            ),
            Check(
                "doctor's alarms, with batch norm",
                alarms,
                ", ".join(alarms) or "none",
                "none",
                not alarms,
            ),
        ]

    def to_data(self) -> dict[str, Any]:
        """Return the numbers of both networks."""
        return {
            "first_layer": self.first_layer,
            "gradient_ratio": self.gradient_ratio,
            "networks": [self.plain.to_data(), self.normalized.to_data()],
        }


def look_back(plain: Trained, normalized: Trained) -> WatchStep:
    """Return the records of two watched networks."""
    start = time.perf_counter()
    without, with_norm = _seen(plain), _seen(normalized)
    first = next(iter(without.gradient_norm))
    return WatchStep(without, with_norm, first, time.perf_counter() - start)


def _seen(network: Trained) -> Seen:
    assert isinstance(network.watch, Watch)
    history = network.watch.history
    layers = history["layers"]
    hidden = {n: s for n, s in layers.items() if s["role"] == "activation"}
    last, series = list(hidden.items())[-1]
    return Seen(
        name=network.name,
        unit=history["unit"],
        steps=history["steps"],
        saturated={name: s["saturated"] for name, s in hidden.items()},
        gradient_norm={
            name: s["gradient_norm"]
            for name, s in layers.items()
            if s["role"] == "weight"
        },
        band_layer=last,
        band=(series["low"], series["middle"], series["high"]),
        findings=network.watch.findings(),
    )

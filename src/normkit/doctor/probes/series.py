"""The probes' measurements of one step as numbers, and of the last few steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from normkit.doctor.measurements import (
    LayerStatistics,
    NormStatistics,
    NotFinite,
    WeightStatistics,
)
from normkit.doctor.probes.layer_probe import LayerProbe
from normkit.doctor.probes.tensor_statistics import bands_of, histogram_of
from normkit.moments import Moments

__all__ = [
    "RECENT",
    "SERIES",
    "WINDOW",
    "Window",
    "layer_of",
    "numbers_of",
    "pooled",
    "present",
    "to_floats",
    "with_spread",
]

# Number of observed steps that a layer is judged by.
RECENT = 5
# A unit is dead when it is zero for two windows of so many samples.
WINDOW = 1000
# Samples of the first observed step from which its dead units show the start: one that
# is active on a tenth of the samples is zero on all of 32 by chance in 3 % of cases.
MIN_START = 32

# Recorded per layer and observed step, in this order.
SERIES = (
    *("input_mean", "input_std", "output_mean", "output_std", "output_rms"),
    *("low", "middle", "high", "saturated", "dead", "gradient_norm"),
    *("weight_norm", "weight_gradient_norm", "update_ratio"),
)
# Of these, what shows that an input, an output or a weight is not finite.
NOT_FINITE = ("input_std", "output_rms", "weight_norm")


def numbers_of(probes: Sequence[LayerProbe]) -> list[dict[str, Tensor]]:
    """Return the measurements of each probe as one-value tensors on its device."""
    found = [_numbers_of(probe) for probe in probes]
    values = {
        i: probe.unit_values
        for i, probe in enumerate(probes)
        if probe.unit_values is not None
    }
    for i, band in zip(values, bands_of([*values.values()]), strict=True):
        found[i]["low"], found[i]["middle"], found[i]["high"] = band.unbind()
    return found


def _numbers_of(probe: LayerProbe) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for side, measured in (("input", probe.input), ("output", probe.output)):
        if measured is not None:
            found[f"{side}.count"] = measured.count
            found[f"{side}.mean"] = measured.mean
            found[f"{side}.m2"] = measured.m2
    if probe.saturated_share is not None:
        found["saturated"] = probe.saturated_share
    if probe.alive is not None:
        found["dead"] = (~probe.alive).float().mean()
    if probe.gradient_norm is not None:
        found["gradient_norm"] = probe.gradient_norm
    if probe.constant is not None:
        found["constant"] = probe.constant
    return found


def with_spread(found: dict[str, float]) -> dict[str, float]:
    """Return mean, standard deviation and rms of inputs and outputs."""
    more = {}
    for side in ("input", "output"):
        if found.get(f"{side}.count"):
            mean = found[f"{side}.mean"]
            var = found[f"{side}.m2"] / found[f"{side}.count"]
            more[f"{side}_mean"] = mean
            more[f"{side}_std"] = var**0.5
            more[f"{side}_rms"] = (var + mean * mean) ** 0.5
    return more


def to_floats(values: list[Tensor]) -> list[float]:
    """Return values from any device as floats, one transfer per device and dtype."""
    # On a CPU a number at a time takes a quarter of the time of a stack of them.
    out = [float(value) if value.is_cpu else 0.0 for value in values]
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, value in enumerate(values):
        if not value.is_cpu:
            places.setdefault((value.device, value.dtype), []).append(i)
    for here in places.values():
        numbers = torch.stack([values[i] for i in here]).tolist()
        for i, number in zip(here, numbers, strict=True):
            out[i] = number
    return out


def present(series: list[float | None]) -> tuple[float, ...]:
    """Return a series without its gaps."""
    return tuple(value for value in series if value is not None)


def pooled(recent: Iterable[dict[str, float]], side: str) -> Moments | None:
    """Return the moments of a layer's input or output over several observed steps."""
    parts = [
        Moments(
            torch.tensor(int(found[f"{side}.count"])),
            torch.tensor(found[f"{side}.mean"], dtype=torch.float64),
            torch.tensor(found[f"{side}.m2"], dtype=torch.float64),
        )
        for found in recent
        if f"{side}.count" in found
    ]
    return Moments.merge_all(parts) if parts else None


def layer_of(
    probe: LayerProbe,
    steps: Sequence[int],
    series: dict[str, list[float | None]],
    recent: Sequence[dict[str, float]],
    window: Window,
    norm: NormStatistics | None,
) -> LayerStatistics:
    """Return the statistics of one layer over the last few observed steps.

    Args:
        probe: Its probe.
        steps: The observed steps.
        series: Its whole record, an entry for each of them.
        recent: Its numbers in the last observed steps.
        window: Which of its units were active.
        norm: Its running statistics, where it keeps some.
    """
    weight, sizes = None, present(series["weight_norm"])
    if sizes:
        updates = zip(steps, series["update_ratio"], strict=True)
        weight = WeightStatistics(
            norm=sizes[-1],
            gradient_norm=present(series["weight_gradient_norm"]),
            update_ratio=present(series["update_ratio"]),
            norm_at_start=sizes[0],
            usual_norm=probe.usual_norm,
            size=probe.weight_size,
            parameter=id(probe.module._parameters.get("weight")),
            updated_at=tuple(step for step, value in updates if value is not None),
        )
    return LayerStatistics(
        name=probe.name,
        kind=probe.kind,
        role=probe.role,
        is_output=probe.is_output,
        samples=sum(int(found["samples"]) for found in recent),
        units=probe.units,
        input=pooled(recent, "input"),
        output=pooled(recent, "output"),
        gradient_norm=present(series["gradient_norm"]),
        saturated=present(series["saturated"]),
        dead=window.dead,
        dead_samples=2 * WINDOW,
        dead_at_start=window.dead_at_start,
        rms_at_start=next(iter(present(series["output_rms"])), math.nan),
        fed_by=probe.fed_by,
        is_normalized=probe.is_normalized,
        is_factor=probe.is_factor,
        beside=probe.beside,
        had_gradients=probe.had_gradients,
        has_zero_scale=probe.has_zero_scale,
        norm=norm,
        weight=weight,
        before=histogram_of(probe.before),
        after=histogram_of(probe.after),
        gains=probe.gains,
        eps=probe.eps,
        crossed=probe.crossed,
        rows=probe.rows,
        not_finite=NotFinite(
            *(_first_not_finite(series[key]) for key in NOT_FINITE),
        ),
    )


def _first_not_finite(series: list[float | None]) -> int | None:
    bad = (i for i, x in enumerate(series) if x is not None and not math.isfinite(x))
    return next(bad, None)


class Window:
    """The units of one layer that were active in the last two windows of samples."""

    def __init__(self) -> None:
        self.dead_at_start: float | None = None
        self.samples = 0
        self.alive: Tensor | None = None
        self.before: Tensor | None = None
        self.has_varied = False

    @property
    def dead(self) -> float | None:
        """Share of units that were zero in both windows; None before there are two.

        None where their number has varied: they are positions of some length then.
        """
        if self.before is None or self.has_varied:
            return None
        alive = self.before if self.alive is None else self.before | self.alive
        return 1 - float(alive.double().mean())

    def add(self, probe: LayerProbe) -> None:
        """Add the active units of one step."""
        if probe.alive is None:
            return
        if not self.samples and self.before is None and probe.samples >= MIN_START:
            self.dead_at_start = float((~probe.alive).float().mean())
        if self.samples >= WINDOW:
            self.before, self.alive, self.samples = self.alive, None, 0
        known = self.alive if self.alive is not None else self.before
        self.has_varied |= known is not None and known.shape != probe.alive.shape
        if self.alive is None or self.has_varied:
            self.alive = probe.alive
        else:
            self.alive = self.alive | probe.alive
        self.samples += probe.samples

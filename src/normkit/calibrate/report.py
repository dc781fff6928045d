"""Report of a calibration: each layer before and after, with standard errors.

    d_mean = mean_c |old mean − new mean| / √(new var + eps)
    d_var  = mean_c |ln((old var + eps) / (new var + eps))|

A healthy network in training stays below 0.25 and 0.35. The standard errors are given
in the same two units.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normkit.calibrate.fake_quantization import weight_ranges_follow
from normkit.calibrate.passes import SkippedBatch
from normkit.errors import ArgumentError
from normkit.modeling.graph_norms import graph_model, norms_as_modules
from normkit.modeling.unwrap import unwrapped
from normkit.results import Result, counted

__all__ = ["CalibrationReport", "LayerCalibration"]


@dataclass(frozen=True)
class LayerCalibration:
    """One layer before and after.

    Attributes:
        name: Its dotted name in the model.
        kind: The name of its class.
        eps: Its eps.
        count: Values per channel that the new statistics rest on; the least over
            channels where a mask makes them differ.
        batches: Batches that reached it.
        old: The buffers as they were, by name.
        mean: The new mean, float64, shape `(C,)`.
        var: The new unbiased variance.
        mean_error: Standard error of `mean`, batches taken as independent; None for
            a running average.
        var_error: Standard error of `var`; likewise.
    """

    name: str
    kind: str
    eps: float
    count: float
    batches: int
    old: Mapping[str, Tensor]
    mean: Tensor
    var: Tensor
    mean_error: Tensor | None = None
    var_error: Tensor | None = None

    @property
    def d_mean(self) -> float:
        """Distance that the mean moved, in standard deviations; mean over channels."""
        old = self.old["running_mean"].to(self.mean.dtype).reshape(-1)
        moved = (old - self.mean).abs() * torch.rsqrt(self.var + self.eps)
        return float(moved.mean())

    @property
    def d_var(self) -> float:
        """Distance that the variance moved, |ln| of the ratio; mean over channels."""
        old = self.old["running_var"].to(self.var.dtype).reshape(-1)
        ratio = (old + self.eps) / (self.var + self.eps)
        return float(ratio.log().abs().mean())

    @property
    def error(self) -> float:
        """The larger standard error of the two distances; nan where not defined."""
        return relative_error(self.var, self.mean_error, self.var_error, self.eps)


@dataclass(frozen=True, repr=False)
class CalibrationReport(Result):
    """Report of a calibration; `undo` reverts it.

    Attributes:
        mode: The estimator: "exact", "average" or "running".
        order: What earlier layers normalized by: "train" or "eval".
        batches: Batches used, over all ranks.
        layers: The calibrated layers, in the order of the model.
        untouched: The reason for each normalization layer left alone, by name.
        skipped: Batches that were not finite, of this rank.
        stopped: Whether it stopped at `tolerance`, before the data ended.
        metric_before: The metric before, where one was given.
        metric_after: The metric after.
    """

    mode: str
    order: str
    batches: int
    layers: tuple[LayerCalibration, ...]
    untouched: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[SkippedBatch, ...] = ()
    stopped: bool = False
    metric_before: float | None = None
    metric_after: float | None = None

    def undo(self, model: nn.Module) -> None:
        """Write the old statistics back into `model`, bit for bit and in place.

        Ranges of quantized weights that followed the variances go back up to rounding.

        Raises:
            ArgumentError: `model` has no layer of one of the names, or of another size;
                nothing is written then.
        """
        model = unwrapped(graph_model(model))
        with norms_as_modules(model), weight_ranges_follow(model):
            self._undo(model)

    def _undo(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        writes: list[tuple[Tensor, Tensor]] = []
        for layer in self.layers:
            module = modules.get(layer.name)
            for name, old in layer.old.items():
                buffer = None if module is None else getattr(module, name, None)
                if not isinstance(buffer, Tensor) or buffer.shape != old.shape:
                    raise ArgumentError(
                        f"cannot undo: the model has no {layer.name}.{name} of shape "
                        f"{tuple(old.shape)}; pass the model that was calibrated"
                    )
                writes.append((buffer, old))
        with torch.no_grad():
            for buffer, old in writes:
                buffer.copy_(old)

    def to_text(self) -> str:
        """Return a table of the layers, then the layers and batches left out."""
        lines = [
            f"{self.mode} statistics of "
            f"{counted(self.batches, 'batch', plural='batches')}, {self.order} order"
        ]
        if self.stopped:
            lines[0] += ", stopped once sure enough"
        if self.metric_before is not None and self.metric_after is not None:
            lines.append(f"metric {self.metric_before:.6g} -> {self.metric_after:.6g}")
        width = max([5, *(len(layer.name) for layer in self.layers)])
        if self.layers:
            lines.append(
                f"{'layer':<{width}}  {'values':>10}  {'d_mean':>8}  {'d_var':>8}  "
                f"{'std.err.':>8}"
            )
        for layer in self.layers:
            error = "-" if math.isnan(layer.error) else f"{layer.error:.4f}"
            lines.append(
                f"{layer.name:<{width}}  {layer.count:>10.10g}  {layer.d_mean:>8.4f}  "
                f"{layer.d_var:>8.4f}  {error:>8}"
            )
        lines += [f"left alone  {name}: {why}" for name, why in self.untouched.items()]
        lines += [f"skipped  {batch}" for batch in self.skipped]
        return "\n".join(lines)

    def to_rows(self) -> list[dict[str, object]]:
        """Return one mapping per layer."""
        return [
            {
                "name": layer.name,
                "kind": layer.kind,
                "channels": layer.mean.numel(),
                "values": layer.count,
                "batches": layer.batches,
                "d_mean": _number(layer.d_mean),
                "d_var": _number(layer.d_var),
                "standard_error": _number(layer.error),
            }
            for layer in self.layers
        ]

    def to_json(self) -> str:
        """Return the report as JSON; undefined numbers are null."""
        content: dict[str, Any] = {
            "mode": self.mode,
            "order": self.order,
            "batches": self.batches,
            "stopped": self.stopped,
            "metric_before": _number(self.metric_before),
            "metric_after": _number(self.metric_after),
            "layers": self.to_rows(),
            "untouched": dict(self.untouched),
            "skipped": [
                {"index": b.index, "layer": b.layer, "channels": b.channels}
                for b in self.skipped
            ],
        }
        return json.dumps(content, indent=2)


def relative_error(
    var: Tensor, mean_error: Tensor | None, var_error: Tensor | None, eps: float
) -> float:
    """Return the larger of the two standard errors, in the units of the distances."""
    if mean_error is None or var_error is None:
        return math.nan
    spread = var + eps
    return float(
        torch.maximum(
            (mean_error * torch.rsqrt(spread)).mean(), (var_error / spread).mean()
        )
    )


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)

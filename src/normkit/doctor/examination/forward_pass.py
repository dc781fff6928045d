"""One pass over the batches: the measurements of every layer, merged over batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normkit.doctor.channel_statistics import ChannelStatistics, Padding
from normkit.doctor.measurements import (
    LayerStatistics,
    OutputStatistics,
    WeightStatistics,
)
from normkit.doctor.probes.layer_probe import LayerProbe, merged
from normkit.doctor.probes.probes import Probes
from normkit.doctor.probes.tensor_statistics import first_tensor, histogram_of, norm_of
from normkit.moments import Moments, moments

__all__ = ["ForwardPass", "equal_rows"]


@dataclass
class _Layer:
    """The measurements of one layer over one pass."""

    kind: str
    probe: LayerProbe
    samples: int = 0
    input: Moments | None = None
    output: Moments | None = None
    gradient_norm: list[float] = field(default_factory=list)
    saturated: list[float] = field(default_factory=list)
    channels: ChannelStatistics | None = None
    calls: list[ChannelStatistics] = field(default_factory=list)
    unpadded: Moments | None = None
    num_padded: int = 0
    alive: Tensor | None = None
    fed_by: str = ""

    @property
    def dead(self) -> float | None:
        """Share of units that were zero on every sample."""
        return None if self.alive is None else 1 - float(self.alive.double().mean())


class ForwardPass:
    """One pass over all batches: measurements of each layer, loss of each batch."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.losses: list[float] = []
        self.metrics: list[float] = []
        self.seen: dict[str, _Layer] = {}
        self.gradients: dict[tuple[str, str], list[float]] = {}
        self.equal_gradients: dict[str, float] = {}
        self.input: Moments | None = None
        self._answers: list[Moments] = []
        self._sums_to_one = True
        self._classes: int | None = None

    def add_probes(self, probes: Probes) -> None:
        """Merge what the probes measured on one batch."""
        for probe in probes.in_order:
            if probe.input is None:
                continue
            layer = self.seen.setdefault(probe.name, _Layer(probe.kind, probe))
            layer.samples += probe.samples
            layer.fed_by = probe.fed_by
            layer.input = merged(layer.input, _on_cpu(probe.input))
            if probe.output is not None:
                layer.output = merged(layer.output, _on_cpu(probe.output))
            if probe.channels is not None:
                channels = probe.channels.to("cpu")
                old = layer.channels
                layer.channels = old.merge(channels) if old else channels
                layer.num_padded += probe.num_padded
                if probe.unpadded is not None:
                    layer.unpadded = merged(layer.unpadded, _on_cpu(probe.unpadded))
                for index, call in enumerate(probe.calls):
                    if index < len(layer.calls):
                        layer.calls[index] = layer.calls[index].merge(call.to("cpu"))
                    else:
                        layer.calls.append(call.to("cpu"))
            if probe.alive is not None:
                alive = probe.alive.cpu()
                layer.alive = alive if layer.alive is None else layer.alive | alive
            if probe.gradient_norm is not None:
                layer.gradient_norm.append(float(probe.gradient_norm))
            if probe.saturated_share is not None:
                layer.saturated.append(float(probe.saturated_share))

    def add_gradients(self, model: nn.Module) -> None:
        """Record the norms of the gradients of weights and biases."""
        for name, module in model.named_modules():
            for kind in ("weight", "bias"):
                parameter = module._parameters.get(kind)
                if parameter is not None and parameter.grad is not None:
                    norms = self.gradients.setdefault((name, kind), [])
                    norms.append(float(norm_of(parameter.grad)))
            weight = module._parameters.get("weight")
            if weight is not None and weight.grad is not None and weight.dim() > 1:
                self.equal_gradients[name] = equal_rows(weight, weight.grad)

    def add_input(self, batch: Any) -> None:
        """Merge the values of the first floating-point input."""
        x = first_tensor(batch)
        if x is not None:
            flat = x.detach().flatten()
            self.input = merged(self.input, _on_cpu(moments(flat, 0)))

    def add_output(self, output: Any, targets: Any) -> None:
        """Merge the model's outputs, unit by unit."""
        y = first_tensor(output)
        if y is None or y.dim() < 2:
            return
        y = y.detach().float().flatten(1)
        self._answers.append(_on_cpu(moments(y, 0)))
        sums = y.sum(1)
        is_positive = bool((y >= 0).all())
        self._sums_to_one &= is_positive and bool(((sums - 1).abs() < 1e-3).all())
        if isinstance(targets, Tensor) and targets.dtype == torch.int64:
            found = int(targets.max()) + 1
            self._classes = max(found, self._classes or 0)

    def output(self, loss_fn: Any) -> OutputStatistics | None:
        """Return statistics of the outputs; None when they were no tensor of one size.

        Args:
            loss_fn: The loss, whose name is recorded.
        """
        if not self._answers or len({a.mean.shape for a in self._answers}) > 1:
            return None
        merged = Moments.merge_all(self._answers)
        return OutputStatistics(
            spread=float(merged.var.mean().sqrt()),
            scale=float(merged.mean_square.mean().sqrt()),
            units=merged.mean.numel(),
            sums_to_one=self._sums_to_one and merged.mean.numel() > 1,
            classes=self._classes,
            loss_kind=getattr(loss_fn, "__name__", type(loss_fn).__name__),
        )

    def channels(self, name: str) -> ChannelStatistics | None:
        """Return the channel statistics of one layer; None when it was not called."""
        return self.seen[name].channels if name in self.seen else None

    def calls(self, name: str) -> tuple[ChannelStatistics, ...]:
        """Return the channel statistics of each call of one layer within a forward."""
        return tuple(self.seen[name].calls) if name in self.seen else ()

    def padding(self, name: str) -> Padding | None:
        """Return the effect of the constant ends of sequences on one layer."""
        layer = self.seen.get(name)
        if layer is None or layer.channels is None or layer.unpadded is None:
            return None
        if not layer.num_padded:
            return None
        whole, unpadded = layer.channels.pooled, layer.unpadded
        sd = unpadded.var.sqrt()
        judged = (sd > 0) & (whole.var > 0)
        if not judged.any():
            return None
        shift = ((whole.mean - unpadded.mean).abs() / sd)[judged].mean()
        ratio = (whole.var / unpadded.var)[judged].log().mean().exp()
        count = float(whole.count.max())
        return Padding(layer.num_padded / count, float(shift), float(ratio))

    def weight(self, name: str) -> WeightStatistics | None:
        """Return statistics of one layer's weight; None when it has no matrix."""
        probe = self.seen[name].probe
        weight = probe.module._parameters.get("weight")
        if probe.role != "weight" or weight is None:
            return None
        return WeightStatistics(
            norm=float(norm_of(weight.detach())),
            gradient_norm=tuple(self.gradients.get((name, "weight"), ())),
            bias_gradient_norm=tuple(self.gradients.get((name, "bias"), ())),
            equal_rows=equal_rows(weight),
            equal_gradients=self.equal_gradients.get(name),
        )

    def layers(self) -> list[LayerStatistics]:
        """Return the statistics of each layer, in the order of execution."""
        ordered = sorted(self.seen.items(), key=lambda item: item[1].probe.order or 0)
        return [
            LayerStatistics(
                name=name,
                kind=layer.kind,
                role=layer.probe.role,
                is_output=layer.probe.is_output,
                samples=layer.samples,
                units=layer.probe.units,
                input=layer.input,
                output=layer.output,
                gradient_norm=tuple(layer.gradient_norm),
                saturated=tuple(layer.saturated),
                dead=layer.dead,
                dead_samples=layer.samples,
                fed_by=layer.fed_by,
                features=_features(layer.probe.module),
                before=histogram_of(layer.probe.before),
                after=histogram_of(layer.probe.after),
            )
            for name, layer in ordered
        ]


def equal_rows(weight: Tensor, gradient: Tensor | None = None) -> float:
    """Return the share of rows equal to another row (and with an equal gradient).

    Rows with equal weights and equal gradients stay equal for ever: they are one unit.
    """
    if weight.shape[0] < 2 or weight.dim() < 2:
        return 0.0
    rows = weight.detach().flatten(1).cpu()
    rows = rows.float() if rows.element_size() < 4 else rows
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows.numpy()):
        groups.setdefault(row.tobytes(), []).append(index)
    alike = 0
    for members in groups.values():
        if len(members) < 2:
            continue
        if gradient is None:
            alike += len(members)
            continue
        theirs = gradient.detach().flatten(1)[members].double()
        away = (theirs - theirs[:1]).abs().amax(1)
        same = away <= 1e-4 * theirs.abs().amax()
        alike += int(same.sum()) if int(same.sum()) > 1 else 0
    return alike / len(rows)


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def _on_cpu(found: Moments) -> Moments:
    return found.to(device="cpu", dtype=torch.float64)

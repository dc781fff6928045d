"""One pass over the batches: what every layer saw, merged batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normkit.doctor.layer_probe import LayerProbe, merged
from normkit.doctor.measure import first_tensor, histogram_of, norm_of
from normkit.doctor.probe import Probes
from normkit.doctor.statistics import (
    LayerStatistics,
    OutputStatistics,
    WeightStatistics,
)
from normkit.doctor.streams import ChannelStream, Padding
from normkit.moments import Moments, moments

__all__ = ["Walk", "twins"]


@dataclass
class _Seen:
    """What one walk saw of one layer."""

    kind: str
    probe: LayerProbe
    samples: int = 0
    input: Moments | None = None
    output: Moments | None = None
    gradient_norm: list[float] = field(default_factory=list)
    saturated: list[float] = field(default_factory=list)
    stream: ChannelStream | None = None
    calls: list[ChannelStream] = field(default_factory=list)
    kept: Moments | None = None
    num_padded: int = 0
    alive: Tensor | None = None
    fed_by: str = ""

    @property
    def dead(self) -> float | None:
        """Share of units that were zero on every sample."""
        return None if self.alive is None else 1 - float(self.alive.double().mean())


class Walk:
    """One pass over all batches: what each layer saw, and the loss of each batch."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.losses: list[float] = []
        self.metrics: list[float] = []
        self.seen: dict[str, _Seen] = {}
        self.gradients: dict[tuple[str, str], list[float]] = {}
        self.gradient_twins: dict[str, float] = {}
        self.input: Moments | None = None
        self._answers: list[Moments] = []
        self._sums_to_one = True
        self._classes: int | None = None

    def take(self, probes: Probes) -> None:
        """Merge what the probes saw of one batch."""
        for probe in probes.in_order:
            if probe.input is None:
                continue
            seen = self.seen.setdefault(probe.name, _Seen(probe.kind, probe))
            seen.samples += probe.samples
            seen.fed_by = probe.fed_by
            seen.input = merged(seen.input, _on_cpu(probe.input))
            if probe.output is not None:
                seen.output = merged(seen.output, _on_cpu(probe.output))
            if probe.stream is not None:
                stream = probe.stream.to("cpu")
                seen.stream = seen.stream.merge(stream) if seen.stream else stream
                seen.num_padded += probe.num_padded
                if probe.kept is not None:
                    seen.kept = merged(seen.kept, _on_cpu(probe.kept))
                for index, call in enumerate(probe.calls):
                    if index < len(seen.calls):
                        seen.calls[index] = seen.calls[index].merge(call.to("cpu"))
                    else:
                        seen.calls.append(call.to("cpu"))
            if probe.alive is not None:
                alive = probe.alive.cpu()
                seen.alive = alive if seen.alive is None else seen.alive | alive
            if probe.gradient_norm is not None:
                seen.gradient_norm.append(float(probe.gradient_norm))
            if probe.saturated_share is not None:
                seen.saturated.append(float(probe.saturated_share))

    def take_weights(self, model: nn.Module) -> None:
        """Note the norms of the gradients of weights and biases."""
        for name, module in model.named_modules():
            for kind in ("weight", "bias"):
                parameter = module._parameters.get(kind)
                if parameter is not None and parameter.grad is not None:
                    norms = self.gradients.setdefault((name, kind), [])
                    norms.append(float(norm_of(parameter.grad)))
            weight = module._parameters.get("weight")
            if weight is not None and weight.grad is not None and weight.dim() > 1:
                self.gradient_twins[name] = twins(weight, weight.grad)

    def take_input(self, batch: Any) -> None:
        """Merge the values of the first floating input."""
        x = first_tensor(batch)
        if x is not None:
            flat = x.detach().flatten()
            self.input = merged(self.input, _on_cpu(moments(flat, 0)))

    def take_output(self, output: Any, targets: Any) -> None:
        """Merge the answers, unit by unit."""
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
        """What the model answered; None when it was no tensor of one size."""
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

    def calls(self, name: str) -> tuple[ChannelStream, ...]:
        """The stream of each call of one layer within a forward."""
        return tuple(self.seen[name].calls) if name in self.seen else ()

    def padding(self, name: str) -> Padding | None:
        """What the constant ends of sequences do to one layer's statistics."""
        seen = self.seen.get(name)
        if seen is None or seen.stream is None or seen.kept is None:
            return None
        if not seen.num_padded:
            return None
        whole, kept = seen.stream.pooled, seen.kept
        sd = kept.var.sqrt()
        judged = (sd > 0) & (whole.var > 0)
        if not judged.any():
            return None
        shift = ((whole.mean - kept.mean).abs() / sd)[judged].mean()
        ratio = (whole.var / kept.var)[judged].log().mean().exp()
        count = float(whole.count.max())
        return Padding(seen.num_padded / count, float(shift), float(ratio))

    def stream(self, name: str) -> ChannelStream | None:
        """The per-channel stream of one layer; None when it was not called."""
        return self.seen[name].stream if name in self.seen else None

    def weight(self, name: str) -> WeightStatistics | None:
        """The weight of one layer; None when it has no matrix."""
        seen = self.seen[name]
        weight = seen.probe.module._parameters.get("weight")
        if seen.probe.role != "weight" or weight is None:
            return None
        return WeightStatistics(
            norm=float(norm_of(weight.detach())),
            gradient_norm=tuple(self.gradients.get((name, "weight"), ())),
            bias_gradient_norm=tuple(self.gradients.get((name, "bias"), ())),
            twins=twins(weight),
            gradient_twins=self.gradient_twins.get(name),
        )

    def layers(self) -> list[LayerStatistics]:
        """What was seen, layer by layer in the order of execution."""
        ordered = sorted(self.seen.items(), key=lambda item: item[1].probe.order or 0)
        return [
            LayerStatistics(
                name=name,
                kind=seen.kind,
                role=seen.probe.role,
                is_output=seen.probe.is_output,
                samples=seen.samples,
                units=seen.probe.units,
                input=seen.input,
                output=seen.output,
                gradient_norm=tuple(seen.gradient_norm),
                saturated=tuple(seen.saturated),
                dead=seen.dead,
                dead_samples=seen.samples,
                fed_by=seen.fed_by,
                features=_features(seen.probe.module),
                before=histogram_of(seen.probe.before),
                after=histogram_of(seen.probe.after),
            )
            for name, seen in ordered
        ]


def twins(weight: Tensor, gradient: Tensor | None = None) -> float:
    """Share of rows equal to another row, and of equal gradient if one is given.

    Equal rows with equal gradients stay equal for ever: one unit, many times.
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

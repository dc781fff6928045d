"""One pass over the batches: the measurements of every layer, merged over batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normkit.doctor.channel_statistics import ChannelStatistics, Padding
from normkit.doctor.examination.answers import Answers
from normkit.doctor.examination.equal_rows import EqualRows
from normkit.doctor.examination.far_values import FarValues
from normkit.doctor.examination.targets import channels_of, on_cpu
from normkit.doctor.measurements import LayerStatistics, NotFinite, WeightStatistics
from normkit.doctor.probes.layer_probe import LayerProbe, merged
from normkit.doctor.probes.parts import Parts
from normkit.doctor.probes.probes import Probes
from normkit.doctor.probes.series import numbers_of, to_floats
from normkit.doctor.probes.tensor_statistics import first_tensor, histogram_of, norm_of
from normkit.moments import Moments, moments

__all__ = ["ForwardPass"]

# Channel statistics of so many batches wait to be merged: few tensors to keep, and a
# merge costs as much for many parts as for two.
MERGED_AT_ONCE = 16
_MOMENTS = ("count", "mean", "m2")


@dataclass
class _Scalars:
    """Moments of single values, merged in Python: a hundredth of the time of tensors.

    A pass over 50 batches merges those of every layer's inputs and outputs.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def add(self, count: float, mean: float, m2: float) -> None:
        total = self.count + int(count)
        if not self.count:
            self.count, self.mean, self.m2 = total, mean, m2
            return
        share, delta = count / total, mean - self.mean
        self.mean += delta * share
        self.m2 += m2 + delta * delta * self.count * share
        self.count = total

    @property
    def moments(self) -> Moments | None:
        if not self.count:
            return None
        mean, m2 = torch.tensor([self.mean, self.m2], dtype=torch.float64)
        return Moments(torch.tensor(self.count), mean, m2)


class _Channels:
    """Channel statistics, merged a few batches at a time."""

    def __init__(self) -> None:
        self._parts: list[ChannelStatistics] = []

    def add(self, part: ChannelStatistics) -> None:
        self._parts.append(part.to("cpu"))
        if len(self._parts) == MERGED_AT_ONCE:
            self._parts = [ChannelStatistics.merge_all(self._parts)]

    @property
    def statistics(self) -> ChannelStatistics:
        self._parts = [ChannelStatistics.merge_all(self._parts)]
        return self._parts[0]


@dataclass
class _Layer:
    """The measurements of one layer over one pass."""

    kind: str
    probe: LayerProbe
    samples: int = 0
    input: _Scalars = field(default_factory=_Scalars)
    output: _Scalars = field(default_factory=_Scalars)
    gradient_norm: list[float] = field(default_factory=list)
    saturated: list[float] = field(default_factory=list)
    calls: list[_Channels] = field(default_factory=list)
    unpadded: Moments | None = None
    num_padded: int = 0
    alive: Tensor | None = None
    has_varied: bool = False
    fed_by: str = ""
    beside: str = ""
    is_normalized: bool = False
    crossed: tuple[int, int] | None = None
    reached: tuple[int, int] = (0, 0)

    @property
    def dead(self) -> float | None:
        """Share of units that were zero on every sample.

        None where their number has varied: they are positions of some length then.
        """
        if self.alive is None or self.has_varied:
            return None
        return 1 - float(self.alive.double().mean())

    def add_alive(self, alive: Tensor) -> None:
        """Add the active units of one batch."""
        self.has_varied |= self.alive is not None and self.alive.shape != alive.shape
        is_same = self.alive is not None and not self.has_varied
        self.alive = self.alive | alive if is_same and self.alive is not None else alive


class ForwardPass:
    """One pass over all batches: measurements of each layer, loss of each batch."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.losses: list[float] = []
        self.metrics: list[float] = []
        self.seen: dict[str, _Layer] = {}
        self.gradients: dict[tuple[str, str], list[float]] = {}
        self.equal_gradients: dict[str, float] = {}
        self._with_gradient: set[str] = set()
        self.input: Moments | None = None
        self.input_channels: list[ChannelStatistics] = []
        self.other_inputs: list[list[Moments]] = []
        self.is_table = False
        self.are_shares = True
        self.are_integers = True
        self.far = FarValues()
        self.answers = Answers()
        self.parts = Parts()
        # In eval mode before the pass, and in training mode when they were called.
        self.switched_on: frozenset[str] = frozenset()
        # In training mode before it.
        self.left_on: frozenset[str] = frozenset()
        self._equal_rows: dict[str, EqualRows] = {}

    def add_probes(self, probes: Probes) -> None:
        """Merge what the probes measured on one batch."""
        self.parts.add(probes.blocks)
        is_measured = probes.channels or not probes.batch_norms_only
        called = [
            p
            for p in probes.in_order
            if p.input is not None or p.output is not None or p.calls or not is_measured
        ]
        numbers = numbers_of(called)
        values = iter(to_floats([v for each in numbers for v in each.values()]))
        for probe, each in zip(called, numbers, strict=True):
            layer = self.seen.setdefault(probe.name, _Layer(probe.kind, probe))
            layer.samples += probe.samples
            layer.fed_by, layer.beside = probe.fed_by, probe.beside
            layer.crossed = probe.crossed
            if probe.gradient_calls:
                layer.reached = probe.graph_calls, probe.gradient_calls
            layer.is_normalized |= probe.is_normalized
            found = {key: next(values) for key in each}
            for side, kept in (("input", layer.input), ("output", layer.output)):
                if f"{side}.count" in found:
                    kept.add(*(found[f"{side}.{key}"] for key in _MOMENTS))
            if "gradient_norm" in found:
                layer.gradient_norm.append(found["gradient_norm"])
            if "saturated" in found:
                layer.saturated.append(found["saturated"])
            if probe.alive is not None:
                layer.add_alive(probe.alive.cpu())
            self._add_channels(layer, probe)

    def _add_channels(self, layer: _Layer, probe: LayerProbe) -> None:
        layer.num_padded += probe.num_padded
        if probe.unpadded is not None:
            layer.unpadded = merged(layer.unpadded, on_cpu(probe.unpadded))
        for index, call in enumerate(probe.calls):
            if index == len(layer.calls):
                layer.calls.append(_Channels())
            layer.calls[index].add(call)

    @property
    def unreached(self) -> dict[str, nn.Module]:
        """Layers called with gradients enabled whose parameters never had one."""
        if not self._with_gradient:
            return {}
        return {
            name: seen.probe.module
            for name, seen in self.seen.items()
            if seen.probe.had_gradients
            and name not in self._with_gradient
            and any(
                p.requires_grad for p in seen.probe.module.parameters(recurse=False)
            )
        }

    def add_gradients(self, model: nn.Module) -> None:
        """Record the norms of the gradients of weights and biases."""
        found: dict[tuple[str, str], Tensor] = {}
        for name, module in model.named_modules():
            # A scripted module's `_parameters` is no dict.
            held = dict(module.named_parameters(recurse=False))
            if any(p.grad is not None for p in held.values()):
                self._with_gradient.add(name)
            for kind in ("weight", "bias"):
                parameter = held.get(kind)
                if parameter is not None and parameter.grad is not None:
                    found[name, kind] = norm_of(parameter.grad)
            weight = held.get("weight")
            if weight is not None and weight.grad is not None and weight.dim() > 1:
                self.equal_gradients[name] = self.rows(name, weight).share(weight.grad)
        for key, norm in zip(found, to_floats(list(found.values())), strict=True):
            self.gradients.setdefault(key, []).append(norm)

    def rows(self, name: str, weight: Tensor) -> EqualRows:
        """Return the equal rows of one layer's weight, which no pass changes."""
        if name not in self._equal_rows:
            self._equal_rows[name] = EqualRows.of(weight)
        return self._equal_rows[name]

    def add_input(self, batch: Any, given: Any) -> None:
        """Merge the values of the first floating-point input, and of small ones.

        Args:
            batch: The batch.
            given: What the model was called with.
        """
        x = first_tensor(batch)
        others = [v for v in tree_leaves(given) if v is not x and _is_table(v)]
        self.other_inputs.append(
            [on_cpu(moments(v.detach().flatten(), 0)) for v in others]
        )
        if x is not None:
            flat = x.detach().flatten()
            self.is_table = x.dim() == 2
            self.are_shares &= self.is_table and _are_shares(x.detach())
            self.are_integers = self.are_integers and bool((flat == flat.round()).all())
            self.far.add(flat)
            self.input = merged(self.input, on_cpu(moments(flat, 0)))
            if x.dim() > 1 and len(x) > 1:
                self.input_channels.append(channels_of(x))

    @property
    def others(self) -> tuple[Moments, ...]:
        """Moments of the further inputs; none where batches differ in their number."""
        if len({len(each) for each in self.other_inputs}) != 1:
            return ()
        return tuple(
            Moments.merge_all(list(each))
            for each in zip(*self.other_inputs, strict=True)
        )

    @property
    def input_columns(self) -> ChannelStatistics | None:
        """Statistics of a few columns of the inputs; None for sizes that vary."""
        parts = self.input_channels
        if len({part.within.shape for part in parts}) != 1:
            return None
        return ChannelStatistics.merge_all(parts)

    def channels(self, name: str) -> ChannelStatistics | None:
        """Return the channel statistics of one layer; None when it was not called."""
        calls = self.calls(name)
        return ChannelStatistics.merge_all(calls) if calls else None

    def calls(self, name: str) -> tuple[ChannelStatistics, ...]:
        """Return the channel statistics of each call of one layer within a forward."""
        layer = self.seen.get(name)
        return () if layer is None else tuple(c.statistics for c in layer.calls)

    def padding(self, name: str) -> Padding | None:
        """Return the effect of the constant ends of sequences on one layer."""
        layer = self.seen.get(name)
        channels = self.channels(name)
        if layer is None or channels is None or layer.unpadded is None:
            return None
        if not layer.num_padded:
            return None
        whole, unpadded = channels.pooled, layer.unpadded
        sd = unpadded.var.sqrt()
        judged = (sd > 0) & (whole.var > 0)
        if not judged.any():
            return None
        shift = ((whole.mean - unpadded.mean).abs() / sd)[judged].mean()
        ratio = (whole.var / unpadded.var)[judged].log().mean().exp()
        count = float(whole.count.max())
        return Padding(layer.num_padded / count, float(shift), float(ratio))

    def had_mask(self, name: str) -> bool:
        """Return True where one layer was called with `mask=`."""
        return name in self.seen and self.seen[name].probe.had_mask

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
            equal_rows=self.rows(name, weight).share(),
            equal_gradients=self.equal_gradients.get(name),
            usual_norm=probe.usual_norm,
            size=weight.numel(),
            parameter=id(weight),
            has_bias=probe.module._parameters.get("bias") is not None,
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
                input=layer.input.moments,
                output=layer.output.moments,
                gradient_norm=tuple(layer.gradient_norm),
                saturated=tuple(layer.saturated),
                dead=layer.dead,
                dead_samples=layer.samples,
                reached=layer.reached,
                fed_by=layer.fed_by,
                is_normalized=layer.is_normalized,
                is_factor=layer.probe.is_factor,
                beside=layer.beside,
                had_gradients=layer.probe.had_gradients,
                has_zero_scale=layer.probe.has_zero_scale,
                features=_features(layer.probe.module),
                before=histogram_of(layer.probe.before),
                after=histogram_of(layer.probe.after),
                gains=layer.probe.gains,
                shift_spread=_shift_spread(layer.probe),
                eps=layer.probe.eps,
                crossed=layer.crossed,
                rows=layer.probe.rows,
                not_finite=_not_finite(layer),
            )
            for name, layer in ordered
        ]


def _shift_spread(probe: LayerProbe) -> float:
    shift = probe.module._parameters.get("bias") if probe.role == "norm" else None
    return 0.0 if shift is None else float(shift.detach().double().std(correction=0))


def _not_finite(layer: _Layer) -> NotFinite:
    """Return which of inputs, outputs and weight are not finite."""
    sides = [layer.input.moments, layer.output.moments]
    is_bad = [m is not None and not math.isfinite(float(m.mean + m.m2)) for m in sides]
    if not any(is_bad):
        return NotFinite()
    weight = layer.probe.module._parameters.get("weight")
    is_bad.append(weight is not None and not bool(weight.isfinite().all()))
    return NotFinite(*(0 if bad else None for bad in is_bad))


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def _are_shares(rows: Tensor) -> bool:
    """Return True for rows that sum to one, or are empty."""
    if not rows.numel() or float(rows.min()) < 0:
        return False
    sums = rows.float().sum(1)
    return bool((((sums - 1).abs() < 1e-3) | (sums == 0)).all())


def _is_table(x: Any) -> bool:
    """Return True for a number or a row of them for each sample."""
    is_real = isinstance(x, Tensor) and x.is_floating_point()
    return is_real and x.dim() in (1, 2) and len(x) > 1

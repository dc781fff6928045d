"""Reports of a conversion, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normkit.results import Result, counted

__all__ = ["Conversion", "ConversionReport", "FusionReport"]


@dataclass(frozen=True)
class Conversion:
    """One layer before and after.

    Attributes:
        name: Its dotted name in the model.
        before: The name of its class before.
        after: The name of its class after.
        explained: For group norm fitted to data: the share of the variance of batch
            norm's outputs that the new layer explains, least over channels; else None.
    """

    name: str
    before: str
    after: str
    explained: float | None = None


@dataclass(frozen=True, repr=False)
class ConversionReport(Result):
    """Report of a conversion.

    Attributes:
        model: The model that was given; it has been changed in place.
        to: What was asked for.
        layers: The converted layers, in the order of the model.
        untouched: The reason for each normalization left as it was, by name.
        fused: What each batch norm computes together with, by name: `"relu"`,
            `"add+relu"`; empty where nothing was to be fused.
        unfused: The reason for each other batch norm.
    """

    model: nn.Module
    to: str
    layers: tuple[Conversion, ...]
    untouched: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    unfused: Mapping[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """Return one line per layer, then what was left alone."""
        lines = [f"to {self.to}: {counted(len(self.layers), 'layer')}"]
        for layer in self.layers:
            line = f"  {layer.name or '(the model)'}: {layer.before} -> {layer.after}"
            if layer.explained is not None:
                line += f", {layer.explained:.1%} of the output's variance"
            lines.append(line)
        for name, reason in self.untouched.items():
            lines.append(f"  {name or '(the model)'}: left as it is, {reason}")
        if self.fused or self.unfused:
            total = len(self.fused) + len(self.unfused)
            lines.append(f"{len(self.fused)} of {total} fused")
            lines += [f"  {name}: {what}" for name, what in self.fused.items()]
            lines += [f"  {name}: left, {why}" for name, why in self.unfused.items()]
        return "\n".join(lines)

    def to_rows(self) -> list[dict[str, object]]:
        """Return one mapping per converted layer."""
        return [dict(vars(layer)) for layer in self.layers]

    def to_json(self) -> dict[str, object]:
        """Return the report as plain data."""
        return {
            "to": self.to,
            "layers": self.to_rows(),
            "untouched": dict(self.untouched),
            "fused": dict(self.fused),
            "unfused": dict(self.unfused),
        }


@dataclass(frozen=True, repr=False)
class FusionReport(Result):
    """Report of the fusion: what was fused, and a reason for each other layer.

    Attributes:
        model: The model.
        fused: What each batch norm computes together with, by the layer's name:
            "relu", or "add+relu" with the sum before it.
        left: The reason for each other batch norm.
    """

    model: nn.Module
    fused: dict[str, str]
    left: dict[str, str]

    def to_text(self) -> str:
        """Return one line per layer."""
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.left)} fused"]
        lines += [f"  {name}: {act}" for name, act in self.fused.items()]
        lines += [f"  {name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"fused": dict(self.fused), "left": dict(self.left)}

"""Report of an initialization: n·Var[w] per layer, as meant and as drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from normkit.results import Result

__all__ = ["InitLine", "InitReport"]


@dataclass(frozen=True)
class InitLine:
    """One linear map.

    Attributes:
        name: Dotted name of the layer.
        kind: Its class.
        rule: What was done, in a few words.
        fan_in: Products per output.
        fan_out: Products per gradient of an input.
        predicted: fan_in·Var[w] as meant.
        measured: fan_in·mean(|w|²) of the weights drawn: what the layer multiplies the
            mean square of its input by.
        predicted_back: fan_out·Var[w] as meant: likewise for gradients.
        measured_back: fan_out·mean(|w|²).
        signal_predicted: Mean square of the output by theory, on the example inputs;
            None without, and where theory has no number (`notes` says why).
        signal_measured: As measured.
        gradient_predicted: Mean square of the gradient of the output by theory,
            relative to that of the last layer; None likewise.
        gradient_measured: As measured.
    """

    name: str
    kind: str
    rule: str
    fan_in: float
    fan_out: float
    predicted: float
    measured: float
    predicted_back: float
    measured_back: float
    signal_predicted: float | None = None
    signal_measured: float | None = None
    gradient_predicted: float | None = None
    gradient_measured: float | None = None

    @property
    def label(self) -> str:
        """The name, with the part of the layer where it holds several maps."""
        _, _, part = self.kind.partition(".")
        return f"{self.name} {part}" if part else self.name


@dataclass(frozen=True, repr=False)
class InitReport(Result):
    """Report of an initialization.

    Attributes:
        scheme: The scheme.
        lines: One per linear map: in the order they run where that is known, else in
            the order of the model.
        left: The reason for each layer with parameters that was left alone.
        notes: What else was done, e.g. a norm's weight set to 0, and what is unknown.
    """

    scheme: str
    lines: tuple[InitLine, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_text(self) -> str:
        """Return a table of n·Var[w], as meant and as drawn, forward and backward."""
        lines = [f"{self.scheme}: n·Var[w], predicted and measured"]
        labels = [line.label for line in self.lines]
        width = max([5, *(len(label) for label in labels)])
        has_signal = any(line.signal_measured is not None for line in self.lines)
        head = f"{'layer':<{width}}  {'forward':>17}  {'backward':>17}"
        if has_signal:
            head += f"  {'E[y²]':>19}  {'E[dy²], relative':>19}"
        lines.append(head + "  rule")
        for line, label in zip(self.lines, labels, strict=True):
            row = (
                f"{label:<{width}}  {line.predicted:>8.4g} {line.measured:>8.4g}  "
                f"{line.predicted_back:>8.4g} {line.measured_back:>8.4g}"
            )
            if has_signal:
                row += f"  {_pair(line.signal_predicted, line.signal_measured)}"
                row += f"  {_pair(line.gradient_predicted, line.gradient_measured)}"
            lines.append(f"{row}  {line.rule}")
        lines += [f"left alone  {name}: {why}" for name, why in self.left.items()]
        lines += list(self.notes)
        return "\n".join(lines)

    def to_rows(self) -> list[dict[str, object]]:
        """Return one mapping per linear map."""
        return [
            {key: _known(value) for key, value in asdict(line).items()}
            for line in self.lines
        ]

    def to_json(self) -> str:
        """Return the report as JSON; unknown numbers are null."""
        content = {
            "scheme": self.scheme,
            "lines": self.to_rows(),
            "left": dict(self.left),
            "notes": list(self.notes),
        }
        return json.dumps(content, indent=2)


def _pair(predicted: float | None, measured: float | None) -> str:
    shown = ["-" if v is None else f"{v:.4g}" for v in (predicted, measured)]
    return f"{shown[0]:>9} {shown[1]:>9}"


def _known(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value

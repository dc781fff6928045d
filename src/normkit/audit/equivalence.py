"""The verdict on two models."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from os import PathLike

from normkit.audit.comparison import Comparison, LayerAgreement, Parting
from normkit.audit.page import equivalence_page
from normkit.doctor.finding import plain
from normkit.results import Result

__all__ = ["Equivalence"]


@dataclass(frozen=True, repr=False)
class Equivalence(Result):
    """Verdict on two models: the same function, as far as runs can tell.

    It is true (`if normkit.verify(…):`) when they agree on every input.

    Attributes:
        equal: Whether they agree.
        max_difference: The largest difference of their outputs on any input.
        tolerance: The largest difference that counts as rounding.
        precision: "float64", or "own": each model in its own types, because one of
            them does not run in float64. Then only large differences are seen.
        comparisons: One per input.
        parting: Where they part; None if they agree or cannot be compared.
        failure: Why they cannot be compared although the first model runs; empty if
            they can.
        layers: The named values of the first model, on the first input.
        notes: What else the runs showed, such as what onnxruntime makes of a file.

    Example:
        >>> verdict = Equivalence(True, 0.0, 1e-7, "float64", (Comparison("x", 0.0),))
        >>> bool(verdict)
        True
        >>> print(verdict)
        the same function: largest difference 0.0e+00 in float64, on x
    """

    equal: bool
    max_difference: float
    tolerance: float
    precision: str
    comparisons: tuple[Comparison, ...]
    parting: Parting | None = None
    failure: str = ""
    layers: tuple[LayerAgreement, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.equal

    def to_text(self) -> str:
        """Return the verdict, and where the models part, as lines of text."""
        where = "float64" if self.precision == "float64" else "their own types"
        ran = [each for each in self.comparisons if not each.problem]
        on = ", ".join(each.inputs for each in ran)
        if self.failure:
            lines = [f"not the same function: {self.failure}"]
        elif self.equal:
            lines = [
                f"the same function: largest difference {self.max_difference:.1e} in "
                f"{where}, on {on}"
            ]
        else:
            lines = [
                f"not the same function: largest difference {self.max_difference:.1e} "
                f"in {where}, above {self.tolerance:.0e}"
            ]
            lines += [f"  {each.difference:.1e} on {each.inputs}" for each in ran]
        if self.parting is not None:
            lines.append(self.parting.to_text())
        lines += [
            f"not compared on {each.inputs}: {each.problem}"
            for each in self.comparisons
            if each.problem
        ]
        lines += self.notes
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the verdict as JSON text, every field included; inf is a string."""
        return json.dumps(plain(asdict(self)), indent=2)

    def to_rows(self) -> list[dict[str, object]]:
        """Return one mapping per named value of the first model."""
        return [
            {
                "value": layer.name,
                "operation": layer.kind,
                "same as": layer.found_at,
                "difference": layer.difference,
            }
            for layer in self.layers
        ]

    def to_html(self, path: str | PathLike[str] | None = None) -> str:
        """Return the report page, and write it to `path` if that is given.

        Raises:
            DependencyError: jinja2 is not installed.
        """
        head, *rest = self.to_text().splitlines()
        page = equivalence_page(
            head, rest, self.equal, self.comparisons, self.parting, self.layers
        )
        if path is not None:
            page.write(path)
        return page.to_html()

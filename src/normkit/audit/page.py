"""The report page of a comparison: the verdict, and the place where the models part."""

from __future__ import annotations

from collections.abc import Sequence

from normkit import report
from normkit.audit.comparison import Comparison, LayerAgreement, Parting

__all__ = ["equivalence_page"]


def equivalence_page(
    head: str,
    rest: Sequence[str],
    equal: bool,
    comparisons: Sequence[Comparison],
    parting: Parting | None,
    layers: Sequence[LayerAgreement],
) -> report.Page:
    """Return the page of a comparison.

    Args:
        head: The verdict in one line.
        rest: The further lines of its text.
        equal: Whether the models agree.
        comparisons: One per input.
        parting: Where they part, if they do.
        layers: The named values of the first model.
    """
    blocks: list[report.Block] = [
        *_numbers(equal, comparisons, layers),
        *_parting(parting),
    ]
    if layers:
        blocks.append(report.Heading("Layer by layer"))
        blocks.append(_table(layers))
    blocks += [
        report.Heading("Inputs"),
        report.Table(
            ["input", "difference", "not compared because"],
            [
                [each.inputs, None if each.problem else each.difference, each.problem]
                for each in comparisons
            ],
            caption="Both models on each input, relative to the largest output",
        ),
    ]
    if rest:
        blocks.append(
            report.Details("As text", [report.Code("\n".join([head, *rest]))])
        )
    return report.Page(title="Two models compared", lead=head, blocks=blocks)


def _numbers(
    equal: bool, comparisons: Sequence[Comparison], layers: Sequence[LayerAgreement]
) -> list[report.Block]:
    largest = max((c.difference for c in comparisons if not c.problem), default=None)
    same = sum(layer.found_at != "" for layer in layers)
    return [
        report.Numbers(
            [
                report.Number(
                    "verdict",
                    "same function" if equal else "not the same",
                    severity="ok" if equal else "error",
                ),
                report.Number("largest difference", largest, "relative"),
                report.Number("values that agree", f"{same} of {len(layers)}"),
            ]
        )
    ]


def _parting(parting: Parting | None) -> list[report.Block]:
    if parting is None:
        return []
    what, facts = "", []
    if parting.pair is not None:
        pair = parting.pair
        what = f"{pair.label_a} in the first model, {pair.label_b} in the second"
        if pair.relation:
            what += f": {pair.relation}"
        facts = [("difference", pair.difference)]
    sentences = [part for part in (what, parting.note) if part]
    before = ", ".join(a for a, _ in parting.last) or "the inputs"
    return [
        report.Heading("Where they part"),
        report.Cards(
            [
                report.Card(
                    parting.place,
                    ". ".join(sentences) or "The second model has no such value.",
                    severity="error",
                    facts=facts,
                )
            ]
        ),
        report.Text(f"The last that agrees before: {before}."),
        report.Table(
            ["first model", "second model"],
            [
                [
                    parting.region_a[i] if i < len(parting.region_a) else "",
                    parting.region_b[i] if i < len(parting.region_b) else "",
                ]
                for i in range(
                    min(20, max(len(parting.region_a), len(parting.region_b)))
                )
            ],
            caption="What each computes from there to the outputs that differ",
        ),
    ]


def _table(layers: Sequence[LayerAgreement]) -> report.Table:
    return report.Table(
        ["value", "operation", "same as", "difference", ""],
        [
            [
                layer.name,
                layer.kind,
                layer.found_at,
                layer.difference,
                report.Mark("ok", "agrees")
                if layer.found_at
                else report.Mark("info", "no such value"),
            ]
            for layer in layers
        ],
        caption="Named values of the first model on the first input. A value without "
        "an equal may have been folded away.",
    )

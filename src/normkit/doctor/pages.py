"""The report pages of a diagnosis and of a watched training."""

from __future__ import annotations

import math
import statistics as numbers
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from normkit.doctor.checks.distance import D_MEAN_WARNING, D_VAR_WARNING
from normkit.doctor.explain_gap import GapExplanation
from normkit.doctor.finding import Finding, Severity, by_cause, ranked
from normkit.doctor.fixes.confirm import Confirmation
from normkit.doctor.history_charts import MAX_ROWS, history_charts
from normkit.doctor.measurements import LayerStatistics, Statistics
from normkit.doctor.probes.series import RECENT
from normkit.doctor.transformer_charts import transformer_blocks
from normkit.report import (
    Bar,
    Bars,
    Block,
    Card,
    Cards,
    Details,
    Figure,
    Heading,
    Histograms,
    Lines,
    Number,
    Numbers,
    Page,
    Row,
    Table,
    Text,
)
from normkit.report import Severity as Sign
from normkit.report.charts import thinned
from normkit.results import counted

__all__ = ["diagnosis_page", "finding_cards", "watch_page"]

_SIGN: dict[Severity, Sign] = {
    "error": "error",
    "warning": "warning",
    "info": "info",
    "clear": "ok",
    "not_judged": "not judged",
}
MAX_HISTOGRAMS = 6


def diagnosis_page(
    summary: str,
    readings: list[Finding],
    statistics: Statistics,
    confirmations: Sequence[Confirmation] = (),
    gap: GapExplanation | None = None,
    verdict: Sequence[tuple[str, str]] = (),
    made: str = "",
) -> Page:
    """Return the page of a diagnosis.

    Args:
        summary: The outcome in one sentence.
        readings: The results of all checks.
        statistics: The measurements that the checks read.
        confirmations: The effect of each repair on a copy.
        gap: The train/eval gap by cause and layer.
        verdict: Facts of the first cause: "cost", "cause", "fix", "on a copy".
        made: What was examined, when, and by which versions, in one sentence.
    """
    return Page(
        title="Diagnosis",
        lead=f"{summary} {made}".strip(),
        blocks=[
            *_first_cause(dict(verdict), readings),
            *_outcome(by_cause(readings), readings),
            *_confirmations(confirmations),
            *_modes(statistics),
            *_gap(gap),
            *_by_layer(statistics, readings),
            *transformer_blocks(statistics, readings),
            *_not_judged(readings),
        ],
    )


def watch_page(
    history: dict[str, Any],
    readings: list[Finding],
    statistics: Statistics,
    *,
    steps: int,
    made: str = "",
) -> Page:
    """Return the page of a watched training.

    Args:
        history: `Watch.history`.
        readings: The results of all checks.
        statistics: The measurements that the checks read.
        steps: Number of training steps, observed or not.
        made: What was watched, when, and by which versions, in one sentence.
    """
    findings = by_cause(readings)
    number = "Nothing" if not findings else counted(len(findings), "finding")
    return Page(
        title="Watched training",
        lead=f"{number} in {counted(len(history['layers']), 'layer')}, observed on "
        f"{len(history['steps'])} of {counted(steps, 'step')}. {made}".strip(),
        blocks=[
            *_outcome(findings, readings),
            *history_charts(history),
            *_by_layer(statistics, readings),
            *transformer_blocks(statistics, readings),
            *_not_judged(readings),
        ],
    )


def finding_cards(findings: Iterable[Finding]) -> Cards:
    """Return one card per finding, with the number of its layers."""
    return Cards(
        [
            Card(
                title=f"{finding.id} {finding.name.replace('_', ' ')}",
                text=finding.evidence,
                severity=_SIGN[finding.severity],
                where=finding.where,
                facts=[
                    ("value", finding.value),
                    ("threshold", finding.threshold),
                    *([("follows from", finding.follows)] if finding.follows else []),
                ],
                fix=finding.fix,
            )
            for finding in findings
        ]
    )


def _first_cause(verdict: dict[str, str], readings: list[Finding]) -> Iterable[Block]:
    """Yield one card: what is wrong, what it costs, the fix and what it gave."""
    if not verdict:
        return
    first = by_cause(readings)[0]
    facts = [(name, verdict[name]) for name in ("on a copy",) if name in verdict]
    yield Cards(
        [
            Card(
                title=f"What is wrong: {first.name.replace('_', ' ')}",
                text=verdict["cost"],
                severity=_SIGN[first.severity],
                where=verdict["cause"],
                facts=facts,
                fix=verdict["fix"],
            )
        ]
    )


def _outcome(findings: list[Finding], readings: list[Finding]) -> Iterable[Block]:
    """Yield the number of causes, a card per finding, and a table of all layers."""
    counts = Counter(f.severity for f in findings if not f.follows)
    others = Counter(f.severity for f in readings)
    yield Numbers(
        [
            Number("errors", counts["error"], severity="error"),
            Number("warnings", counts["warning"], severity="warning"),
            Number("in order", others["clear"], severity="ok"),
            Number("not judged", others["not_judged"], severity="not judged"),
        ]
    )
    yield Heading("Findings")
    if not findings:
        yield Text("The checks with enough data found nothing.")
        return
    yield finding_cards(findings)
    several = [f for f in ranked(readings) if f.layer]
    if len(several) > len(findings):
        columns = ["check", "layer", "severity", "value", "threshold"]
        rows = [[f.id, f.layer, f.severity, f.value, f.threshold] for f in several]
        table = Table(columns, rows[: 5 * MAX_ROWS], "Every layer with a finding")
        yield Details(f"All {len(several)} layers", [table])


def _confirmations(confirmations: Sequence[Confirmation]) -> Iterable[Block]:
    """Yield the effect of each repair on a copy."""
    if not confirmations:
        return
    yield Heading("Fixes tried on a copy")
    yield Table(
        ["check", "measure in eval mode", "before", "after", "helps"],
        [[c.id, c.measure, c.before, c.after, c.helps] for c in confirmations],
        "Each fix on its own copy, on the same batches",
    )


def _modes(statistics: Statistics) -> Iterable[Block]:
    """Yield loss and metric in both modes."""
    found = statistics.evaluation
    if found is None:
        return
    rows = [
        ["loss", found.mean(found.batch_loss), found.mean(found.running_loss)],
    ]
    if found.batch_metric:
        metric = found.mean(found.batch_metric), found.mean(found.running_metric)
        rows.append(["metric", *metric])
    yield Heading("Train and eval")
    yield Table(
        ["", "batch statistics", "running statistics"],
        rows,
        f"The same {sum(found.samples)} samples, dropout off, in both modes",
    )


def _by_layer(statistics: Statistics, readings: list[Finding]) -> Iterable[Block]:
    """Yield tables and charts layer by layer, in the order of execution."""
    if not statistics.layers:
        return
    yield from _histograms(statistics)
    yield Heading("Layer by layer")
    yield from _signals(statistics)
    distances = [f for f in readings if f.id == "D01" and not math.isnan(f.value)]
    if distances:
        yield Row([_drift(distances, "d_mean"), _drift(distances, "d_var")])
    yield from _shares(readings, "D20", "Share of inputs where the activation is flat")
    yield from _shares(readings, "D21", "Share of units that are zero on every sample")
    layers = thinned(list(statistics.layers), MAX_ROWS)
    rows = [
        [
            layer.where,
            layer.kind,
            *_mean_and_std(layer),
            layer.output_rms,
            numbers.median(layer.gradient_norm) if layer.gradient_norm else None,
        ]
        for layer in layers
    ]
    columns = ["layer", "kind", "input mean", "input std", "output rms", "‖dL/dh‖"]
    shown = f"{len(layers)} of {counted(len(statistics.layers), 'layer')}"
    table = Table(columns, rows, f"{shown}, in the order of execution")
    yield Details("Activations and gradients", [table], is_open=len(layers) <= 30)


def _histograms(statistics: Statistics) -> Iterable[Block]:
    """Yield histograms before and after some of the normalizations."""
    layers = [
        layer
        for layer in statistics.of_role("norm")
        if layer.before is not None and layer.after is not None
    ]
    if not layers:
        return
    shown = thinned(layers, MAX_HISTOGRAMS)
    figures: list[Block] = []
    for layer in shown:
        before, after = layer.before, layer.after
        assert before is not None
        assert after is not None
        (mean, std), out = _mean_and_std(layer), layer.output
        alt = "Share of values in each bin."
        if mean is not None and std is not None and out is not None:
            left = float(out.mean), float(out.var.sqrt())
            alt = (
                f"Before: mean {mean:.3g}, standard deviation {std:.3g}. After: mean "
                f"{left[0]:.3g}, standard deviation {left[1]:.3g}."
            )
        chart = Histograms(
            {
                "before": (before.edges, before.counts.tolist()),
                "after": (after.edges, after.counts.tolist()),
            },
            x_label="value",
        )
        figures.append(Figure(f"{layer.kind} {layer.where}", chart, alt=alt))
    yield Heading("Before and after normalization")
    if statistics.while_training:
        yield Text(f"On the last observed steps, at most {RECENT}.")
    if len(shown) < len(layers):
        yield Text(f"{len(shown)} of {len(layers)} layers, spread over the depth.")
    yield Row(figures)


def _signals(statistics: Statistics) -> Iterable[Block]:
    """Yield the size of signals and of gradients over the depth."""
    layers = [layer for layer in statistics.of_role("weight") if layer.output_rms > 0]
    if len(layers) < 2:
        return
    places = list(range(len(layers)))
    series = {"rms of the outputs": (places, [la.output_rms for la in layers])}
    if any(layer.gradient_norm for layer in layers):
        # The median over the batches, as in the checks.
        gradients = [
            numbers.median(la.gradient_norm) if la.gradient_norm else math.nan
            for la in layers
        ]
        series["‖dL/dh‖"] = (places, gradients)
    first, last = layers[0], layers[-1]
    words = (
        f"The rms of the outputs goes from {first.output_rms:.3g} at {first.where} to "
        f"{last.output_rms:.3g} at {last.where}"
    )
    if "‖dL/dh‖" in series:
        flow = series["‖dL/dh‖"][1]
        words += f", the norm of the gradient from {flow[-1]:.3g} back to {flow[0]:.3g}"
    yield Figure(
        "Signals and gradients over the depth",
        Lines(
            series,
            x_label="weight layer",
            log_y=True,
            x_names=[layer.where for layer in layers],
        ),
        alt=f"{words}.",
        caption=f"{words}.",
    )


def _drift(distances: list[Finding], key: str) -> Bars:
    """Return the distance of running statistics from the data's, by layer."""
    what, unit = {
        "d_mean": ("running_mean from the mean of the inputs", "mean |Δ| / sd"),
        "d_var": ("running_var from the variance of the inputs", "mean |ln ratio|"),
    }[key]
    return Bars(
        [
            Bar(f.layer or "(model)", f.details[key], _SIGN[f.severity])
            for f in thinned(distances, MAX_ROWS)
        ],
        f"How far {what} is, {unit}",
        "distance",
        limit={"d_mean": D_MEAN_WARNING, "d_var": D_VAR_WARNING}[key],
    )


def _shares(readings: list[Finding], id_: str, caption: str) -> Iterable[Block]:
    found = [f for f in readings if f.id == id_ and not math.isnan(f.value)]
    if found:
        yield Bars(
            [
                Bar(f.layer or "(model)", f.value, _SIGN[f.severity])
                for f in thinned(found, MAX_ROWS)
            ],
            caption,
            "share",
            limit=min(f.threshold for f in found),
            largest=1.0,
        )


def _gap(gap: GapExplanation | None) -> Iterable[Block]:
    """Yield the train/eval gap by cause and by layer."""
    if gap is None:
        return
    yield Heading("Causes of the train/eval gap")
    yield Text(
        f"{gap.batch:.4g} with the statistics of each batch, {gap.running:.4g} in eval "
        f"mode: {gap.gap:.4g} are lost. Statistics were swapped one cause after the "
        "other; the parts add up to the gap."
    )
    yield Table(
        ["cause", "part", "±"],
        [[part.name, part.value, 2 * part.error] for part in gap.causes],
        "Parts by cause, with two standard errors",
    )
    if gap.absent:
        named = "; ".join(f"{name} (needs {why})" for name, why in gap.absent.items())
        yield Text(f"Not measured, and so included in the parts above: {named}.")
    if gap.layers:
        yield Bars(
            [Bar(part.name, part.value) for part in thinned(gap.layers, MAX_ROWS)],
            "Stale statistics by layer, each layer swapped alone; their interaction "
            f"is {gap.interaction:.3g}",
            "part of the gap",
        )


def _mean_and_std(layer: LayerStatistics) -> tuple[float | None, float | None]:
    if layer.input is None:
        return None, None
    return float(layer.input.mean), float(layer.input.var.sqrt())


def _not_judged(readings: list[Finding]) -> Iterable[Block]:
    found = [f for f in readings if f.severity == "not_judged"]
    if found:
        rows = [[f.id, f.where, f.evidence] for f in found[: 5 * MAX_ROWS]]
        table = Table(["check", "layer", "reason"], rows, "Checks without enough data")
        yield Details(f"{len(found)} not judged", [table])

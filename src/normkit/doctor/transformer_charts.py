"""Charts of the residual stream and of attention, as blocks of a page."""

from __future__ import annotations

import statistics as numbers
from collections.abc import Iterable

from normkit.doctor.finding import Finding
from normkit.doctor.history_charts import MAX_ROWS
from normkit.doctor.measurements import Statistics
from normkit.doctor.transformer_statistics import streams
from normkit.report import Block, Figure, Heading, Lines, Row, Table
from normkit.report.charts import thinned

__all__ = ["transformer_blocks"]

MIN_BLOCKS = 4


def transformer_blocks(
    statistics: Statistics, readings: list[Finding]
) -> Iterable[Block]:
    """Yield the stream over the depth, and a table of each attention's logits."""
    rows = [row for row in streams(statistics.blocks) if len(row) >= MIN_BLOCKS]
    # Without the findings on masks and on logits that are not finite.
    found = [f for f in readings if f.id == "D36" and "entropy" in f.details]
    if not (rows or found):
        return
    yield Heading("Blocks and attention")
    if rows:
        figures = []
        for row in rows[:2]:
            rms = [numbers.median(row[0].before), *(b.after[-1] for b in row)]
            words = (
                f"rms of the output of each block, from {row[0].name} to {row[-1].name}"
            )
            depth = list(range(len(rms)))
            figures.append(
                Figure(
                    words,
                    Lines({row[0].kind: (depth, rms)}, y_label="rms", log_y=True),
                    alt=f"From {rms[0]:.3g} before the first block to {rms[-1]:.3g}.",
                    caption="0 is the input of the first block.",
                )
            )
        yield Row(figures)
    if found:
        yield Table(
            ["attention", "largest |logit|", "entropy", "one key alone"],
            [
                [f.where, f.value, f.details["entropy"], f.details["sharp"]]
                for f in thinned(found, MAX_ROWS)
            ],
            "Entropy as a share of the most possible; one key alone: queries with a "
            "weight above 0.99",
        )

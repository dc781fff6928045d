"""S11: how well mixed a batch is, and what its noise does."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from normkit.studies import verdict as rules
from normkit.studies.batch_mixing import (
    GHOST_RATES,
    GHOSTS,
    NORMS,
    ORDERS,
    RATES,
    measure,
)
from normkit.studies.figure import band, bars_by_group
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _evaluated_order(results: list[Result], name: str) -> tuple[Pick, list[float]]:
    """Return the best rate on validation, and the test accuracies there."""
    rows = [r["orders"][name] for r in results]
    best = pick([[one["validation"] for one in row] for row in rows], RATES)
    return best, [row[best.index]["test"] for row in rows]


def _evaluated_ghost(results: list[Result], size: int) -> tuple[Pick, Result]:
    rows = [r["ghosts"][str(size)] for r in results]
    best = pick([[one["validation"] for one in row] for row in rows], GHOST_RATES)
    splits = ("train", "test")
    return best, {s: [row[best.index][s] for row in rows] for s in splits}


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def lost(order: str, arm: str) -> tuple[list[float], list[Pick]]:
        """Return the points lost against shuffled data, each at its best rate."""
        mixed, good = _evaluated_order(results, f"shuffled, {arm}")
        other, bad = _evaluated_order(results, f"{order}, {arm}")
        return rules.minus(good, bad), [mixed, other]

    def suffers(order: str) -> rules.Part:
        points, picks = lost(order, "batch norm")
        return rules.at_least(
            f"points lost by {order}, batch norm",
            points,
            5,
            none=0,
            about=f"harm of {order}",
            unless=edges({"shuffled": picks[0], "ordered": picks[1]}),
        )

    def suffers_more(order: str) -> rules.Part:
        full, group = lost(order, "batch norm"), lost(order, "group norm")
        names = (
            "batch norm shuffled",
            "batch norm",
            "group norm shuffled",
            "group norm",
        )
        return rules.at_least(
            f"points lost by {order}, batch norm − group norm",
            rules.minus(full[0], group[0]),
            1,
            none=0,
            about=f"more harm than to group norm, {order}",
            unless=edges(dict(zip(names, [*full[1], *group[1]], strict=True))),
        )

    def at(order: str, arm: str):
        return rules.reported(
            f"{order}, {arm}, %", _evaluated_order(results, f"{order}, {arm}")[1]
        )

    ghosts = {size: _evaluated_ghost(results, size) for size in GHOSTS}
    # 0.3 points are 12 of 4000 test images, and one and a half of 500 digits.
    least = 1.0 if results[0]["ghosts"]["data"] == ["digits"] else 0.3

    def ghost_reason(*sizes: int) -> str:
        return edges({f"ghost batch {s}": ghosts[s][0] for s in sizes})

    def gap(size: int) -> list[float]:
        return rules.minus(ghosts[size][1]["train"], ghosts[size][1]["test"])

    slopes = [
        np.polyfit(np.log(r["noise"]["sizes"]), np.log(r["noise"]["spread"]), 1)[0]
        for r in results
    ]
    cosines = [r["direction"]["cosine"] for r in results]
    rates = [r["direction"]["samples_per_second"] for r in results]
    exact = "batch norm, exact statistics"
    return [
        rules.verdict(
            "C16",
            rules.at_least(
                "smallest gain in cosine from one batch size to the next",
                [min(b - a for a, b in itertools.pairwise(c)) for c in cosines],
                0,
                about="a better direction",
            ),
            rules.at_least(
                "samples per second, batch 64 / batch 1",
                [per_second[-1] / per_second[0] for per_second in rates],
                5,
                none=1,
                about="in parallel",
            ),
            rules.reported(
                "cosine of batch 64 / cosine of batch 1",
                [c[-1] / c[0] for c in cosines],
            ),
        ),
        rules.verdict(
            "C34",
            rules.within(
                "slope of log spread of an output against log batch",
                slopes,
                -0.65,
                -0.35,
                about="there is such noise",
            ),
            rules.at_least(
                "test accuracy, ghost batch 16 − 128, points",
                rules.minus(ghosts[16][1]["test"], ghosts[128][1]["test"]),
                least,
                none=0,
                about="it regularizes",
                unless=ghost_reason(16, 128),
            ),
        ),
        rules.verdict(
            "C50",
            *(suffers(order) for order in ORDERS[1:]),
            *(suffers_more(order) for order in ORDERS[1:]),
            *(at(order, arm) for order in ORDERS[1:] for arm in (*NORMS, exact)),
        ),
        rules.verdict(
            "C63",
            rules.at_least(
                "gap of training and test accuracy, ghost batch 128 − 4, points",
                rules.minus(gap(128), gap(4)),
                least,
                none=0,
                unless=ghost_reason(4, 128),
            ),
            rules.reported(
                "test accuracy, ghost batch 4 − 128, points",
                rules.minus(ghosts[4][1]["test"], ghosts[128][1]["test"]),
            ),
        ),
        rules.verdict(
            "C80",
            rules.at_most(
                "test accuracy, ghost batch 128 − 32, points",
                rules.minus(ghosts[128][1]["test"], ghosts[32][1]["test"]),
                1,
                none=5,
                unless=ghost_reason(128, 32),
            ),
            note="Four devices with 32 images each: a step of all 128, normalized by "
            "the statistics of the 32.",
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw accuracy by order of the data, and noise of the statistics."""
    axes = figure.subplots(1, 3, width_ratios=(1.6, 1, 0.9))
    exact = "batch norm, exact statistics"
    arms = ("batch norm", exact, "group norm")
    rows = {
        arm: [_evaluated_order(results, f"{o}, {arm}")[1] for o in ORDERS]
        for arm in arms
    }
    names = ["shuffled", "buffer\nof 200", "one class\na batch"]
    bars_by_group(axes[0], names, rows, indices=(0, 5, 2))
    axes[0].set(title="Test accuracy by order", ylabel="%", ylim=(0, 100))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3
    )
    ghosts = {size: _evaluated_ghost(results, size)[1] for size in GHOSTS}
    for i, split in enumerate(("train", "test")):
        curves = [
            [ghosts[size][split][k] for size in GHOSTS] for k in range(len(results))
        ]
        band(axes[1], GHOSTS, curves, label=split, index=i)
    axes[1].set(title="Accuracy by ghost batch", xscale="log", ylabel="%")
    axes[1].set_xticks(GHOSTS, [str(s) for s in GHOSTS])
    axes[1].minorticks_off()
    axes[1].legend()
    noise = results[0]["noise"]["sizes"]
    spread = [r["noise"]["spread"] for r in results]
    band(axes[2], noise, spread, index=0)
    line = [spread[0][0] * math.sqrt(noise[0] / s) for s in noise]
    axes[2].plot(noise, line, "k:", label="1/√batch")
    axes[2].set(title="Spread of a logit", xscale="log", yscale="log", xlabel="batch")
    axes[2].legend()


STUDY = Study(
    id="S11",
    title="batches",
    question="How do the order and the noise of the batches act through batch norm?",
    prediction="Batches that do not resemble the data ruin batch norm and not group "
    "norm. The noise falls with the root of the batch and regularizes.",
    seen="Left: data sorted by class behind a shuffle buffer, and batches of one class "
    "each, against shuffled data. Middle: accuracy when parts of a batch (ghost "
    "batches) are normalized on their own. Right: the noise that the rest of a batch "
    "puts on one output falls with the root of its size.",
    meaning="Badly mixed data harm batch norm, and they harm group norm, which looks "
    "at one sample at a time, no less: most of it is not batch norm's. Tuned, batch "
    "norm behind a buffer is ahead. The noise is there, as large as calculated; that "
    "it regularizes these nets is not seen.",
    arms=(*NORMS, *ORDERS, "ghost batches of 4 to 128"),
    metric="Test accuracy of a small CNN at its best rate by validation, on shuffled "
    "data, on data sorted by class behind a shuffle buffer of 200, and in batches of "
    "one class each in random order; spread of an output over batch-mates; cosine of a "
    "batch's gradient with the full one. A ghost batch is the part of an SGD batch "
    "that shares statistics.",
    criterion="C50: each order costs batch norm 5 points, and a point more than group "
    "norm. C34: slope −0.65 to −0.35, ghost batches of 16 give 0.3 points. C63: a gap "
    "smaller by 0.3 (1 point in place of 0.3 on the digits). C16: cosine grows, five "
    "times the samples per second of processor time. C80: ghost batches of 32 lose at "
    "most a point (5 refute).",
    claims=("C16", "C34", "C50", "C63", "C80"),
    minutes=5,
    scales={
        "quick": Scale(
            2, {"data": "digits", "width": 8, "mix_epochs": 1, "noise_draws": 6}
        ),
        "cpu": Scale(
            10, {"data": "mnist", "width": 8, "mix_epochs": 4, "noise_draws": 12}
        ),
        "gpu": Scale(
            10, {"data": "mnist", "width": 64, "mix_epochs": 30, "noise_draws": 100}
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

"""S03: which learning rates and initial weights work, with and without batch norm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from normkit.studies import verdict as rules
from normkit.studies.interval import Number, median_interval
from normkit.studies.rate_grid import GAINED, GAINS, HIGH, LOW, RATES, WORKS, measure
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _evaluated_rate(results: list[Result], arm: str) -> Pick:
    """Return the rate at which most gains work on validation."""
    return pick(
        [
            [
                float(sum(a >= WORKS for a in row))
                for row in r["grids"]["validation"][arm]
            ]
            for r in results
        ],
        RATES,
    )


def _evaluated_gain(results: list[Result], arm: str) -> int:
    """Return the gain at which the largest rate works on validation, then most do."""

    def rank(gain: int) -> tuple[float, float]:
        highest, count = 0.0, 0
        for r in results:
            works = [
                rate
                for rate, row in zip(RATES, r["grids"]["validation"][arm], strict=True)
                if row[gain] >= WORKS
            ]
            highest += math.log(max(works, default=RATES[0] / 10))
            count += len(works)
        return highest, count

    return max(range(len(GAINS)), key=rank)


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""
    grids = [r["grids"]["test"] for r in results]

    def share(arm: str) -> list[float]:
        """Return the percentage of cells that work."""
        return [
            100
            * sum(a >= WORKS for row in grid[arm] for a in row)
            / (len(RATES) * len(GAINS))
            for grid in grids
        ]

    def highest(grid: Result, arm: str, gain: int) -> tuple[float, float]:
        """Return bounds of the largest working rate at this gain.

        It lies below the grid when none works, and above it when the last one does.
        """
        works = [
            rate
            for rate, row in zip(RATES, grid[arm], strict=True)
            if row[gain] >= WORKS
        ]
        if not works:
            return 0.0, RATES[0]
        top = max(works)
        return top, math.inf if top == RATES[-1] else top

    def times_higher(act: str) -> list[Number]:
        arms = f"{act}, batch", f"{act}, plain"
        gains = [_evaluated_gain(results, arm) for arm in arms]
        found: list[Number] = []
        for grid in grids:
            full, plain = (
                highest(grid, arm, gain) for arm, gain in zip(arms, gains, strict=True)
            )
            low = full[0] / plain[1]
            high = full[1] / plain[0] if plain[0] else math.inf
            found.append(low if low == high else (low, high))
        return found

    def none_works(arm: str) -> list[float]:
        gain = _evaluated_gain(results, arm)
        return [100.0 * (highest(grid, arm, gain)[0] == 0) for grid in grids]

    def cell(grid: Result, arm: str, rate: float) -> float:
        gain = _evaluated_gain(results, arm)
        return 100 * grid[arm][RATES.index(rate)][gain]

    def gained(act: str) -> list[float]:
        return rules.minus(share(f"{act}, batch"), share(f"{act}, plain"))

    def wider(act: str) -> rules.Part:
        return rules.at_least(
            f"share of cells ≥ 90 %, {act}, batch norm − plain, points",
            gained(act),
            30,
            none=0,
            about=f"more cells, {act}",
        )

    def higher(act: str) -> rules.Part:
        return rules.at_least(
            f"largest working rate, best gain of each, {act}, batch norm / plain",
            times_higher(act),
            5,
            none=1,
            about=f"larger rates, {act}",
        )

    def more_gains(act: str) -> rules.Part:
        arms = f"{act}, batch", f"{act}, plain"
        rates = [_evaluated_rate(results, arm) for arm in arms]
        counts = [
            [float(sum(a >= WORKS for a in grid[arm][rate.index])) for grid in grids]
            for arm, rate in zip(arms, rates, strict=True)
        ]
        return rules.at_least(
            f"gains of {len(GAINS)} that work at the best rate, {act}, "
            "batch norm − plain",
            rules.minus(*counts),
            1,
            none=0,
            about=act,
            unless=edges({"batch norm": rates[0], "plain": rates[1]}),
        )

    def reinforce(act: str) -> rules.Part:
        full, plain = f"{act}, batch", f"{act}, plain"
        return rules.at_least(
            f"interaction of batch norm and rate {LOW:g} → {HIGH:g}, {act}, points",
            [
                cell(g, full, HIGH)
                - cell(g, full, LOW)
                - cell(g, plain, HIGH)
                + cell(g, plain, LOW)
                for g in grids
            ],
            5,
            none=0,
            about=act,
        )

    small = [i for i, g in enumerate(GAINS) if g <= 1]
    best_plain = []
    for r in results:
        known = r["grids"]["validation"]["sigmoid, plain"]
        cells = [(k, i) for k in range(len(RATES)) for i in small]
        k, i = max(cells, key=lambda at, known=known: known[at[0]][at[1]])
        best_plain.append(100 * r["grids"]["test"]["sigmoid, plain"][k][i])
    batch_cells = [
        100
        * sum(row[i] >= WORKS for row in grid["sigmoid, batch"] for i in small)
        / (len(small) * len(RATES))
        for grid in grids
    ]
    shares = [
        rules.reported(f"share of cells ≥ 90 %, {arm}", share(arm)) for arm in grids[0]
    ]
    censored = [
        rules.reported(
            f"none of {len(RATES)} rates works, {act}, plain, % of seeds",
            none_works(f"{act}, plain"),
        )
        for act in ("sigmoid", "relu")
    ]

    def tuned(norm: str, name: str) -> list[float]:
        return [
            math.log(r["own_rates"][norm]["first"] / r["own_rates"][norm][name])
            for r in results
        ]

    gain = {
        n: rules.minus(tuned(n, "own"), tuned(n, "single")) for n in ("plain", "batch")
    }
    gains_of_plain = median_interval(gain["plain"])
    less = rules.at_most(
        "what own rates gain in log test loss, batch norm − half of plain",
        rules.minus(gain["batch"], [g / 2 for g in gain["plain"]]),
        0,
    )
    nothing = "not judged: the plain net gains nothing from own rates"
    reason = "" if gains_of_plain.low >= GAINED else nothing
    return [
        rules.verdict(
            "C20",
            wider("sigmoid"),
            wider("relu"),
            higher("sigmoid"),
            higher("relu"),
            *shares,
            *censored,
        ),
        rules.verdict(
            "C21",
            rules.at_least(
                "share of cells won by batch norm, sigmoid − relu, points",
                rules.minus(gained("sigmoid"), gained("relu")),
                5,
                none=0,
                about="most of all for saturating units",
            ),
        ),
        rules.verdict("C32", higher("sigmoid"), higher("relu")),
        rules.verdict(
            "C33",
            rules.at_most(
                "plain sigmoid net at gain ≤ 1, best rate and gain, %",
                best_plain,
                50,
                none=90,
                about="a plain net does not train",
            ),
            rules.at_least(
                "share of batch-norm cells ≥ 90 % there, %",
                batch_cells,
                60,
                none=0,
                about="with batch norm it does",
            ),
        ),
        rules.verdict("C35", more_gains("sigmoid"), more_gains("relu")),
        rules.verdict(
            "C48",
            less.unless(reason),
            rules.reported("what own rates gain, plain", gain["plain"]),
            rules.reported("the same, batch norm", gain["batch"]),
            rules.reported(
                "what a second search of one rate gains, plain",
                tuned("plain", "single"),
            ),
            rules.reported("a second search, batch norm", tuned("batch", "single")),
            note="The gain is beyond that of a second search with one rate for all "
            "layers, which is the zero baseline.",
        ),
        rules.verdict("C56", reinforce("sigmoid"), reinforce("relu")),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw one heat map per arm: median accuracy over rate and gain."""
    axes = figure.subplots(1, 4, sharey=True)
    for ax, arm in zip(axes, results[0]["grids"]["test"], strict=True):
        tables = [r["grids"]["test"][arm] for r in results]
        table = torch.tensor(tables).median(0).values
        heat = ax.imshow(
            100 * table.numpy(),
            origin="lower",
            aspect="auto",
            vmin=0,
            vmax=100,
            cmap="viridis",
        )
        if ax is axes[-1]:
            figure.colorbar(heat, ax=axes, label="test accuracy, %", shrink=0.9)
        ax.set_title(arm.replace("batch", "BN"))
        ax.set_xticks(range(len(GAINS)), [f"{g:g}" for g in GAINS])
        ax.set_xlabel("gain √(n·Var[w])")
        ax.grid(visible=False)
        for y, row in enumerate(table.tolist()):
            for x, value in enumerate(row):
                shade = "black" if value > 0.6 else "white"
                weight = "bold" if value >= WORKS else "normal"
                ax.text(
                    x,
                    y,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    color=shade,
                    fontsize=6.5,
                    fontweight=weight,
                )
    axes[0].set_yticks(range(len(RATES)), [f"{r:g}" for r in RATES])
    axes[0].set_ylabel("learning rate")


STUDY = Study(
    id="S03",
    title="rates and initial weights",
    question="Which learning rates and initial weights train a deep net at all?",
    prediction="With batch norm many more of them, and rates several times larger.",
    seen="Each cell is a net: learning rate upwards, gain of the initial weights to "
    "the right. The gain is the factor by which a linear layer stretches its input; 1 "
    "keeps its size. Bold cells reach 90 %. Plain nets have a small island of them, "
    "batch-normalized ones a continent.",
    meaning="With batch norm many more pairs of rate and start train. At its own best "
    "gain each plain net works at some rate, so the largest working rate is about ten "
    "times larger with batch norm, not thousands of times. Rates of each layer's own "
    "gain the plain net nothing here, so whether batch norm makes them needless is not "
    "judged.",
    arms=("sigmoid and ReLU", "plain and batch norm", "9 rates × 5 gains"),
    metric="Test accuracy on the digits after a fixed number of steps, a cell works "
    "from 90 %. The gain of initial weights is √(n·Var[w]) for n inputs: 1 keeps the "
    "variance of a linear layer. Test loss with one rate for all layers against own "
    "rates by random search, at a gain where both nets train.",
    criterion="C20: 30 points more cells, and a largest working rate at the best gain "
    "of each arm five times larger (C32), for both activations. C21: 5 points more "
    "for sigmoids than for ReLU. C33: plain sigmoid nets of gain ≤ 1 stay below 50 %, "
    "60 % of the batch-norm cells work. C35: at each arm's best rate one gain more "
    "works. C48: own rates gain less than half as much log loss with batch norm, "
    "judged where they gain 0.05 without. C56: an interaction of rate and batch norm "
    "of 5 points.",
    claims=("C20", "C21", "C32", "C33", "C35", "C48", "C56"),
    minutes=3,
    scales={
        "quick": Scale(2, {"steps": 60, "hidden": (32, 32, 32), "layer_draws": 8}),
        "cpu": Scale(10, {"steps": 160, "hidden": (40, 40, 40, 40), "layer_draws": 12}),
        "gpu": Scale(10, {"steps": 2000, "hidden": (256,) * 6, "layer_draws": 128}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

"""S03: which learning rates and initial weights work, with and without batch norm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.verdict import Verdict, at_least, at_most, minus, reported, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_GAINS = (0.1, 0.3, 1.0, 3.0, 10.0)
_ARMS = (("sigmoid", ""), ("sigmoid", "batch"), ("relu", ""), ("relu", "batch"))
_WORKS = 0.9
_LOW, _HIGH = 0.1, 3.0  # the two rates of the interaction term


def measure(
    trial: Trial, *, steps: int, hidden: tuple[int, ...], layer_draws: int
) -> Result:
    """Measure accuracy on the digits for every rate × gain × activation × norm."""
    images = trial.images("digits").flat().standardized()
    widths = (images.x_train.shape[1], *hidden, images.classes)
    batches = images.batches(60, steps, trial.generator(1))
    rates = torch.tensor(_RATES).repeat_interleave(len(_GAINS)).to(trial.device)
    per_gain = torch.stack([stds_for(widths, gain) for gain in _GAINS])
    grids = {}
    for activation, norm in _ARMS:
        nets = Replicas(
            Recipe(widths, activation, norm),
            per_gain.repeat(len(_RATES), 1),
            trial.generator(2),
            device=trial.device,
        )
        for rows in batches:
            nets.step(images.x_train[rows], images.y_train[rows], rates)
        with nets.population(images.x_train):
            hits = nets.accuracy(images.x_test, images.y_test)
        table = torch.tensor(hits).view(len(_RATES), len(_GAINS))
        grids[f"{activation}, {norm or 'plain'}"] = table.tolist()
    own_rates = {
        norm or "plain": _gain_of_layer_rates(
            trial, images, widths, norm, batches, layer_draws
        )
        for norm in ("", "batch")
    }
    return {"grids": grids, "own_rates": own_rates}


def _gain_of_layer_rates(trial, images, widths, norm, batches, draws) -> float:
    """Return how much, in log, a rate of its own for each layer lowers the loss.

    As many nets with one rate (on a fine grid) as with random rates around the best of
    them, at gain 0.5 where layers differ.
    """
    layers = len(widths) - 1
    stds = stds_for(widths, 0.5).expand(draws, -1)
    one = torch.logspace(-2, 1.5, draws)

    def losses(rates: torch.Tensor) -> torch.Tensor:
        nets = Replicas(
            Recipe(widths, "sigmoid", norm),
            stds,
            trial.generator(3),
            device=trial.device,
        )
        total = torch.zeros(draws)
        for number, rows in enumerate(batches):
            nets.step(
                images.x_train[rows], images.y_train[rows], rates.to(trial.device)
            )
            if number >= len(batches) * 3 // 4:
                total += nets.last_losses.cpu()
        return (total / (len(batches) - len(batches) * 3 // 4)).nan_to_num(math.inf)

    single = losses(one)
    best = one[single.argmin()]
    around = torch.rand(draws, layers, generator=trial.generator(4)) * 2 - 1
    own = losses(best * 10**around)
    return math.log(single.min().item() / min(own.min().item(), single.min().item()))


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""

    def share(arm: str) -> list[float]:
        """Return the percentage of cells that work."""
        return [
            100
            * sum(a >= _WORKS for row in r["grids"][arm] for a in row)
            / (len(_RATES) * len(_GAINS))
            for r in results
        ]

    def highest(result: Result, arm: str, gain: float = 1.0) -> float:
        """Return the largest working rate at this gain; half the lowest if none."""
        column = [row[_GAINS.index(gain)] for row in result["grids"][arm]]
        works = [rate for rate, a in zip(_RATES, column, strict=True) if a >= _WORKS]
        return max(works, default=_RATES[0] / 2)

    def cell(result: Result, arm: str, rate: float) -> float:
        return 100 * result["grids"][arm][_RATES.index(rate)][_GAINS.index(1.0)]

    def gained(act: str) -> list[float]:
        return minus(share(f"{act}, batch"), share(f"{act}, plain"))

    def wider(act: str):
        return at_least(
            f"share of cells ≥ 90 %, {act}, batch norm − plain, points",
            gained(act),
            30,
            none=0,
        )

    def higher(act: str):
        return at_least(
            f"largest working rate at gain 1, {act}, batch norm / plain",
            [
                highest(r, f"{act}, batch") / highest(r, f"{act}, plain")
                for r in results
            ],
            5,
            none=1,
        )

    def reinforce(act: str):
        full, plain = f"{act}, batch", f"{act}, plain"
        return at_least(
            f"interaction of batch norm and rate {_LOW:g} → {_HIGH:g}, {act}, points",
            [
                cell(r, full, _HIGH)
                - cell(r, full, _LOW)
                - cell(r, plain, _HIGH)
                + cell(r, plain, _LOW)
                for r in results
            ],
            1,
            none=0,
        )

    small = [i for i, g in enumerate(_GAINS) if g <= 1]
    best_plain = [
        100 * max(row[i] for row in r["grids"]["sigmoid, plain"] for i in small)
        for r in results
    ]
    batch_cells = [
        100
        * sum(row[i] >= _WORKS for row in r["grids"]["sigmoid, batch"] for i in small)
        / (len(small) * len(_RATES))
        for r in results
    ]
    shares = [
        reported(f"share of cells ≥ 90 %, {arm}", share(arm))
        for arm in results[0]["grids"]
    ]
    gap = {norm: [r["own_rates"][norm] for r in results] for norm in ("plain", "batch")}
    return [
        verdict(
            "C20",
            wider("sigmoid"),
            wider("relu"),
            higher("sigmoid"),
            higher("relu"),
            *shares,
        ),
        verdict(
            "C21",
            wider("sigmoid"),
            at_least(
                "the same, sigmoid gain over ReLU gain, points",
                minus(gained("sigmoid"), gained("relu")),
                1,
                none=0,
            ),
        ),
        verdict("C32", higher("sigmoid"), higher("relu")),
        verdict(
            "C33",
            at_most("best plain sigmoid net at gain ≤ 1, %", best_plain, 50, none=90),
            at_least(
                "share of batch-norm cells ≥ 90 % there, %", batch_cells, 60, none=0
            ),
        ),
        verdict("C35", wider("sigmoid"), wider("relu")),
        verdict(
            "C48",
            at_most(
                "gain in log loss from own rates, batch norm − half of plain",
                minus(gap["batch"], [g / 2 for g in gap["plain"]]),
                0,
            ),
            reported("gain, plain", gap["plain"]),
            reported("gain, batch norm", gap["batch"]),
            note="The plain net hardly trains at any rate and has nothing to gain: the "
            "rule, as written, compares with that. Own rates do help batch norm.",
        ),
        verdict("C56", reinforce("sigmoid"), reinforce("relu")),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw one heat map per arm: median accuracy over rate and gain."""
    axes = figure.subplots(1, 4, sharey=True)
    for ax, arm in zip(axes, results[0]["grids"], strict=True):
        table = torch.tensor([r["grids"][arm] for r in results]).median(0).values
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
        ax.set_xticks(range(len(_GAINS)), [f"{g:g}" for g in _GAINS])
        ax.set_xlabel("gain √(n·Var[w])")
        ax.grid(visible=False)
        for y, row in enumerate(table.tolist()):
            for x, value in enumerate(row):
                shade = "black" if value > 0.6 else "white"
                weight = "bold" if value >= _WORKS else "normal"
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
    axes[0].set_yticks(range(len(_RATES)), [f"{r:g}" for r in _RATES])
    axes[0].set_ylabel("learning rate")


STUDY = Study(
    id="S03",
    title="rates and initial weights",
    question="Which learning rates and initial weights train a deep net at all?",
    prediction="With batch norm many more of them, and rates several times larger.",
    arms=("sigmoid and ReLU", "plain and batch norm", "8 rates × 5 gains"),
    metric="Test accuracy on the digits after a fixed number of steps, a cell works "
    "from 90 %; loss with one rate for all layers against own rates by random search.",
    criterion="C20, C35: 30 points more cells for both activations. C32 (and C20): the "
    "largest working rate at gain 1 five times larger. C33: plain sigmoid nets of gain "
    "≤ 1 stay below 50 %, 60 % of the batch-norm cells work. C48: own rates help batch "
    "norm less than half as much. C56: positive interaction of rate and batch norm.",
    claims=("C20", "C21", "C32", "C33", "C35", "C48", "C56"),
    minutes=4,
    scales={
        "quick": Scale(2, {"steps": 60, "hidden": (32, 32, 32), "layer_draws": 8}),
        "cpu": Scale(5, {"steps": 240, "hidden": (48, 48, 48, 48), "layer_draws": 16}),
        "gpu": Scale(10, {"steps": 2000, "hidden": (256,) * 6, "layer_draws": 128}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

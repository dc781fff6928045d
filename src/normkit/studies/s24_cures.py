"""S24: the usual cures of a net whose sigmoids are saturated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from normkit.studies import verdict as rules
from normkit.studies.figure import bars, points
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.selection import edges, pick
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name, activation, gain, norm. Gain 20: two thirds of the sigmoids are saturated.
_ARMS = {
    "none": ("sigmoid", 20.0, ""),
    "ReLU": ("relu", 20.0, ""),
    # 4 because the slope of the sigmoid at 0 is 1/4.
    "better initial weights": ("sigmoid", 4.0, ""),
    "batch norm": ("sigmoid", 20.0, "batch"),
}
_RATES = (1e-6, 1e-5, 0.0001, 0.001, 0.01, 0.1, 0.5, 2.0, 8.0)
# Rates up to this are small.
_SMALL = 0.01


def measure(trial: Trial, *, steps: int, hidden: tuple[int, ...]) -> Result:
    """Train the saturated net and the same with each cure on its own, at each rate."""
    images = trial.images("digits").flat().standardized()
    widths = (images.x_train.shape[1], *hidden, images.classes)
    rates = torch.tensor(_RATES, device=trial.device)
    result: Result = {"saturated": {}, "test": {}, "validation": {}}
    for name, (activation, gain, norm) in _ARMS.items():
        nets = Replicas(
            Recipe(widths, activation, norm),
            stds_for(widths, gain).expand(len(_RATES), -1),
            trial.generator(2),
            device=trial.device,
        )
        taps: list[torch.Tensor] = []
        with torch.no_grad():
            nets(images.x_train[:200], taps)
        if activation == "sigmoid":
            slopes = torch.stack([torch.sigmoid(h[0]) for h in taps])
            slopes = slopes * (1 - slopes)
        else:
            slopes = torch.stack([(h[0] > 0).float() / 4 for h in taps])
        result["saturated"][name] = (slopes < 0.05).float().mean().item()
        for rows in images.batches(60, steps, trial.generator(1)):
            nets.step(images.x_train[rows], images.y_train[rows], rates)
        with nets.population(images.x_train):
            for split, x, y in (
                ("test", images.x_test, images.y_test),
                ("validation", images.x_val, images.y_val),
            ):
                result[split][name] = [100 * v for v in nets.accuracy(x, y)]
    return result


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""
    large = [i for i, rate in enumerate(_RATES) if rate > _SMALL]
    small = [i for i, rate in enumerate(_RATES) if rate <= _SMALL]

    def chosen(name: str, among: list[int]):
        grid = [_RATES[i] for i in among]
        rows = [[r["validation"][name][i] for i in among] for r in results]
        best = pick(rows, grid)
        return best, [r["test"][name][among[best.index]] for r in results]

    base, base_test = chosen("none", large)
    slow, slow_test = chosen("none", small)

    def cures(name: str) -> rules.Part:
        best, test = chosen(name, list(range(len(_RATES))))
        part = rules.at_least(
            f"points gained by {name}",
            rules.minus(test, base_test),
            10,
            none=0,
            about=name,
        )
        learns = {"cured": best} if part.interval.high > 10 else {}
        return part.unless(edges(learns))

    return [
        rules.verdict(
            "C24",
            cures("ReLU"),
            cures("better initial weights"),
            rules.at_least(
                f"points gained by a small rate (≤ {_SMALL:g})",
                rules.minus(slow_test, base_test),
                10,
                none=0,
                about="a small rate",
            ),
            rules.reported("accuracy without a cure, best rate, %", base_test),
            rules.reported("the same at a small rate, %", slow_test),
            rules.reported(
                "accuracy with batch norm, %",
                chosen("batch norm", list(range(len(_RATES))))[1],
            ),
            rules.reported(
                "saturated share at the start, %",
                [100 * r["saturated"]["none"] for r in results],
            ),
            note="The rate without a cure is the best of those above 0.01; it may be "
            f"at an edge ({base.rate:g}; small: {slow.rate:g}).",
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw the saturated share at the start, and the accuracy of each cure."""
    left, right = figure.subplots(1, 2)
    names = [name.replace("initial ", "initial\n") for name in _ARMS]
    bars(left, names, [[100 * r["saturated"][n] for r in results] for n in _ARMS])
    left.set(title="Saturated inputs at the start", ylabel="%")
    rows = []
    for name in _ARMS:
        best = pick([r["validation"][name] for r in results], _RATES)
        rows.append([r["test"][name][best.index] for r in results])
    points(right, names, rows)
    right.set(title="Test accuracy, best rate", ylabel="%")
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize=6.5)


STUDY = Study(
    id="S24",
    title="cures of saturation",
    question="Do ReLU, better initial weights and small rates cure a saturated net?",
    prediction="Each of the three does.",
    seen="Left: share of inputs where the slope is below a fifth of the largest. "
    "Right: accuracy with each cure on its own.",
    meaning="Better initial weights cure saturation, as batch norm does. A small rate "
    "leaves a saturated net where it is. A ReLU in its place does not saturate, and "
    "explodes at weights this large: it helps in some seeds.",
    arms=(*_ARMS, "small rates"),
    metric="Share of inputs where the slope is below a fifth of the largest; test "
    "accuracy on the digits at the best rate by validation.",
    criterion="C24: each cure on its own gains 10 points over the net as it is, whose "
    "rate is above 0.01.",
    claims=("C24",),
    minutes=1,
    scales={
        "quick": Scale(2, {"steps": 60, "hidden": (32, 32, 32)}),
        "cpu": Scale(10, {"steps": 240, "hidden": (40, 40, 40, 40)}),
        "gpu": Scale(10, {"steps": 5000, "hidden": (256,) * 6}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

"""S18: batch norm before or after the activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from normkit.studies import verdict as rules
from normkit.studies.figure import bars
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_SAME = 2
_ACTS = ("sigmoid", "tanh", "relu")
_PLACES = ("none", "before", "after")


def measure(
    trial: Trial, *, data: str, train: int, steps: int, hidden: tuple[int, ...]
) -> Result:
    """Measure test accuracy and early gradients for each activation and place."""
    images = trial.images(data, train=train, val=1000, test=2000).standardized()
    if images.x_train.shape[-1] > 16:  # 14 × 14 pixels of MNIST are enough, and fast
        images = images.map(lambda x: F.avg_pool2d(x, 2))
    images = images.flat()
    widths = (images.x_train.shape[1], *hidden, images.classes)
    batches = images.batches(60, steps, trial.generator(1))
    rates = torch.tensor(_RATES, device=trial.device)
    test: dict[str, list[float]] = {}
    known: dict[str, list[float]] = {}
    gradient: dict[str, float] = {}
    for act in _ACTS:
        for place in _PLACES:
            norm = "" if place == "none" else "batch"
            recipe = Recipe(
                widths, act, norm, "after" if place == "after" else "before"
            )
            nets = Replicas(
                recipe,
                stds_for(widths, 1.0).expand(len(_RATES), -1),
                trial.generator(2),
                device=trial.device,
            )
            early = []
            for number, rows in enumerate(batches):
                grads = nets.step(images.x_train[rows], images.y_train[rows], rates)
                if number < 10:
                    first, last = (grads[i][_SAME].norm() for i in (0, len(widths) - 2))
                    early.append((first / last).item())
            with nets.population(images.x_train[:2000]):
                for found, x, y in (
                    (test, images.x_test, images.y_test),
                    (known, images.x_val, images.y_val),
                ):
                    hits = nets.accuracy(x, y)
                    found[f"{act} {place}"] = [100 * h for h in hits]
            gradient[f"{act} {place}"] = sorted(early)[len(early) // 2]
    return {
        "data": images.name,
        "test": test,
        "validation": known,
        "first_to_last": gradient,
    }


def _evaluated_best(results: list[Result], arm: str) -> tuple[Pick, list[float]]:
    """Return the best rate on validation, and the test accuracies there."""
    best = pick([r["validation"][arm] for r in results], _RATES)
    return best, [r["test"][arm][best.index] for r in results]


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def lead(act: str) -> rules.Part:
        pairs = [_evaluated_best(results, f"{act} {p}") for p in ("before", "after")]
        # On the digits 0.3 points are one and a half of 500 images.
        bound = 1.0 if results[0]["data"] == "digits" else 0.3
        return rules.at_least(
            f"test accuracy, before − after, {act}, best rates, points",
            rules.minus(pairs[0][1], pairs[1][1]),
            bound,
            none=0,
            about=act,
            unless=edges({"before": pairs[0][0], "after": pairs[1][0]}),
        )

    def at_one(act: str) -> list[float]:
        return [
            r["test"][f"{act} before"][_SAME] - r["test"][f"{act} after"][_SAME]
            for r in results
        ]

    def first_to_last(act: str, place: str) -> list[float]:
        return [r["first_to_last"][f"{act} {place}"] for r in results]

    return [
        rules.verdict(
            "C12",
            *(lead(act) for act in _ACTS),
            *(
                rules.reported(
                    f"the same at rate {_RATES[_SAME]:g}, {act}", at_one(act)
                )
                for act in _ACTS
            ),
        ),
        rules.verdict(
            "C51",
            rules.at_most(
                "early ‖dW1‖/‖dWlast‖, sigmoid, plain",
                first_to_last("sigmoid", "none"),
                0.05,
                none=0.2,
                about="plain gradients vanish",
            ),
            rules.at_least(
                "the same, batch norm before",
                first_to_last("sigmoid", "before"),
                0.2,
                none=0.05,
                about="with batch norm they do not",
            ),
            rules.reported(
                "the same, batch norm after", first_to_last("sigmoid", "after")
            ),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw test accuracy at the best rate by activation and place."""
    axes = figure.subplots(1, 3, sharey=True)
    for ax, act in zip(axes, _ACTS, strict=True):
        rows = [_evaluated_best(results, f"{act} {place}")[1] for place in _PLACES]
        bars(ax, list(_PLACES), rows, indices=(7, 0, 1))
        ax.set(title=f"{act}, best rate", ylim=(0, 100))
    axes[0].set_ylabel(f"test accuracy, % ({results[0]['data']})")


STUDY = Study(
    id="S18",
    title="place",
    question="Does batch norm belong before the activation or after it?",
    prediction="Before: higher accuracy there, and gradients that do not vanish.",
    seen="Test accuracy without batch norm, with it before the activation, and behind "
    "it, each at its best rate.",
    meaning="Before is no better: behind the activation sigmoid nets are a little "
    "better, and tanh and ReLU nets cannot be told apart. Both keep gradients from "
    "vanishing.",
    arms=("none, before, after", "sigmoid, tanh, ReLU"),
    metric="Test accuracy at the best of seven rates by validation; ‖dW1‖/‖dWlast‖ "
    "over the first ten "
    "steps at rate 0.1.",
    criterion="C12: 0.3 points more before than after, for each activation. C51: plain "
    "below 0.05, batch norm above 0.2.",
    claims=("C12", "C51"),
    minutes=3,
    scales={
        "quick": Scale(
            2, {"data": "digits", "train": 0, "steps": 40, "hidden": (32, 32, 32)}
        ),
        "cpu": Scale(
            10,
            {"data": "mnist", "train": 5000, "steps": 250, "hidden": (48, 48, 48, 48)},
        ),
        "gpu": Scale(
            10, {"data": "mnist", "train": 0, "steps": 5000, "hidden": (256,) * 6}
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

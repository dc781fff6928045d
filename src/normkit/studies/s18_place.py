"""S18: batch norm before or after the activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from normkit.studies.figure import bars
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.verdict import Verdict, at_least, at_most, reported, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
_SAME = 1
_ACTS = ("sigmoid", "tanh", "relu")
_PLACES = ("none", "before", "after")


def measure(
    trial: Trial, *, data: str, train: int, steps: int, hidden: tuple[int, ...]
) -> Result:
    """Measure test accuracy and early gradients for each activation and place."""
    images = trial.images(data, train=train).flat().standardized()
    widths = (images.x_train.shape[1], *hidden, images.classes)
    batches = images.batches(60, steps, trial.generator(1))
    rates = torch.tensor(_RATES, device=trial.device)
    test: dict[str, list[float]] = {}
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
                hits = nets.accuracy(images.x_test[:2000], images.y_test[:2000])
            test[f"{act} {place}"] = [100 * h for h in hits]
            gradient[f"{act} {place}"] = sorted(early)[len(early) // 2]
    return {"data": images.name, "test": test, "first_to_last": gradient}


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""

    def lead(act: str, rate: int | None) -> list[float]:
        found = []
        for r in results:
            pair = (r["test"][f"{act} {place}"] for place in ("before", "after"))
            before, after = (max(p) if rate is None else p[rate] for p in pair)
            found.append(before - after)
        return found

    def first_to_last(act: str, place: str) -> list[float]:
        return [r["first_to_last"][f"{act} {place}"] for r in results]

    return [
        verdict(
            "C12",
            *(
                at_least(
                    f"test accuracy, before − after, {act}, best rates, points",
                    lead(act, None),
                    0.3,
                    none=0,
                )
                for act in _ACTS
            ),
            *(
                reported(f"the same at rate {_RATES[_SAME]:g}, {act}", lead(act, _SAME))
                for act in _ACTS
            ),
        ),
        verdict(
            "C51",
            at_most(
                "early ‖dW1‖/‖dWlast‖, sigmoid, plain",
                first_to_last("sigmoid", "none"),
                0.05,
                none=0.2,
            ),
            at_least(
                "the same, batch norm before",
                first_to_last("sigmoid", "before"),
                0.2,
                none=0.05,
            ),
            reported("the same, batch norm after", first_to_last("sigmoid", "after")),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw test accuracy at the best rate by activation and place."""
    axes = figure.subplots(1, 3, sharey=True)
    for ax, act in zip(axes, _ACTS, strict=True):
        rows = [
            [max(r["test"][f"{act} {place}"]) for r in results] for place in _PLACES
        ]
        bars(ax, list(_PLACES), rows, indices=(7, 0, 1))
        ax.set(title=f"{act}, best rate", ylim=(0, 100))
    axes[0].set_ylabel(f"test accuracy, % ({results[0]['data']})")


STUDY = Study(
    id="S18",
    title="place",
    question="Does batch norm belong before the activation or after it?",
    prediction="Before: higher accuracy there, and gradients that do not vanish.",
    arms=("none, before, after", "sigmoid, tanh, ReLU"),
    metric="Test accuracy at the best of five rates; ‖dW1‖/‖dWlast‖ over the first ten "
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
            5,
            {"data": "mnist", "train": 5000, "steps": 400, "hidden": (64, 64, 64, 64)},
        ),
        "gpu": Scale(
            10, {"data": "mnist", "train": 0, "steps": 5000, "hidden": (256,) * 6}
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

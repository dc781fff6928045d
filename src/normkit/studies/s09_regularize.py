"""S09: batch norm against dropout as a regularizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from normkit.nn import BatchNorm2d
from normkit.studies.figure import points
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import accuracy, cnn, train
from normkit.studies.verdict import Verdict, at_least, at_most, minus, reported, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (0.01, 0.03, 0.1)
_SAME = 1
_ARMS = {
    "plain": (False, 0.0),
    "dropout": (False, 0.5),
    "batch norm": (True, 0.0),
    "both": (True, 0.5),
}


def measure(
    trial: Trial, *, data: str, train_images: int, steps: int, width: int
) -> Result:
    """Train a small CNN on few images in the four arms, at three rates each."""
    images = trial.images(data, train=train_images).standardized()
    batches = images.batches(50, steps, trial.generator(1))
    channels, side = images.x_train.shape[1:3]
    result: Result = {"data": images.name, "test": {}, "train": {}}
    for arm, (has_norm, dropout) in _ARMS.items():
        test, known = [], []
        for rate in _RATES:
            torch.manual_seed(trial.seed)
            model = cnn(
                images.classes,
                BatchNorm2d if has_norm else None,
                channels=channels,
                side=side,
                width=width,
                dropout=dropout,
            ).to(trial.device)
            train(model, images, batches, rate)
            test.append(
                100 * accuracy(model, images.x_test[:5000], images.y_test[:5000])
            )
            known.append(100 * accuracy(model, images.x_train, images.y_train))
        result["test"][arm] = test
        result["train"][arm] = known
    return result


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""

    def best(r: Result, arm: str) -> float:
        return max(r["test"][arm])

    def gain(arm: str, over: str) -> list[float]:
        return [best(r, arm) - best(r, over) for r in results]

    def same(arm: str, over: str) -> list[float]:
        return [r["test"][arm][_SAME] - r["test"][over][_SAME] for r in results]

    def overfit(arm: str) -> list[float]:
        """Return training minus test accuracy at the best rate."""
        found = []
        for r in results:
            i = r["test"][arm].index(best(r, arm))
            found.append(r["train"][arm][i] - r["test"][arm][i])
        return found

    more = minus(overfit("plain"), overfit("batch norm"))
    higher = at_least(
        "test accuracy, batch norm − plain, best rates, points",
        gain("batch norm", "plain"),
        0.3,
        none=0,
    )
    return [
        verdict(
            "C19",
            higher,
            at_least(
                "batch norm − dropout, best rates, points",
                gain("batch norm", "dropout"),
                0,
            ),
            at_most(
                "what dropout adds to batch norm, points",
                gain("both", "batch norm"),
                0.3,
            ),
            reported(
                "batch norm − plain, same rate, points", same("batch norm", "plain")
            ),
        ),
        verdict(
            "C57",
            higher,
            at_least(
                "gap of training and test accuracy, plain − batch norm, points",
                more,
                0.3,
                none=0,
            ),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw the test accuracy of the four arms, best rate and same rate."""
    axes = figure.subplots(1, 2, sharey=True)
    rows = [[max(r["test"][arm]) for r in results] for arm in _ARMS]
    same = [[r["test"][arm][_SAME] for r in results] for arm in _ARMS]
    points(axes[0], list(_ARMS), rows)
    points(axes[1], list(_ARMS), same)
    axes[0].set(title=f"Test accuracy, best rate ({results[0]['data']})", ylabel="%")
    axes[1].set_title(f"The same at rate {_RATES[_SAME]:g}")


STUDY = Study(
    id="S09",
    title="batch norm and dropout",
    question="Does batch norm raise accuracy, and does it make dropout unnecessary?",
    prediction="Higher accuracy than without, as much as with dropout; dropout adds "
    "nothing to it.",
    arms=tuple(_ARMS),
    metric="Test accuracy of a small CNN on few training images, each arm at the best "
    "of three rates and all at one rate.",
    criterion="C19: 0.3 points above plain, not below dropout, which adds at most "
    "0.3. C57: also a gap of training and test accuracy smaller by 0.3.",
    claims=("C19", "C57"),
    minutes=5,
    scales={
        "quick": Scale(
            2, {"data": "digits", "train_images": 300, "steps": 30, "width": 8}
        ),
        "cpu": Scale(
            7, {"data": "mnist", "train_images": 1000, "steps": 250, "width": 12}
        ),
        "gpu": Scale(
            10, {"data": "cifar10", "train_images": 0, "steps": 8000, "width": 64}
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

"""S09: batch norm against dropout as a regularizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from normkit.nn import BatchNorm2d
from normkit.studies import verdict as rules
from normkit.studies.figure import points
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import accuracy, cnn, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
_SAME = 1
_ARMS = {
    "plain": (False, 0.0, False),
    "dropout": (False, 0.5, False),
    "batch norm": (True, 0.0, False),
    "both": (True, 0.5, False),
    "with LRN": (True, 0.0, True),
}


def _norm(*, response: bool):
    """Return a maker of batch norm, followed by local response normalization or not."""
    if not response:
        return BatchNorm2d
    # The sizes of Krizhevsky et al. 2012.
    return lambda channels: nn.Sequential(
        BatchNorm2d(channels), nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)
    )


def measure(
    trial: Trial, *, data: str, train_images: int, steps: int, width: int
) -> Result:
    """Train a small CNN on few images in the arms, at each rate."""
    images = trial.images(data, train=train_images, val=1000, test=2000).standardized()
    if images.name == "mnist":  # 14 × 14 pixels are enough, and fast
        images = images.map(lambda x: F.avg_pool2d(x, 2))
    batches = images.batches(50, steps, trial.generator(1))
    channels = images.x_train.shape[1]
    splits = {
        "train": (images.x_train, images.y_train),
        "validation": (images.x_val, images.y_val),
        "test": (images.x_test, images.y_test),
    }
    result: Result = {"data": images.name, **{name: {} for name in splits}}
    for arm, (has_norm, dropout, response) in _ARMS.items():
        for name in splits:
            result[name][arm] = []
        for rate in _RATES:
            torch.manual_seed(trial.seed)
            model = cnn(
                images.classes,
                _norm(response=response) if has_norm else None,
                channels=channels,
                width=width,
                dropout=dropout,
            ).to(trial.device)
            train(model, images, batches, rate)
            for name, (x, y) in splits.items():
                result[name][arm].append(100 * accuracy(model, x, y))
    return result


def _evaluated_pick(results: list[Result], arm: str) -> Pick:
    return pick([r["validation"][arm] for r in results], _RATES)


def _evaluated_best(
    results: list[Result], arm: str, split: str = "test"
) -> list[float]:
    best = _evaluated_pick(results, arm).index
    return [r[split][arm][best] for r in results]


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""
    # 0.3 points are 6 of 2000 test images, and one and a half of 500 digits.
    least = 1.0 if results[0]["data"] == "digits" else 0.3

    def best(arm: str) -> list[float]:
        return _evaluated_best(results, arm)

    def edge(*arms: str) -> str:
        return edges({arm: _evaluated_pick(results, arm) for arm in arms})

    def overfit(arm: str) -> list[float]:
        """Return training minus test accuracy at the best rate."""
        return rules.minus(_evaluated_best(results, arm, "train"), best(arm))

    def same(arm: str) -> list[float]:
        return [r["test"][arm][_SAME] for r in results]

    higher = rules.at_least(
        "test accuracy, batch norm − plain, best rates, points",
        rules.minus(best("batch norm"), best("plain")),
        least,
        none=0,
        about="more accuracy",
        unless=edge("batch norm", "plain"),
    )
    return [
        rules.verdict(
            "C19",
            higher,
            rules.at_least(
                "batch norm − dropout, best rates, points",
                rules.minus(best("batch norm"), best("dropout")),
                0,
                about="as good as dropout",
                unless=edge("batch norm", "dropout"),
            ),
            rules.at_most(
                "what dropout adds to batch norm, points",
                rules.minus(best("both"), best("batch norm")),
                least,
                about="dropout adds nothing",
                unless=edge("both", "batch norm"),
            ),
            rules.reported(
                "batch norm − plain, same rate, points",
                rules.minus(same("batch norm"), same("plain")),
            ),
        ),
        rules.verdict(
            "C57",
            higher,
            rules.at_least(
                "gap of training and test accuracy, plain − batch norm, points",
                rules.minus(overfit("plain"), overfit("batch norm")),
                least,
                none=0,
                about="a smaller gap, clean labels",
                unless=edge("batch norm", "plain"),
            ),
        ),
        rules.verdict(
            "C72",
            rules.at_most(
                "what local response normalization adds to batch norm, points",
                rules.minus(best("with LRN"), best("batch norm")),
                least,
                unless=edge("with LRN", "batch norm"),
            ),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw the test accuracy of the arms, best rate and same rate."""
    axes = figure.subplots(1, 2, sharey=True)
    rows = [_evaluated_best(results, arm) for arm in _ARMS]
    same = [[r["test"][arm][_SAME] for r in results] for arm in _ARMS]
    names = [arm.replace(" ", "\n") for arm in _ARMS]
    points(axes[0], names, rows)
    points(axes[1], names, same)
    axes[0].set(title=f"Test accuracy, best rate ({results[0]['data']})", ylabel="%")
    axes[1].set_title(f"The same at rate {_RATES[_SAME]:g}")


STUDY = Study(
    id="S09",
    title="batch norm and dropout",
    question="Does batch norm raise accuracy, and does it make dropout unnecessary?",
    prediction="Higher accuracy than without, as much as with dropout; dropout adds "
    "nothing to it.",
    seen="Each dot is a seed. Left at each arm's best rate, right at one rate for all.",
    meaning="On a thousand images and few steps part of the lead of batch norm is that "
    "it learns faster, which a best rate does not take away. LRN is local response "
    "normalization, the layer that batch norm replaced.",
    arms=tuple(_ARMS),
    metric="Test accuracy of a small CNN on few training images, each arm at the best "
    "of five rates by validation and all at one rate. LRN is local response "
    "normalization behind each batch norm.",
    criterion="C19: 0.3 points above plain, not below dropout, which adds at most "
    "0.3. C57: also a gap of training and test accuracy smaller by 0.3. C72: LRN adds "
    "at most 0.3. On the digits 1 point in place of 0.3.",
    claims=("C19", "C57", "C72"),
    minutes=5,
    scales={
        "quick": Scale(
            2, {"data": "digits", "train_images": 300, "steps": 30, "width": 8}
        ),
        "cpu": Scale(
            10, {"data": "mnist", "train_images": 1000, "steps": 90, "width": 6}
        ),
        "gpu": Scale(
            10, {"data": "cifar10", "train_images": 0, "steps": 8000, "width": 64}
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

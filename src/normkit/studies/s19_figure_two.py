"""S19: the paper's table of learning rates, on a small convolutional net."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from normkit.nn import BatchNorm2d
from normkit.studies import verdict as rules
from normkit.studies.figure import band, points
from normkit.studies.interval import Number
from normkit.studies.selection import edges, pick
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import accuracy, cnn, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name: batch norm, multiple of the base rate, activation.
_ARMS = {
    "plain ×1": (False, 1.0, nn.ReLU),
    "plain ×5": (False, 5.0, nn.ReLU),
    "BN ×1": (True, 1.0, nn.ReLU),
    "BN ×5": (True, 5.0, nn.ReLU),
    "BN ×30": (True, 30.0, nn.ReLU),
    "BN ×5 sigmoid": (True, 5.0, nn.Sigmoid),
    "plain sigmoid": (False, 1.0, nn.Sigmoid),
}
_CANDIDATES = (0.03, 0.1, 0.3, 1.0, 3.0)


def measure(
    trial: Trial, *, data: str, train_images: int, steps: int, width: int, looks: int
) -> Result:
    """Train at multiples of the best rate of the plain net."""
    images = trial.images(data, train=train_images, val=500, test=1000).standardized()
    batches = images.batches(64, steps, trial.generator(1))
    channels, side = images.x_train.shape[1:3]

    def curve(
        has_norm: bool, rate: float, act: type[nn.Module]
    ) -> dict[str, list[float]]:
        torch.manual_seed(trial.seed)
        norm = BatchNorm2d if has_norm else None
        model = cnn(
            images.classes,
            norm,
            channels=channels,
            side=side,
            width=width,
            activation=act,
        ).to(trial.device)
        seen: dict[str, list[float]] = {"test": [], "validation": []}

        def look(step: int, _: float) -> None:
            if step % max(1, steps // looks) == 0:
                for split, x, y in (
                    ("test", images.x_test, images.y_test),
                    ("validation", images.x_val, images.y_val),
                ):
                    seen[split].append(100 * accuracy(model, x, y))

        # Without momentum, as the multiples of the paper are of plain steps.
        train(model, images, batches, rate, momentum=0.0, on_step=look)
        return seen

    tried = {rate: curve(False, rate, nn.ReLU) for rate in _CANDIDATES}
    base = max(tried, key=lambda rate: tried[rate]["validation"][-1])
    curves = {}
    for arm, (has_norm, factor, act) in _ARMS.items():
        known = arm == "plain ×1"
        curves[arm] = tried[base] if known else curve(has_norm, base * factor, act)
    return {
        "data": images.name,
        "base": base,
        "tried": {f"{rate:g}": one["validation"][-1] for rate, one in tried.items()},
        "chance": 100 / images.classes,
        "every": max(1, steps // looks),
        "curves": curves,
    }


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""
    # Per seed, as the multiples are trained per seed.
    picks = [pick([list(r["tried"].values())], _CANDIDATES) for r in results]
    outside = [one for one in picks if one.at_edge]
    # As many as the interval leaves out at each end.
    reason = edges({"plain": outside[0]}) if len(outside) > len(results) // 5 else ""

    def reached(r: Result, arm: str, target: float) -> float:
        test = r["curves"][arm]["test"]
        return next((i for i, a in enumerate(test, 1) if a >= target), math.inf)

    def speed(arm: str) -> list[Number]:
        """Return the looks plain ×1 needs for 95 % of its best, over those of `arm`."""
        found: list[Number] = []
        for r in results:
            target = 0.95 * max(r["curves"]["plain ×1"]["validation"])
            steps = [reached(r, name, target) for name in ("plain ×1", arm)]
            end = len(r["curves"]["plain ×1"]["test"])
            found.append(rules.steps_ratio(steps[0], steps[1], end))
        return found

    def best(arm: str) -> list[float]:
        """Return the test accuracy at the look of the best validation."""
        found = []
        for r in results:
            known = r["curves"][arm]["validation"]
            found.append(r["curves"][arm]["test"][known.index(max(known))])
        return found

    def end(arm: str) -> list[float]:
        return [r["curves"][arm]["test"][-1] for r in results]

    chance = [r["chance"] for r in results]
    return [
        rules.verdict(
            "C18",
            rules.at_least(
                "steps to 95 % of the plain net's best, plain ×1 / BN ×1",
                speed("BN ×1"),
                1.5,
                none=1,
                about="×1 on small images",
                unless=reason,
            ),
            rules.at_least(
                "the same, BN ×5",
                speed("BN ×5"),
                3,
                none=1,
                about="×5 on small images",
                unless=reason,
            ),
            rules.reported("the same, BN ×30", speed("BN ×30")),
            rules.reported(
                "best accuracy, BN ×5 − plain ×1, points",
                rules.minus(best("BN ×5"), best("plain ×1")),
            ),
        ),
        rules.verdict(
            "C32",
            rules.at_least(
                "end, BN ×5 − plain ×1, points",
                rules.minus(end("BN ×5"), end("plain ×1")),
                0,
                about="BN ×5 trains",
                unless=reason,
            ),
            rules.at_least(
                "end, BN ×30 − plain ×1, points",
                rules.minus(end("BN ×30"), end("plain ×1")),
                0,
                about="BN ×30 trains",
                unless=reason,
            ),
            rules.at_most(
                "end, plain ×5 above chance, points",
                rules.minus(end("plain ×5"), chance),
                5,
                none=20,
                about="plain ×5 fails",
                unless=reason,
            ),
        ),
        rules.verdict(
            "C33",
            rules.at_most(
                "end, plain sigmoid above chance, points",
                rules.minus(end("plain sigmoid"), chance),
                5,
                none=20,
                about="a plain sigmoid CNN does not train",
            ),
            rules.at_least(
                "best, BN ×5 sigmoid − plain sigmoid, points",
                rules.minus(best("BN ×5 sigmoid"), best("plain sigmoid")),
                20,
                none=0,
                about="with batch norm it does",
            ),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw accuracy over time, and the best of each arm."""
    left, right = figure.subplots(1, 2)
    every = results[0]["every"]
    for i, arm in enumerate(_ARMS):
        rows = [r["curves"][arm]["test"] for r in results]
        steps = [every * (k + 1) for k in range(len(rows[0]))]
        band(left, steps, rows, label=arm, index=i, dashed="BN" not in arm)
    left.set(title=f"Test accuracy ({results[0]['data']})", xlabel="step", ylabel="%")
    figure.legend(loc="outside lower center", ncols=4)
    names = [arm.replace(" ", "\n") for arm in _ARMS]
    points(right, names, [[r["curves"][a]["test"][-1] for r in results] for a in _ARMS])
    right.set(title="Accuracy at the end, in the same colours", ylabel="%")
    right.tick_params(axis="x", labelsize=6.5)


STUDY = Study(
    id="S19",
    title="figures two and three",
    question="How much larger a rate does batch norm tolerate, and what is gained?",
    prediction="×1 is faster, ×5 faster still and better, ×30 works; plain ×5 fails; "
    "the sigmoid net trains with batch norm alone.",
    seen="Full lines are batch norm, dashed plain nets, on colour images; ×5 and ×30 "
    "are multiples of the plain net's best rate. Right: where each arm ends.",
    meaning="At the plain net's best rate batch norm needs fewer steps, and five times "
    "that rate, which breaks the plain net, works. Thirty times that rate does not, in "
    "so few steps. The sigmoid net trains only with batch norm.",
    arms=tuple(_ARMS),
    metric="Test accuracy of a small CNN over steps of plain SGD; the base rate is the "
    "plain net's best of five on validation.",
    criterion="C18: 1.5 times fewer steps at ×1 and 3 times at ×5. C32: ×5 and ×30 end "
    "no lower than plain ×1; plain ×5 within 5 points of chance (20 refutes). C33: "
    "plain sigmoid at chance, batch norm 20 points above it.",
    claims=("C18", "C32", "C33"),
    minutes=6,
    scales={
        "quick": Scale(
            2,
            {"data": "digits", "train_images": 0, "steps": 40, "width": 8, "looks": 8},
        ),
        "cpu": Scale(
            10,
            {
                "data": "cifar10",
                "train_images": 3000,
                "steps": 240,
                "width": 8,
                "looks": 16,
            },
        ),
        "gpu": Scale(
            5,
            {
                "data": "cifar10",
                "train_images": 0,
                "steps": 20_000,
                "width": 64,
                "looks": 100,
            },
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

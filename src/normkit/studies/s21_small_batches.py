"""S21: batches of one and two images, with tuned rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from normkit.errors import NormkitError
from normkit.nn import BatchNorm2d, GroupNorm
from normkit.studies import verdict as rules
from normkit.studies.figure import color
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import accuracy, cnn, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": BatchNorm2d,
    "group norm": lambda channels: GroupNorm(min(8, channels // 2), channels),
}
# By batch size: rates around its root, as noise asks for.
_RATES = {
    1: (0.0001, 0.0003, 0.001, 0.003),
    2: (0.0003, 0.001, 0.003, 0.01, 0.03),
    4: (0.001, 0.003, 0.01, 0.03, 0.1),
    32: (0.01, 0.03, 0.1, 0.3, 1.0),
}


def measure(
    trial: Trial, *, images_seen: int, width: int, sizes: tuple[int, ...]
) -> Result:
    """Train a small CNN on as many images at each batch size, rate and norm."""
    images = trial.images("digits").standardized()
    found: dict[str, list[dict[str, float]]] = {}
    for size in sizes:
        batches = images.batches(size, images_seen // size, trial.generator(1))
        for arm, norm in _NORMS.items():
            rows = []
            for rate in _RATES[size]:
                torch.manual_seed(trial.seed)
                model = cnn(images.classes, norm, width=width).to(trial.device)
                train(model, images, batches, rate)
                rows.append(
                    {
                        "validation": 100 * accuracy(model, images.x_val, images.y_val),
                        "test": 100 * accuracy(model, images.x_test, images.y_test),
                    }
                )
            found[f"{size} {arm}"] = rows
    return {
        "sizes": list(sizes),
        "found": found,
        "refuses_one_value": _refuses_one_value(),
    }


def _refuses_one_value() -> bool:
    try:
        BatchNorm2d(3).train()(torch.randn(1, 3, 1, 1))
    except NormkitError:
        return True
    return False


def _evaluated(results: list[Result], size: int, arm: str) -> tuple[Pick, list[float]]:
    """Return the best rate on validation, and the test accuracies there."""
    rows = [r["found"][f"{size} {arm}"] for r in results]
    best = pick([[one["validation"] for one in row] for row in rows], _RATES[size])
    return best, [row[best.index]["test"] for row in rows]


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""
    full, group = "batch norm", "group norm"

    def lead(size: int) -> list[float]:
        return rules.minus(
            _evaluated(results, size, group)[1], _evaluated(results, size, full)[1]
        )

    def reason(*cells: tuple[int, str]) -> str:
        picks = [_evaluated(results, size, arm)[0] for size, arm in cells]
        names = [f"{arm} at batch {size}" for size, arm in cells]
        return edges(dict(zip(names, picks, strict=True)))

    def ahead(size: int) -> rules.Part:
        return rules.at_least(
            f"test accuracy at batch {size}, group − batch norm, points",
            lead(size),
            5,
            none=0,
            about=f"group norm ahead at batch {size}",
            unless=reason((size, group), (size, full)),
        )

    def loss(large: int, small: int) -> list[float]:
        return rules.minus(
            _evaluated(results, large, full)[1], _evaluated(results, small, full)[1]
        )

    sizes = results[0]["sizes"]
    first, middle = sizes[0], 32
    return [
        rules.verdict(
            "C50",
            rules.at_least(
                f"accuracy, batch norm, batch {middle} − batch {sizes[1]}, points",
                loss(middle, sizes[1]),
                5,
                none=0,
                about="large ones",
                unless=reason((middle, full), (sizes[1], full)),
            ),
        ),
        rules.verdict(
            "C65",
            rules.at_most(
                "one value per channel trains (0: refused)",
                [0.0 if r["refuses_one_value"] else 1.0 for r in results],
                0,
                about="one value per channel",
            ),
            rules.at_most(
                f"accuracy at batch {first}, batch norm, %",
                _evaluated(results, first, full)[1],
                50,
                none=90,
                about="no training with one image",
                unless=reason((first, full)),
            ),
            note="Maps larger than 1 × 1 give one image several values per channel.",
        ),
        rules.verdict(
            "C86",
            *(ahead(size) for size in sizes[:2]),
            rules.at_most(
                f"test accuracy at batch {middle}, group − batch norm, points",
                lead(middle),
                1,
                none=5,
                about=f"no lead at batch {middle}",
                unless=reason((middle, group), (middle, full)),
            ),
            *(
                rules.reported(
                    f"accuracy at batch {s}, {arm}, %", _evaluated(results, s, arm)[1]
                )
                for s in sizes
                for arm in _NORMS
            ),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw the test accuracy of each norm at each batch size, every seed a dot."""
    axes = figure.subplots()
    sizes = results[0]["sizes"]
    for i, arm in enumerate(_NORMS):
        for k, size in enumerate(sizes):
            values = _evaluated(results, size, arm)[1]
            place = k + 0.16 * (2 * i - 1)
            axes.plot([place] * len(values), values, ".", color=color(i), ms=5)
            middle = sorted(values)[len(values) // 2]
            axes.hlines(
                middle,
                place - 0.13,
                place + 0.13,
                color=color(i),
                lw=2,
                label=arm if k == 0 else "",
            )
    axes.set_xticks(range(len(sizes)), [str(s) for s in sizes])
    axes.set(title="Test accuracy, best rate of each", xlabel="batch", ylabel="%")
    axes.legend(loc="lower right")


STUDY = Study(
    id="S21",
    title="one image and two",
    question="From which batch size on does batch norm work?",
    prediction="With one or two images a batch, group norm is well ahead; at 32 it is "
    "not.",
    seen="Dots are seeds: accuracy after equally many images, each norm at its best "
    "rate for that batch.",
    meaning="On small images a batch of one still has many values per channel, and "
    "batch norm trains with them. That images of one class a batch, or larger nets, "
    "lose more is known from the literature; at this size it does not show, but for a "
    "few points at one image.",
    arms=(*_NORMS, "batches of 1, 2 and 32"),
    metric="Test accuracy of a small CNN on the digits after equally many images, at "
    "the best of four or five rates by validation for each norm and batch size.",
    criterion="C86: group norm 5 points ahead at 1 and 2, at most 1 at 32. C65: one "
    "value is refused, and accuracy at batch 1 is below 50 %. C50: 5 points from batch "
    "2 to 32.",
    claims=("C50", "C65", "C86"),
    minutes=6,
    scales={
        "quick": Scale(2, {"images_seen": 256, "width": 8, "sizes": (1, 2, 32)}),
        "cpu": Scale(10, {"images_seen": 800, "width": 8, "sizes": (1, 2, 32)}),
        "gpu": Scale(10, {"images_seen": 30_000, "width": 64, "sizes": (1, 2, 4, 32)}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

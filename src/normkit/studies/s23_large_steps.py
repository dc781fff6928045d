"""S23: what a large learning rate breaks, and what it leaves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.studies import verdict as rules
from normkit.studies.data import Images
from normkit.studies.figure import band
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SMALL = 1  # index of the rate that goes on after a large one
_ARMS = {"plain": "", "batch norm": "batch"}
_EARLY = 5


def measure(trial: Trial, *, steps: int, hidden: int, depth: int) -> Result:
    """Take a few steps at each rate and look at the layers; then go on slowly."""
    images = trial.images("digits").flat().standardized()
    result: Result = {}
    for arm, norm in _ARMS.items():
        nets = _nets(trial, images, hidden, depth, norm)
        x = images.x_train[:200]
        before = _sizes(nets, x)
        rates = torch.tensor(_RATES, device=trial.device)
        batches = images.batches(60, 2 * steps, trial.generator(1))
        for rows in batches[:_EARLY]:
            nets.step(images.x_train[rows], images.y_train[rows], rates)
        after = _sizes(nets, x)
        for rows in batches[_EARLY:steps]:
            nets.step(images.x_train[rows], images.y_train[rows], rates)
        middle = _loss(nets, images)
        slow = torch.full((len(_RATES),), _RATES[_SMALL], device=trial.device)
        for rows in batches[steps:]:
            nets.step(images.x_train[rows], images.y_train[rows], slow)
        result[arm] = {
            "growth": (after / before).nan_to_num(math.inf).T.tolist(),
            "loss": middle,
            "after_slow": _loss(nets, images),
        }
    return result


def _nets(trial: Trial, images: Images, hidden: int, depth: int, norm: str) -> Replicas:
    widths = (images.x_train.shape[1], *[hidden] * depth, images.classes)
    return Replicas(
        Recipe(widths, "relu", norm),
        stds_for(widths, math.sqrt(2)).expand(len(_RATES), -1),
        trial.generator(2),
        device=trial.device,
    )


@torch.no_grad()
def _sizes(nets: Replicas, x: Tensor) -> Tensor:
    """Return the root mean square of each layer's linear outputs, `(layer, net)`."""
    taps: list[Tensor] = []
    last = nets(x, taps, inputs=True)
    return torch.stack([h.square().mean((1, 2)).sqrt() for h in [*taps, last]])


@torch.no_grad()
def _loss(nets: Replicas, images: Images) -> list[float]:
    """Return each net's training loss; inf for one that diverged."""
    return nets.losses(images.x_train, images.y_train).nan_to_num(math.inf).tolist()


def _evaluated_limit(result: Result, arm: str) -> int:
    """Return the index of the largest rate that ends below the loss of guessing."""
    return max(
        (i for i, v in enumerate(result[arm]["loss"]) if v < math.log(10)), default=-1
    )


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""
    limits = [_evaluated_limit(r, "plain") for r in results]
    known = [min(k, len(_RATES) - 2) for k in limits]
    inside = all(0 <= k < len(_RATES) - 1 for k in limits)
    reason = "" if inside else "not judged: the limit of a rate is outside the grid"

    def growth(arm: str, above: int) -> list[float]:
        """Return the growth of the last layer, `above` rates over the limit."""
        return [
            min(r[arm]["growth"][max(k, 0) + above][-1], 1e30)
            for r, k in zip(results, known, strict=True)
        ]

    def last_to_first(arm: str) -> list[float]:
        rows = [
            r[arm]["growth"][max(k, 0) + 1] for r, k in zip(results, known, strict=True)
        ]
        return [min(row[-1], 1e30) / min(row[0], 1e29) for row in rows]

    def stuck() -> list[float]:
        """Return the loss after the largest working rate and a small one, over small.

        Both have the same number of steps; the floor is that of a fitted net.
        """
        found = []
        for r, k in zip(results, limits, strict=True):
            losses = r["plain"]["after_slow"]
            found.append(max(losses[max(k, 0)], 0.01) / max(losses[_SMALL], 0.01))
        return found

    rates = [_RATES[max(k, 0)] for k in limits]
    full = [_RATES[max(_evaluated_limit(r, "batch norm"), 0)] for r in results]
    return [
        rules.verdict(
            "C73",
            rules.at_least(
                "loss after the largest working rate and a small one / small alone",
                stuck(),
                1.2,
                none=1,
            ),
            rules.reported("the largest working rate, plain", rates),
        ),
        rules.verdict(
            "C85",
            rules.at_least(
                "growth of the output in 5 steps, plain, first rate that fails",
                growth("plain", 1),
                10,
                none=1,
                about="activations explode where the rate is too large",
                unless=reason,
            ),
            rules.at_least(
                "growth, last layer / first layer, there",
                last_to_first("plain"),
                3,
                none=1,
                about="more so with depth",
                unless=reason,
            ),
            rules.at_most(
                "growth of the output, batch norm, at the same rate",
                growth("batch norm", 1),
                10,
                about="not with batch norm",
                unless=reason,
            ),
            rules.reported(
                "growth of the output, plain, last rate that works", growth("plain", 0)
            ),
            rules.reported("the largest working rate, batch norm", full),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw the growth of each layer by rate, and the loss before and after."""
    left, middle, right = figure.subplots(1, 3)
    layers = len(results[0]["plain"]["growth"][0])
    for axes, arm in ((left, "plain"), (middle, "batch norm")):
        for i, layer in enumerate((0, layers // 2, layers - 1)):
            rows = [[min(row[layer], 1e6) for row in r[arm]["growth"]] for r in results]
            band(axes, _RATES, rows, label=f"layer {layer + 1}", index=i)
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylim=(0.1, 2e6))
        axes.set_title(f"Growth in {_EARLY} steps, {arm}")
    left.legend()
    for i, key in enumerate(("loss", "after_slow")):
        rows = [[min(v, 3.0) for v in r["plain"][key]] for r in results]
        label = "at the rate" if key == "loss" else f"and then at {_RATES[_SMALL]:g}"
        band(right, _RATES, rows, label=label, index=3 + i)
    right.set(title="Training loss, plain", xscale="log", xlabel="learning rate")
    right.legend()


STUDY = Study(
    id="S23",
    title="large steps",
    question="What happens at a learning rate that is too large?",
    prediction="Activations explode, most in the last layers, and not with batch norm; "
    "large rates that work end in bad minima.",
    seen="Growth of a layer's output within five steps: nothing happens up to a rate, "
    "then it is beyond all bounds. With batch norm it is not.",
    meaning="A rate that is too large breaks a plain net at once, by an explosion or "
    "by silence: in some seeds all units of a layer die instead. Batch norm works at "
    "rates ten times larger. Whether a large rate that works leaves a worse minimum "
    "differs from seed to seed.",
    arms=(*_ARMS, "ten rates", "then a small one"),
    metric="Growth of each layer's linear output over five steps; training loss of "
    "ReLU nets on the digits at each rate, and after as many steps more at a small "
    "rate.",
    criterion="C85: at the first rate that fails the plain net's output grows ×10, the "
    "last layer three times as much as the first; with batch norm at most ×10. C73: "
    "the loss stays 1.2 times higher than at the small rate alone.",
    claims=("C73", "C85"),
    minutes=1,
    scales={
        "quick": Scale(2, {"steps": 40, "hidden": 32, "depth": 5}),
        "cpu": Scale(10, {"steps": 150, "hidden": 48, "depth": 8}),
        "gpu": Scale(20, {"steps": 3000, "hidden": 256, "depth": 20}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

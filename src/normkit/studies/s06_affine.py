"""S06: what the learned weight and bias are for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.moments import moments
from normkit.nn import BatchNorm1d
from normkit.studies.figure import band, points
from normkit.studies.replicas import Recipe, Replicas
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.verdict import Verdict, at_least, at_most, reported, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (0.3, 1.0, 3.0, 10.0)


def measure(
    trial: Trial, *, points: int, steps: int, depths: tuple[int, ...]
) -> Result:
    """Check identities of the affine map; train on two spirals with and without it."""
    generator = trial.generator()
    x = 5 + 3 * torch.randn(256, 16, generator=generator)
    batch = moments(x, 0)
    restored = _restored(x, (batch.var + 1e-5).sqrt(), batch.mean)
    by_deviation = _restored(x, batch.var.sqrt(), batch.mean)
    gain, offset = torch.randn(2, 16, generator=generator)
    out = moments(_restored(x, gain, offset), 0)
    share = batch.var / (batch.var + 1e-5)
    result: Result = {
        "restore_error": _largest(restored - x),
        "restore_error_deviation": _largest(by_deviation - x),
        "mean_error": _largest(out.mean - offset),
        "var_error": _largest(out.var - gain.square() * share),
        "losses": {},
        "accuracies": {},
        "curves": {},
    }
    points_x, points_y = _spirals(points, generator)
    for depth in depths:
        for affine in (True, False):
            arm = f"{depth} hidden, " + ("affine" if affine else "plain")
            losses, hits = _train(trial, points_x, points_y, depth, steps, affine)
            # The best rate of each arm, by its loss averaged over the last tenth.
            tail = losses[-max(1, len(losses) // 10) :].mean(0)
            best = int(tail.nan_to_num(math.inf).argmin())
            result["losses"][arm] = tail[best].item()
            result["accuracies"][arm] = hits[best]
            result["curves"][arm] = losses[:: max(1, steps // 60), best].tolist()
    return result


def _restored(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = BatchNorm1d(x.shape[1])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        return layer(x)


def _largest(error: Tensor) -> float:
    return error.abs().max().item()


def _spirals(points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return two interleaved spirals of 1.5 turns: not linearly separable."""
    turn = torch.rand(points, generator=generator).sqrt() * 3 * math.pi
    label = torch.arange(points) % 2
    angle = turn + math.pi * label
    arms = torch.stack([turn * angle.cos(), turn * angle.sin()], 1) / (3 * math.pi)
    return arms + 0.02 * torch.randn(points, 2, generator=generator), label


def _train(
    trial: Trial, x: Tensor, y: Tensor, depth: int, steps: int, affine: bool
) -> tuple[Tensor, list[float]]:
    """Train a net per rate; return losses `(steps, rates)` and training accuracies."""
    widths = (2, *[32] * depth, 2)
    recipe = Recipe(widths, "sigmoid", "batch", affine=affine)
    stds = torch.tensor([1 / math.sqrt(n) for n in widths[:-1]]).expand(len(_RATES), -1)
    nets = Replicas(recipe, stds, trial.generator(1))
    rates = torch.tensor(_RATES)
    order = trial.generator(2)
    losses = []
    for _ in range(steps):
        rows = torch.randperm(len(y), generator=order)[:128]
        nets.step(x[rows], y[rows], rates)
        losses.append(nets.last_losses)
    nets.calibrate(x)
    return torch.stack(losses), nets.accuracy(x, y)


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""
    arms = list(results[0]["losses"])
    deep, deep_plain = arms[-2], arms[-1]

    def ratio(plain: str, full: str) -> list[float]:
        return [r["losses"][plain] / r["losses"][full] for r in results]

    def column(name: str) -> list[float]:
        return [r[name] for r in results]

    capacity = (
        at_least(
            f"loss without / with affine, {deep.split(',')[0]}",
            ratio(deep_plain, deep),
            1.1,
            none=1,
        ),
        at_least("the same, 1 hidden", ratio(arms[1], arms[0]), 1.1, none=1),
    )
    accuracy = [
        reported(f"training accuracy, {arm}", [r["accuracies"][arm] for r in results])
        for arm in arms
    ]
    restore = at_most("largest error after restoring", column("restore_error"), 1e-5)
    return [
        verdict("C10", *capacity, *accuracy),
        verdict(
            "C11",
            restore,
            reported(
                "the same with weight = √var, without eps",
                column("restore_error_deviation"),
            ),
        ),
        verdict("C26", *capacity),
        verdict(
            "C49",
            at_most("largest |mean − bias|", column("mean_error"), 1e-5),
            at_most(
                "largest |var − weight²·var/(var + eps)|", column("var_error"), 1e-4
            ),
        ),
        verdict("C59", restore),
        verdict(
            "C61",
            at_most(
                "largest |var − weight²·var/(var + eps)|", column("var_error"), 1e-4
            ),
            capacity[0],
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw training loss over time, and the final loss of each arm."""
    left, right = figure.subplots(1, 2)
    for i, arm in enumerate(results[0]["curves"]):
        rows = [r["curves"][arm] for r in results]
        band(left, range(len(rows[0])), rows, label=arm, index=i)
    left.set(yscale="log", xlabel="60ths of the training", ylabel="loss")
    left.set_title("Two spirals, best rate of each arm")
    left.legend()
    arms = list(results[0]["losses"])
    names = [arm.replace(", ", ",\n") for arm in arms]
    points(right, names, [[r["accuracies"][a] for r in results] for a in arms])
    right.set(title="Accuracy at the end", ylabel="share right")


STUDY = Study(
    id="S06",
    title="the affine map",
    question="What do the learned weight and bias do?",
    prediction="They can undo the normalization exactly, and sigmoid nets need them.",
    arms=("with weight and bias", "without", "one hidden layer", "several"),
    metric="Errors of the identities in float32; training loss on two spirals, each "
    "arm at the best of four learning rates.",
    criterion="Identities to 1e-5 (1e-4 on variances up to 10). Capacity: the loss "
    "without the affine map is at least 1.1 times the loss with it; 1 is no effect.",
    claims=("C10", "C11", "C26", "C49", "C59", "C61"),
    minutes=2,
    scales={
        "quick": Scale(2, {"points": 512, "steps": 150, "depths": (1, 3)}),
        "cpu": Scale(5, {"points": 512, "steps": 1200, "depths": (1, 3)}),
        "gpu": Scale(20, {"points": 2048, "steps": 10_000, "depths": (1, 6)}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

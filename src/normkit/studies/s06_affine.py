"""S06: what the learned weight and bias are for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.moments import moments
from normkit.nn import BatchNorm1d
from normkit.studies import verdict as rules
from normkit.studies.figure import band, points
from normkit.studies.replicas import Recipe, Replicas
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


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
    # Lower layers that scale and shift each unit, as learning might.
    scale, shift = 2 + torch.rand(2, 16, generator=generator) * 8
    apart = _restored(x * scale + shift, gain, offset) - _restored(x, gain, offset)
    result: Result = {
        "restore_error": _largest(restored - x),
        "restore_error_deviation": _largest(by_deviation - x),
        "mean_error": _largest(out.mean - offset),
        "var_error": _largest(out.var - gain.square() * share),
        "lower_layers": _largest(apart) / gain.abs().max().item(),
        "skewness": _skewness(_restored(x.pow(3), gain, offset), gain, offset),
        **_learned(trial),
        "losses": {},
        "accuracies": {},
        "curves": {},
    }
    splits = {s: _spirals(points, generator) for s in ("train", "validation", "test")}
    for depth in depths:
        for affine in (True, False):
            arm = f"{depth} hidden, " + ("affine" if affine else "plain")
            curve, losses, hits = _train(trial, splits, depth, steps, affine)
            result["losses"][arm] = losses
            result["accuracies"][arm] = hits
            result["curves"][arm] = curve[:: max(1, steps // 60)].T.tolist()
    return result


def _skewness(y: Tensor, gain: Tensor, offset: Tensor) -> float:
    """Return the mean skewness of units with this deviation and mean."""
    return (((y - offset) / gain).pow(3).mean(0)).abs().mean().item()


def _learned(trial: Trial) -> dict[str, float]:
    """Train weight and bias of one layer to give back its input: the worst of 16 units.

    Relative distance of weight from the deviation, and of bias from the mean of the
    data, before training and after.
    """
    generator = trial.generator(5)
    mean = 2 + 6 * torch.rand(16, generator=generator)
    std = 1 + 3 * torch.rand(16, generator=generator)
    layer = BatchNorm1d(16)

    def distance() -> dict[str, float]:
        return {
            "weight": _largest(layer.weight / std - 1),
            "bias": _largest(layer.bias / mean - 1),
        }

    before = distance()
    for _ in range(200):
        x = mean + std * torch.randn(256, 16, generator=generator)
        loss = (layer(x) - x).square().sum(1).mean()
        grads = torch.autograd.grad(loss, (layer.weight, layer.bias))
        with torch.no_grad():
            for p, g in zip((layer.weight, layer.bias), grads, strict=True):
                p -= 0.05 * g
    after = distance()
    return {
        f"{name} {when}": found[name]
        for when, found in (("before", before), ("after", after))
        for name in found
    }


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
    trial: Trial,
    splits: dict[str, tuple[Tensor, Tensor]],
    depth: int,
    steps: int,
    affine: bool,
) -> tuple[Tensor, dict[str, list[float]], dict[str, list[float]]]:
    """Train a net per rate; return its losses `(steps, rates)`, and those of splits.

    The last value is the accuracy of each split, as the losses `[rate]`.
    """
    widths = (2, *[32] * depth, 2)
    recipe = Recipe(widths, "sigmoid", "batch", affine=affine)
    stds = torch.tensor([1 / math.sqrt(n) for n in widths[:-1]]).expand(len(_RATES), -1)
    nets = Replicas(recipe, stds, trial.generator(1))
    rates = torch.tensor(_RATES)
    order = trial.generator(2)
    x, y = splits["train"]
    curve = []
    for _ in range(steps):
        rows = torch.randperm(len(y), generator=order)[:128]
        nets.step(x[rows], y[rows], rates)
        curve.append(nets.last_losses)
    nets.calibrate(x)
    nets.training = False
    losses, hits = {}, {}
    for name, (x_seen, y_seen) in splits.items():
        with torch.no_grad():
            losses[name] = nets.losses(x_seen, y_seen).nan_to_num(math.inf).tolist()
        hits[name] = nets.accuracy(x_seen, y_seen)
    return torch.stack(curve), losses, hits


def _evaluated_pick(results: list[Result], arm: str) -> Pick:
    return pick([[-v for v in r["losses"][arm]["validation"]] for r in results], _RATES)


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""
    arms = list(results[0]["losses"])

    def column(name: str) -> list[float]:
        return [r[name] for r in results]

    def at_best(key: str, arm: str) -> list[float]:
        best = _evaluated_pick(results, arm).index
        return [r[key][arm]["test"][best] for r in results]

    def lost(full: str, plain: str) -> rules.Part:
        picks = [_evaluated_pick(results, arm) for arm in (full, plain)]
        name = full.split(",")[0]
        return rules.at_least(
            f"test loss without / with weight and bias, {name}",
            rules.over(at_best("losses", plain), at_best("losses", full)),
            1.1,
            none=1,
            about=f"capacity, {name}",
            unless=edges({"with them": picks[0], "without": picks[1]}),
        )

    capacity = (lost(arms[-2], arms[-1]), lost(arms[0], arms[1]))
    accuracy = [
        rules.reported(f"test accuracy, {arm}", at_best("accuracies", arm))
        for arm in arms
    ]
    spread = rules.at_most(
        "largest |var − weight²·var/(var + eps)|",
        column("var_error"),
        1e-4,
        about="the variance",
    )
    restore = rules.at_most(
        "largest error after restoring", column("restore_error"), 1e-5
    )
    return [
        rules.verdict("C10", *capacity, *accuracy),
        rules.verdict(
            "C11",
            restore,
            rules.reported(
                "the same with weight = √var, without eps",
                column("restore_error_deviation"),
            ),
        ),
        rules.verdict("C26", *capacity),
        rules.verdict(
            "C49",
            rules.at_most(
                "largest |mean − bias|", column("mean_error"), 1e-5, about="the mean"
            ),
            spread,
            rules.at_most(
                "change of the output when lower layers scale and shift, / weight",
                column("lower_layers"),
                1e-3,
                about="no coupling to scale and shift of lower layers",
            ),
            rules.at_most(
                "|skewness| of the output when a lower layer cubes",
                column("skewness"),
                0.1,
                about="no coupling to the shape of their distribution",
            ),
        ),
        rules.verdict("C59", restore),
        rules.verdict("C61", spread, capacity[0]),
        rules.verdict(
            "C82",
            rules.at_most(
                "largest |weight / deviation − 1| after training",
                column("weight after"),
                0.05,
                about="the deviation",
            ),
            rules.at_most(
                "largest |bias / mean − 1| after training",
                column("bias after"),
                0.05,
                about="the mean",
            ),
            rules.reported("the first before training", column("weight before")),
            rules.reported("the second before training", column("bias before")),
            note="One layer that is asked for its own input, the case in which "
            "normalizing is useless.",
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw training loss over time, and the final loss of each arm."""
    left, right = figure.subplots(1, 2)
    arms = list(results[0]["curves"])
    best = {arm: _evaluated_pick(results, arm).index for arm in arms}
    for i, arm in enumerate(arms):
        rows = [r["curves"][arm][best[arm]] for r in results]
        band(left, range(len(rows[0])), rows, label=arm, index=i)
    left.set(yscale="log", xlabel="60ths of the training", ylabel="loss")
    left.set_title("Two spirals, best rate of each arm")
    left.legend()
    names = [arm.replace(", ", ",\n") for arm in arms]
    rows = [[100 * r["accuracies"][a]["test"][best[a]] for r in results] for a in arms]
    points(right, names, rows)
    right.set(title="Test accuracy at the end", ylabel="%")


STUDY = Study(
    id="S06",
    title="the affine map",
    question="What do the learned weight and bias do?",
    prediction="They can undo the normalization exactly, and sigmoid nets need them.",
    seen="On two spirals, which no line separates, sigmoid nets that normalize without "
    "weight and bias stay near two thirds right; with them they learn it.",
    meaning="Normalized inputs of a sigmoid sit in its middle, where it is almost a "
    "line. Weight and bias let it leave. They can undo the normalizing exactly, and "
    "learn to where that is asked of them. The output's mean and variance no longer "
    "depend on lower layers; the shape of its distribution does.",
    arms=("with weight and bias", "without", "one hidden layer", "several"),
    metric="Errors of the identities in float32; test loss on two spirals, each arm at "
    "the best of six learning rates by validation; weight and bias of a layer that "
    "learns to give back its input.",
    criterion="Identities to 1e-5 (1e-4 on variances up to 10). Capacity: the loss "
    "without weight and bias is at least 1.1 times the loss with them; 1 is no effect. "
    "C49: lower layers that scale and shift change the output by less than 1e-3, and "
    "one that cubes leaves a skewness below 0.1. C82: both found to 5 %.",
    claims=("C10", "C11", "C26", "C49", "C59", "C61", "C82"),
    minutes=2,
    scales={
        "quick": Scale(2, {"points": 512, "steps": 150, "depths": (1, 3)}),
        "cpu": Scale(10, {"points": 512, "steps": 600, "depths": (1, 3)}),
        "gpu": Scale(20, {"points": 2048, "steps": 10_000, "depths": (1, 6)}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

"""S12: which values share a statistic, checked against the definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from normkit.nn import (
    BatchNorm1d,
    BatchNorm2d,
    InstanceNorm2d,
    LayerNorm,
    PerActivationBatchNorm,
)
from normkit.studies import verdict as rules
from normkit.studies.figure import bars, points
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import accuracy, cnn, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measure(trial: Trial, *, steps: int, width: int) -> Result:
    """Measure errors against float64 definitions; train each kind of layer briefly."""
    generator = trial.generator()
    flat = 2 + torch.randn(32, 6, generator=generator, dtype=torch.float64)
    maps = 2 + torch.randn(8, 6, 5, 5, generator=generator, dtype=torch.float64)
    words = torch.randn(4, 7, 6, generator=generator, dtype=torch.float64)
    plain = {"affine": False, "dtype": torch.float64}
    dense = BatchNorm1d(6, **plain)
    eval_layer = BatchNorm1d(6, dtype=torch.float64)
    with torch.no_grad():
        nn.init.normal_(eval_layer.weight, generator=generator)
        nn.init.normal_(eval_layer.bias, generator=generator)
    eval_layer(flat)
    errors = {
        "biased": _error(dense(flat), flat, (0,)),
        # 3 · flat has nine times the variance.
        "by_variance": _largest(_divided(3 * flat, 1.0).std(0, correction=0) - 1),
        "by_deviation": _largest(_divided(3 * flat, 0.5).std(0, correction=0) - 1),
        **_eps_errors(dense, flat),
        "unbiased": _error(dense(flat), flat, (0,), correction=1),
        "conv": _error(BatchNorm2d(6, **plain)(maps), maps, (0, 2, 3)),
        "layer": _error(LayerNorm(6, elementwise_affine=False)(words), words, (2,)),
        "instance": _error(InstanceNorm2d(6)(maps), maps, (2, 3)),
        "preprocess": _largest(
            dense(flat) * (flat.var(0, correction=0) + 1e-5).sqrt()
            - (flat - flat.mean(0))
        ),
        "superposition_train": _superposition(eval_layer.train(), flat),
        "superposition_eval": _superposition(eval_layer.eval(), flat),
        "gradient": _gradient_error(eval_layer.train(), flat[:6]),
        "other_words": _leak(LayerNorm(6, dtype=torch.float64), words),
        "other_words_joint": _leak(LayerNorm([7, 6], dtype=torch.float64), words),
    }
    positions = BatchNorm1d(6, affine=False, dtype=torch.float64)
    places = PerActivationBatchNorm((6, 7), dtype=torch.float64)
    sentences = words.movedim(1, 2)  # (N, C, T), as a batch norm takes them
    leaks = {
        "batch norm": _leak_of_places(positions, sentences),
        "one per place": _leak_of_places(places, sentences),
    }
    images = trial.images("digits").standardized()
    batches = images.batches(32, steps, trial.generator(2))
    trained = {}
    for arm in ("per channel", "per point"):
        torch.manual_seed(trial.seed)
        norm = BatchNorm2d if arm == "per channel" else _per_point_norms()
        model = cnn(10, norm, width=width)
        train(model, images, batches, 0.05)
        trained[arm] = {
            "accuracy": accuracy(model, images.x_test, images.y_test),
            "parameters": sum(
                p.numel()
                for m in model.modules()
                if isinstance(m, BatchNorm2d | PerActivationBatchNorm)
                for p in m.parameters()
            ),
        }
    shape = BatchNorm2d(6).weight.numel()
    return {
        "errors": errors,
        "trained": trained,
        "leaks": leaks,
        "share_of_chw": shape / (6 * 5 * 5),
        "share_of_n": dense.running_mean.numel() / 6,  # type: ignore[union-attr]
        "share_of_z": flat.numel() / 6,
    }


def _divided(x: Tensor, power: float) -> Tensor:
    """Return x without its mean, over the variance to `power`."""
    return (x - x.mean(0)) / x.var(0, correction=0).pow(power)


def _eps_errors(layer: nn.Module, x: Tensor) -> dict[str, float]:
    """Compare where eps is added, on values whose variance is of its size."""
    small = (x - x.mean(0)) * 3e-3
    var = small.var(0, correction=0)
    found = layer(small)
    centred = small - small.mean(0)
    return {
        "eps_in_root": _largest(found - centred / (var + 1e-5).sqrt()),
        "eps_outside": _largest(found - centred / (var.sqrt() + 1e-5)),
    }


@torch.no_grad()
def _leak_of_places(layer: nn.Module, sentences: Tensor) -> float:
    """Return how much the other places change when the words of one place do."""
    changed = sentences.clone()
    changed[:, :, 0] = changed[:, :, 0] * 10 + 3
    return _largest((layer(changed) - layer(sentences))[:, :, 1:])


def _per_point_norms() -> Callable[[int], nn.Module]:
    """Build the norms of the three maps of the CNN, 8, 4 and 2 pixels wide, in turn."""
    sides = iter((8, 4, 2))

    def made(channels: int) -> nn.Module:
        side = next(sides)
        return PerActivationBatchNorm((channels, side, side))

    return made


def _error(y: Tensor, x: Tensor, dims: tuple[int, ...], correction: int = 0) -> float:
    mean = x.mean(dims, keepdim=True)
    var = x.var(dims, correction=correction, keepdim=True)
    return _largest(y - (x - mean) / (var + 1e-5).sqrt())


def _largest(error: Tensor) -> float:
    return error.abs().max().item()


@torch.no_grad()
def _superposition(layer: nn.Module, x: Tensor) -> float:
    """Return how far f(x + y) − f(0) is from the sum of f(x) − f(0) and f(y) − f(0)."""
    other, zero = x.flip(0) * 0.5, torch.zeros_like(x)
    base = layer(zero)
    both = layer(x + other) - base
    return _largest(both - (layer(x) - base) - (layer(other) - base))


def _gradient_error(layer: BatchNorm1d, x: Tensor) -> float:
    """Compare analytic gradients of weight and bias with central differences."""
    cotangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    worst = 0.0
    for vector in (layer.weight, layer.bias):
        layer.zero_grad()
        (layer(x) * cotangent).sum().backward()
        grad = vector.grad
        assert grad is not None
        with torch.no_grad():
            for i in range(len(vector)):
                sides = []
                for step in (1e-5, -2e-5):
                    vector[i] += step
                    sides.append((layer(x) * cotangent).sum().item())
                vector[i] += 1e-5
                slope = (sides[0] - sides[1]) / 2e-5
                worst = max(worst, abs(slope - grad[i].item()))
    return worst


@torch.no_grad()
def _leak(layer: nn.Module, words: Tensor) -> float:
    """Return how much the other words change when one word does."""
    changed = words.clone()
    changed[:, 0] = changed[:, 0] * 10 + 3
    return _largest(layer(changed)[:, 1:] - layer(words)[:, 1:])


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def column(name: str) -> list[float]:
        return [r["errors"][name] for r in results]

    def of(arm: str, name: str) -> list[float]:
        return [r["trained"][arm][name] for r in results]

    exact = 1e-9
    gap = rules.minus(of("per point", "accuracy"), of("per channel", "accuracy"))
    return [
        rules.verdict(
            "C13",
            rules.at_most("error against the biased variance", column("biased"), exact),
            rules.reported("error against the unbiased one", column("unbiased")),
        ),
        rules.verdict(
            "C27",
            rules.within(
                "size of a statistic / n",
                [r["share_of_n"] for r in results],
                1,
                1,
                about="shapes",
            ),
            rules.at_most(
                "superposition error in eval",
                column("superposition_eval"),
                exact,
                about="linear at inference",
            ),
            rules.at_most(
                "superposition error in training",
                column("superposition_train"),
                exact,
                about="linear in training",
            ),
        ),
        rules.verdict(
            "C30",
            rules.at_most(
                "weight and bias gradients against differences",
                column("gradient"),
                1e-7,
            ),
        ),
        rules.verdict(
            "C45",
            rules.at_most(
                "error, linear, over N", column("biased"), exact, about="linear"
            ),
            rules.at_most(
                "error, convolution, over N, H, W",
                column("conv"),
                exact,
                about="convolution",
            ),
        ),
        rules.verdict(
            "C46",
            rules.at_most("error, layer norm over features", column("layer"), exact),
            rules.at_most("error, instance norm over H, W", column("instance"), exact),
        ),
        rules.verdict(
            "C47",
            rules.at_most(
                "what is left after undoing eps", column("preprocess"), exact
            ),
        ),
        rules.verdict(
            "C54",
            rules.at_least(
                "change of the other words when one changes",
                column("other_words"),
                0.01,
            ),
            rules.reported(
                "the same for LayerNorm over (T, d)", column("other_words_joint")
            ),
        ),
        rules.verdict(
            "C58",
            rules.within(
                "size of the weight / C·H·W", [r["share_of_chw"] for r in results], 1, 1
            ),
            rules.reported(
                "accuracy per point − per channel, points", [100 * g for g in gap]
            ),
            rules.reported("parameters, per channel", of("per channel", "parameters")),
            rules.reported("parameters, per point", of("per point", "parameters")),
        ),
        rules.verdict(
            "C70",
            rules.at_most(
                "|deviation − 1| after dividing by the variance",
                column("by_variance"),
                exact,
            ),
            rules.reported(
                "the same, divided by the deviation", column("by_deviation")
            ),
        ),
        rules.verdict(
            "C75",
            rules.within(
                "numbers in Z / n, batch of 32",
                [r["share_of_z"] for r in results],
                1,
                1,
            ),
        ),
        rules.verdict(
            "C77",
            rules.at_most(
                "error against (x − mean)/(deviation + eps), variance near eps",
                column("eps_outside"),
                exact,
            ),
            rules.reported(
                "error against (x − mean)/√(variance + eps)", column("eps_in_root")
            ),
        ),
        rules.verdict(
            "C78",
            rules.at_most(
                "change of the words at other places when those at one do",
                [r["leaks"]["batch norm"] for r in results],
                exact,
            ),
            rules.reported(
                "the same for statistics of each place",
                [r["leaks"]["one per place"] for r in results],
            ),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw errors against the definitions, and the two kinds of statistics compared."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    names = {
        "biased": "batch,\nbiased",
        "unbiased": "batch,\nunbiased",
        "conv": "conv",
        "layer": "layer",
        "instance": "instance",
        "superposition_eval": "linear,\neval",
        "superposition_train": "linear,\ntraining",
        "other_words": "other\nwords",
    }
    floor = 1e-17
    rows = [[max(r["errors"][key], floor) for r in results] for key in names]
    bars(left, list(names.values()), rows, indices=[0] * len(rows))
    left.set(title="Largest error against the definition (float64)", yscale="log")
    left.set_ylim(floor, 10 ** math.ceil(math.log10(max(map(max, rows)) * 1.01)))
    arms = ("per channel", "per point")
    accuracies = [[100 * r["trained"][a]["accuracy"] for r in results] for a in arms]
    points(right, [a.replace(" ", "\n") for a in arms], accuracies, indices=(0, 1))
    right.set(title="Test accuracy", ylabel="%")


STUDY = Study(
    id="S12",
    title="shapes and definitions",
    question="Over which values is each normalization taken, and is it linear?",
    prediction="As the paper defines them; linear at inference and not in training.",
    seen="Bars are errors against written definitions, in float64: at 1e-15 they are "
    "rounding, at 1 another formula.",
    meaning="Which values share a mean and a variance is a definition, and can be read "
    "off by changing one value and looking what moves.",
    arms=("batch, layer and instance norm", "per channel against per point"),
    metric="Largest error in float64 against the written definitions; superposition "
    "error; how much other words change; accuracy of a small CNN.",
    criterion="An identity holds when its error is below 1e-9 (1e-7 against finite "
    "differences). C54 needs other words to change by 0.01, C58 C·H·W weights, C75 "
    "n numbers in Z, C78 no change at other places.",
    claims=(
        *("C13", "C27", "C30", "C45", "C46", "C47", "C54", "C58"),
        *("C70", "C75", "C77", "C78"),
    ),
    minutes=0.7,
    scales={
        "quick": Scale(2, {"steps": 60, "width": 8}),
        "cpu": Scale(10, {"steps": 100, "width": 8}),
        "gpu": Scale(5, {"steps": 400, "width": 16}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

"""S04: signals and gradients at the start, and which starts train."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.init import variance_recursion
from normkit.studies.data import Images
from normkit.studies.figure import band, color
from normkit.studies.replicas import ACTIVATIONS, Recipe, Replicas, stds_for
from normkit.studies.stack import propagate
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.verdict import (
    Verdict,
    at_least,
    at_most,
    minus,
    over,
    reported,
    verdict,
    within,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name, activation, standard deviation of the weights times the root of the fan.
STARTS = (
    ("tanh 0.01", "tanh", 0.01 * 64),
    ("tanh 0.05", "tanh", 0.05 * 64),
    ("tanh Xavier", "tanh", 1.0),
    ("linear Xavier", "identity", 1.0),
    ("relu Xavier", "relu", 1.0),
    ("relu Kaiming", "relu", math.sqrt(2)),
)
DEPTH = 6
_RATES = (0.01, 0.1, 0.5)
# The gains of a std of 0.01 and 0.05 at 4096 units, and Xavier's.
_GAINS = (0.64, 3.2, 1.0)


def measure(
    trial: Trial,
    *,
    units: int,
    batch: int,
    depths: tuple[int, ...],
    steps: int,
    width: int,
) -> Result:
    """Measure spread per layer forward and backward; accuracy by depth and start."""
    stack = _spread(trial, units, batch)
    images = trial.images("digits").flat().standardized()
    trained = {
        f"{depth} {norm or 'plain'}": _trained(trial, images, depth, width, norm, steps)
        for depth in depths
        for norm in ("", "batch")
    }
    return {
        "stack": stack,
        "trained": trained,
        "depths": list(depths),
        "cures": _cures(trial, images, width, steps),
        "symmetry": _symmetry(trial, images, steps=min(steps, 200)),
    }


def _spread(trial: Trial, units: int, batch: int) -> dict[str, dict]:
    """Run the same normal weights at each scale, forward and back."""
    generator = trial.generator(1)
    x = torch.randn(batch, units, generator=generator).to(trial.device)
    draws = [
        torch.randn(units, units, generator=generator)
        .div_(math.sqrt(units))
        .to(trial.device)
        for _ in range(DEPTH)
    ]
    cotangent = torch.randn(batch, units, generator=generator).to(trial.device)
    found = {}
    for name, activation, gain in STARTS:
        act = ACTIVATIONS[activation]
        passed = propagate(x, draws, act, cotangent, gain=gain)
        outputs = passed.outputs
        key = "linear" if activation == "identity" else activation
        theory = variance_recursion([gain**2] * DEPTH, key)
        found[name] = {
            "std": [h.std().item() for h in outputs],
            "rms": [h.square().mean().sqrt().item() for h in outputs],
            "theory": [math.sqrt(signal.after) for signal in theory],
            "saturated": [(h.abs() > 0.99).float().mean().item() for h in outputs],
            "mean_over_std": (outputs[-1].mean() / outputs[-1].std()).item(),
            "weight_grads": passed.weight_grads,
            "input_grads": [g.std().item() for g in passed.input_grads],
            "histogram": torch.histc(outputs[-1].cpu(), 41, -1.025, 1.025).tolist(),
        }
    return found


def _trained(
    trial: Trial, images: Images, depth: int, width: int, norm: str, steps: int
) -> dict[str, float]:
    """Return the test accuracy of each start at its best rate, tanh."""
    widths = (images.x_train.shape[1], *[width] * depth, images.classes)
    stds = torch.stack([stds_for(widths, gain) for gain in _GAINS])
    nets = Replicas(
        Recipe(widths, "tanh", norm),
        stds.repeat_interleave(len(_RATES), 0),
        trial.generator(2),
        device=trial.device,
    )
    best = _best_accuracy(
        trial, nets, images, torch.tensor(_RATES).repeat(len(_GAINS)), steps
    )
    names = ("0.01", "0.05", "Xavier")
    table = torch.tensor(best).view(len(_GAINS), len(_RATES)).amax(1).tolist()
    return dict(zip(names, table, strict=True))


def _best_accuracy(
    trial: Trial, nets: Replicas, images: Images, rates: Tensor, steps: int
) -> list[float]:
    rates = rates.to(trial.device)
    for rows in images.batches(60, steps, trial.generator(3)):
        nets.step(images.x_train[rows], images.y_train[rows], rates)
    with nets.population(images.x_train):
        return nets.accuracy(images.x_test, images.y_test)


def _cures(trial: Trial, images: Images, width: int, steps: int) -> dict[str, float]:
    """Train a six-layer sigmoid stack with small weights, with each cure on its own."""
    widths = (images.x_train.shape[1], *[width] * 6, images.classes)
    rates = torch.tensor([0.001, 0.01, 0.1, 0.5, 2.0])
    arms = {
        "none": ("sigmoid", 1.0, ""),
        "ReLU": ("relu", 1.0, ""),
        # 4 because the slope of the sigmoid at 0 is 1/4.
        "better init": ("sigmoid", 4.0, ""),
        "batch norm": ("sigmoid", 1.0, "batch"),
    }
    found = {}
    for name, (activation, gain, norm) in arms.items():
        stds = stds_for(widths, gain).expand(len(rates), -1)
        nets = Replicas(
            Recipe(widths, activation, norm),
            stds,
            trial.generator(2),
            device=trial.device,
        )
        hits = _best_accuracy(trial, nets, images, rates, steps)
        found[name] = max(hits)
        if name == "none":
            found["small rate"] = max(hits[:2])
    return found


def _symmetry(trial: Trial, images: Images, *, steps: int) -> dict[str, float]:
    """Measure how far training separates the units of a layer of constant weights."""
    widths = (images.x_train.shape[1], 32, 32, images.classes)
    nets = Replicas(
        Recipe(widths, "tanh"), torch.ones(2), trial.generator(), device=trial.device
    )
    with torch.no_grad():
        for weight in nets.weights:
            weight.copy_(torch.tensor([0.05, 0.0]).view(2, 1, 1).expand_as(weight))
        zero = nets(images.x_train[:100])[1].abs().max().item()
    rates = torch.full((2,), 0.1, device=trial.device)
    for rows in images.batches(60, steps, trial.generator(3)):
        nets.step(images.x_train[rows], images.y_train[rows], rates)
    apart = max((w - w[:, :, :1]).abs().max().item() for w in nets.weights[:-1])
    hits = nets.accuracy(images.x_test, images.y_test)
    return {"apart": apart, "zero_output": zero, "constant": hits[0], "zeros": hits[1]}


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""

    def layer(start: str, key: str, index: int) -> list[float]:
        return [r["stack"][start][key][index] for r in results]

    def ratio(start: str, key: str) -> list[float]:
        """Return first layer over last."""
        rows = [r["stack"][start][key] for r in results]
        return [row[0] / row[-1] for row in rows]

    def trained(depth: int, norm: str, start: str) -> list[float]:
        return [100 * r["trained"][f"{depth} {norm}"][start] for r in results]

    def cure(name: str) -> list[float]:
        return [100 * r["cures"][name] for r in results]

    depths = results[0]["depths"]
    shallow, deep = depths[0], depths[-1]

    def lost(start: str, norm: str = "plain") -> list[float]:
        return minus(trained(shallow, norm, start), trained(deep, norm, start))

    against = [
        [v for s in r["stack"].values() for v in over(s["rms"], s["theory"])]
        for r in results
    ]
    worst = [max(abs(ratio - 1) for ratio in row) for row in against]
    return [
        verdict(
            "C3",
            at_least(
                f"points lost from {shallow} to {deep} layers, n·Var[w] = 0.41",
                lost("0.01"),
                40,
                none=0,
            ),
            at_least("the same, Xavier", lost("Xavier"), 2, none=0),
            reported("the same with batch norm, 0.01", lost("0.01", "batch")),
            note="Depth alone does little at a good start.",
        ),
        verdict(
            "C23",
            at_least(
                "std of layer 6 / layer 1, std 0.05",
                [1 / v for v in ratio("tanh 0.05", "std")],
                0.9,
            ),
            at_least(
                "share of |h| > 0.99 in layer 6, std 0.05",
                layer("tanh 0.05", "saturated", -1),
                0.25,
                none=0.05,
            ),
            at_least(
                "std of layer 6 / layer 1, std 0.01",
                [1 / v for v in ratio("tanh 0.01", "std")],
                0.9,
            ),
            note="True for n·Var[w] above 1, the opposite below.",
        ),
        verdict(
            "C24",
            reported("six sigmoid layers, small weights, best rate, %", cure("none")),
            at_least("ReLU, %", cure("ReLU"), 90, none=50),
            at_least("better initial weights, %", cure("better init"), 90, none=50),
            at_least("small rate (≤ 0.01), %", cure("small rate"), 90, none=50),
            reported("batch norm, %", cure("batch norm")),
        ),
        verdict(
            "C38",
            at_most(
                "difference of units after training from constants",
                [r["symmetry"]["apart"] for r in results],
                0,
            ),
            at_most(
                "output of a net of zeros",
                [r["symmetry"]["zero_output"] for r in results],
                0,
            ),
            reported(
                "test accuracy from constants",
                [r["symmetry"]["constant"] for r in results],
            ),
        ),
        verdict(
            "C39",
            at_most("std of layer 6", layer("tanh 0.01", "std", -1), 0.06, none=0.5),
            at_most("‖dW1‖/‖dW6‖", ratio("tanh 0.01", "weight_grads"), 0.1, none=0.5),
            at_most(
                f"accuracy at {shallow} layers, best rate, %",
                trained(shallow, "plain", "0.01"),
                50,
                none=90,
            ),
            reported(f"accuracy at {deep} layers, %", trained(deep, "plain", "0.01")),
        ),
        verdict(
            "C40",
            at_least(
                "share of |h| > 0.99 in layer 6",
                layer("tanh 0.05", "saturated", -1),
                0.25,
                none=0.05,
            ),
            at_most("‖dW1‖/‖dW6‖", ratio("tanh 0.05", "weight_grads"), 0.1, none=0.5),
            at_most(
                f"accuracy at {shallow} layers, best rate, %",
                trained(shallow, "plain", "0.05"),
                50,
                none=90,
            ),
            reported(f"accuracy at {deep} layers, %", trained(deep, "plain", "0.05")),
        ),
        verdict(
            "C41",
            within(
                "std of layer 6 / layer 1, linear",
                [1 / v for v in ratio("linear Xavier", "std")],
                0.9,
                1.1,
            ),
            within(
                "the same, tanh", [1 / v for v in ratio("tanh Xavier", "std")], 0.9, 1.1
            ),
            within(
                "gradient std of layer 1 / layer 6, linear",
                ratio("linear Xavier", "input_grads"),
                0.9,
                1.1,
            ),
            within("the same, tanh", ratio("tanh Xavier", "input_grads"), 0.9, 1.1),
        ),
        verdict(
            "C42",
            at_most(
                "largest error of the variance recursion, any layer and start",
                worst,
                0.05,
                none=0.5,
            ),
            reported("measured over calculated", [v for row in against for v in row]),
        ),
        verdict(
            "C43",
            at_most(
                "std of layer 6 / layer 1, ReLU, Xavier",
                [1 / v for v in ratio("relu Xavier", "std")],
                0.25,
                none=0.8,
            ),
            within(
                "the same, Kaiming",
                [1 / v for v in ratio("relu Kaiming", "std")],
                0.85,
                1.15,
            ),
        ),
        verdict(
            "C44",
            at_most(
                "|mean| / std of the last layer, ReLU, Kaiming",
                [abs(r["stack"]["relu Kaiming"]["mean_over_std"]) for r in results],
                0.1,
                none=0.4,
            ),
            at_least("yet its six layers train, %", cure("ReLU"), 90, none=50),
            note="ReLU breaks the rule of zero mean and trains: helpful, not "
            "a needed one.",
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw spread and gradients per layer, and accuracy by depth."""
    axes = figure.subplots(1, 3)
    layers = range(1, DEPTH + 1)
    for i, (name, _, _) in enumerate(STARTS):
        stacks = [r["stack"][name] for r in results]
        band(axes[0], layers, [s["std"] for s in stacks], label=name, index=i)
        if name.startswith("tanh"):
            # rms = std there: the theory's line lies on it.
            axes[0].plot(layers, stacks[0]["theory"], "x", color=color(i), ms=4)
        if not name.startswith("linear"):
            rows = [
                [g / s["weight_grads"][-1] for g in s["weight_grads"]] for s in stacks
            ]
            band(axes[1], layers, rows, index=i)
    axes[0].set(title="Std of activations (×: theory)", xlabel="layer", yscale="log")
    axes[1].set(title="‖dW‖ relative to layer 6", xlabel="layer", yscale="log")
    depths = results[0]["depths"]
    for i, start in enumerate(("0.01", "0.05", "Xavier")):
        for norm, dashed in (("plain", False), ("batch", True)):
            rows = [
                [100 * r["trained"][f"{d} {norm}"][start] for d in depths]
                for r in results
            ]
            band(axes[2], depths, rows, index=i, dashed=dashed)
    axes[2].plot([], [], "k--", label="with batch norm")
    axes[2].set(
        title="Test accuracy, best rate",
        xlabel="layers (tanh)",
        ylabel="%",
        ylim=(0, 102),
    )
    axes[2].set_xticks(depths)
    figure.legend(loc="outside lower center", ncols=7, columnspacing=1)


STUDY = Study(
    id="S04",
    title="initial weights",
    question="What do initial weights do to signals and gradients, and which train?",
    prediction="Small weights let both vanish, larger ones saturate, Xavier keeps the "
    "variance, Kaiming does so for ReLU; bad starts do not train.",
    arms=(
        "std 0.01, 0.05, Xavier, Kaiming",
        "tanh, ReLU, linear",
        "depths",
        "plain and batch norm",
    ),
    metric="Std of activations and gradients over six layers of 4096 units, against "
    "the variance recursion; test accuracy on the digits at the best of three rates, "
    "with n·Var[w] as at 4096 units.",
    criterion="C42: the recursion is right to 5 % at every layer of every start. C39, "
    "C40: forward as stated, ‖dW1‖/‖dW6‖ below 0.1, and six layers below 50 %. C41, "
    "C43: flat means within 10 % (15 % for Kaiming) over the layers. C3: depth "
    "costs 40 points off the critical start, 2 at Xavier. C24: each cure reaches 90 %.",
    claims=("C3", "C23", "C24", "C38", "C39", "C40", "C41", "C42", "C43", "C44"),
    minutes=5,
    scales={
        "quick": Scale(
            2, {"units": 1024, "batch": 64, "depths": (6, 12), "steps": 60, "width": 32}
        ),
        "cpu": Scale(
            5,
            {"units": 4096, "batch": 64, "depths": (6, 20), "steps": 240, "width": 48},
        ),
        "gpu": Scale(
            5,
            {
                "units": 4096,
                "batch": 512,
                "depths": (6, 20, 50, 100),
                "steps": 3000,
                "width": 200,
            },
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

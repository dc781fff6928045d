"""S17: how a small change of the weights grows on its way through a deep net."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.studies import verdict as rules
from normkit.studies.figure import band
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name, activation, gain √(n·Var[w]), norm.
_ARMS = (
    ("tanh, gain 0.64", "tanh", 0.64, ""),
    ("tanh, gain 1", "tanh", 1.0, ""),
    ("tanh, gain 3.2", "tanh", 3.2, ""),
    ("relu, gain √2", "relu", 2**0.5, ""),
    ("relu, gain 3.2", "relu", 3.2, ""),
    ("tanh, batch norm", "tanh", 3.2, "batch"),
    ("relu, batch norm", "relu", 3.2, "batch"),
)
_CHANGE = 0.01


def measure(trial: Trial, *, depth: int, width: int, batch: int) -> Result:
    """Change all weights of the first layer by 1 % and follow it through the layers."""
    images = trial.images("digits").flat().standardized()
    x = images.x_train[:batch]
    widths = (x.shape[1], *[width] * depth, 10)
    y = images.y_train[:batch]
    moved = torch.randn(x.shape, generator=trial.generator(3)).to(x.device)
    moved = x + _CHANGE * moved * x.std()
    changes, sizes, amplified = {}, {}, {}
    for name, activation, gain, norm in _ARMS:
        nets = Replicas(
            Recipe(widths, activation, norm),
            stds_for(widths, gain)[None],
            trial.generator(1),
            device=trial.device,
        )
        before: list[Tensor] = []
        after: list[Tensor] = []
        with torch.no_grad():
            amplified[name] = _amplified(nets, x, moved, y)
            nets(x, before)
            first = nets.weights[0]
            noise = torch.randn(first.shape, generator=trial.generator(2)).to(
                first.device
            )
            first += _CHANGE * noise * first.std()
            nets(x, after)
        changes[name] = [
            ((b - a).norm() / a.norm()).item()
            for a, b in zip(before, after, strict=True)
        ]
        sizes[name] = [a.square().mean().sqrt().item() for a in before]
    return {
        "depth": depth,
        "changes": changes,
        "sizes": sizes,
        "amplified": amplified,
    }


def _amplified(nets: Replicas, x: Tensor, moved: Tensor, y: Tensor) -> float:
    """Return the relative change of a sample's loss over that of its input.

    The mean over the samples, of their losses' absolute changes.
    """
    losses = [
        torch.nn.functional.cross_entropy(nets(seen)[0], y, reduction="none")
        for seen in (x, moved)
    ]
    change = (losses[1] - losses[0]).abs().mean() / losses[0].mean()
    return (change / _CHANGE).item()


def _per_layer(changes: list[float]) -> float:
    """Return the factor by which the relative change grows from one layer to the next.

    Over the part below 0.3: a change as large as the signal cannot grow.
    """
    rising = [c for c in changes if c < 0.3]
    span = max(len(rising) - 1, 1)
    return (rising[-1] / rising[0]) ** (1 / span)


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def growth(arm: str) -> list[float]:
        return [_per_layer(r["changes"][arm]) for r in results]

    def less(act: str) -> list[float]:
        return rules.over(growth(f"{act}, gain 3.2"), growth(f"{act}, batch norm"))

    return [
        rules.verdict(
            "C22",
            rules.at_least(
                "growth of a relative change per layer, tanh, gain 3.2",
                growth("tanh, gain 3.2"),
                1.05,
                none=1,
                about="tanh, gain 3.2",
            ),
            rules.at_least(
                "tanh, gain 1",
                growth("tanh, gain 1"),
                1.05,
                none=1,
                about="tanh, gain 1",
            ),
            rules.at_least(
                "relu, gain 3.2",
                growth("relu, gain 3.2"),
                1.05,
                none=1,
                about="ReLU",
            ),
            rules.reported("tanh, gain 0.64", growth("tanh, gain 0.64")),
            rules.reported("relu, gain √2", growth("relu, gain √2")),
        ),
        rules.verdict(
            "C32",
            rules.at_most(
                "growth per layer with batch norm, tanh",
                growth("tanh, batch norm"),
                1.02,
                none=1.1,
                about="no growth, tanh",
            ),
            rules.at_most(
                "growth per layer with batch norm, relu",
                growth("relu, batch norm"),
                1.02,
                none=1.1,
                about="no growth, relu",
            ),
            rules.at_least(
                "growth, plain / batch norm at the same weights, tanh",
                less("tanh"),
                1.05,
                none=1,
                about="less than plain, tanh",
            ),
            rules.at_least(
                "growth, the same, relu",
                less("relu"),
                1.05,
                none=1,
                about="less than plain, relu",
            ),
            note="Of changes at the start of training. What batch norm does to the "
            "largest working rate is S03.",
        ),
        rules.verdict(
            "C67",
            *(
                rules.at_least(
                    f"relative change of the loss / of the input, {arm}",
                    [r["amplified"][arm] for r in results],
                    5,
                    none=1,
                    about=arm,
                )
                for arm in ("tanh, gain 1", "tanh, gain 3.2", "relu, gain √2")
            ),
            *(
                rules.reported(
                    f"the same, {arm}", [r["amplified"][arm] for r in results]
                )
                for arm in ("tanh, batch norm", "relu, batch norm")
            ),
            note="Of each sample's loss, at the start of training. 1 is no growth.",
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw the relative change, layer by layer."""
    left, right = figure.subplots(1, 2)
    layers = range(1, results[0]["depth"] + 1)
    for i, (name, activation, _, norm) in enumerate(_ARMS):
        rows = [r["changes"][name] for r in results]
        axes = left if activation == "tanh" else right
        band(axes, layers, rows, label=name, index=i, dashed=bool(norm))
    # The plain ReLU nets scale with the gain: one curve, drawn inside the other.
    right.lines[0].set_linewidth(4)
    for axes, act in ((left, "tanh"), (right, "relu")):
        axes.set(
            title=f"Relative change of pre-activations, {act}",
            yscale="log",
            xlabel="layer",
            ylim=(1e-3, 3),
        )
        axes.legend(loc="lower center", ncols=2)


STUDY = Study(
    id="S17",
    title="changes through depth",
    question="Do small changes of the parameters grow with depth, and does batch norm "
    "stop that?",
    prediction="They grow in every plain net and do not with batch norm.",
    seen="The weights of the first layer are changed by 1 %; lines follow the relative "
    "change from layer to layer. Where weights are large (gain 3.2) and tanh bends it "
    "grows until it is as large as the signal. With batch norm it grows, too, dashed.",
    meaning="Small changes grow in a net that is too strongly coupled, keep their size "
    "at the critical gain, and grow slowly through batch norm at the start of "
    "training. Batch norm does not stop amplification; it makes its strength "
    "independent of the weights' scale.",
    arms=tuple(arm[0] for arm in _ARMS),
    metric="Relative change of each layer's pre-activations when the first layer's "
    "weights change by 1 %; its factor per layer, where the change is below 0.3.",
    criterion="C22: a factor of at least 1.05 per layer, 1 is none. C32: at most 1.02 "
    "with batch norm (from 1.1 refuted), and 1.05 times less than without. C67: "
    "the loss changes by five times the relative change of the input, 1 is no growth.",
    claims=("C22", "C32", "C67"),
    minutes=0.2,
    scales={
        "quick": Scale(2, {"depth": 10, "width": 64, "batch": 64}),
        "cpu": Scale(10, {"depth": 30, "width": 128, "batch": 128}),
        "gpu": Scale(20, {"depth": 100, "width": 512, "batch": 512}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

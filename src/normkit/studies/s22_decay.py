"""S22: weight decay with batch norm: the effective rate, and γ as the regularizer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.studies import verdict as rules
from normkit.studies.data import Images
from normkit.studies.figure import band, points
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.selection import edges, pick
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the weights that batch norm follows.
_DECAY = 0.01
_RATE = 0.3
# Of the loss by Σ γ², in the arm with the statistics of all images.
_GAMMA_DECAYS = (0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_FEW = 200


def measure(trial: Trial, *, steps: int, few_steps: int, hidden: int) -> Result:
    """Train with decay, without, and with its norms alone; then with decay of γ."""
    images = trial.images("digits").flat().standardized()
    return {
        "effective": _effective(trial, images, steps, hidden),
        "scale": _scale_identity(trial, images, hidden),
        "gamma": _gamma(trial, few_steps, hidden),
    }


def _net(trial: Trial, images: Images, hidden: int, count: int) -> Replicas:
    widths = (images.x_train.shape[1], hidden, hidden, images.classes)
    return Replicas(
        Recipe(widths, "relu", "batch"),
        stds_for(widths, math.sqrt(2)).expand(count, -1),
        trial.generator(2),
        device=trial.device,
    )


def _scale_identity(trial: Trial, images: Images, hidden: int) -> dict[str, float]:
    """Multiply a layer before batch norm by 4: what becomes of output and gradient."""
    x, y = images.x_train[:100], images.y_train[:100]
    nets = _net(trial, images, hidden, 1)
    output, grad = nets(x).detach(), nets.gradients(x, y)[1]
    with torch.no_grad():
        nets.weights[1] *= 4
        nets.biases[1] *= 4
    after, small = nets(x).detach(), nets.gradients(x, y)[1]
    return {
        "output": ((after - output).norm() / output.norm()).item(),
        "gradient": ((4 * small - grad).norm() / grad.norm()).item(),
    }


def _effective(
    trial: Trial, images: Images, steps: int, hidden: int
) -> dict[str, list[float]]:
    """Compare decay with its effect on the norms of the weights alone.

    Network 0 trains without decay, 1 with it, 2 without but with each weight before a
    batch norm set to the norm that network 1 has: the same effective rate, rate/‖w‖².
    """
    nets = _net(trial, images, hidden, 3)
    normed = nets.weights[:-1]
    rates = torch.full((3,), _RATE, device=trial.device)
    start = [w[0].norm().item() for w in normed]
    seen: dict[str, list[float]] = {"none": [], "decay": [], "validation": []}
    for rows in images.batches(60, steps, trial.generator(1)):
        nets.step(images.x_train[rows], images.y_train[rows], rates)
        with torch.no_grad():
            for weight in normed:
                weight[1] *= 1 - _RATE * _DECAY
                weight[2] *= weight[1].norm() / weight[2].norm()
        for i, name in enumerate(("none", "decay")):
            seen[name].append(normed[0][i].norm().item() / start[0])
    with nets.population(images.x_train):
        seen["accuracy"] = [
            100 * v for v in nets.accuracy(images.x_test, images.y_test)
        ]
        nets.training = False
        with torch.no_grad():
            logits = nets(images.x_test)
    apart = (logits[2] - logits[1]).norm() / logits[1].norm()
    without = (logits[0] - logits[1]).norm() / logits[1].norm()
    return {
        "accuracy": seen["accuracy"],
        "none": seen["none"][:: max(1, steps // 40)],
        "decay": seen["decay"][:: max(1, steps // 40)],
        "apart": [apart.item(), without.item()],
    }


def _gamma(trial: Trial, steps: int, hidden: int) -> dict[str, list[float]]:
    """Train on few images: statistics of batches, or of all images with decay of γ."""
    few = trial.images("digits", train=_FEW).flat().standardized()
    splits = {
        "validation": (few.x_val, few.y_val),
        "test": (few.x_test, few.y_test),
    }
    arms = {"batch": (0.0,), "all": _GAMMA_DECAYS}
    found: dict[str, list[float]] = {}
    for arm, decays in arms.items():
        nets = _net(trial, few, hidden, len(decays))
        shrink = torch.tensor(decays, device=trial.device).view(-1, 1, 1)
        for rows in few.batches(20, steps, trial.generator(3)):
            _gamma_step(nets, few, rows, shrink, whole=arm == "all")
        with nets.population(few.x_train):
            for split, (x, y) in splits.items():
                found[f"{arm} {split}"] = [100 * v for v in nets.accuracy(x, y)]
    return found


def _gamma_step(
    nets: Replicas, few: Images, rows: Tensor, shrink: Tensor, *, whole: bool
) -> None:
    """Take a step on a batch, normalized by itself or by all images."""
    x, y = few.x_train[rows], few.y_train[rows]
    logits = nets(few.x_train)[:, rows] if whole else nets(x)
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), y.repeat(nets.count), reduction="none"
    )
    loss = flat.view(nets.count, -1).mean(1).sum()
    loss = loss + sum((shrink * g.square()).sum() for g in nets.gains)
    grads = torch.autograd.grad(loss, nets.parameters)
    with torch.no_grad():
        for p, g in zip(nets.parameters, grads, strict=True):
            p -= 0.1 * g


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def effective(index: int) -> list[float]:
        return [r["effective"]["accuracy"][index] for r in results]

    chosen = pick([r["gamma"]["all validation"] for r in results], _GAMMA_DECAYS)
    batch = [r["gamma"]["batch test"][0] for r in results]
    whole = [r["gamma"]["all test"] for r in results]
    decayed = [row[chosen.index] for row in whole]
    bare = [row[0] for row in whole]
    # Without decay is the lower edge, and a result: decay of γ does not help.
    reason = edges({"decay of γ": chosen}) if chosen.index else ""
    return [
        rules.verdict(
            "C84",
            rules.at_least(
                "test accuracy, statistics of batches − of all images, points",
                rules.minus(batch, bare),
                1,
                none=0,
                about="the statistics of batches regularize",
            ),
            rules.at_least(
                "what decay of γ adds to statistics of all images, points",
                rules.minus(decayed, bare),
                1,
                none=0,
                about="decay of γ regularizes",
                unless=reason,
            ),
            rules.at_most(
                "statistics of batches − of all with decay of γ, points",
                rules.minus(batch, decayed),
                1,
                none=3,
                about="decay of γ does as well",
                unless=reason,
            ),
        ),
        rules.verdict(
            "C87",
            rules.at_most(
                "relative error of the output after a weight ×4",
                [r["scale"]["output"] for r in results],
                1e-4,
                about="the scale of a weight is not seen",
            ),
            rules.at_most(
                "relative error of gradient = 1/4 then",
                [r["scale"]["gradient"] for r in results],
                1e-3,
                about="the effective rate is rate/‖w‖²",
            ),
            rules.at_least(
                "‖w‖ at the end / at the start, without decay",
                [r["effective"]["none"][-1] for r in results],
                1.2,
                none=1,
                about="without decay the norm grows",
            ),
            rules.at_most(
                "relative distance of outputs, decay against its norms alone",
                [r["effective"]["apart"][0] for r in results],
                0.05,
                none=0.3,
                about="decay acts through the norm alone",
            ),
            rules.reported(
                "the same, decay against none",
                [r["effective"]["apart"][1] for r in results],
            ),
            rules.reported(
                "test accuracy, decay − none, points",
                rules.minus(effective(1), effective(0)),
            ),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw the norm of a weight over training, and accuracy by decay of γ."""
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(("none", "decay")):
        rows = [r["effective"][name] for r in results]
        label = "without decay" if name == "none" else "with decay"
        band(left, range(len(rows[0])), rows, label=label, index=i)
    left.set(title="‖w‖ of the first layer / at the start")
    left.set_xlabel("40ths of the training")
    left.legend()
    names = ["batch", *(f"{d:g}" for d in _GAMMA_DECAYS)]
    rows = [[r["gamma"]["batch test"][0] for r in results]] + [
        [r["gamma"]["all test"][k] for r in results] for k in range(len(_GAMMA_DECAYS))
    ]
    points(right, names, rows, indices=(0, *[1] * len(_GAMMA_DECAYS)))
    right.set(title="Test accuracy by decay of γ", ylabel="%")
    right.tick_params(axis="x", labelsize=5.5)


STUDY = Study(
    id="S22",
    title="weight decay",
    question="What does weight decay do to a layer that batch norm follows, and is "
    "batch norm itself a decay of γ?",
    prediction="Decay acts through the norm of the weights alone; the statistics of "
    "batches regularize as decay of γ does.",
    seen="Left: without decay the weights before batch norm keep their norm or grow, "
    "with decay they shrink. Right: accuracy on few images, normalized by batches "
    "(first), and by all images with more and more decay of γ, batch norm's weight.",
    meaning="Batch norm does not see the scale of the weight before it, so decay "
    "changes nothing but the size of the effective step, rate over squared norm: a net "
    "that is given only the norms of the decayed one follows it exactly.",
    arms=("no decay", "decay", "no decay, norms of the decayed", "decay of γ"),
    metric="Output and gradient after a weight is multiplied by 4; norm of a weight; "
    "relative distance of the outputs on the test images; test accuracy after training "
    "on 200 digits normalized by batches of 20 or by all, with decay of γ chosen on "
    "validation.",
    criterion="C87: errors below 1e-4 and 1e-3, a norm that grows 1.2 times without "
    "decay, outputs within 5 % (0.3 refutes). C84: batches a point better than all "
    "images, decay of γ a point better than none, and at most a point (3 refute) "
    "behind batches.",
    claims=("C84", "C87"),
    minutes=1,
    scales={
        "quick": Scale(2, {"steps": 60, "few_steps": 60, "hidden": 32}),
        "cpu": Scale(10, {"steps": 400, "few_steps": 300, "hidden": 48}),
        "gpu": Scale(20, {"steps": 10_000, "few_steps": 5000, "hidden": 256}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

"""S20: large gradients or a smooth loss: why batch norm is fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.studies import verdict as rules
from normkit.studies.data import Images
from normkit.studies.figure import band
from normkit.studies.replicas import Recipe, Replicas
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATE = 0.5
# Distances along the gradient, as multiples of the learning rate.
_STRIDES = (0.5, 1.0, 2.0, 4.0)


def measure(trial: Trial, *, data: str, steps: int, hidden: int, looks: int) -> Result:
    """Measure gradients and the loss along them; train a plain net with large steps."""
    images = trial.images(data, train=20_000, val=1, test=2000).flat()
    widths = (images.x_train.shape[1], hidden, hidden, hidden, images.classes)
    batches = images.batches(60, steps, trial.generator(1))
    at = [round(steps * (i / looks) ** 2) for i in range(looks)]
    arms = {}
    for arm, norm in (("plain", ""), ("batch norm", "batch")):
        nets = _nets(trial, widths, norm)
        arms[arm] = _train(nets, images, batches, torch.tensor([_RATE]), set(at))
    sizes = [torch.tensor(arms[arm]["early"]) for arm in ("batch norm", "plain")]
    boost = sizes[0] / sizes[1]  # per layer
    nets = _nets(trial, widths, "")
    large = _train(nets, images, batches, _RATE * boost[None], set(at))
    return {
        "data": images.name,
        "at": sorted(set(at)),
        "arms": {**arms, "plain, steps as large": large},
        "boost": boost.tolist(),
    }


def _nets(trial: Trial, widths: tuple[int, ...], norm: str) -> Replicas:
    return Replicas(
        Recipe(widths, "sigmoid", norm),
        torch.tensor([0.1]),
        trial.generator(2),
        device=trial.device,
    )


def _train(
    nets: Replicas, images: Images, batches: Tensor, rates: Tensor, at: set[int]
) -> dict[str, list]:
    rates = rates.to(batches.device)
    layers = len(nets.weights)
    early: list[list[float]] = []
    curves: dict[str, list[float]] = {
        key: []
        for key in ("loss_range", "gradient_range", "smoothness", "accuracy", "loss")
    }
    for step, rows in enumerate(batches):
        x, y = images.x_train[rows], images.y_train[rows]
        if step in at:
            for key, value in _landscape(nets, x, y).items():
                curves[key].append(value)
            with nets.population(images.x_train[:2000]):
                hits = nets.accuracy(images.x_test, images.y_test)
            curves["accuracy"].append(hits[0])
        grads = nets.step(x, y, rates)
        curves["loss"].append(nets.last_losses[0].item())
        if step < 20:
            early.append([g.norm().item() for g in grads[:layers]])
    with nets.population(images.x_train[:2000]):
        final = nets.accuracy(images.x_test, images.y_test)[0]
    # Of the training loss, the mean of tenths of the run: short enough for the record.
    losses = torch.tensor(curves["loss"]).nan_to_num(10.0)
    return {
        **curves,
        "loss": [part.mean().item() for part in losses.tensor_split(10)],
        "early": torch.tensor(early).median(0).values.tolist(),
        "final": [final],
    }


def _landscape(nets: Replicas, x: Tensor, y: Tensor) -> dict[str, float]:
    """Return the loss's range along the gradient, and the gradient's change there."""
    training_state = [(m.clone(), v.clone()) for m, v in nets.running]
    grads = nets.gradients(x, y)
    losses, distances, slopes = [], [], []
    whole = torch.cat([g.flatten() for g in grads])
    for stride in _STRIDES:
        with torch.no_grad():
            for p, g in zip(nets.parameters, grads, strict=True):
                p -= stride * _RATE * g
        moved = nets.gradients(x, y)
        losses.append(nets.last_losses[0].item())
        with torch.no_grad():
            for p, g in zip(nets.parameters, grads, strict=True):
                p += stride * _RATE * g
        apart = (torch.cat([g.flatten() for g in moved]) - whole).norm()
        distances.append((apart / whole.norm()).item())
        slopes.append((apart / (stride * _RATE * whole.norm())).item())
    for (mean, var), (old_mean, old_var) in zip(
        nets.running, training_state, strict=True
    ):
        mean.copy_(old_mean)
        var.copy_(old_var)
    return {
        "loss_range": max(losses) - min(losses),
        "gradient_range": max(distances),
        "smoothness": max(slopes),
    }


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def early(arm: str, layer: int) -> list[float]:
        return [r["arms"][arm]["early"][layer] for r in results]

    def ratio(key: str) -> list[float]:
        """Return plain over batch norm, median over the run."""
        found = []
        for r in results:
            plain, full = (
                torch.tensor(r["arms"][arm][key]).median().item()
                for arm in ("plain", "batch norm")
            )
            found.append(plain / max(full, 1e-12))
        return found

    def final(arm: str) -> list[float]:
        return [100 * r["arms"][arm]["final"][0] for r in results]

    def half(arm: str) -> list[float]:
        """Return the mean loss over the second tenth of the run: how fast it starts."""
        return [r["arms"][arm]["loss"][1] for r in results]

    larger = rules.over(early("batch norm", 0), early("plain", 0))
    boost = rules.at_least(
        "early ‖dW1‖, batch norm / plain",
        larger,
        10,
        none=1,
        about="large gradients",
    )
    behind = rules.over(half("plain, steps as large"), half("batch norm"))
    return [
        rules.verdict(
            "C17",
            boost,
            rules.at_most(
                "early loss, plain with steps as large / batch norm",
                behind,
                1.2,
                none=2,
                about="large steps alone start as fast",
            ),
            rules.at_least(
                "final accuracy, plain with steps as large − batch norm, points",
                rules.minus(final("plain, steps as large"), final("batch norm")),
                0,
                about="large steps alone end as high",
            ),
            rules.reported(
                "early loss, plain / batch norm",
                rules.over(half("plain"), half("batch norm")),
            ),
            rules.reported(
                "final accuracy, plain with steps as large, %",
                final("plain, steps as large"),
            ),
            rules.reported("final accuracy, batch norm, %", final("batch norm")),
            rules.reported(
                "relative change of the gradient along a step, plain / batch norm",
                ratio("gradient_range"),
            ),
            rules.reported(
                "largest slope of the gradient, plain / batch norm", ratio("smoothness")
            ),
            note="If large gradients are the reason, a plain net whose layers take "
            "steps as large is as fast.",
        ),
        rules.verdict(
            "C51",
            boost,
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw gradient norms, the loss with large steps, and the gradient's change."""
    axes = figure.subplots(1, 3)
    layers = range(1, 5)
    arms = tuple(results[0]["arms"])
    for i, arm in enumerate(arms):
        if i < 2:
            band(
                axes[0],
                layers,
                [r["arms"][arm]["early"] for r in results],
                label=arm,
                index=i,
            )
            rows = [r["arms"][arm]["gradient_range"] for r in results]
            band(axes[2], results[0]["at"], rows, label=arm, index=i)
        tenths = [r["arms"][arm]["loss"] for r in results]
        band(axes[1], range(1, 11), tenths, label=arm, index=i)
    axes[0].set(title="‖dW‖, first 20 steps", yscale="log", xlabel="layer")
    axes[0].set_xticks(list(layers))
    axes[1].set(title="Training loss", xlabel="tenth of the run")
    axes[2].set(
        title="Change of the gradient",
        yscale="log",
        xlabel="step",
        ylabel="‖g′ − g‖ / ‖g‖ along a step",
    )
    for ax in axes[:2]:
        ax.legend()


STUDY = Study(
    id="S20",
    title="gradients and smoothness",
    question="Is batch norm fast because it keeps gradients large?",
    prediction="Its early gradients are ten times larger, and a plain net with steps "
    "as large is as fast.",
    seen="Left: the first layers of the plain net get gradients an order smaller. "
    "Middle: a plain net whose layers take steps as large as batch norm's starts "
    "behind it and overtakes it. Right: how much the gradient changes along a step.",
    meaning="Large gradients are part of it: with steps as large a plain net makes up "
    "most of the gap and ends higher. What is left at the start goes with the smoother "
    "loss.",
    arms=("plain", "batch norm", "plain, each layer's rate raised to equal steps"),
    metric="Norm of the first layer's gradient over 20 steps; training loss in the "
    "second tenth of the run; range of loss and gradient along the gradient.",
    criterion="C17: a ratio of 10, and plain with steps as large has at most 1.2 "
    "times the early loss of batch norm (2 refutes), and ends no lower. C51: the "
    "ratio of 10.",
    claims=("C17", "C51"),
    minutes=2,
    scales={
        "quick": Scale(2, {"data": "digits", "steps": 100, "hidden": 50, "looks": 5}),
        "cpu": Scale(10, {"data": "mnist", "steps": 1000, "hidden": 100, "looks": 12}),
        "gpu": Scale(
            10, {"data": "mnist", "steps": 20_000, "hidden": 100, "looks": 50}
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

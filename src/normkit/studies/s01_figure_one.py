"""S01: the first figure of the batch-norm paper, and what it does not show."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.studies.data import Images
from normkit.studies.figure import band, color
from normkit.studies.replicas import Recipe, Replicas
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.verdict import Verdict, at_least, at_most, reported, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (0.1, 0.5, 2.0)
_MIDDLE = 1  # index of the rate of the bands
_LEVELS = (0.15, 0.5, 0.85)
_TARGETS = (0.8, 0.85, 0.9, 0.925, 0.95)
# Bands before this step reflect the start rather than drift.
_SETTLED = 100


def measure(
    trial: Trial, *, data: str, steps: int, batch: int, looks: int, hidden: int
) -> Result:
    """Train three-layer sigmoid nets with and without batch norm at three rates."""
    images = trial.images(data).flat()
    features = images.x_train.shape[1]
    widths = (features, hidden, hidden, hidden, images.classes)
    batches = images.batches(batch, steps, trial.generator(1))
    at = sorted({0, _SETTLED, *_spaced(steps, looks)})
    result: Result = {"data": images.name, "steps": at, "batch": batch, "arms": {}}
    for arm, norm in (("plain", ""), ("batch norm", "batch")):
        nets = Replicas(
            Recipe(widths, "sigmoid", norm),
            torch.full((len(_RATES),), 0.1),
            trial.generator(2),
            device=trial.device,
        )
        result["arms"][arm] = _train(nets, images, batches, set(at))
    return result


def _spaced(steps: int, looks: int) -> list[int]:
    """Return the evaluation steps: dense at first, where accuracy moves fast."""
    return [round(steps * (i / looks) ** 2) for i in range(1, looks + 1)]


def _train(
    nets: Replicas, images: Images, batches: Tensor, at: set[int]
) -> dict[str, list]:
    """Train the nets of one arm; curves `[look][rate]` or `[look][rate][level]`."""
    rates = torch.tensor(_RATES, device=images.x_train.device)
    known = images.x_train[:2000]
    shown, labels = images.x_test[:2000], images.y_test[:2000]
    seen: dict[str, list] = {
        key: []
        for key in ("accuracy", "running_accuracy", "bands", "drift_bands", "saturated")
    }
    ratios = []
    for step in range(len(batches) + 1):
        if step in at:
            seen["running_accuracy"].append(nets.accuracy(shown, labels))
            # Moving averages lag, and a curve of them would, too.
            with nets.population(known):
                seen["accuracy"].append(nets.accuracy(shown, labels))
                taps: list[Tensor] = []
                with torch.no_grad():
                    nets(shown, taps)
            last = taps[-1]
            levels = torch.tensor(_LEVELS, device=last.device)
            quantiles = last.quantile(levels, dim=1)  # (level, net, unit)
            seen["bands"].append(quantiles[:, :, 0].T.tolist())
            seen["drift_bands"].append(quantiles.permute(1, 2, 0).cpu())
            slope = torch.sigmoid(last) * (1 - torch.sigmoid(last))
            # Below a fifth of the largest slope, 1/4.
            seen["saturated"].append((slope < 0.05).float().mean((1, 2)).tolist())
        if step == len(batches):
            break
        rows = batches[step]
        grads = nets.step(images.x_train[rows], images.y_train[rows], rates)
        if step < 20:
            sizes = [g.flatten(1).norm(dim=1) for g in grads[: len(nets.weights)]]
            ratios.append((sizes[0] / sizes[-1]).tolist())
    every = torch.stack(seen.pop("drift_bands"))  # (look, net, unit, level)
    start = sorted(at).index(_SETTLED)
    medians = every[start:, :, :, 1]
    width = every[..., 2] - every[..., 0]
    moved = medians.amax(0) - medians.amin(0)
    seen["drift"] = (moved / width[-1]).median(-1).values.tolist()
    seen["travel"] = (
        (medians.diff(dim=0).abs().sum(0) / width[-1]).median(-1).values.tolist()
    )
    seen["growth"] = (width[-1] / width[start]).median(-1).values.tolist()
    seen["first_to_last"] = torch.tensor(ratios).median(0).values.tolist()
    return seen


def _first_step(result: Result, arm: str, rate: int, target: float) -> float:
    """Return the steps until the accuracy reaches `target`; inf when it never does."""
    for step, accuracies in zip(
        result["steps"], result["arms"][arm]["accuracy"], strict=True
    ):
        if accuracies[rate] >= target:
            return max(step, 1)
    return math.inf


def _speed_up(result: Result, target: float, rate: int | None) -> float:
    """Return the steps without over those with batch norm; `rate=None`: best of each.

    A net that never arrives counts as arriving at the end.
    """
    end = result["steps"][-1]
    picks = range(len(_RATES)) if rate is None else [rate]
    steps = [
        min(end, *(_first_step(result, arm, r, target) for r in picks))
        for arm in ("plain", "batch norm")
    ]
    return steps[0] / steps[1]


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""

    def of(arm: str, key: str) -> list[float]:
        return [r["arms"][arm][key][_MIDDLE] for r in results]

    def end(arm: str, key: str) -> list[float]:
        return [r["arms"][arm][key][-1][_MIDDLE] for r in results]

    def ratio(top: list[float], bottom: list[float]) -> list[float]:
        return [a / max(b, 1e-9) for a, b in zip(top, bottom, strict=True)]

    def speed(target: float, rate: int | None) -> list[float]:
        return [_speed_up(r, target, rate) for r in results]

    plain, batch = "plain", "batch norm"
    if results[0]["data"] == "mnist":
        wanted = [(0.8, 5.0), (0.9, 1.3)]
    else:
        wanted = [(0.95, 8.0)]
    speeds = [
        at_least(
            f"steps to {100 * t:g} %, plain / batch norm, best rate each",
            speed(t, None),
            bound,
            none=1,
        )
        for t, bound in wanted
    ] + [
        at_least(
            f"steps to {100 * t:g} %, both at rate {_RATES[_MIDDLE]:g}",
            speed(t, _MIDDLE),
            bound,
            none=1,
        )
        for t, bound in wanted
    ]
    rest = [
        reported(f"steps to {100 * t:g} %, best rate each", speed(t, None))
        for t in _TARGETS
        if t not in dict(wanted)
    ]
    return [
        verdict(
            "C1",
            at_least(
                "range of the median input / final band width, plain",
                of(plain, "drift"),
                0.3,
                none=0.05,
            ),
        ),
        verdict(
            "C2",
            at_least(
                "growth of the band from step 100, plain",
                of(plain, "growth"),
                10,
                none=1,
            ),
            at_most("growth of the band, batch norm", of(batch, "growth"), 2),
            at_least(
                "drift, plain / batch norm",
                ratio(of(plain, "drift"), of(batch, "drift")),
                1.2,
                none=1,
            ),
            reported(
                "path length of the median, plain / batch norm",
                ratio(of(plain, "travel"), of(batch, "travel")),
            ),
        ),
        verdict(
            "C5",
            at_least(
                "saturated share at the end, plain / batch norm",
                ratio(end(plain, "saturated"), end(batch, "saturated")),
                3,
                none=1,
            ),
            at_most(
                "first steps, ‖dW1‖/‖dW4‖, plain",
                of(plain, "first_to_last"),
                0.05,
                none=0.2,
            ),
            at_least(
                "the same with batch norm", of(batch, "first_to_last"), 0.2, none=0.05
            ),
        ),
        verdict(
            "C18",
            *speeds,
            *rest,
            note="A net that never arrives counts with the last step. The size of "
            "“faster” depends on the target: see the curve of speed-up.",
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw accuracy, one unit's input in both nets, and speed-up against target."""
    axes = figure.subplots(1, 4, width_ratios=(1.25, 1, 1, 1))
    axes[2].sharey(axes[1])
    steps = results[0]["steps"]
    for i, arm in enumerate(("plain", "batch norm")):
        rows = [[a[_MIDDLE] for a in r["arms"][arm]["accuracy"]] for r in results]
        band(axes[0], steps, rows, label=arm, index=i)
        bands = torch.tensor(
            [[look[_MIDDLE] for look in r["arms"][arm]["bands"]] for r in results[:1]]
        )[0]
        for level in range(3):
            axes[1 + i].plot(
                steps, bands[:, level], color=color(i), lw=(0.8, 1.5, 0.8)[level]
            )
        axes[1 + i].fill_between(
            steps, bands[:, 0], bands[:, 2], color=color(i), alpha=0.15
        )
        axes[1 + i].set(title=f"Input, {arm}", xlabel="step")
    axes[0].set(
        title=f"Test accuracy ({results[0]['data']})", xlabel="step", ylim=(0, 1)
    )
    axes[0].legend(loc="lower right")
    axes[1].set_ylabel("a unit's 15, 50, 85 %")
    targets = [0.5 + 0.01 * i for i in range(50)]
    for i, (rate, name) in enumerate(((None, "best rates"), (_MIDDLE, "same rate"))):
        rows = [[_speed_up(r, t, rate) for t in targets] for r in results]
        band(axes[3], targets, rows, label=name, index=2 + i)
    axes[3].axhline(1, color="black", lw=0.8)
    axes[3].set(title="Times faster", yscale="log", xlabel="target accuracy")
    axes[3].legend(loc="upper right", borderaxespad=0)


STUDY = Study(
    id="S01",
    title="figure one",
    question="Do a sigmoid net's inputs drift, and does batch norm stop that and speed "
    "it up?",
    prediction="Without batch norm inputs drift and saturate; with it they stay, and "
    "training is much faster.",
    arms=("plain", "batch norm", "each at learning rates 0.1, 0.5 and 2"),
    metric="Test accuracy with exact population statistics; {15, 50, 85} % of the "
    "inputs of the last hidden sigmoids (median over units); share of inputs where the "
    "slope is below 0.05; ‖dW1‖/‖dW4‖ over the first 20 steps. Judged at rate 0.5.",
    criterion="C1: the median moves by 0.3 of the final band. C2: the band grows ×10 "
    "without and at most ×2 with batch norm, drift ratio 1.2. C5: three times the "
    "saturated share; gradient ratio below 0.05 against above 0.2. C18, with the best "
    "rates and with the same: MNIST ×5 to 80 % and ×1.3 to 90 %, digits ×8 to 95 %.",
    claims=("C1", "C2", "C5", "C18"),
    minutes=6,
    scales={
        "quick": Scale(
            2, {"data": "digits", "steps": 150, "batch": 60, "looks": 12, "hidden": 50}
        ),
        "cpu": Scale(
            5, {"data": "mnist", "steps": 4000, "batch": 60, "looks": 60, "hidden": 100}
        ),
        "gpu": Scale(
            10,
            {
                "data": "mnist",
                "steps": 50_000,
                "batch": 60,
                "looks": 100,
                "hidden": 100,
            },
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

"""S02: internal covariate shift by its definition, and a batch norm that has it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.studies.figure import band, bars_by_group
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.verdict import Verdict, at_least, at_most, reported, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ARMS = {
    "plain": ("", 0.0),
    "batch norm": ("batch", 0.0),
    "noisy batch norm": ("batch", 0.5),
}
_RATES = (0.03, 0.1, 0.3, 1.0)
_SAME = 1
_TARGET = 0.9


def measure(trial: Trial, *, steps: int, hidden: tuple[int, ...], looks: int) -> Result:
    """Measure the shift of gradients by the update of the layers below, and speed."""
    images = trial.images("digits").flat().standardized()
    widths = (images.x_train.shape[1], *hidden, images.classes)
    batches = images.batches(60, steps, trial.generator(1))
    rates = torch.tensor(_RATES, device=trial.device)
    at = set(range(0, steps, max(1, steps // looks)))
    result: Result = {"at": sorted(at), "steps": steps, "shift": {}, "reached": {}}
    for act in ("sigmoid", "relu"):
        for arm, (norm, noise) in _ARMS.items():
            nets = Replicas(
                Recipe(widths, act, norm, noise=noise),
                stds_for(widths, math.sqrt(2)).expand(len(_RATES), -1),
                trial.generator(2),
                device=trial.device,
            )
            shifts, reached = [], [math.inf] * len(_RATES)
            for step, rows in enumerate(batches):
                x, y = images.x_train[rows], images.y_train[rows]
                if step in at:
                    shifts.append(_shift(nets, x, y, rates))
                nets.step(x, y, rates)
                if step % 5 == 4:
                    with nets.population(images.x_train):
                        hits = nets.accuracy(images.x_test, images.y_test)
                    reached = [
                        step + 1 if h >= _TARGET and r == math.inf else r
                        for h, r in zip(hits, reached, strict=True)
                    ]
            result["shift"][f"{act} {arm}"] = torch.stack(shifts).T.tolist()
            result["reached"][f"{act} {arm}"] = reached
    return result


def _shift(nets: Replicas, x: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    """Return ‖G' − G‖/‖G‖ of each net, averaged over layers.

    G' is the gradient of a layer after those below it have taken their step (Santurkar
    et al., "How does batch normalization help optimization?", definition 2.1).
    """
    layers = len(nets.weights)
    kept = [p.detach().clone() for p in nets.parameters]
    state = [(m.clone(), v.clone()) for m, v in nets.running]
    before = nets.gradients(x, y)[:layers]
    grads = nets.gradients(x, y)
    step = rates.view(-1, 1, 1)
    found = []
    for layer in range(1, layers):
        with torch.no_grad():
            below = layer - 1
            groups = [below, layers + below]  # weight and bias
            if nets.recipe.norm and nets.recipe.affine:
                groups += [2 * layers + below, 3 * layers - 1 + below]
            for i in groups:
                nets.parameters[i] -= step * grads[i]
        after = nets.gradients(x, y)[layer]
        change = (after - before[layer]).flatten(1).norm(dim=1)
        found.append(change / before[layer].flatten(1).norm(dim=1).clamp(min=1e-30))
    with torch.no_grad():
        for p, old in zip(nets.parameters, kept, strict=True):
            p.copy_(old)
        for (m, v), (old_m, old_v) in zip(nets.running, state, strict=True):
            m.copy_(old_m)
            v.copy_(old_v)
    return torch.stack(found).mean(0)


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""

    def shift(result: Result, arm: str) -> float:
        """Return the run's median at the common rate; a diverged net counts as 1e3."""
        row = torch.tensor(result["shift"][arm][_SAME]).nan_to_num(1e3)
        return row.median().item()

    def lower(act: str) -> list[float]:
        return [
            shift(r, f"{act} batch norm") / shift(r, f"{act} plain") for r in results
        ]

    def steps(result: Result, arm: str) -> float:
        return min(*result["reached"][arm], result["steps"])

    def slower(act: str, arm: str, over: str) -> list[float]:
        return [steps(r, f"{act} {arm}") / steps(r, f"{act} {over}") for r in results]

    return [
        verdict(
            "C21",
            *(
                at_least(
                    f"steps to 90 %, noisy batch norm / batch norm, {act}, best rates",
                    slower(act, "noisy batch norm", "batch norm"),
                    1.5,
                    none=1,
                )
                for act in ("sigmoid", "relu")
            ),
            *(
                reported(
                    f"steps to 90 %, plain / noisy batch norm, {act}",
                    slower(act, "plain", "noisy batch norm"),
                )
                for act in ("sigmoid", "relu")
            ),
            note="The noise brings the shift back: if that made training slow, the "
            "noisy net would be slow.",
        ),
        verdict(
            "C26",
            *(
                at_most(
                    f"shift, batch norm / plain, {act}, rate {_RATES[_SAME]:g}",
                    lower(act),
                    0.5,
                    none=1,
                )
                for act in ("sigmoid", "relu")
            ),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw the shift over the run, and the steps to the target."""
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    for ax, act in zip(axes[:2], ("sigmoid", "relu"), strict=True):
        for i, arm in enumerate(_ARMS):
            rows = [r["shift"][f"{act} {arm}"][_SAME] for r in results]
            band(ax, results[0]["at"], rows, label=arm, index=i)
        ax.set(title=f"Shift of gradients, {act}", yscale="log", xlabel="step")
    axes[0].legend(loc=(0, 0.62))
    axes[0].set_ylabel("‖G′ − G‖ / ‖G‖")
    limit, acts = results[0]["steps"], ("sigmoid", "relu")
    rows = {
        arm: [
            [min(*r["reached"][f"{act} {arm}"], limit) for r in results] for act in acts
        ]
        for arm in _ARMS
    }
    bars_by_group(axes[2], acts, rows)
    axes[2].set(title="Steps to 90 %, best rates", ylabel="steps")


STUDY = Study(
    id="S02",
    title="covariate shift",
    question="Does batch norm lower internal covariate shift, and is that why it is "
    "fast?",
    prediction="The shift falls by half, and a batch norm with shift put back is slow.",
    arms=tuple(_ARMS),
    metric="Relative change of a layer's gradient when the layers below take their "
    "step; steps to 90 % on the digits.",
    criterion="C26: at most half the shift of the plain net, sigmoid and ReLU. C21: "
    "noisy batch norm (scale and shift drawn anew at every step, deviation 0.5) needs "
    "1.5 times the steps of batch norm.",
    claims=("C21", "C26"),
    minutes=2,
    scales={
        "quick": Scale(2, {"steps": 60, "hidden": (32, 32, 32), "looks": 6}),
        "cpu": Scale(5, {"steps": 400, "hidden": (64, 64, 64), "looks": 20}),
        "gpu": Scale(10, {"steps": 3000, "hidden": (256,) * 5, "looks": 50}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

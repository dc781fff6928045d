"""S02: internal covariate shift by its definition, and a batch norm that has it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.studies import verdict as rules
from normkit.studies.figure import bars_by_group, color
from normkit.studies.interval import Number
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ARMS = {
    "plain": ("", 0.0),
    "batch norm": ("batch", 0.0),
    "noisy batch norm": ("batch", 0.5),
}
# Rate 0 is the zero baseline.
_RATES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_GRID = _RATES[1:]
_TARGET = 0.9
# A step of every lower layer by this share of its weights' norm: equal in all arms.
_STEP = 0.01
# Shifts are compared where the training loss lies between these.
_LOSSES = (0.3, 2.0)


def measure(trial: Trial, *, steps: int, hidden: tuple[int, ...], looks: int) -> Result:
    """Measure the shift of gradients by the update of the layers below, and speed."""
    images = trial.images("digits").flat().standardized()
    widths = (images.x_train.shape[1], *hidden, images.classes)
    batches = images.batches(60, steps, trial.generator(1))
    rates = torch.tensor(_RATES, device=trial.device)
    # Dense at first, where the loss falls.
    at = {round(steps * (i / looks) ** 2) for i in range(looks)}
    result: Result = {"at": sorted(at), "steps": steps}
    for key in ("shift", "loss", "moved", "still", "reached", "validated"):
        result[key] = {}
    for act in ("sigmoid", "relu"):
        for arm, (norm, noise) in _ARMS.items():
            nets = Replicas(
                Recipe(widths, act, norm, noise=noise),
                stds_for(widths, math.sqrt(2)).expand(len(_RATES), -1),
                trial.generator(2),
                device=trial.device,
            )
            name, still = f"{act} {arm}", torch.zeros(len(_RATES))
            shifts, losses, moves = [], [], []
            splits = {
                "reached": (images.x_test, images.y_test),
                "validated": (images.x_val, images.y_val),
            }
            for key in splits:
                result[key][name] = [math.inf] * len(_RATES)
            means = None
            for step, rows in enumerate(batches):
                x, y = images.x_train[rows], images.y_train[rows]
                if step in at:
                    shifts.append(_shift(nets, x, y, _STEP))
                    losses.append(nets.losses(x, y).detach())
                    still = torch.maximum(still, _shift(nets, x, y, 0.0).amax(0).cpu())
                if step % 10 == 0:
                    now = _means(nets, images.x_train[:200])
                    if means is not None:
                        moves.append((now - means).abs().mean((0, 2)))
                    means = now
                nets.step(x, y, rates)
                if step % 5 == 4:
                    with nets.population(images.x_train[:500]):
                        for key, (x_seen, y_seen) in splits.items():
                            result[key][name] = [
                                step + 1 if h >= _TARGET and r == math.inf else r
                                for h, r in zip(
                                    nets.accuracy(x_seen, y_seen),
                                    result[key][name],
                                    strict=True,
                                )
                            ]
            # [rate][look][layer]
            result["shift"][name] = torch.stack(shifts).permute(2, 0, 1).tolist()
            result["loss"][name] = torch.stack(losses).T.tolist()
            result["moved"][name] = torch.stack(moves).mean(0).tolist()
            result["still"][name] = still.max().item()
    return result


@torch.no_grad()
def _means(nets: Replicas, x: Tensor) -> Tensor:
    """Return the mean input of each hidden unit in units of its deviation.

    Shape `(layer, net, unit)`; of a batch norm with its noise.
    """
    state = [(m.clone(), v.clone()) for m, v in nets.running]
    taps: list[Tensor] = []
    nets(x, taps)
    for (m, v), (old_m, old_v) in zip(nets.running, state, strict=True):
        m.copy_(old_m)
        v.copy_(old_v)
    return torch.stack([h.mean(1) / h.std(1).clamp(min=1e-6) for h in taps])


def _shift(nets: Replicas, x: Tensor, y: Tensor, length: float) -> Tensor:
    """Return ‖G' − G‖/‖G‖ of each layer but the first and net, `(layer, net)`.

    G' is the gradient of a layer after those below it have taken a step (Santurkar et
    al., "How does batch normalization help optimization?", NeurIPS 2018, definition
    2.1), here of `length` times the norm of their weights. The noise of a noisy batch
    norm is the same for G and G'.
    """
    layers = len(nets.weights)
    kept = [p.detach().clone() for p in nets.parameters]
    state = [(m.clone(), v.clone()) for m, v in nets.running]
    found = []
    with nets.held_noise():
        before = nets.gradients(x, y)
        for layer in range(1, layers):
            below = layer - 1
            groups = [below, layers + below]  # weight and bias
            if nets.recipe.norm and nets.recipe.affine:
                groups += [2 * layers + below, 3 * layers - 1 + below]
            sizes = [t.flatten(1).norm(dim=1) for t in (kept[below], before[below])]
            stride = (length * sizes[0] / sizes[1].clamp(min=1e-30)).view(-1, 1, 1)
            with torch.no_grad():
                for i in groups:
                    nets.parameters[i] -= stride * before[i]
            after = nets.gradients(x, y)[layer]
            change = (after - before[layer]).flatten(1).norm(dim=1)
            found.append(change / before[layer].flatten(1).norm(dim=1).clamp(min=1e-30))
    with torch.no_grad():
        for p, old in zip(nets.parameters, kept, strict=True):
            p.copy_(old)
        for (m, v), (old_m, old_v) in zip(nets.running, state, strict=True):
            m.copy_(old_m)
            v.copy_(old_v)
    return torch.stack(found)


def _evaluated_pick(results: list[Result], name: str) -> Pick:
    """Return the rate of fewest steps to the target on validation."""
    return pick([[-v for v in r["validated"][name][1:]] for r in results], _GRID)


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""
    picks = {
        f"{act} {arm}": _evaluated_pick(results, f"{act} {arm}")
        for act in ("sigmoid", "relu")
        for arm in _ARMS
    }

    def shift(result: Result, name: str, layer: int | None = None) -> float:
        """Return the median over the looks of the common losses; nan where none."""
        rate = 1 + picks[name].index
        rows = [
            row if layer is None else [row[layer]]
            for row, loss in zip(
                result["shift"][name][rate], result["loss"][name][rate], strict=True
            )
            if _LOSSES[0] <= loss <= _LOSSES[1]
        ]
        values = torch.tensor(rows).mean(1) if rows else torch.tensor([math.nan])
        return values.median().item()

    def reason(act: str, *arms: str) -> str:
        names = [f"{act} {arm}" for arm in arms]
        seen = [shift(r, n) for r in results for n in names]
        if any(math.isnan(v) for v in seen):
            return f"not judged: a net never has a loss of {_LOSSES[0]} to {_LOSSES[1]}"
        return edge(act, *arms)

    def compared(act: str, top: str, bottom: str) -> list[float]:
        found = []
        for r in results:
            ratio = shift(r, f"{act} {top}") / shift(r, f"{act} {bottom}")
            found.append(1.0 if math.isnan(ratio) else ratio)
        return found

    def steps(act: str, slow: str, fast: str) -> list[Number]:
        names = f"{act} {slow}", f"{act} {fast}"
        found = []
        for r in results:
            a, b = (r["reached"][n][1 + picks[n].index] for n in names)
            found.append(rules.steps_ratio(a, b, r["steps"]))
        return found

    def edge(act: str, *arms: str) -> str:
        return edges({f"{act} {a}": picks[f"{act} {a}"] for a in arms})

    def moved(act: str, arm: str) -> list[float]:
        name = f"{act} {arm}"
        return [r["moved"][name][1 + picks[name].index] for r in results]

    def deeper(act: str) -> list[float]:
        found = []
        for r in results:
            ends = [shift(r, f"{act} plain", layer) for layer in (-1, 0)]
            found.append(1.0 if math.isnan(ends[0]) else ends[0] / ends[1])
        return found

    acts = ("sigmoid", "relu")
    noisy, full, plain = "noisy batch norm", "batch norm", "plain"

    def for_each(made) -> list[rules.Part]:
        return [made(act) for act in acts]

    slower = for_each(
        lambda act: rules.at_least(
            f"steps to 90 %, noisy batch norm / batch norm, {act}, best rates",
            steps(act, noisy, full),
            1.5,
            none=1,
            about=act,
            unless=edge(act, noisy, full),
        )
    )
    returned = for_each(
        lambda act: rules.at_least(
            f"move of a unit's mean input in ten steps, noisy / plain, {act}",
            [
                a / max(b, 1e-9)
                for a, b in zip(moved(act, noisy), moved(act, plain), strict=True)
            ],
            2,
            none=1,
            about=f"the shift is back, {act}",
        )
    )
    faster = for_each(
        lambda act: rules.at_least(
            f"steps to 90 %, plain / noisy batch norm, {act}, best rates",
            steps(act, plain, noisy),
            1.2,
            none=1,
            about=f"faster all the same, {act}",
            unless=edge(act, plain, noisy),
        )
    )
    lower = for_each(
        lambda act: rules.at_most(
            f"shift, batch norm / plain, equal steps and losses, {act}",
            compared(act, full, plain),
            0.5,
            none=1,
            about=f"less shift, {act}",
            unless=reason(act, full, plain),
        )
    )
    depth = for_each(
        lambda act: rules.at_least(
            f"shift of the last layer / of the second, plain, {act}",
            deeper(act),
            1.2,
            none=1,
            about=act,
            unless=reason(act, plain),
        )
    )
    still = rules.reported(
        "largest shift by a step of length 0, any arm",
        [max(r["still"].values()) for r in results],
    )
    return [
        rules.verdict(
            "C21",
            *slower,
            note="If shift were what makes training slow, batch norm with shift put "
            "back would be slow. That it is back: C83.",
        ),
        rules.verdict("C26", *lower, still),
        rules.verdict("C79", *depth, still),
        rules.verdict("C83", *returned, *faster),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw the shift over the loss, and the steps to the target."""
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    acts = ("sigmoid", "relu")
    picks = {
        f"{a} {arm}": 1 + _evaluated_pick(results, f"{a} {arm}").index
        for a in acts
        for arm in _ARMS
    }
    for ax, act in zip(axes[:2], acts, strict=True):
        for i, arm in enumerate(_ARMS):
            name = f"{act} {arm}"
            rate = picks[name]
            looks = [
                (loss, sum(look) / len(look))
                for r in results
                for loss, look in zip(
                    r["loss"][name][rate], r["shift"][name][rate], strict=True
                )
                if _LOSSES[0] <= loss <= _LOSSES[1]
            ]
            ax.plot(*zip(*looks, strict=True), ".", color=color(i), label=arm, ms=4)
        ax.set(title=f"Shift of gradients, {act}", yscale="log")
        ax.set(xlabel="training loss", xlim=_LOSSES[::-1])
    axes[0].legend(fontsize=6.5)
    axes[0].set_ylabel(f"‖G′ − G‖ / ‖G‖, steps of {100 * _STEP:g} %")
    limit = results[0]["steps"]
    rows = {
        arm: [
            [
                min(r["reached"][f"{act} {arm}"][picks[f"{act} {arm}"]], limit)
                for r in results
            ]
            for act in acts
        ]
        for arm in _ARMS
    }
    bars_by_group(axes[2], acts, rows)
    axes[2].axhline(limit, color="black", lw=0.8, ls=":", label="end of the run")
    axes[2].legend(fontsize=6.5)
    axes[2].set(title="Steps to 90 %, best rates", ylabel="steps")


STUDY = Study(
    id="S02",
    title="covariate shift",
    question="Does batch norm lower internal covariate shift, and is that why it is "
    "fast?",
    prediction="The shift falls by half, and a batch norm with shift put back is slow.",
    seen="Shift is how much the gradient of a layer changes when the layers below it "
    "take their step. It is lower with batch norm, by about half, for steps of equal "
    "length. With noise on its outputs batch norm needs more steps than without, and "
    "fewer than the plain net.",
    meaning="Batch norm does lower the shift at this size, less than stated. Noise "
    "that moves each unit's input costs some of the speed and leaves batch norm ahead "
    "of the sigmoid net without it: little shift is not what batch norm is fast by. A "
    "step of length 0 changes no gradient: the noise is held fixed while it is "
    "measured.",
    arms=tuple(_ARMS),
    metric="Relative change of a layer's gradient when each layer below takes a step "
    "of 1 % of its weights, where the loss is 0.3 to 2.0, at each arm's best rate by "
    "validation; how far a unit's mean input moves in ten steps, in deviations; steps "
    "to 90 % on the digits.",
    criterion="C26: at most half the shift of the plain net, sigmoid and ReLU. C21: "
    "noisy batch norm (scale and shift drawn anew at every step, deviation 0.5) needs "
    "1.5 times the steps of batch norm. C79: the last layer's shift is 1.2 times the "
    "second's. C83: the noisy net's means move twice as much as the plain net's, and "
    "the plain net needs 1.2 times its steps.",
    claims=("C21", "C26", "C79", "C83"),
    minutes=3,
    scales={
        "quick": Scale(2, {"steps": 60, "hidden": (32, 32, 32), "looks": 6}),
        "cpu": Scale(10, {"steps": 240, "hidden": (40, 40, 40), "looks": 20}),
        "gpu": Scale(10, {"steps": 3000, "hidden": (256,) * 5, "looks": 50}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

"""S01: the first figure of the batch-norm paper, and what it does not show."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.studies.data import Images
from normkit.studies.figure import band, color
from normkit.studies.interval import Number
from normkit.studies.replicas import Recipe, Replicas
from normkit.studies.selection import edges, pick
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.verdict import (
    Part,
    Verdict,
    at_least,
    at_most,
    over,
    reported,
    steps_ratio,
    unless,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Rate 0 is the zero baseline: what moves there is no effect of training.
_RATES = (0.0, 0.1, 0.5, 2.0, 5.0, 10.0)
_GRID = _RATES[1:]
_MIDDLE = 2  # index of the rate of the bands
_LEVELS = (0.15, 0.5, 0.85)
_TARGETS = (0.8, 0.85, 0.9, 0.925, 0.95)
# Inputs before this step reflect the start rather than training.
_SETTLED = 100
# Distributions are compared while each arm learns the same: between these accuracies.
_FROM, _TO = 0.5, 0.85


def measure(
    trial: Trial, *, data: str, steps: int, batch: int, looks: int, hidden: int
) -> Result:
    """Train three-layer sigmoid nets with and without batch norm at several rates."""
    images = trial.images(data, train=20_000, val=1000, test=1000).flat()
    features = images.x_train.shape[1]
    widths = (features, hidden, hidden, hidden, images.classes)
    batches = images.batches(batch, steps, trial.generator(1))
    at = sorted({0, _SETTLED, *_spaced(steps, looks)})
    result: Result = {"data": images.name, "steps": at, "batch": batch, "arms": {}}
    arms = (
        ("plain", Recipe(widths, "sigmoid"), _RATES),
        ("batch norm", Recipe(widths, "sigmoid", "batch"), _RATES),
        (
            "no weight and bias",
            Recipe(widths, "sigmoid", "batch", affine=False),
            (0.0, _RATES[_MIDDLE]),
        ),
    )
    for arm, recipe, rates in arms:
        nets = Replicas(
            recipe,
            torch.full((len(rates),), 0.1),
            trial.generator(2),
            device=trial.device,
        )
        result["arms"][arm] = _train(nets, images, batches, set(at), rates)
    return result


def _spaced(steps: int, looks: int) -> list[int]:
    """Return the evaluation steps: dense at first, where accuracy moves fast."""
    return [round(steps * (i / looks) ** 2) for i in range(1, looks + 1)]


def _train(
    nets: Replicas,
    images: Images,
    batches: Tensor,
    at: set[int],
    rates: tuple[float, ...],
) -> dict[str, list]:
    """Train the nets of one arm; curves `[look][rate]` or `[look][rate][level]`."""
    each = torch.tensor(rates, device=images.x_train.device)
    known = images.x_train[:1000]
    levels = torch.tensor(_LEVELS, device=known.device)
    seen: dict[str, list] = {
        key: [] for key in ("accuracy", "validation", "bands", "saturated")
    }
    every, ratios = [], []
    for step in range(len(batches) + 1):
        if step in at:
            # Moving averages lag, and a curve of them would, too.
            with nets.population(known):
                seen["accuracy"].append(nets.accuracy(images.x_test, images.y_test))
                seen["validation"].append(nets.accuracy(images.x_val, images.y_val))
                taps: list[Tensor] = []
                with torch.no_grad():
                    nets(images.x_test, taps)
            last = taps[-1]
            quantiles = last.quantile(levels, dim=1)  # (level, net, unit)
            seen["bands"].append(quantiles[:, :, 0].T.tolist())
            every.append(quantiles.permute(1, 2, 0).cpu())
            slope = torch.sigmoid(last) * (1 - torch.sigmoid(last))
            # Below a fifth of the largest slope, 1/4.
            seen["saturated"].append((slope < 0.05).float().mean((1, 2)).tolist())
        if step == len(batches):
            break
        rows = batches[step]
        grads = nets.step(images.x_train[rows], images.y_train[rows], each)
        if step < 20:
            sizes = [g.flatten(1).norm(dim=1) for g in grads[: len(nets.weights)]]
            ratios.append((sizes[0] / sizes[-1]).tolist())
    every = torch.stack(every)  # (look, net, unit, level)
    start = sorted(at).index(_SETTLED)
    seen["drift"] = [_drift(every[start:, net]) for net in range(len(rates))]
    windows = [
        _window([row[net] for row in seen["validation"]]) for net in range(len(rates))
    ]
    seen["window"] = [list(w) for w in windows]
    seen["window_drift"] = [
        _drift(every[first : last + 1, net])
        for net, (first, last) in enumerate(windows)
    ]
    width = every[..., 2] - every[..., 0]
    seen["window_growth"] = [
        (width[last, net] / width[first, net]).median().item()
        for net, (first, last) in enumerate(windows)
    ]
    seen["first_to_last"] = torch.tensor(ratios).median(0).values.tolist()
    return seen


def _drift(quantiles: Tensor) -> float:
    """Return how far the median input moves, in widths of its last band.

    `quantiles`: `(look, unit, level)`; the median over the units.
    """
    moved = quantiles[..., 1].amax(0) - quantiles[..., 1].amin(0)
    width = quantiles[-1, :, 2] - quantiles[-1, :, 0]
    return (moved / width).median().item()


def _window(accuracies: list[float]) -> tuple[int, int]:
    """Return the looks at which accuracy first reaches `_FROM` and `_TO`.

    The last look where it does not.
    """
    last = len(accuracies) - 1
    found = [
        next((i for i, a in enumerate(accuracies) if a >= level), last)
        for level in (_FROM, _TO)
    ]
    return found[0], found[1]


def _first_step(
    result: Result, arm: str, rate: int, target: float, split: str = "accuracy"
) -> float:
    """Return the steps until the accuracy reaches `target`; inf when it never does."""
    for step, accuracies in zip(
        result["steps"], result["arms"][arm][split], strict=True
    ):
        if accuracies[rate] >= target:
            return max(step, 1)
    return math.inf


def _evaluated_rates(
    results: list[Result], target: float
) -> tuple[dict[str, int], str]:
    """Return each arm's rate of fewest steps on validation, and why not to judge."""
    picks = {
        arm: pick(
            [
                [
                    -_first_step(r, arm, 1 + i, target, "validation")
                    for i in range(len(_GRID))
                ]
                for r in results
            ],
            _GRID,
        )
        for arm in ("plain", "batch norm")
    }
    chosen = {arm: 1 + one.index for arm, one in picks.items()}
    return chosen, edges(plain=picks["plain"], batch_norm=picks["batch norm"])


def _evaluated_speed(
    results: list[Result], target: float, chosen: dict[str, int]
) -> list[Number]:
    """Return the steps without over those with batch norm, or their bounds."""
    return [
        steps_ratio(
            _first_step(r, "plain", chosen["plain"], target),
            _first_step(r, "batch norm", chosen["batch norm"], target),
            r["steps"][-1],
        )
        for r in results
    ]


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""

    def of(arm: str, key: str, rate: int = _MIDDLE) -> list[float]:
        return [r["arms"][arm][key][rate] for r in results]

    def filled(rate: int) -> list[float]:
        """Return the points by which the saturated share of the plain net grows."""
        found = []
        for r in results:
            shares = r["arms"]["plain"]["saturated"]
            start = r["steps"].index(_SETTLED)
            found.append(100 * (shares[-1][rate] - shares[start][rate]))
        return found

    def ratio(top: list[float], bottom: list[float]) -> list[float]:
        return over(top, [max(b, 1e-9) for b in bottom])

    plain, batch, bare = "plain", "batch norm", "no weight and bias"
    is_mnist = results[0]["data"] == "mnist"
    wanted = {0.8: 5.0, 0.9: 1.3} if is_mnist else {0.95: 8.0}
    same = {plain: _MIDDLE, batch: _MIDDLE}
    best: list[Part] = []
    rest: list[Part] = []
    for target in sorted({*_TARGETS, *wanted}):
        chosen, reason = _evaluated_rates(results, target)
        speed = _evaluated_speed(results, target, chosen)
        text = f"steps to {100 * target:g} %, plain / batch norm, best rate each"
        if target not in wanted:
            rest.append(reported(text, speed))
            continue
        bound, about = wanted[target], f"{100 * target:g} %, best rates"
        best.append(unless(at_least(text, speed, bound, none=1, about=about), reason))
    at_one = [
        at_least(
            f"steps to {100 * t:g} %, both at rate {_RATES[_MIDDLE]:g}",
            _evaluated_speed(results, t, same),
            bound,
            none=1,
            about=f"{100 * t:g} %, same rate",
        )
        for t, bound in wanted.items()
    ]
    unmoved = reported("the same at rate 0", of(plain, "drift", 0))
    drifts = {arm: of(arm, "window_drift") for arm in (plain, batch)}
    drifts[bare] = of(bare, "window_drift", 1)
    behind = [
        arm
        for arm in (plain, batch)
        if any(r["arms"][arm]["validation"][-1][_MIDDLE] < _TO for r in results)
    ]
    apart = f"not judged: {' and '.join(behind)} ends below {100 * _TO:g} %"
    apart = apart if behind else ""
    span = f"from {100 * _FROM:g} to {100 * _TO:g} % accuracy"
    return [
        verdict(
            "C1",
            at_least(
                "range of the median input / final band width, plain",
                of(plain, "drift"),
                0.3,
                none=0.05,
            ),
            unmoved,
        ),
        verdict(
            "C2",
            at_most(
                f"growth of the band {span}, batch norm",
                of(batch, "window_growth"),
                1.25,
                none=2,
                about="the width",
            ),
            unless(
                at_least(
                    f"growth of the band {span}, plain / batch norm",
                    ratio(of(plain, "window_growth"), of(batch, "window_growth")),
                    1.2,
                    none=1,
                    about="the width against a plain net",
                ),
                apart,
            ),
            unless(
                at_least(
                    f"move of the median {span}, plain / batch norm",
                    ratio(drifts[plain], drifts[batch]),
                    1.2,
                    none=1,
                    about="the place against a plain net",
                ),
                apart,
            ),
            reported(f"move of the median {span}, batch norm", drifts[batch]),
            reported("the same over the whole run", of(batch, "drift")),
            note="Compared while both nets learn the same, not over the same steps: "
            "at step 100 the plain net has not begun to learn, and its band is narrow.",
        ),
        verdict(
            "C5",
            at_least(
                f"growth of the saturated share from step {_SETTLED}, plain, points",
                filled(_MIDDLE),
                5,
                none=0,
                about="drift into saturation",
            ),
            at_most(
                "first steps, ‖dW1‖/‖dW4‖, plain",
                of(plain, "first_to_last"),
                0.05,
                none=0.2,
                about="vanishing gradients",
            ),
            reported("growth of the saturated share at rate 0, points", filled(0)),
            reported("the same at rate 2, points", filled(_MIDDLE + 1)),
            reported("‖dW1‖/‖dW4‖ with batch norm", of(batch, "first_to_last")),
        ),
        verdict(
            "C18",
            *best,
            *at_one,
            *rest,
            note="“≥” is a bound: the plain net had not arrived when the run ended. "
            "The size of “faster” depends on the target: see the curve of speed-up.",
        ),
        verdict(
            "C68",
            at_least(
                f"move of the median {span}, with / without weight and bias",
                ratio(drifts[batch], drifts[bare]),
                1.5,
                none=1,
                about="more than without weight and bias",
            ),
            unless(
                at_least(
                    f"move of the median {span}, batch norm / plain",
                    ratio(drifts[batch], drifts[plain]),
                    0.8,
                    none=0.2,
                    about="as much as in the plain net",
                ),
                apart,
            ),
            reported(f"move of the median {span}, without", drifts[bare]),
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
    targets = [0.5 + 0.01 * i for i in range(47)]
    same = {"plain": _MIDDLE, "batch norm": _MIDDLE}
    for i, name in enumerate(("best rates", "same rate")):
        columns = []
        for t in targets:
            chosen = same if i else _evaluated_rates(results, t)[0]
            found = _evaluated_speed(results, t, chosen)
            # A bound is drawn as its nearer end, no effect where there is none.
            columns.append(
                [max(v[0], min(v[1], 1)) if isinstance(v, tuple) else v for v in found]
            )
        rows = [list(row) for row in zip(*columns, strict=True)]
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
    seen="The band is where the middle 70 % of the inputs of one hidden unit lie, its "
    "line the median; drift is how far that line moves, in widths of the last band. "
    "Without batch norm the band starts narrow, wanders and widens; with it it stays. "
    "Accuracy rises earlier with batch norm, and the lead is largest for modest "
    "targets.",
    meaning="While both nets learn the same, the inputs of a batch-normalized unit "
    "hardly move and those of a plain unit do. That is what “covariate shift” names; "
    "that it is the cause of slowness does not follow (S02). How many times faster "
    "depends on the accuracy that is asked for, so a single factor says little. Weight "
    "and bias, though they could, do not bring the drift back.",
    arms=(
        "plain",
        "batch norm",
        "each at learning rates 0 to 10",
        "batch norm without weight and bias",
    ),
    metric="Accuracy with exact population statistics; {15, 50, 85} % of the inputs of "
    "the last hidden sigmoids (median over units): the band is from 15 to 85 %; share "
    "of inputs where the slope is below 0.05; ‖dW1‖/‖dW4‖ over the first 20 steps. "
    "Distributions at rate 0.5; rates for speed by validation.",
    criterion="C1: the median moves by 0.3 of the final band. C2, while each net goes "
    "from 50 to 85 % accuracy: the band of batch norm grows at most ×1.25 (×2 "
    "refutes), and the plain net's band and median move 1.2 times as much. C5: the "
    "saturated share grows by 5 points; gradient ratio below 0.05. C18, with the best "
    "rates and with the same: MNIST ×5 to 80 % and ×1.3 to 90 %, digits ×8 to 95 %. "
    "C68: weight and bias raise the move ×1.5, to 0.8 of the plain net's.",
    claims=("C1", "C2", "C5", "C18", "C68"),
    minutes=5,
    scales={
        "quick": Scale(
            2, {"data": "digits", "steps": 150, "batch": 60, "looks": 12, "hidden": 50}
        ),
        "cpu": Scale(
            10,
            {"data": "mnist", "steps": 1200, "batch": 60, "looks": 30, "hidden": 100},
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

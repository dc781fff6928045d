"""S15: scaling the inputs, and what whitening costs."""

from __future__ import annotations

import functools
import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit.nn import BatchNorm1d, WhiteningBatchNorm
from normkit.studies import verdict as rules
from normkit.studies.data import Images
from normkit.studies.figure import band, bars
from normkit.studies.interval import Number
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_SCALINGS = ("0 to 255", "0 to 1", "standardized", "whitened")
_TARGET = 0.92
_LAYERS = {
    "batch norm": BatchNorm1d,
    "whitening": WhiteningBatchNorm,
    "whitening by Newton's method": functools.partial(
        WhiteningBatchNorm, method="newton"
    ),
}


def measure(
    trial: Trial, *, steps: int, hidden: tuple[int, ...], features: tuple[int, ...]
) -> Result:
    """Measure steps to the target by input scaling, and the cost of whitening."""
    images = trial.images("digits").flat()
    scaled = _scalings(images)
    reached = {}
    for name in _SCALINGS:
        reached[name] = _steps_to_target(trial, scaled[name], steps, hidden)
    white = scaled["whitened"].x_train
    centred = images.x_train - images.x_train.mean(0)
    covariance = white.T @ white / len(white)
    used = covariance.diagonal() > 0.5  # pixels that vary
    apart = (covariance - torch.diag(covariance.diagonal()))[used][:, used]
    return {
        "steps": steps,
        "reached": reached,
        "correlation": apart.abs().max().item(),
        "restored": _restored(white[:, used], centred[:, used]),
        "features": list(features),
        "microseconds": _cost(trial, features),
        "toy": _toy(trial),
    }


def _scalings(images: Images) -> dict[str, Images]:
    """Return the same pixels in four scales; statistics of the training images."""
    x = images.x_train
    mean, std = x.mean(0), x.std(0)
    centred = x - mean
    values, vectors = torch.linalg.eigh((centred.T @ centred / len(x)).double())
    # Directions in which the training images do not vary are left at zero.
    inverse = torch.where(values > 1e-4, values.clamp(min=1e-4).rsqrt(), 0.0)
    zca = ((vectors * inverse) @ vectors.T).float()
    return {
        "0 to 255": images.map(lambda v: v * 255),
        "0 to 1": images,
        "standardized": images.map(lambda v: (v - mean) / std.clamp(min=0.05)),
        "whitened": images.map(lambda v: (v - mean) @ zca),
    }


def _restored(white: Tensor, x: Tensor) -> float:
    """Return the relative error of `x` as the best linear map of the whitened."""
    found = white.double() @ torch.linalg.lstsq(white.double(), x.double()).solution
    return ((found - x).norm() / x.norm()).item()


def _steps_to_target(
    trial: Trial, images: Images, steps: int, hidden: tuple[int, ...]
) -> dict[str, list[float]]:
    """Return each rate's steps to the target accuracy; inf if never."""
    widths = (images.x_train.shape[1], *hidden, images.classes)
    stds = stds_for(widths, math.sqrt(2)).expand(len(_RATES), -1)
    nets = Replicas(
        Recipe(widths, "relu"), stds, trial.generator(1), device=trial.device
    )
    rates = torch.tensor(_RATES, device=trial.device)
    splits = {
        "validation": (images.x_val, images.y_val),
        "test": (images.x_test, images.y_test),
    }
    found = {split: [math.inf] * len(_RATES) for split in splits}
    for step, rows in enumerate(images.batches(60, steps, trial.generator(2)), 1):
        nets.step(images.x_train[rows], images.y_train[rows], rates)
        if step % 4 and step > 40:
            continue
        for split, (x, y) in splits.items():
            found[split] = [
                step if hit >= _TARGET and known == math.inf else known
                for hit, known in zip(nets.accuracy(x, y), found[split], strict=True)
            ]
    return found


@torch.no_grad()
def _cost(trial: Trial, features: tuple[int, ...]) -> dict[str, list[float]]:
    """Time a training-mode forward in microseconds: batch norm and two whitenings.

    The batch has four samples per feature, so that the covariance has full rank.
    """
    spent: dict[str, list[float]] = {name: [] for name in _LAYERS}
    for size in features:
        x = torch.randn(4 * size, size, generator=trial.generator(3))
        layers = {name: make(size, affine=False) for name, make in _LAYERS.items()}
        rounds: dict[str, list[float]] = {name: [] for name in _LAYERS}
        for _ in range(5):
            for name, layer in layers.items():
                # Time of this process: others on the machine do not count.
                start = time.process_time()
                layer(x)
                rounds[name].append(1e6 * (time.process_time() - start))
        for name, times in rounds.items():
            spent[name].append(sorted(times)[len(times) // 2])
    return spent


def _toy(trial: Trial) -> dict[str, float]:
    """Run the example of the paper: a bias, then the mean removed.

    The bias cannot change the output. Steps that ignore the dependence of the mean on
    it change it for ever, and the loss stays.
    """
    u = torch.randn(64, generator=trial.generator(4))
    target = 1 + 0.1 * torch.randn(64, generator=trial.generator(5))
    found = {}
    for name in ("detached", "full"):
        bias = torch.zeros((), requires_grad=True)
        losses = []
        for _ in range(200):
            x = u + bias
            mean = x.mean()
            out = x - (mean.detach() if name == "detached" else mean)
            loss = (out - target).square().mean()
            (grad,) = torch.autograd.grad(loss, bias)
            with torch.no_grad():
                bias -= 0.1 * grad
            losses.append(loss.item())
        found[f"{name} bias"] = abs(bias.item())
        found[f"{name} loss change"] = max(losses) - min(losses)
    return found


def _evaluated_steps(results: list[Result], name: str) -> tuple[Pick, list[float]]:
    """Return the rate of fewest steps on validation, and the test's steps there."""
    rows = [[-v for v in r["reached"][name]["validation"]] for r in results]
    best = pick(rows, _RATES)
    return best, [r["reached"][name]["test"][best.index] for r in results]


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def faster(slow: str, fast: str) -> list[Number]:
        return [
            rules.steps_ratio(a, b, r["steps"])
            for a, b, r in zip(
                _evaluated_steps(results, slow)[1],
                _evaluated_steps(results, fast)[1],
                results,
                strict=True,
            )
        ]

    def needs(raw: str) -> rules.Part:
        picks = [_evaluated_steps(results, n)[0] for n in (raw, "standardized")]
        return rules.at_least(
            f"steps to 92 %, {raw} / standardized, best rates",
            faster(raw, "standardized"),
            1.5,
            none=1,
            about=f"against {raw}",
            unless=edges({"raw": picks[0], "standardized": picks[1]}),
        )

    def toy(name: str) -> list[float]:
        return [r["toy"][name] for r in results]

    place = len(results[0]["features"]) // 2
    middle = results[0]["features"][place]

    def times_batch_norm(name: str) -> list[float]:
        spent = [r["microseconds"] for r in results]
        return [s[name][place] / s["batch norm"][place] for s in spent]

    return [
        rules.verdict(
            "C4",
            needs("0 to 255"),
            needs("0 to 1"),
            rules.reported(
                "steps, standardized / whitened", faster("standardized", "whitened")
            ),
        ),
        rules.verdict(
            "C25",
            rules.at_most(
                "largest correlation left by whitening",
                [r["correlation"] for r in results],
                0.01,
                about="decorrelates",
            ),
            rules.at_least(
                "relative error of the inputs as a linear map of the whitened",
                [r["restored"] for r in results],
                0.1,
                none=0.01,
                about="loses what was there",
            ),
            rules.at_least(
                f"time of whitening / batch norm, {middle} features",
                times_batch_norm("whitening"),
                3,
                none=1,
                about="costly",
            ),
            rules.reported(
                "the same by Newton's method",
                times_batch_norm("whitening by Newton's method"),
            ),
        ),
        rules.verdict(
            "C81",
            rules.at_least(
                "growth of a bias under a detached mean",
                toy("detached bias"),
                10,
                none=0,
                about="parameters run away",
            ),
            rules.at_most(
                "change of the loss meanwhile",
                toy("detached loss change"),
                1e-3,
                about="nothing is learned",
            ),
            rules.reported(
                "growth of the bias under the full gradient", toy("full bias")
            ),
            note="Plain whitening leaves the statistics out of the gradient. The "
            "growth is the zero baseline's with the full gradient.",
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw steps by input scaling, and the cost of whitening."""
    left, right = figure.subplots(1, 2)
    limit = results[0]["steps"]
    rows = [
        [min(v, limit) for v in _evaluated_steps(results, name)[1]]
        for name in _SCALINGS
    ]
    bars(left, list(_SCALINGS), rows)
    left.axhline(limit, color="black", lw=0.8, ls=":", label="end of the run")
    left.legend()
    left.set(title="Steps to 92 %, best rate of each", ylabel="steps")
    for i, name in enumerate(_LAYERS):
        curves = [r["microseconds"][name] for r in results]
        band(right, results[0]["features"], curves, label=name, index=i)
    right.set(
        title="Time of one forward",
        xscale="log",
        yscale="log",
        xlabel="features",
        ylabel="µs of one core",
    )
    right.set_xticks(results[0]["features"], [str(f) for f in results[0]["features"]])
    right.minorticks_off()
    right.legend()


STUDY = Study(
    id="S15",
    title="whitening",
    question="What do standardized and whitened inputs bring, and what do they cost?",
    prediction="Standardized inputs need fewer steps; whitening costs several times "
    "more than batch norm, and a detached mean lets parameters run away.",
    seen="Left: steps to 92 % by scale of the input; the dotted line is the end of the "
    "run, which raw pixels reach without arriving. Right: the time of whitening grows "
    "far faster with the number of features than that of batch norm.",
    meaning="Standardized inputs are the cheap part of whitening, and most of the "
    "gain. Whitening keeps what it transforms, as a linear map of it, and costs tens "
    "of times as much. Done outside the gradient it lets parameters run away while the "
    "loss stands still.",
    arms=(*_SCALINGS, *_LAYERS),
    metric="Steps of a ReLU net to 92 % on the digits, best of twelve rates by "
    "validation; time of a forward over the number of features; the bias of "
    "the paper's example.",
    criterion="C4: 1.5 times fewer steps than raw scales. C25: correlations below "
    "0.01, a tenth of the input lost, three times the time of batch norm. C81: a bias "
    "that grows past 10 while the loss moves by less than 1e-3.",
    claims=("C4", "C25", "C81"),
    minutes=2,
    scales={
        "quick": Scale(2, {"steps": 80, "hidden": (32, 32), "features": (16, 64, 128)}),
        "cpu": Scale(
            10, {"steps": 400, "hidden": (48, 48), "features": (64, 256, 512)}
        ),
        "gpu": Scale(
            10, {"steps": 2000, "hidden": (256, 256), "features": (64, 256, 1024)}
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

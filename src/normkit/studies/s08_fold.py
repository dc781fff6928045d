"""S08: batch norm at inference is part of the weights."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.affine import Affine
from normkit.fold import fold
from normkit.moments import Moments
from normkit.nn import BatchNorm2d
from normkit.studies import verdict as rules
from normkit.studies.figure import bars
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import cnn, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measure(trial: Trial, *, steps: int, width: int, rounds: int) -> Result:
    """Fold a trained CNN; fold an input standardization; time both forms."""
    images = trial.images("digits").standardized()
    batches = images.batches(32, steps, trial.generator(1))
    model = cnn(10, BatchNorm2d, width=width)
    train(model, images, batches, 0.05)
    model.eval()
    x = images.x_test
    folded, ledger = fold(model, x[:4])
    with torch.no_grad():
        before, after = model(x), folded(x)
    return {
        "folded": len(ledger.folded),
        "left": len(ledger.left),
        "norms": sum(isinstance(m, BatchNorm2d) for m in model.modules()),
        "fold_error": _relative(after, before),
        "answers_changed": int((after.argmax(1) != before.argmax(1)).sum()),
        "affine_error": _affine_error(trial),
        "times": _times(model, folded, x[:64], rounds),
        **_input_fold(trial, images.x_train),
    }


def _relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@torch.no_grad()
def _affine_error(trial: Trial) -> float:
    """Compare a batch norm in eval with the affine map computed from its state."""
    generator = trial.generator(2)
    layer = BatchNorm2d(8)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        nn.init.normal_(tensor, generator=generator)  # type: ignore[arg-type]
    nn.init.uniform_(layer.running_var, 0.5, 2, generator=generator)  # type: ignore[arg-type]
    layer.eval()
    x = torch.randn(4, 8, 6, 6, generator=generator)
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    count = torch.ones((), dtype=torch.int64)
    standardize = Affine.standardize(Moments(count, mean, var), layer.eps)
    precomputed = standardize.then(Affine(layer.weight, layer.bias))
    return _relative(precomputed(x, dim=1), layer(x))


@torch.no_grad()
def _input_fold(trial: Trial, x: Tensor) -> dict[str, float]:
    """Fold x → (x − mean)/std into a convolution with zero padding, and without.

    W·(a·x + b) = (W·a)·x + ΣW·b. The padding of the folded form is 0 where that of the
    standardized image is 0: outside the image the two disagree by ΣW·b.
    """
    generator = trial.generator(3)
    raw = x[:64] * 3 + 2
    mean, std = raw.mean(), raw.std()
    weight = torch.randn(8, 1, 3, 3, generator=generator)
    scale, shift = 1 / std, -mean / std
    bias = (weight * shift).sum((1, 2, 3))
    wanted = F.conv2d(raw * scale + shift, weight, padding=1)
    folded = F.conv2d(raw, weight * scale, bias, padding=1)
    # Padding the raw image with its mean is padding the standardized one with 0.
    padded = F.conv2d(F.pad(raw, (1, 1, 1, 1), value=mean.item()), weight * scale, bias)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    return {
        "inner_error": _relative(folded[inner], wanted[inner]),
        "border_error": _relative(folded, wanted),
        "mean_padding_error": _relative(padded, wanted),
    }


@torch.no_grad()
def _times(model: nn.Module, folded: nn.Module, x: Tensor, rounds: int) -> list[float]:
    """Return the model's time over the folded one's, alternating, a ratio a round."""
    ratios = []
    for _ in range(rounds):
        spent = []
        for each in (model, folded):
            start = time.perf_counter()
            for _ in range(5):
                each(x)
            spent.append(time.perf_counter() - start)
        ratios.append(spent[0] / spent[1])
    return ratios


def _evaluated(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def column(name: str) -> list[float]:
        return [r[name] for r in results]

    speed = [_evaluated(r["times"]) for r in results]
    return [
        rules.verdict(
            "C15",
            rules.at_most(
                "relative error of the precomputed map (float32)",
                column("affine_error"),
                1e-6,
                about="the same result",
            ),
            rules.at_least(
                "time of the CNN / time with its norms folded",
                speed,
                1.05,
                none=1,
                about="less time",
            ),
        ),
        rules.verdict(
            "C60",
            rules.at_most(
                "relative error inside the image",
                column("inner_error"),
                1e-5,
                about="inside the image",
            ),
            rules.at_most(
                "relative error with a border of zeros",
                column("border_error"),
                1e-5,
                about="at a border of zeros",
            ),
            rules.reported(
                "the same, border padded with the mean", column("mean_padding_error")
            ),
            note="Exact inside. A zero-padded convolution has to pad with the mean "
            "instead, or cannot take the shift.",
        ),
        rules.verdict(
            "C64",
            rules.at_most(
                "relative error of the folded CNN (float32)", column("fold_error"), 1e-5
            ),
            rules.within(
                "share of the norms folded",
                [r["folded"] / r["norms"] for r in results],
                1,
                1,
            ),
            rules.at_most("test answers that change", column("answers_changed"), 0),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw the errors of the three folds, and the time saved."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    keys = (
        "affine_error",
        "fold_error",
        "inner_error",
        "mean_padding_error",
        "border_error",
    )
    names = (
        "eval as\naffine map",
        "norms into\nconvolutions",
        "input norm,\ninside",
        "input norm,\nmean padding",
        "input norm,\nzero padding",
    )
    bars(left, names, [[r[k] for r in results] for k in keys], indices=(0, 0, 2, 2, 1))
    left.axhline(1e-5, color="black", lw=0.8, ls=":")
    left.set(
        title="Relative error of the folded form (float32)",
        yscale="log",
        ylim=(1e-8, 10),
    )
    bars(right, ["CNN"], [[_evaluated(r["times"]) for r in results]])
    right.axhline(1, color="black", lw=0.8)
    right.set(title="Times faster folded")


STUDY = Study(
    id="S08",
    title="folding",
    question="Does batch norm disappear at inference, exactly, and save time?",
    prediction="It is a precomputed map, joins the convolution exactly, and so does "
    "the standardization of the input.",
    seen="Every fold but one is exact to rounding; standardizing the input in front of "
    "a convolution that pads with zeros is not. The folded net is faster.",
    meaning="At inference batch norm is part of the weights before it. The padding of "
    "an image is in raw units, zero is not their mean, and at the border that shows.",
    arms=("a CNN and the same folded", "an input standardization folded forward"),
    metric="Relative error in float32; ratio of times, measured in turns.",
    criterion="Errors up to 1e-6 for the map, 1e-5 for the folds, no changed answer; "
    "C15 also needs the folded CNN to be 1.05 times faster.",
    claims=("C15", "C60", "C64"),
    minutes=0.5,
    scales={
        "quick": Scale(2, {"steps": 30, "width": 8, "rounds": 10}),
        "cpu": Scale(10, {"steps": 100, "width": 16, "rounds": 20}),
        "gpu": Scale(5, {"steps": 200, "width": 16, "rounds": 40}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

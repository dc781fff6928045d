"""S10: over-fitting to wrong labels, with and without batch norm."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from normkit.studies import verdict as rules
from normkit.studies.data import Images
from normkit.studies.figure import band
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_SAME = 2
_ARMS = {"plain": "", "batch norm": "batch"}
# The shares of labels that are drawn at random.
_NOISES = (0.0, 0.4, 1.0)


def measure(
    trial: Trial, *, epochs: int, hidden: tuple[int, ...], train: int
) -> Result:
    """Measure train and test accuracy per epoch at each share of random labels."""
    images = trial.images("digits", train=train).flat().standardized()
    result: Result = {"curves": {}}
    for noise in _NOISES:
        noisy = _mislabel(images, noise, trial.generator(4))
        for arm, norm in _ARMS.items():
            curves = _train(trial, noisy, norm, epochs, hidden)
            result["curves"][f"{noise:g} {arm}"] = curves
    return result


def _mislabel(images: Images, share: float, generator: torch.Generator) -> Images:
    """Return the training labels with a share redrawn; the test labels stay."""
    count = len(images.y_train)
    drawn = torch.randint(images.classes, (count,), generator=generator)
    chosen = torch.rand(count, generator=generator) < share
    labels = torch.where(chosen.to(drawn.device), drawn, images.y_train.cpu())
    return replace(images, y_train=labels.to(images.y_train.device))


def _train(
    trial: Trial, images: Images, norm: str, epochs: int, hidden: tuple[int, ...]
) -> dict[str, list[list[float]]]:
    """Train; return accuracies of each split, `[rate][epoch]`."""
    widths = (images.x_train.shape[1], *hidden, images.classes)
    # Kaiming's gain, which is right for the plain ReLU net.
    stds = stds_for(widths, 2**0.5).expand(len(_RATES), -1)
    nets = Replicas(
        Recipe(widths, "relu", norm), stds, trial.generator(1), device=trial.device
    )
    rates = torch.tensor(_RATES, device=trial.device)
    per_epoch = len(images.y_train) // 64
    batches = images.batches(64, epochs * per_epoch, trial.generator(2))
    splits = {
        "train": (images.x_train, images.y_train),
        "validation": (images.x_val, images.y_val),
        "test": (images.x_test, images.y_test),
    }
    seen: dict[str, list] = {name: [] for name in splits}
    for number, rows in enumerate(batches, 1):
        nets.step(images.x_train[rows], images.y_train[rows], rates)
        if number % per_epoch == 0:
            with nets.population(images.x_train):
                for name, (x, y) in splits.items():
                    seen[name].append(nets.accuracy(x, y))
    return {name: torch.tensor(rows).T.tolist() for name, rows in seen.items()}


def _peak(curve: list[float]) -> int:
    """Return the epoch of the best accuracy, smoothed over three epochs."""
    values = torch.tensor(curve)
    smooth = values.unfold(0, 3, 1).mean(1) if len(values) >= 3 else values
    return int(smooth.argmax()) + 2


def _evaluated_pick(results: list[Result], name: str, *, peak: bool) -> Pick:
    """Return the rate of the best validation accuracy, at the peak or at the end."""
    scores = [
        [max(c) if peak else c[-1] for c in r["curves"][name]["validation"]]
        for r in results
    ]
    return pick(scores, _RATES)


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""
    full, plain = "batch norm", "plain"

    def peaks(arm: str, rate: int) -> list[float]:
        """Return the epochs of the highest test accuracy."""
        return [float(_peak(r["curves"][f"0.4 {arm}"]["test"][rate])) for r in results]

    def reason(noise: str, *, peak: bool) -> str:
        arms = (full, plain)
        return edges(
            {a: _evaluated_pick(results, f"{noise} {a}", peak=peak) for a in arms}
        )

    def best_peaks(arm: str) -> list[float]:
        return peaks(arm, _evaluated_pick(results, f"0.4 {arm}", peak=True).index)

    def fallen(arm: str) -> list[float]:
        """Return the points lost on the test from the validation's peak to the end."""
        found = []
        for r in results:
            curves = r["curves"][f"0.4 {arm}"]
            peak = _peak(curves["validation"][_SAME]) - 1
            test = curves["test"][_SAME]
            found.append(100 * (test[peak] - sum(test[-3:]) / 3))
        return found

    def last(noise: str, arm: str, rate: int | None) -> list[float]:
        name = f"{noise} {arm}"
        best = _evaluated_pick(results, name, peak=False).index
        return [
            100 * r["curves"][name]["test"][best if rate is None else rate][-1]
            for r in results
        ]

    def difference(noise: str, rate: int | None) -> list[float]:
        return rules.minus(last(noise, full, rate), last(noise, plain, rate))

    def higher(noise: str, about: str) -> rules.Part:
        text = f"final test accuracy, {about}, best rates, batch norm − plain, points"
        gained = difference(noise, None)
        edge = reason(noise, peak=False)
        return rules.at_least(text, gained, 1, none=0, about=about, unless=edge)

    def fitted(arm: str) -> list[float]:
        """Return the highest training accuracy on random labels, any rate."""
        return [
            100 * max(max(row) for row in r["curves"][f"1 {arm}"]["train"])
            for r in results
        ]

    return [
        rules.verdict(
            "C57",
            higher("0", "clean labels"),
            higher("0.4", "40 % random labels"),
            rules.reported("the same at one rate, clean", difference("0", _SAME)),
            rules.reported(
                "the same at one rate, 40 % random", difference("0.4", _SAME)
            ),
        ),
        rules.verdict(
            "C62",
            rules.at_least(
                "epoch of the peak, 40 % random labels, same rate, batch norm / plain",
                rules.over(peaks(full, _SAME), peaks(plain, _SAME)),
                1.2,
                none=1,
                about="postpones, same rate",
            ),
            rules.at_least(
                "the same, best rates",
                rules.over(best_peaks(full), best_peaks(plain)),
                1.2,
                none=1,
                about="postpones, best rates",
                unless=reason("0.4", peak=True),
            ),
            rules.at_least(
                "points lost after the peak, batch norm",
                fallen(full),
                1,
                none=0,
                about="cannot prevent",
            ),
            rules.reported("points lost after the peak, plain", fallen(plain)),
            rules.reported(
                "training accuracy on random labels, batch norm, %", fitted(full)
            ),
            rules.reported("the same, plain, %", fitted(plain)),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw test accuracy with noisy labels, and training accuracy on random ones."""
    axes = figure.subplots(1, 3)
    plots = (
        ("0", "test", "Test, clean labels"),
        ("0.4", "test", "Test, 40 % random labels"),
        ("1", "train", "Training, random labels"),
    )
    for ax, (noise, kind, title) in zip(axes, plots, strict=True):
        for i, arm in enumerate(_ARMS):
            rows = [r["curves"][f"{noise} {arm}"][kind][_SAME] for r in results]
            band(ax, range(1, len(rows[0]) + 1), rows, label=arm, index=i)
        ax.set(title=title, xlabel="epoch")
    axes[0].set_ylabel(f"accuracy, rate {_RATES[_SAME]:g}")
    axes[0].legend()


STUDY = Study(
    id="S10",
    title="noisy labels",
    question="Does batch norm delay or prevent over-fitting to wrong labels?",
    prediction="The best epoch comes later with batch norm; over-fitting comes all the "
    "same.",
    seen="Middle: with 40 % of the labels wrong accuracy rises, then falls as the "
    "wrong labels are learned, sooner and further with batch norm. Right: it learns "
    "random labels faster.",
    meaning="Batch norm speeds up learning, of wrong labels too: the best epoch comes "
    "earlier, not later. It prevents nothing. At the best rates both end alike.",
    arms=("plain", "batch norm", "0, 40 and 100 % random labels", "six rates"),
    metric="Epoch of the best test accuracy (three-epoch mean), what is lost after the "
    "peak on validation, and how well random labels are learned; ReLU nets on the "
    "digits, rates by validation, whose labels are as noisy as the test's: not at all.",
    criterion="C62: the peak comes 1.2 times later, at the same rate and at the best "
    "rates; and batch norm loses a point after it. C57: a point more at the end.",
    claims=("C57", "C62"),
    minutes=4,
    scales={
        "quick": Scale(2, {"epochs": 8, "hidden": (64, 64), "train": 400}),
        "cpu": Scale(10, {"epochs": 30, "hidden": (80, 80), "train": 900}),
        "gpu": Scale(10, {"epochs": 200, "hidden": (512, 512, 512), "train": 0}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

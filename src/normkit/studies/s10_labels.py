"""S10: over-fitting to wrong labels, with and without batch norm."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from normkit.studies.data import Images
from normkit.studies.figure import band
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.verdict import Verdict, at_least, minus, reported, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (0.03, 0.1, 0.3)
_SAME = 1
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
    """Train; return `test` and `train` accuracies, `[rate][epoch]`."""
    widths = (images.x_train.shape[1], *hidden, images.classes)
    # Kaiming's gain, which is right for the plain ReLU net.
    stds = stds_for(widths, 2**0.5).expand(len(_RATES), -1)
    nets = Replicas(
        Recipe(widths, "relu", norm), stds, trial.generator(1), device=trial.device
    )
    rates = torch.tensor(_RATES, device=trial.device)
    per_epoch = len(images.y_train) // 64
    batches = images.batches(64, epochs * per_epoch, trial.generator(2))
    test, known = [], []
    for number, rows in enumerate(batches, 1):
        nets.step(images.x_train[rows], images.y_train[rows], rates)
        if number % per_epoch == 0:
            with nets.population(images.x_train):
                test.append(nets.accuracy(images.x_test, images.y_test))
                known.append(nets.accuracy(images.x_train, images.y_train))
    return {
        "test": torch.tensor(test).T.tolist(),
        "train": torch.tensor(known).T.tolist(),
    }


def _peak(curve: list[float]) -> int:
    """Return the epoch of the best test accuracy, smoothed over three epochs."""
    values = torch.tensor(curve)
    smooth = values.unfold(0, 3, 1).mean(1) if len(values) >= 3 else values
    return int(smooth.argmax()) + 2


def _best(curves: dict[str, list]) -> int:
    """Return the rate with the highest peak of test accuracy."""
    return int(torch.tensor(curves["test"]).amax(1).argmax())


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""

    def peak_ratio(noise: str, *, same: bool) -> list[float]:
        ratios = []
        for r in results:
            full, plain = (
                r["curves"][f"{noise} {arm}"] for arm in ("batch norm", "plain")
            )
            picks = (_SAME, _SAME) if same else (_best(full), _best(plain))
            ratios.append(
                _peak(full["test"][picks[0]]) / _peak(plain["test"][picks[1]])
            )
        return ratios

    def fallen(arm: str) -> list[float]:
        """Return the points lost from the peak to the end."""
        return [
            100 * (max(c) - sum(c[-3:]) / 3)
            for c in (r["curves"][f"0.4 {arm}"]["test"][_SAME] for r in results)
        ]

    def last(noise: str, arm: str, kind: str, rate: int | None = None) -> list[float]:
        found = []
        for r in results:
            curves = r["curves"][f"{noise} {arm}"]
            pick = _best(curves) if rate is None else rate
            found.append(100 * curves[kind][pick][-1])
        return found

    def difference(noise: str, rate: int | None) -> list[float]:
        return minus(
            *(last(noise, arm, "test", rate) for arm in ("batch norm", "plain"))
        )

    def fitted(arm: str) -> list[float]:
        """Return the highest training accuracy on random labels, any rate."""
        return [
            100 * max(max(row) for row in r["curves"][f"1 {arm}"]["train"])
            for r in results
        ]

    return [
        verdict(
            "C57",
            at_least(
                "final test accuracy, clean, best rates, batch norm − plain, points",
                difference("0", None),
                0.5,
                none=0,
            ),
            at_least(
                "the same with 40 % random labels", difference("0.4", None), 0.5, none=0
            ),
            reported("the same at one rate, clean", difference("0", _SAME)),
            reported("the same at one rate, 40 % random", difference("0.4", _SAME)),
        ),
        verdict(
            "C62",
            at_least(
                "epoch of the peak, 40 % random labels, same rate, batch norm / plain",
                peak_ratio("0.4", same=True),
                1.2,
                none=1,
            ),
            at_least(
                "the same, best rates", peak_ratio("0.4", same=False), 1.2, none=1
            ),
            at_least(
                "points lost after the peak, batch norm",
                fallen("batch norm"),
                1,
                none=0,
            ),
            reported("points lost after the peak, plain", fallen("plain")),
            reported(
                "training accuracy on random labels, batch norm, %",
                fitted("batch norm"),
            ),
            reported("the same, plain, %", fitted("plain")),
            note="The first two parts say “postpones”, the third “cannot prevent”.",
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
    arms=("plain", "batch norm", "0, 40 and 100 % random labels", "three rates"),
    metric="Epoch of the best test accuracy (three-epoch mean), what is lost after it, "
    "and how well random labels are learned; ReLU nets on the digits.",
    criterion="C62: the peak comes 1.2 times later, at the same rate and at the best "
    "rates; and batch norm loses a point after it. C57: half a point more at the end.",
    claims=("C57", "C62"),
    minutes=4,
    scales={
        "quick": Scale(2, {"epochs": 8, "hidden": (64, 64), "train": 400}),
        "cpu": Scale(5, {"epochs": 60, "hidden": (128, 128, 128), "train": 1000}),
        "gpu": Scale(10, {"epochs": 200, "hidden": (512, 512, 512), "train": 0}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

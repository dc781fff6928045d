"""S07: which statistics to use at inference."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from normkit.calibrate import calibrate
from normkit.nn import BatchNorm1d, BatchNorm2d
from normkit.studies.data import Images
from normkit.studies.figure import band, bars_by_group
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import accuracy, cnn, train
from normkit.studies.verdict import Verdict, at_least, at_most, reported, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Torch's momentum: the share of the new batch. None gives all batches the same share.
_MOMENTA = {"decay 0.9": 0.1, "decay 0.99": 0.01, "all batches of training": None}
_ESTIMATORS = (
    *_MOMENTA,
    "average, weights frozen",
    "exact, weights frozen",
)


def measure(
    trial: Trial, *, sizes: tuple[int, ...], epochs: int, width: int, rate: float
) -> Result:
    """Train once per moving average; the weights come out the same each time."""
    images = trial.images("digits").standardized()
    result: Result = {"sizes": list(sizes), "gaps": {}, "train_mode": {}}
    weights_apart = 0.0
    model: nn.Module = nn.Identity()
    for size in sizes:
        steps = epochs * len(images.y_train) // size
        batches = images.batches(size, steps, trial.generator(1))
        models = {}
        for name, momentum in _MOMENTA.items():
            torch.manual_seed(trial.seed)
            model = cnn(
                10, lambda c, m=momentum: BatchNorm2d(c, momentum=m), width=width
            )
            train(model, images, batches, rate * (size / 32) ** 0.5)
            models[name] = model
        for name, mode in (("average", "average"), ("exact", "exact")):
            frozen = copy.deepcopy(models["decay 0.9"])
            again = images.batches(
                size, len(images.y_train) // size, trial.generator(2)
            )
            calibrate(frozen, [images.x_train[rows] for rows in again], mode=mode)
            models[f"{name}, weights frozen"] = frozen
        first = models["decay 0.9"].state_dict()
        for name in ("decay 0.99", "all batches of training"):
            for key, value in models[name].state_dict().items():
                if "running" not in key:
                    apart = (value - first[key]).abs().max().item()
                    weights_apart = max(weights_apart, apart)
        reference = _train_mode_accuracy(trial, models["decay 0.9"], images, size)
        result["train_mode"][str(size)] = reference
        result["gaps"][str(size)] = {
            name: 100 * (accuracy(m, images.x_test, images.y_test) - reference)
            for name, m in models.items()
        }
    result["weights_apart"] = weights_apart
    result["output_change"] = _output_change(model, images.x_train[:32])
    result["start_share"] = _start_share(trial)
    return result


@torch.no_grad()
def _train_mode_accuracy(
    trial: Trial, model: nn.Module, images: Images, size: int
) -> float:
    """Return test accuracy, normalized by test batches of the training size."""
    probe = copy.deepcopy(model).train()
    hits = []
    for repeat in range(3):
        order = torch.randperm(
            len(images.y_test), generator=trial.generator(10 + repeat)
        )
        for rows in order.split(size):
            if len(rows) == size:
                answer = probe(images.x_test[rows]).argmax(1)
                hits.append((answer == images.y_test[rows]).float().mean())
    return torch.stack(hits).mean().item()


@torch.no_grad()
def _output_change(model: nn.Module, x: Tensor) -> float:
    """Return how much a training-mode output changes when the running statistics do."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.1, 9)  # type: ignore[arg-type]
    return (model.train()(x) - other.train()(x)).abs().max().item()


def _start_share(trial: Trial) -> dict[str, list[float]]:
    """Return the start's share in running_mean after n batches of one distribution."""
    layer = BatchNorm1d(4096)
    generator = trial.generator(3)
    shares = []
    for _ in range(40):
        layer(5 + torch.randn(64, 4096, generator=generator))
        assert layer.running_mean is not None
        shares.append(1 - layer.running_mean.mean().item() / 5)
    return {"measured": shares, "formula": [0.9 ** (n + 1) for n in range(40)]}


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""
    sizes = results[0]["sizes"]

    def gap(name: str, size: int) -> list[float]:
        """Return eval accuracy minus the average over frozen weights, in points."""
        return [
            r["gaps"][str(size)][name] - r["gaps"][str(size)]["average, weights frozen"]
            for r in results
        ]

    def close(name: str, size: int):
        return at_most(
            f"|{name} − frozen average|, batch {size}, points",
            [abs(v) for v in gap(name, size)],
            0.5,
            none=1,
        )

    frozen = [
        at_most(
            f"|eval with the frozen average − training mode|, batch {size}, points",
            [abs(r["gaps"][str(size)]["average, weights frozen"]) for r in results],
            0.5,
            none=1,
        )
        for size in sizes
    ]
    unchanged = [r["output_change"] for r in results]
    apart = [r["weights_apart"] for r in results]
    error = [
        max(
            abs(a - b)
            for a, b in zip(
                r["start_share"]["measured"], r["start_share"]["formula"], strict=True
            )
        )
        for r in results
    ]
    return [
        verdict("C14", *frozen),
        verdict(
            "C28",
            *(close("all batches of training", size) for size in sizes),
            *(close("decay 0.9", size) for size in sizes),
            *(
                reported(
                    f"decay 0.99 − frozen average, batch {size}, points",
                    gap("decay 0.99", size),
                )
                for size in sizes
            ),
            note="The average over all batches of training mixes in those that other "
            "weights saw; the moving average forgets them.",
        ),
        verdict(
            "C29",
            at_most(
                "difference of weights trained with other moving averages", apart, 0
            ),
            at_most(
                "share of the start left after 10 batches of decay 0.9",
                [r["start_share"]["measured"][9] for r in results],
                0.01,
            ),
            reported("largest error of the formula (1 − m)ⁿ", error),
        ),
        verdict(
            "C66",
            at_least(
                "change of the training output when the running statistics change",
                unchanged,
                1e-6,
            ),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw each estimator's accuracy against training mode, and the start's share."""
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    sizes = results[0]["sizes"]
    rows = {
        name: [[r["gaps"][str(size)][name] for r in results] for size in sizes]
        for name in _ESTIMATORS
    }
    bars_by_group(left, [f"batch {size}" for size in sizes], rows)
    left.axhline(0, color="black", lw=0.8)
    left.set(title="Test accuracy in eval minus training mode", ylabel="points")
    left.legend(fontsize=6.5)
    steps = range(1, 41)
    band(
        right, steps, [r["start_share"]["measured"] for r in results], label="measured"
    )
    right.plot(steps, results[0]["start_share"]["formula"], "k:", label="(1 − 0.1)ⁿ")
    right.set(title="Share of the start left", xlabel="batches n")
    right.legend()


STUDY = Study(
    id="S07",
    title="population statistics",
    question="Which estimate of the population statistics should inference use?",
    prediction="The average over all training batches and the moving average of decay "
    "0.9 both do as well as the statistics of the final weights.",
    arms=_ESTIMATORS,
    metric="Test accuracy of a small CNN in eval mode, against the same weights "
    "normalized by test batches.",
    criterion="An estimate does when it is within half a point; 1 point away is a "
    "failure. C29: weights equal whatever is recorded, and less than 1 % of the "
    "start left after ten batches. C66: the training output has to change by 1e-6.",
    claims=("C14", "C28", "C29", "C66"),
    minutes=4,
    scales={
        "quick": Scale(2, {"sizes": (32,), "epochs": 1, "width": 8, "rate": 0.05}),
        "cpu": Scale(7, {"sizes": (4, 32), "epochs": 2, "width": 16, "rate": 0.05}),
        "gpu": Scale(
            10, {"sizes": (4, 32, 256), "epochs": 20, "width": 64, "rate": 0.05}
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

"""S07: which statistics to use at inference."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.calibrate import calibrate
from normkit.nn import BatchNorm1d, BatchNorm2d
from normkit.studies import verdict as rules
from normkit.studies.data import Images
from normkit.studies.figure import band, bars_by_group
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import accuracy, cnn, train

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
    trial: Trial,
    *,
    data: str,
    train_images: int,
    sizes: tuple[int, ...],
    steps: int,
    width: int,
    rate: float,
) -> Result:
    """Train once per moving average; the weights come out the same each time."""
    images = trial.images(data, train=train_images, val=1, test=2000).standardized()
    if images.x_train.shape[-1] > 16:  # 14 × 14 pixels of MNIST are enough, and fast
        images = images.map(lambda x: F.avg_pool2d(x, 2))
    result: Result = {
        "data": images.name,
        "sizes": list(sizes),
        "gaps": {},
        "train_mode": {},
    }
    weights_apart = 0.0
    model: nn.Module = nn.Identity()
    for size in sizes:
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
    result["variance"] = _variance_estimates(trial)
    return result


@torch.no_grad()
def _train_mode_accuracy(
    trial: Trial, model: nn.Module, images: Images, size: int
) -> float:
    """Return test accuracy, normalized by test batches of the training size."""
    probe = copy.deepcopy(model).train()
    hits = []
    for repeat in range(2):
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
    for _ in range(100):
        layer(5 + torch.randn(64, 4096, generator=generator))
        assert layer.running_mean is not None
        shares.append(1 - layer.running_mean.mean().item() / 5)
    return {"measured": shares, "formula": [0.9 ** (n + 1) for n in range(100)]}


def _variance_estimates(trial: Trial) -> dict[str, float]:
    """Return E[σ²]/Var over many batches of 8, times m/(m − 1) and without."""
    x = 3 * torch.randn(40_000, 8, generator=trial.generator(4))
    mean = x.var(1, correction=0).mean().item() / 9
    return {"biased": mean, "unbiased": mean * 8 / 7}


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""
    sizes = results[0]["sizes"]

    def gap(name: str, size: int) -> list[float]:
        """Return eval accuracy minus the average over frozen weights, in points."""
        return [
            r["gaps"][str(size)][name] - r["gaps"][str(size)]["average, weights frozen"]
            for r in results
        ]

    # Half a point is 10 of 2000 test images; of 500 digits it would be two and a half.
    bound = 0.5 if results[0]["data"] == "mnist" else 1.0

    def close(name: str, size: int, about: str) -> rules.Part:
        return rules.at_most(
            f"|{name} − frozen average|, batch {size}, points",
            [abs(v) for v in gap(name, size)],
            bound,
            none=2 * bound,
            about=f"{about}, batch {size}",
        )

    def as_training(name: str, size: int, about: str) -> rules.Part:
        return rules.at_most(
            f"|eval with {name} − training mode|, batch {size}, points",
            [abs(r["gaps"][str(size)][name]) for r in results],
            bound,
            none=2 * bound,
            about=f"{about}, batch {size}",
        )

    remembered = [
        as_training("all batches of training", size, "batches remembered")
        for size in sizes
    ]
    frozen = [
        as_training("average, weights frozen", size, "weights frozen") for size in sizes
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
        rules.verdict("C14", *remembered, *frozen),
        rules.verdict(
            "C28",
            *(close("all batches of training", size, "all batches") for size in sizes),
            *(close("decay 0.9", size, "decay 0.9") for size in sizes),
            *(
                rules.reported(
                    f"decay 0.99 − frozen average, batch {size}, points",
                    gap("decay 0.99", size),
                )
                for size in sizes
            ),
            note="The average over all batches of training mixes in those that other "
            "weights saw; the moving average forgets them.",
        ),
        rules.verdict(
            "C29",
            rules.at_most(
                "difference of weights trained with other moving averages",
                apart,
                0,
                about="only recorded",
            ),
            *(
                rules.at_most(
                    f"relative bias after {count} batches of decay 0.9",
                    [r["start_share"]["measured"][count - 1] for r in results],
                    0.01,
                    about=f"unbiased after {count} batches",
                )
                for count in (10, 100)
            ),
            rules.reported("largest error of the formula (1 − m)ⁿ", error),
        ),
        rules.verdict(
            "C66",
            rules.at_least(
                "change of the training output when the running statistics change",
                unchanged,
                1e-6,
            ),
        ),
        rules.verdict(
            "C71",
            rules.within(
                "m/(m − 1)·E[σ²] / Var, batches of 8",
                [r["variance"]["unbiased"] for r in results],
                0.99,
                1.01,
            ),
            rules.reported(
                "the same without the factor",
                [r["variance"]["biased"] for r in results],
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
    measured = [r["start_share"]["measured"][:40] for r in results]
    band(right, steps, measured, label="measured")
    right.plot(
        steps, results[0]["start_share"]["formula"][:40], "k:", label="(1 − 0.1)ⁿ"
    )
    right.set(title="Share of the start left", xlabel="batches n")
    right.legend()


STUDY = Study(
    id="S07",
    title="population statistics",
    question="Which estimate of the population statistics should inference use?",
    prediction="The average over all training batches and the moving average of decay "
    "0.9 both do as well as the statistics of the final weights.",
    seen="Bars are eval minus training-mode accuracy: 0 is what is wanted. The average "
    "over all batches of training is points below in a short run, averages with the "
    "weights frozen are at 0. Right: how much of its start a moving average still "
    "holds.",
    meaning="Statistics belong to weights. Those of batches that early weights saw are "
    "wrong for the last ones; measured anew with the weights frozen they are right. A "
    "moving average forgets its start within some fifty batches, and lags where "
    "weights still move fast.",
    arms=_ESTIMATORS,
    metric="Test accuracy of a small CNN in eval mode, against the same weights "
    "normalized by test batches.",
    criterion="An estimate does when it is within half a point (one of the digits), of "
    "training mode (C14) or of the frozen average (C28); twice as far is a failure. "
    "C29: weights equal whatever is recorded, and a bias below 1 % after 10 and after "
    "100 batches. C66: the training output has to change by 1e-6. C71: within 1 %.",
    claims=("C14", "C28", "C29", "C66", "C71"),
    minutes=4,
    scales={
        "quick": Scale(
            2,
            {
                "data": "digits",
                "train_images": 0,
                "sizes": (32,),
                "steps": 40,
                "width": 8,
                "rate": 0.05,
            },
        ),
        "cpu": Scale(
            10,
            {
                "data": "mnist",
                "train_images": 2400,
                "sizes": (4, 32),
                "steps": 300,
                "width": 8,
                "rate": 0.05,
            },
        ),
        "gpu": Scale(
            10,
            {
                "data": "mnist",
                "train_images": 0,
                "sizes": (4, 32, 256),
                "steps": 5000,
                "width": 64,
                "rate": 0.05,
            },
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

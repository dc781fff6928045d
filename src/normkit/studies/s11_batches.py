"""S11: how large a batch, and how well mixed."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.calibrate import calibrate
from normkit.errors import NormkitError
from normkit.nn import BatchNorm2d, BatchRenorm2d, GroupNorm
from normkit.studies.data import Images
from normkit.studies.figure import band, bars_by_group
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import accuracy, cnn, train
from normkit.studies.verdict import (
    Verdict,
    at_least,
    at_most,
    minus,
    reported,
    verdict,
    within,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_ARMS = ("batch norm", "batch renorm", "group norm")


def _norm(arm: str, steps: int, epochs: int) -> Callable[[int], nn.Module]:
    """Return a maker of an arm's layer, for so many training steps and epochs.

    Batch renorm is plain batch norm for a quarter of the steps and fully itself from
    the half on. Its average spans an epoch, so that it has seen every class, where
    that is 10 to 100 batches.
    """
    if arm == "batch norm":
        return BatchNorm2d
    if arm == "group norm":
        return lambda channels: GroupNorm(min(8, channels // 2), channels)
    return functools.partial(
        BatchRenorm2d,
        momentum=min(0.1, max(0.01, epochs / steps)),
        renorm_from=steps // 4,
        d_max_at=steps // 2,
        r_max_at=steps // 2,
    )


def measure(
    trial: Trial,
    *,
    sizes: tuple[int, ...],
    epochs: int,
    width: int,
    mix_epochs: int,
    noise_draws: int,
) -> Result:
    """Measure batch size, order of the data, ghost batches, and their noise."""
    images = trial.images("digits").standardized()
    table: dict[str, dict[str, float]] = {}
    for arm in _ARMS:
        table[arm] = {}
        for size in sizes:
            steps = epochs * len(images.y_train) // size
            batches = images.batches(size, steps, trial.generator(1))
            norm = _norm(arm, steps, epochs)
            model = _fit(trial, images, batches, norm, width, 0.05 * (size / 32) ** 0.5)
            table[arm][str(size)] = 100 * accuracy(model, images.x_test, images.y_test)
    return {
        "sizes": list(sizes),
        "table": table,
        "orders": _orders(trial, images, width, mix_epochs),
        "ghosts": _ghosts(trial, images, width, mix_epochs),
        "noise": _noise(trial, images, width, noise_draws),
        "direction": _direction(trial, images, width),
        "one_sample_error": _refuses_one_value(),
    }


def _fit(
    trial: Trial,
    images: Images,
    batches: Tensor,
    norm: Callable[[int], nn.Module],
    width: int,
    rate: float,
) -> nn.Module:
    torch.manual_seed(trial.seed)
    model = cnn(images.classes, norm, width=width)
    train(model, images, batches, rate)
    return model


def _orders(
    trial: Trial, images: Images, width: int, epochs: int
) -> dict[str, dict[str, float]]:
    """Measure accuracy after training on shuffled, half-shuffled and sorted data."""
    by_class = images.y_train.argsort(stable=True)
    count, size = len(by_class), 64
    generator = trial.generator(5)
    found: dict[str, dict[str, float]] = {}
    for order in ("shuffled", "buffer of 200", "sorted"):
        rows = []
        for _ in range(epochs):
            if order == "shuffled":
                epoch = torch.randperm(count, generator=generator)
            elif order == "sorted":
                epoch = by_class
            else:
                epoch = by_class[_through_buffer(count, 200, generator)]
            rows.append(epoch[: count // size * size].view(-1, size))
        batches = torch.cat(rows)
        found[order] = {}
        for arm in _ARMS:
            norm = _norm(arm, len(batches), epochs)
            model = _fit(trial, images, batches, norm, width, 0.05)
            found[order][arm] = 100 * accuracy(model, images.x_test, images.y_test)
            if arm == "batch norm":
                calibrate(model, [images.x_train])
                exact = 100 * accuracy(model, images.x_test, images.y_test)
                found[order]["batch norm, exact statistics"] = exact
    return found


def _through_buffer(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return positions in the order that a shuffle buffer of `size` yields them."""
    buffer = list(range(size))
    out = []
    for position in range(size, count + size):
        pick = int(torch.randint(len(buffer), (), generator=generator))
        out.append(buffer[pick])
        if position < count:
            buffer[pick] = position
        else:
            buffer.pop(pick)
    return torch.tensor(out)


def _ghosts(
    trial: Trial, images: Images, width: int, epochs: int
) -> dict[str, dict[str, float]]:
    """Measure accuracies on few images by ghost batch, at one SGD batch."""
    few = trial.images("digits", train=256).standardized()
    batches = few.batches(128, 10 * epochs, trial.generator(6))
    found = {}
    for size in (4, 16, 128):
        model = _fit(
            trial,
            few,
            batches,
            lambda c, s=size: BatchNorm2d(c, ghost_size=s),
            width,
            0.05,
        )
        calibrate(model, [few.x_train])
        found[str(size)] = {
            "test": 100 * accuracy(model, few.x_test, few.y_test),
            "train": 100 * accuracy(model, few.x_train, few.y_train),
        }
    return found


@torch.no_grad()
def _noise(
    trial: Trial, images: Images, width: int, draws: int
) -> dict[str, list[float]]:
    """Measure how much four fixed samples' logits vary with the rest of their batch."""
    batches = images.batches(64, 60, trial.generator(7))
    with torch.enable_grad():
        model = _fit(trial, images, batches, BatchNorm2d, width, 0.05).train()
    generator = trial.generator(8)
    sizes, spread = (8, 16, 32, 64, 128, 256), []
    for size in sizes:
        answers = []
        for _ in range(draws):
            mates = torch.randint(len(images.y_train), (size - 1,), generator=generator)
            answers.append(
                torch.stack(
                    [
                        model(
                            torch.cat([images.x_test[i : i + 1], images.x_train[mates]])
                        )[0]
                        for i in range(4)
                    ]
                )
            )
        spread.append(torch.stack(answers).std(0).mean().item())
    return {"sizes": list(sizes), "spread": spread}


def _direction(trial: Trial, images: Images, width: int) -> dict[str, list[float]]:
    """Return a batch gradient's cosine with the full one, and samples per second.

    The model has no norm layer, so that the gradient of a batch is a mean over samples.
    """
    torch.manual_seed(trial.seed)
    model = cnn(images.classes, None, width=width)
    parameters = list(model.parameters())

    def gradient(rows: Tensor) -> Tensor:
        loss = F.cross_entropy(model(images.x_train[rows]), images.y_train[rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    everything = gradient(torch.arange(len(images.y_train)))
    generator = trial.generator(9)
    sizes, cosines, rates = (1, 4, 16, 64), [], []
    for size in sizes:
        found = []
        start = time.perf_counter()
        for _ in range(12):
            rows = torch.randint(len(images.y_train), (size,), generator=generator)
            found.append(F.cosine_similarity(gradient(rows), everything, dim=0))
        rates.append(12 * size / (time.perf_counter() - start))
        cosines.append(torch.stack(found).mean().item())
    return {"sizes": list(sizes), "cosine": cosines, "samples_per_second": rates}


def _refuses_one_value() -> bool:
    try:
        BatchNorm2d(3).train()(torch.randn(1, 3, 1, 1))
    except NormkitError:
        return True
    return False


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""
    sizes = results[0]["sizes"]
    small, middle = str(sizes[0]), "32"

    def cell(arm: str, size: str) -> list[float]:
        return [r["table"][arm][size] for r in results]

    def order(name: str, arm: str) -> list[float]:
        return [r["orders"][name][arm] for r in results]

    def lost(arm: str) -> list[float]:
        return minus(order("shuffled", arm), order("sorted", arm))

    def ghost(size: int, split: str) -> list[float]:
        return [r["ghosts"][str(size)][split] for r in results]

    def gap(size: int) -> list[float]:
        return minus(ghost(size, "train"), ghost(size, "test"))

    slopes = [
        np.polyfit(np.log(r["noise"]["sizes"]), np.log(r["noise"]["spread"]), 1)[0]
        for r in results
    ]
    cosines = [r["direction"]["cosine"] for r in results]
    rates = [r["direction"]["samples_per_second"] for r in results]
    return [
        verdict(
            "C16",
            at_least(
                "smallest gain in cosine from one batch size to the next",
                [min(b - a for a, b in itertools.pairwise(c)) for c in cosines],
                0,
            ),
            at_least(
                "samples per second, batch 64 / batch 1",
                [per_second[-1] / per_second[0] for per_second in rates],
                5,
                none=1,
            ),
            reported(
                "cosine of batch 64 / cosine of batch 1",
                [c[-1] / c[0] for c in cosines],
            ),
        ),
        verdict(
            "C34",
            within(
                "slope of log spread of an output against log batch",
                slopes,
                -0.65,
                -0.35,
            ),
            at_least(
                "test accuracy, ghost batch 16 − 128, points",
                minus(ghost(16, "test"), ghost(128, "test")),
                0.3,
                none=0,
            ),
            note="The first part: there is such noise. The second: it regularizes.",
        ),
        verdict(
            "C50",
            at_least(
                "points lost by sorted data, batch norm", lost("batch norm"), 20, none=0
            ),
            at_least(
                "the same, batch norm − group norm",
                minus(lost("batch norm"), lost("group norm")),
                1,
                none=0,
            ),
            at_least(
                f"accuracy, batch norm, batch {middle} − batch {small}, points",
                minus(cell("batch norm", middle), cell("batch norm", small)),
                5,
                none=0,
            ),
            reported(
                "sorted, batch norm with exact statistics, %",
                order("sorted", "batch norm, exact statistics"),
            ),
            reported("sorted, batch renorm, %", order("sorted", "batch renorm")),
            reported("sorted, group norm, %", order("sorted", "group norm")),
        ),
        verdict(
            "C63",
            at_least(
                "gap of training and test accuracy, ghost batch 128 − 4, points",
                minus(gap(128), gap(4)),
                0.3,
                none=0,
            ),
            reported(
                "test accuracy, ghost batch 4 − 128, points",
                minus(ghost(4, "test"), ghost(128, "test")),
            ),
        ),
        verdict(
            "C65",
            at_most(
                "one value per channel trains (0: refused)",
                [0.0 if r["one_sample_error"] else 1.0 for r in results],
                0,
            ),
            at_least(
                f"accuracy at batch {small}, group − batch norm, points",
                minus(cell("group norm", small), cell("batch norm", small)),
                5,
                none=0,
            ),
            reported(
                f"accuracy at batch {small}, batch renorm − batch norm, points",
                minus(cell("batch renorm", small), cell("batch norm", small)),
            ),
            note="Maps larger than 1 × 1 give one image several values per channel: it "
            "trains.",
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw accuracy over batch size, order of the data, and noise of the statistics."""
    axes = figure.subplots(1, 3, width_ratios=(1, 1.3, 0.9))
    sizes = results[0]["sizes"]
    for i, arm in enumerate(_ARMS):
        rows = [[r["table"][arm][str(s)] for s in sizes] for r in results]
        band(axes[0], sizes, rows, label=arm, index=i)
    axes[0].set(
        title="Test accuracy by batch", xlabel="batch", ylabel="%", xscale="log"
    )
    axes[0].set_xticks(sizes, [str(s) for s in sizes])
    axes[0].minorticks_off()
    axes[0].legend(loc="lower right")
    orders = ("shuffled", "buffer of 200", "sorted")
    exact = "batch norm, exact statistics"
    rows = {
        arm: [[r["orders"][o][arm] for r in results] for o in orders]
        for arm in (_ARMS[0], exact, *_ARMS[1:])
    }
    names = ["shuffled", "buffer\nof 200", "sorted"]
    bars_by_group(axes[1], names, rows, indices=(0, 5, 1, 2))
    axes[1].set(title="Test accuracy by order", ylim=(0, 180))
    axes[1].set_yticks(range(0, 101, 20))
    axes[1].legend(loc="upper right", handlelength=1)
    noise = results[0]["noise"]["sizes"]
    spread = [r["noise"]["spread"] for r in results]
    band(axes[2], noise, spread, index=0)
    line = [spread[0][0] * math.sqrt(noise[0] / s) for s in noise]
    axes[2].plot(noise, line, "k:", label="1/√batch")
    axes[2].set(title="Spread of a logit", xscale="log", yscale="log", xlabel="batch")
    axes[2].legend()


STUDY = Study(
    id="S11",
    title="batches",
    question="How do size and order of the batches act through batch norm?",
    prediction="Small or sorted batches ruin batch norm and not group norm; batch "
    "renorm, added later with a prediction of its own, lies between them. The noise "
    "falls with the root of the batch and regularizes.",
    arms=(
        *_ARMS,
        "ghost batches",
        "shuffled, buffered and sorted data",
    ),
    metric="Test accuracy of a small CNN at equal epochs; spread of an output over "
    "batch-mates; cosine of a batch's gradient with the full one.",
    criterion="C50: sorted data costs 20 points, group norm less; batch 32 is 5 points "
    "above the smallest. C34: slope −0.65 to −0.35, ghost batches of 16 give 0.3 "
    "points. C63: a gap smaller by 0.3. C16: cosine grows, five times the samples per "
    "second. C65: one value is refused, group norm 5 points ahead.",
    claims=("C16", "C34", "C50", "C63", "C65"),
    minutes=8,
    scales={
        "quick": Scale(
            2,
            {
                "sizes": (8, 32),
                "epochs": 1,
                "width": 8,
                "mix_epochs": 1,
                "noise_draws": 6,
            },
        ),
        "cpu": Scale(
            5,
            {
                "sizes": (2, 4, 8, 32, 128),
                "epochs": 3,
                "width": 16,
                "mix_epochs": 6,
                "noise_draws": 24,
            },
        ),
        "gpu": Scale(
            10,
            {
                "sizes": (2, 4, 8, 32, 128, 512),
                "epochs": 30,
                "width": 64,
                "mix_epochs": 30,
                "noise_draws": 100,
            },
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)

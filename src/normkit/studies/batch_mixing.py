"""Effect of the order, size and noise of batches: measured by S11."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.calibrate import calibrate
from normkit.nn import BatchNorm2d, GroupNorm
from normkit.studies.data import Images
from normkit.studies.study import Result, Trial
from normkit.studies.training import accuracy, cnn, train

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": BatchNorm2d,
    "group norm": lambda channels: GroupNorm(min(8, channels // 2), channels),
}
ORDERS = ("shuffled", "buffer of 200", "one class a batch")
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
GHOST_RATES = RATES[2:]
GHOSTS = (4, 16, 32, 128)


def measure(
    trial: Trial, *, data: str, width: int, mix_epochs: int, noise_draws: int
) -> Result:
    """Measure order of the data, ghost batches, and the noise of the statistics."""
    images = trial.images("digits").standardized()
    return {
        "orders": _orders(trial, images, width, mix_epochs),
        "ghosts": _ghosts(trial, data, width, mix_epochs),
        "noise": _noise(trial, images, width, noise_draws),
        "direction": _direction(trial, images, width),
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


def _seen(model: nn.Module, images: Images) -> dict[str, float]:
    return {
        "train": 100 * accuracy(model, images.x_train, images.y_train),
        "validation": 100 * accuracy(model, images.x_val, images.y_val),
        "test": 100 * accuracy(model, images.x_test, images.y_test),
    }


def _orders(trial: Trial, images: Images, width: int, epochs: int) -> dict[str, list]:
    """Measure accuracies at each rate after training on data in three orders."""
    generator = trial.generator(5)
    found: dict[str, list] = {}
    for order in ORDERS:
        batches = torch.cat(
            [_epoch(order, images.y_train, 64, generator) for _ in range(epochs)]
        )
        for arm, norm in NORMS.items():
            name, exact = f"{order}, {arm}", f"{order}, {arm}, exact statistics"
            found[name] = []
            for rate in RATES:
                model = _fit(trial, images, batches, norm, width, rate)
                found[name].append(_seen(model, images))
                if arm == "batch norm":
                    calibrate(model, [images.x_train])
                    found.setdefault(exact, []).append(_seen(model, images))
    return found


def _epoch(order: str, labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return one epoch of batches, `(batches, size)`, in the order asked for."""
    count = len(labels)
    whole = count // size * size
    if order == "shuffled":
        return torch.randperm(count, generator=generator)[:whole].view(-1, size)
    shuffled = torch.randperm(count, generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    if order == "buffer of 200":
        kept = by_class[_through_buffer(count, 200, generator)]
        return kept[:whole].view(-1, size)
    rows = []
    for label in labels.unique():
        mine = by_class[labels[by_class] == label]
        rows.append(mine[: len(mine) // size * size].view(-1, size))
    batches = torch.cat(rows)
    return batches[torch.randperm(len(batches), generator=generator)]


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


def _ghosts(trial: Trial, data: str, width: int, epochs: int) -> dict[str, list]:
    """Measure accuracies on few images by ghost batch, at one SGD batch."""
    few = trial.images(data, train=256, val=1000, test=4000).standardized()
    if few.x_train.shape[-1] > 16:  # 14 × 14 pixels of MNIST are enough, and fast
        few = few.map(lambda x: F.avg_pool2d(x, 2))
    batches = few.batches(128, 10 * epochs, trial.generator(6))
    found: dict[str, list] = {"data": [few.name]}
    for size in GHOSTS:
        found[str(size)] = []
        for rate in GHOST_RATES:
            model = _fit(
                trial,
                few,
                batches,
                lambda c, s=size: BatchNorm2d(c, ghost_size=s),
                width,
                rate,
            )
            calibrate(model, [few.x_train])
            found[str(size)].append(_seen(model, few))
    return found


@torch.no_grad()
def _noise(
    trial: Trial, images: Images, width: int, draws: int
) -> dict[str, list[float]]:
    """Measure how much four fixed samples' logits vary with the rest of their batch."""
    batches = images.batches(64, 40, trial.generator(7))
    with torch.enable_grad():
        model = _fit(trial, images, batches, BatchNorm2d, width, 0.05).train()
    generator = trial.generator(8)
    sizes, spread = (8, 16, 32, 64, 128), []
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
        start = time.process_time()
        for _ in range(12):
            rows = torch.randint(len(images.y_train), (size,), generator=generator)
            found.append(F.cosine_similarity(gradient(rows), everything, dim=0))
        rates.append(12 * size / (time.process_time() - start))
        cosines.append(torch.stack(found).mean().item())
    return {"sizes": list(sizes), "cosine": cosines, "samples_per_second": rates}

"""Curves of sigmoid nets in training, with batch norm and without: measured by S01."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.studies.data import Images
from normkit.studies.replicas import Recipe, Replicas
from normkit.studies.study import Result, Trial

# Rate 0 is the zero baseline: what moves there is no effect of training.
RATES = (0.0, 0.1, 0.5, 2.0, 5.0, 10.0)
GRID = RATES[1:]
MIDDLE = 2  # index of the rate of the bands
_LEVELS = (0.15, 0.5, 0.85)
TARGETS = (0.8, 0.85, 0.9, 0.925, 0.95)
# Inputs before this step reflect the start rather than training.
SETTLED = 100
# Distributions are compared while each arm learns the same: between these accuracies.
FROM, TO = 0.5, 0.85


def measure(
    trial: Trial, *, data: str, steps: int, batch: int, looks: int, hidden: int
) -> Result:
    """Train three-layer sigmoid nets with and without batch norm at several rates."""
    images = trial.images(data, train=20_000, val=1000, test=1000).flat()
    features = images.x_train.shape[1]
    widths = (features, hidden, hidden, hidden, images.classes)
    batches = images.batches(batch, steps, trial.generator(1))
    at = sorted({0, SETTLED, *_spaced(steps, looks)})
    result: Result = {"data": images.name, "steps": at, "batch": batch, "arms": {}}
    arms = (
        ("plain", Recipe(widths, "sigmoid"), RATES),
        ("batch norm", Recipe(widths, "sigmoid", "batch"), RATES),
        (
            "no weight and bias",
            Recipe(widths, "sigmoid", "batch", affine=False),
            (0.0, RATES[MIDDLE]),
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
    start = sorted(at).index(SETTLED)
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
    """Return the looks at which accuracy first reaches `FROM` and `TO`.

    The last look where it does not.
    """
    last = len(accuracies) - 1
    found = [
        next((i for i, a in enumerate(accuracies) if a >= level), last)
        for level in (FROM, TO)
    ]
    return found[0], found[1]

"""Accuracy over learning rates and gains of initial weights: measured by S03."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normkit.studies.data import Images
from normkit.studies.replicas import Recipe, Replicas, stds_for
from normkit.studies.study import Result, Trial

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
GAINS = (0.1, 0.3, 1.0, 3.0, 10.0)
_ARMS = (("sigmoid", ""), ("sigmoid", "batch"), ("relu", ""), ("relu", "batch"))
WORKS = 0.9
# What own rates must gain in log loss for a need of them to be there.
GAINED = 0.05
LOW, HIGH = 0.1, 3.0  # the two rates of the interaction term


def measure(
    trial: Trial,
    *,
    steps: int,
    hidden: tuple[int, ...],
    layer_draws: int,
) -> Result:
    """Measure accuracy on the digits for every rate × gain × activation × norm."""
    images = trial.images("digits").flat().standardized()
    widths = (images.x_train.shape[1], *hidden, images.classes)
    batches = images.batches(60, steps, trial.generator(1))
    rates = torch.tensor(RATES).repeat_interleave(len(GAINS)).to(trial.device)
    per_gain = torch.stack([stds_for(widths, gain) for gain in GAINS])
    grids: dict[str, dict[str, list]] = {"test": {}, "validation": {}}
    for activation, norm in _ARMS:
        nets = Replicas(
            Recipe(widths, activation, norm),
            per_gain.repeat(len(RATES), 1),
            trial.generator(2),
            device=trial.device,
        )
        for rows in batches:
            nets.step(images.x_train[rows], images.y_train[rows], rates)
        with nets.population(images.x_train):
            hits = {
                "test": nets.accuracy(images.x_test, images.y_test),
                "validation": nets.accuracy(images.x_val, images.y_val),
            }
        for split, found in hits.items():
            table = torch.tensor(found).view(len(RATES), len(GAINS))
            grids[split][f"{activation}, {norm or 'plain'}"] = table.tolist()
    own_rates = {
        norm or "plain": _own_rates(trial, images, norm, batches, layer_draws)
        for norm in ("", "batch")
    }
    return {"grids": grids, "own_rates": own_rates}


def _own_rates(
    trial: Trial, images: Images, norm: str, batches: Tensor, draws: int
) -> dict[str, float]:
    """Return test losses of a ReLU net: one rate, one finely tuned, one per layer.

    First a grid of one rate for all layers. Around its best rate, by a factor of up to
    ten, as many nets with one rate again, and as many with a rate per layer: what the
    second search gains with one rate is the zero baseline of the third. All are chosen
    on validation. Gain √2, at which the plain net trains, too.
    """
    widths = (images.x_train.shape[1], 48, 48, 48, images.classes)
    layers = len(widths) - 1
    spread = torch.rand(draws, layers, generator=trial.generator(4)) * 2 - 1

    def losses(rates: Tensor) -> tuple[float, float, Tensor]:
        """Return the best net's losses of validation and test, and its rates."""
        nets = Replicas(
            Recipe(widths, "relu", norm),
            stds_for(widths, math.sqrt(2)).expand(draws, -1),
            trial.generator(3),
            device=trial.device,
        )
        for rows in batches:
            nets.step(
                images.x_train[rows], images.y_train[rows], rates.to(trial.device)
            )
        with nets.population(images.x_train), torch.no_grad():
            nets.training = False
            known = nets.losses(images.x_val, images.y_val).nan_to_num(math.inf)
            test = nets.losses(images.x_test, images.y_test)
        best = int(known.argmin())
        return known[best].item(), test[best].item(), rates[best]

    grid = torch.logspace(-2, 1, draws)
    first = losses(grid)
    around = first[2] * 10**spread
    second = losses(around[:, 0].contiguous())
    third = losses(around)
    single = min(first, second, key=lambda found: found[0])
    own = min(first, third, key=lambda found: found[0])
    return {
        "rate": first[2].item(),
        "first": first[1],
        "single": single[1],
        "own": own[1],
    }

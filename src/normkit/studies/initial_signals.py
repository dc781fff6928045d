"""Signals and gradients of initial weights, and what they train: measured by S04."""

from __future__ import annotations

import math

import torch

from normkit.init import variance_recursion
from normkit.studies.data import Images
from normkit.studies.replicas import ACTIVATIONS, Recipe, Replicas, stds_for
from normkit.studies.stack import propagate
from normkit.studies.study import Result, Trial

# Name, activation, standard deviation of the weights times the root of the fan.
STARTS = (
    ("tanh 0.01", "tanh", 0.01 * 64),
    ("tanh 0.05", "tanh", 0.05 * 64),
    ("tanh Xavier", "tanh", 1.0),
    ("linear Xavier", "identity", 1.0),
    ("relu Xavier", "relu", 1.0),
    ("relu Kaiming", "relu", math.sqrt(2)),
)
# Of n·Var[w] above 1; not in the figure.
_LARGE = (("linear 0.05", "identity", 0.05 * 64), ("relu 0.05", "relu", 0.05 * 64))
DEPTH = 6
RATES = (0.01, 0.1, 0.3, 1.0, 3.0)
# The gains of a std of 0.01 and 0.05 at 4096 units, and Xavier's.
GAINS = {"0.01": 0.64, "0.05": 3.2, "Xavier": 1.0}
DEPTHS = (6, 20, 50)


def measure(
    trial: Trial, *, units: int, deep_units: int, batch: int, steps: int, width: int
) -> Result:
    """Measure spread per layer forward and backward; accuracy by depth and start."""
    images = trial.images("digits").flat().standardized()
    return {
        "stack": _spread(trial, units, batch, DEPTH, (*STARTS, *_LARGE)),
        "deep": _spread(trial, deep_units, batch, DEPTHS[-1], STARTS[:3]),
        "trained": {
            f"{depth} {norm or 'plain'}": _trained(
                trial, images, depth, width, norm, steps
            )
            for depth in DEPTHS
            for norm in ("", "batch")
            if not norm or depth < DEPTHS[-1]
        },
        "symmetry": _symmetry(trial, images, steps=min(steps, 100)),
    }


def _spread(
    trial: Trial,
    units: int,
    batch: int,
    depth: int,
    starts: tuple[tuple[str, str, float], ...],
) -> dict[str, dict]:
    """Run the same normal weights at each scale, forward and back."""
    generator = trial.generator(1)
    x = torch.randn(batch, units, generator=generator).to(trial.device)
    draws = [
        torch.randn(units, units, generator=generator)
        .div_(math.sqrt(units))
        .to(trial.device)
        for _ in range(depth)
    ]
    cotangent = torch.randn(batch, units, generator=generator).to(trial.device)
    found = {}
    for name, activation, gain in starts:
        act = ACTIVATIONS[activation]
        passed = propagate(x, draws, act, cotangent, gain=gain)
        outputs = passed.outputs
        key = "linear" if activation == "identity" else activation
        theory = variance_recursion([gain**2] * depth, key)
        found[name] = {
            "std": [h.std().item() for h in outputs],
            "rms": [h.square().mean().sqrt().item() for h in outputs],
            "theory": [math.sqrt(signal.after) for signal in theory],
            "saturated": [(h.abs() > 0.99).float().mean().item() for h in outputs],
            "slope": (1 - outputs[-1].square()).mean().item(),
            "mean_over_std": (outputs[-1].mean() / outputs[-1].std()).item(),
            "weight_grads": passed.weight_grads,
            "input_grads": [g.std().item() for g in passed.input_grads],
        }
    return found


def _trained(
    trial: Trial, images: Images, depth: int, width: int, norm: str, steps: int
) -> dict[str, dict[str, list[float]]]:
    """Return the accuracies of each start at each rate, tanh."""
    widths = (images.x_train.shape[1], *[width] * depth, images.classes)
    stds = torch.stack([stds_for(widths, gain) for gain in GAINS.values()])
    nets = Replicas(
        Recipe(widths, "tanh", norm),
        stds.repeat_interleave(len(RATES), 0),
        trial.generator(2),
        device=trial.device,
    )
    rates = torch.tensor(RATES).repeat(len(GAINS)).to(trial.device)
    for rows in images.batches(60, steps, trial.generator(3)):
        nets.step(images.x_train[rows], images.y_train[rows], rates)
    tables = {}
    with nets.population(images.x_train):
        for split, x, y in (
            ("test", images.x_test, images.y_test),
            ("validation", images.x_val, images.y_val),
        ):
            table = torch.tensor(nets.accuracy(x, y)).view(len(GAINS), len(RATES))
            tables[split] = (100 * table).tolist()
    return {
        split: dict(zip(GAINS, rows, strict=True)) for split, rows in tables.items()
    }


def _symmetry(trial: Trial, images: Images, *, steps: int) -> dict[str, float]:
    """Measure how far training separates the units of a layer of constant weights."""
    widths = (images.x_train.shape[1], 32, 32, images.classes)
    nets = Replicas(
        Recipe(widths, "tanh"), torch.ones(2), trial.generator(), device=trial.device
    )
    with torch.no_grad():
        for weight in nets.weights:
            weight.copy_(torch.tensor([0.05, 0.0]).view(2, 1, 1).expand_as(weight))
        zero = nets(images.x_train[:100])[1].abs().max().item()
    rates = torch.full((2,), 0.1, device=trial.device)
    for rows in images.batches(60, steps, trial.generator(3)):
        nets.step(images.x_train[rows], images.y_train[rows], rates)
    apart = max((w - w[:, :, :1]).abs().max().item() for w in nets.weights[:-1])
    hits = nets.accuracy(images.x_test, images.y_test)
    return {"apart": apart, "zero_output": zero, "constant": hits[0], "zeros": hits[1]}

"""What signals that shrink over the depth cost, where gradients arrive and where not.

Perceptrons with ReLU and without norms start with weights that shrink the signal over
the depth to a share of itself, or with torch's own; the loss after some steps says what
it cost. `python benchmarks/doctor shrinking`; docs/why.md has the decision on D22.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from bugs import digits, endless
from torch import nn
from torch.nn.functional import cross_entropy

from normkit.doctor import diagnose

__all__ = ["lines", "measured"]

DEPTHS, SHARES = (5, 8, 12), (1.0, 0.2, 0.05, None)
STEPS, LAST = 150, 20


def network(depth: int, share: float | None) -> nn.Sequential:
    """Return a perceptron whose last signal is `share` of its first; None: torch's."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(64, 64)
        if share is not None:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
            layer.weight.data.mul_(share ** (1 / (depth - 1)))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def loss_after(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Return the mean loss of the last steps of a short training."""
    losses = []
    for x, y in itertools.islice(endless(), STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-LAST:]) / LAST


def measured() -> list[dict[str, Any]]:
    """Return one row per depth and share."""
    rows = []
    for depth, share in itertools.product(DEPTHS, SHARES):
        readings = diagnose(network(depth, share), digits(), cross_entropy).readings
        (signal,) = (f for f in readings if f.id == "D22")
        (gradient,) = (f for f in readings if f.id == "D24")
        losses = {}
        for kind, rate in (("SGD", 0.05), ("Adam", 1e-3)):
            model = network(depth, share)
            more = {"momentum": 0.9} if kind == "SGD" else {}
            made = getattr(torch.optim, kind)(model.parameters(), rate, **more)
            losses[kind] = loss_after(model, made)
        rows.append(
            {
                "depth": depth,
                "start": "torch's own" if share is None else f"{share:g}",
                "signal": signal.value,
                "severity": signal.severity,
                "gradient": gradient.value,
                **losses,
            }
        )
        print(rows[-1], flush=True)
    return rows


def lines(found: list[dict[str, Any]]) -> list[str]:
    """Return the outcome in Markdown."""
    rows = [
        f"| {r['depth']} | {r['start']} | {r['signal']:.2g} | {r['gradient']:.2g} "
        f"| {r['severity']} | {r['SGD']:.2f} | {r['Adam']:.2f} |"
        for r in found
    ]
    return [
        "## Signals that shrink",
        "",
        "Perceptrons with ReLU whose signal shrinks over the depth, fresh: last over",
        "first rms (D22), first over last response of the loss (D24), and the loss",
        f"after {STEPS} steps on digits (a guess has 2.30).",
        "",
        "| layers | made to shrink to | signal | gradient | D22 | SGD | Adam |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]

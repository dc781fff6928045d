"""What the ranks run in test_other_layers.py."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.nn import (
    BatchNorm1d,
    BatchRenorm1d,
    DomainBatchNorm,
    LazyBatchNorm1d,
    PerActivationBatchNorm,
    RecurrentBatchNorm,
    WhiteningBatchNorm,
)

CHANNELS = 4

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "renorm": lambda **options: BatchRenorm1d(
        CHANNELS, renorm_from=0, d_max_at=0, r_max_at=0, **options
    ),
    "per_activation": lambda **options: PerActivationBatchNorm(
        (CHANNELS, 3), **options
    ),
    "recurrent": lambda **options: RecurrentBatchNorm(CHANNELS, 5, **options),
    "zca": lambda **options: WhiteningBatchNorm(CHANNELS, **options),
    "newton": lambda **options: WhiteningBatchNorm(
        CHANNELS, method="newton", **options
    ),
    "lazy": LazyBatchNorm1d,
    "domain": lambda **options: DomainBatchNorm(
        BatchNorm1d(CHANNELS), ("day", "night"), **options
    ),
}


def built(name: str, **options: Any) -> nn.Module:
    layer = LAYERS[name](**options).double()
    if name == "lazy":
        layer(torch.randn(4, CHANNELS, 3, dtype=torch.float64))
        layer.reset_running_stats()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(
                torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter)
            )
    return layer


def statistics_of(layer: nn.Module) -> dict[str, Tensor]:
    return {k: b for k, b in layer.state_dict().items() if "running" in k}


def step(
    rank: int,
    name: str,
    parts: list[Tensor],
    masks: list[Tensor] | None,
    cotangents: list[Tensor],
) -> Any:
    layer = built(name, process_group=dist.group.WORLD)
    twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    results = []
    for each in (layer, *twins):
        x = parts[rank].clone().requires_grad_()
        options = {} if masks is None else {"mask": masks[rank]}
        y = each(x, **options)
        y.backward(cotangents[rank])
        grads = [p.grad for p in each.parameters()]
        results.append((y.detach(), x.grad, grads, statistics_of(each)))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
    return results[0]

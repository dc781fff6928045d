"""Least-squares fit of group norm to the outputs of batch norm.

With z the group-normalized input and y the output of batch norm in eval mode, over all
samples and positions of a channel,

    weight = cov(z, y)/var(z),   bias = mean(y) − weight·mean(z)

is the best fit, and cov²/(var(z)·var(y)) the share of the variance that it explains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.errors import ArgumentError
from normkit.functional import batch_norm, group_norm
from normkit.modeling.batch import (
    Forward,
    device_of,
    run_model,
    to_device,
)
from normkit.modeling.norm_types import check_num_channels
from normkit.modeling.snapshot import preserved

__all__ = ["Match", "fitting_groups", "match_outputs"]


@dataclass(frozen=True)
class Match:
    """Fit of one layer: weight and bias, shape `(C,)`, and its quality."""

    weight: Tensor
    bias: Tensor
    explained: float


def fitting_groups(channels: int, most: int) -> int:
    """Return the largest divisor of `channels` that is not above `most`.

    Example:
        >>> fitting_groups(64, 32), fitting_groups(48, 32), fitting_groups(7, 4)
        (32, 24, 1)
    """
    return max(d for d in range(1, min(channels, most) + 1) if channels % d == 0)


def match_outputs(
    model: nn.Module,
    layers: Sequence[nn.Module],
    num_groups: int,
    batches: Iterable[Any],
    forward: Forward | None,
) -> dict[int, Match]:
    """Fit group norm to each batch norm of `layers`, by the id of the layer.

    The model runs in eval mode, and is left in its own modes, without hooks.

    Raises:
        ArgumentError: No batches, a layer that none of them reached, or two layers with
            one weight or bias.
    """
    sums: dict[int, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}
    owners: dict[int, str] = {}
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            owner = owners.setdefault(id(parameter), names[layer])
            if owner != names[layer]:
                raise ArgumentError(
                    f"layers {owner} and {names[layer]} share a parameter, and each "
                    "needs a fit of its own; leave out batches=, or give one of them "
                    "a copy"
                )

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        check_num_channels(names[module], module, x)
        found = _sums_of(module, x.detach(), num_groups)
        before = sums.get(id(module))
        sums[id(module)] = found if before is None else _merged(before, found)

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        with preserved(model), torch.no_grad():
            model.eval()
            device = device_of(model)
            for batch in batches:
                run_model(model, to_device(batch, device), forward)
    finally:
        for hook in hooks:
            hook.remove()
    unseen = [layer for layer in layers if id(layer) not in sums]
    if unseen:
        raise ArgumentError(
            f"no batch reached {len(unseen)} of {len(layers)} layers, e.g. "
            f"{unseen[0]}; pass batches that run the whole model, or none"
        )
    return {key: _fit(found) for key, found in sums.items()}


def _sums_of(module: Any, x: Tensor, num_groups: int) -> Tensor:
    """Return count, means of z and y, and co-deviations, shape `(6, C)`."""
    if module.running_mean is None:
        raise ArgumentError(
            f"{module} keeps no running statistics, so there is no eval mode to match; "
            "leave out batches="
        )
    wide = x.double()
    y = batch_norm(
        wide,
        module.running_mean.double(),
        module.running_var.double(),
        None if module.weight is None else module.weight.double(),
        None if module.bias is None else module.bias.double(),
        eps=module.eps,
    )
    channels = x.shape[1]
    z = group_norm(wide, fitting_groups(channels, num_groups), eps=module.eps)
    z, y = (t.transpose(0, 1).flatten(1) for t in (z, y))
    count = torch.full((channels,), float(z.shape[1])).to(z)
    mean_z, mean_y = z.mean(1), y.mean(1)
    rest_z, rest_y = z - mean_z[:, None], y - mean_y[:, None]
    return torch.stack(
        [
            *(count, mean_z, mean_y),
            *(rest_z.square().sum(1), (rest_z * rest_y).sum(1)),
            rest_y.square().sum(1),
        ]
    )


def _merged(a: Tensor, b: Tensor) -> Tensor:
    """Merge two sets of sums: Chan's merge for two variables and their product."""
    count = a[0] + b[0]
    share = a[0] * b[0] / count
    dz, dy = b[1] - a[1], b[2] - a[2]
    means = a[1:3] + (b[1:3] - a[1:3]) * b[0] / count
    between = torch.stack([dz * dz, dz * dy, dy * dy]) * share
    return torch.cat([count[None], means, a[3:] + b[3:] + between])


def _fit(sums: Tensor) -> Match:
    _, mean_z, mean_y, zz, zy, yy = sums
    weight = torch.where(zz > 0, zy / zz, 0.0)
    explained = torch.where((zz > 0) & (yy > 0), zy.square() / (zz * yy), 1.0)
    return Match(weight, mean_y - weight * mean_z, float(explained.min()))

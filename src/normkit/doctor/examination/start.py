"""Signs in the weights that a network was trained, and that it has just begun.

torch draws the bias of a linear layer or convolution from ±1/√(inputs of a unit), and
most other schemes start biases, scales and shifts at one value. A bias beyond that, or
scales that differ, are the trace of an optimizer. Not so where every batch norm has the
statistics of its start: RepVGG draws its scales, and training would have moved them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normkit.doctor.probes.norm_statistics import norm_statistics
from normkit.modeling.norm_types import is_norm

__all__ = ["has_just_begun", "has_moved"]

# Batches that are no training yet: at torch's momentum the start has a weight of .05 in
# the running statistics after them.
FEW = 29
# How far scales and shifts lie from one value after ten steps of Adam at 1e-3.
NEAR = 0.01


@torch.no_grad()
def has_moved(model: nn.Module) -> bool:
    """Return True where weights cannot be those of a start; False where they can."""
    norms = [n for n in norm_statistics(model).values() if not n.frozen]
    if norms and all((n.tracked or 0) <= 1 and n.has_default_buffers for n in norms):
        return False
    return any(map(_has_moved, model.modules()))


@torch.no_grad()
def has_just_begun(model: nn.Module) -> bool:
    """Return True after a few steps: by the batches counted, or by scales and shifts.

    Where a network has no norms nothing tells: False.
    """
    tracked = [n.tracked for n in norm_statistics(model).values() if not n.frozen]
    counted = [number for number in tracked if number]
    if counted:
        return max(counted) <= FEW
    norms = [module for module in model.modules() if is_norm(module)]
    held = [p for norm in norms for p in norm.parameters(recurse=False)]
    return bool(held) and all(map(_lies_near, held))


def _lies_near(values: Tensor) -> bool:
    if values.is_meta or not values.numel():
        return False
    middle = values.float().median()
    return bool(((values.float() - middle).abs() <= NEAR).all())


def _has_moved(module: nn.Module) -> bool:
    # A scripted module's `_parameters` is no dict.
    held = dict(module.named_parameters(recurse=False))
    weight, bias = held.get("weight"), held.get("bias")
    if is_norm(module):
        return any(p is not None and _varies(p) for p in (weight, bias))
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return False
    if weight is None or bias is None or bias.is_meta or not _varies(bias):
        return False
    # torch counts the inputs of a transposed convolution by its outputs, too.
    return float(bias.abs().max()) > 1.001 / math.sqrt(weight[0].numel())


def _varies(values: Tensor) -> bool:
    return (
        values.numel() > 1
        and not values.is_meta
        and not bool((values == values.flatten()[0]).all())
    )

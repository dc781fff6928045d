"""The norms that take other statistics in eval mode than in training mode."""

from __future__ import annotations

from torch import Tensor, nn

from normkit.modeling.norm_types import (
    NORMS,
    holds_running_statistics,
    is_batch_norm,
    is_norm,
)
from normkit.nn.tracked_layer import TrackedLayer

__all__ = ["has_two_modes", "own_averages"]

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def has_two_modes(module: nn.Module) -> bool:
    """Return True for a norm that takes other statistics in eval mode.

    And for a larger module that holds running statistics.
    """
    if isinstance(module, _INSTANCE_NORMS):
        return module.running_mean is not None
    if isinstance(module, TrackedLayer):
        return module.running_mean is not None
    if holds_running_statistics(module) or is_batch_norm(module):
        return True
    return len(own_averages(module)) > 1


def own_averages(module: nn.Module) -> dict[str, Tensor]:
    """Return what a norm of a class of its own keeps, in buffers or attributes.

    A mean and a variance have one shape; a mask or a table of positions has no partner.
    """
    is_known = isinstance(module, (*NORMS, TrackedLayer)) or is_batch_norm(module)
    if is_known or not is_norm(module):
        return {}
    held = {**vars(module), **dict(module.named_buffers(recurse=False))}
    kept = {
        name: value
        for name, value in held.items()
        if isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and value.is_floating_point()
        and value.numel() > 1
        and value.numel() == max(value.shape)
    }
    shapes = [value.shape for value in kept.values()]
    return {name: v for name, v in kept.items() if shapes.count(v.shape) > 1}

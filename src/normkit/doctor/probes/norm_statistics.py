"""The running statistics and settings of every batch norm of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.doctor.measurements import NormStatistics
from normkit.modeling.norm_types import holds_constant_statistics, is_batch_norm
from normkit.nn.tracked_layer import TrackedLayer

__all__ = ["norm_statistics"]

# Where a class has no eps of its own; torch's default.
DEFAULT_EPS = 1e-5


def norm_statistics(
    model: nn.Module, frozen: set[str] | None = None
) -> dict[str, NormStatistics]:
    """Return the running statistics of every batch norm that has them, by name.

    Args:
        model: Any module.
        frozen: Names of the batch norms that are kept in eval mode on purpose.
    """
    found = {}
    for name, module in model.named_modules():
        if not is_batch_norm(module):
            continue
        layer: Any = module
        if layer.running_mean is None or layer.running_var is None:
            continue
        # What the momentum of another class means is not known, nor what it counts.
        is_known = isinstance(module, _BatchNorm | TrackedLayer)
        momentum = layer.momentum if is_known else None
        tracked = getattr(layer, "num_batches_tracked", None)
        is_constant = holds_constant_statistics(module)
        found[name] = NormStatistics(
            momentum=None if momentum is None else float(momentum),
            eps=float(getattr(layer, "eps", DEFAULT_EPS)),
            tracked=None if tracked is None else int(tracked),
            frozen=name in (frozen or ()) or momentum == 0 or is_constant,
            running_mean=_copied(layer.running_mean),
            running_var=_copied(layer.running_var),
            weight=_parameter(layer, "weight"),
            bias=_parameter(layer, "bias"),
            is_trainable=any(p.requires_grad for p in module.parameters()),
            dtype=str(layer.running_var.dtype).removeprefix("torch."),
            is_constant=is_constant,
            tracks=getattr(layer, "track_running_stats", True) is not False,
            takes_one_value=getattr(layer, "on_small_batch", "raise") != "raise",
        )
    return found


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return _copied(value) if isinstance(value, Tensor) else None


def _copied(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64, copy=True)

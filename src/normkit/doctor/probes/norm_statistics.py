"""The running statistics and settings of every batch norm of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.doctor.measurements import NormStatistics

__all__ = ["norm_statistics"]


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
        if not isinstance(module, _BatchNorm) or not module.track_running_stats:
            continue
        mean, var = module.running_mean, module.running_var
        if mean is None or var is None:
            continue
        tracked = module.num_batches_tracked
        momentum = module.momentum
        found[name] = NormStatistics(
            momentum=None if momentum is None else float(momentum),
            eps=float(module.eps),
            tracked=None if tracked is None else int(tracked),
            frozen=name in (frozen or ()) or momentum == 0,
            running_mean=_copied(mean),
            running_var=_copied(var),
            weight=None if module.weight is None else _copied(module.weight),
            bias=None if module.bias is None else _copied(module.bias),
            is_trainable=any(p.requires_grad for p in module.parameters()),
            dtype=str(var.dtype).removeprefix("torch."),
            takes_one_value=getattr(module, "on_small_batch", "raise") != "raise",
        )
    return found


def _copied(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64, copy=True)

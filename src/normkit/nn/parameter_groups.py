"""Parameter groups for an optimizer: no weight decay on norms and biases."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module, *, weight_decay: float, **options: Any
) -> list[dict[str, Any]]:
    """Return two groups: weights with decay; biases and norm parameters without.

    The scale of a weight before a normalization does not change the output; that of the
    normalization's own weight does, and decaying it shrinks the output.

    Args:
        model: Frozen parameters are left out; shared ones are listed once.
        weight_decay: Weight decay of the first group.
        **options: Options of both groups, e.g. `lr=0.1`.

    Returns:
        Groups for the first argument of a torch optimizer; an empty one is left out.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> groups = parameter_groups(model, weight_decay=5e-4)
        >>> [(len(g["params"]), g["weight_decay"]) for g in groups]
        [(1, 0.0005), (3, 0.0)]
    """
    norms = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    decayed: dict[int, nn.Parameter] = {}
    spared: dict[int, nn.Parameter] = {}
    for module in model.modules():
        is_norm = isinstance(module, norms) or type(module).__name__ in _BY_NAME
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            # Biases are vectors, and so are the parameters of other libraries' norms.
            is_spared = is_norm or name.endswith("bias") or parameter.dim() < 2
            (spared if is_spared else decayed)[id(parameter)] = parameter
    decayed = {key: p for key, p in decayed.items() if key not in spared}
    groups = [
        {"params": list(decayed.values()), "weight_decay": weight_decay, **options},
        {"params": list(spared.values()), "weight_decay": 0.0, **options},
    ]
    return [group for group in groups if group["params"]]


# Those of normkit whose parameters may have two dimensions or more.
_BY_NAME = ("PerActivationBatchNorm",)

"""Which modules normalize.

torch's and normkit's are known by their class. Others, as timm's and transformers', are
known by their name; what formula such a layer computes, `normkit.convert.detect` finds.
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from normkit.errors import ShapeError

__all__ = [
    "NORMS",
    "check_num_channels",
    "holds_constant_statistics",
    "holds_running_statistics",
    "is_batch_norm",
    "is_norm",
]

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""The normalizations of torch.nn; those of normkit.nn derive from them."""

_NAMED = re.compile(r"(Norm|BN|Normali[sz]ation)(\d\w*)?$")


def is_norm(module: nn.Module) -> bool:
    """Return whether `module` is a normalization, by its class or by its name.

    A module that has children and is only called a norm, such as the PreNorm of a
    transformer block, is none.
    """
    if isinstance(module, NORMS):
        return True
    return bool(_NAMED.search(type(module).__name__)) and not module._modules


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether `module` normalizes channels by statistics of batches.

    torch's and normkit's are known by their class. Others, as detectron2's frozen one
    and in-place ABN's, derive from Module and are known by their buffers: running_mean
    and running_var of one shape `(C,)`. A larger module that holds these beside layers
    with parameters, for a call of `F.batch_norm`, is none.
    """
    if isinstance(module, _NormBase):
        return isinstance(module, _BatchNorm)
    return holds_running_statistics(module) and not any(
        True for child in module.children() for _ in child.parameters()
    )


def holds_running_statistics(module: nn.Module) -> bool:
    """Return whether `module` has buffers running_mean and running_var, both `(C,)`."""
    # A scripted module's `_buffers` is no dict.
    held = dict(module.named_buffers(recurse=False))
    mean, var = held.get("running_mean"), held.get("running_var")
    if mean is None or var is None:
        return False
    return mean.dim() == 1 and mean.shape == var.shape


def holds_constant_statistics(module: nn.Module) -> bool:
    """Return whether `module` is a batch norm frozen by its class.

    torchvision's and detectron's `FrozenBatchNorm2d` and its copies derive from Module
    and hold all four of their tensors as buffers.
    """
    names = {"weight", "bias", "running_mean", "running_var"}
    found = {name for name, _ in module.named_buffers(recurse=False)}
    return not isinstance(module, _NormBase) and names <= found


def check_num_channels(
    name: str, module: nn.Module, x: Tensor, *, cause: Exception | None = None
) -> None:
    """Refuse an input whose channels are not those of a batch or instance norm.

    Args:
        name: Dotted name of the layer.
        module: The layer; any but a batch or instance norm takes any input.
        x: Its input.
        cause: The error that this one explains.

    Raises:
        ShapeError: The number of channels differs.
    """
    if not isinstance(module, _NormBase):
        return
    required, dim = module.num_features, getattr(module, "channel_dim", 1)
    unbatched = getattr(module, "_get_no_batch_dim", None)
    if unbatched is not None and x.dim() == unbatched():
        dim = dim - 1 if dim > 0 else dim
    if required and -x.dim() <= dim < x.dim() and x.shape[dim] != required:
        raise ShapeError(
            f"layer {name!r} ({type(module).__name__}) requires {required} channels in "
            f"dim {dim}, got {x.shape[dim]} in its input of {tuple(x.shape)}; give "
            "batches of the shape that the model was made for, or make the layer for "
            f"{x.shape[dim]} channels"
        ) from cause

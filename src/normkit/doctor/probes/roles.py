"""The role of a layer, the flat range of an activation, the dimension of its units."""

from __future__ import annotations

import math
import re

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normkit.doctor.measurements import Role
from normkit.modeling.norm_types import is_batch_norm, is_norm

__all__ = ["crossed_dims", "role_of", "slope_limits", "unit_dim_after"]

# Every module of torch.nn whose forward is one elementwise non-linearity.
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.LogSigmoid),
    *(nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
    *(nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.GLU),
)
# Those of other libraries are known by their name: timm's GELUTanh and HardSwish,
# transformers' NewGELUActivation and SiLUActivation.
_NAMED = re.compile(
    r"^(Quick|New|Fast|Hard|Clipped|Laplace)?(Re|Ge|GE|Si|S|E|Ce|CE)?(LU|Swish|Mish|"
    r"Sigmoid|Tanh)\d?(Tanh|Me|Jit|Activation)*$"
)
_TABLE = re.compile(r"Embed|Pos|Token|Quer|Prompt|Quanti|Code|Table|Memory|Prototype")
WEIGHTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def role_of(module: nn.Module) -> Role:
    """Return the role of a layer; "other" layers get no probe."""
    if isinstance(module, WEIGHTS):
        return "weight"
    if is_norm(module) or is_batch_norm(module):
        return "norm"
    if isinstance(module, ACTIVATIONS):
        return "activation"
    if _NAMED.search(type(module).__name__) and not module._modules:
        return "activation"
    if isinstance(module, RECURRENT):
        return "recurrent"
    return "weight" if _holds_matrix(module) else "other"


def _holds_matrix(module: nn.Module) -> bool:
    """Return True for a linear layer of a class of its own, by its weight.

    Such as a graph convolution, or the Conv1D of transformers. A table is none: of
    embeddings, positions, codes or queries.
    """
    if type(module).__module__.startswith("torch.") or module._modules:
        return False
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    is_matrix = weight is not None and weight.dim() >= 2 and min(weight.shape) > 1
    return is_matrix and not _TABLE.search(type(module).__name__)


def slope_limits(module: nn.Module) -> tuple[float, float] | None:
    """Return the inputs between which the slope is at least 5 % of its maximum.

    Only for functions that flatten on both sides: a ReLU whose unit is off is not
    saturated. None for every other layer.
    """
    if isinstance(module, nn.Sigmoid):
        limit = 2 * math.atanh(math.sqrt(0.95))  # σ'(z) = ¼ sech²(z/2)
    elif isinstance(module, nn.Tanh):
        limit = math.atanh(math.sqrt(0.95))  # tanh'(z) = sech²(z)
    elif isinstance(module, nn.Softsign):
        limit = math.sqrt(20) - 1  # 1 / (1 + |z|)²
    elif isinstance(module, nn.Hardsigmoid):
        limit = 3.0
    elif isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return float(module.min_val), float(module.max_val)
    else:
        return None
    return -limit, limit


def unit_dim_after(module: nn.Module, before: int) -> int:
    """Return the dimension along which the units of a layer's output lie.

    Args:
        module: The layer.
        before: The dimension along which the units of its input lie.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return -len(module.kernel_size) - 1
    if isinstance(module, nn.Linear | nn.Bilinear) or _holds_matrix(module):
        return -1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        # Over several dimensions, as over (C, H, W), the units stay where they were.
        is_single = len(module.normalized_shape) == 1
        return getattr(module, "channel_dim", -1) if is_single else before
    if isinstance(module, nn.GroupNorm | _NormBase) or is_batch_norm(module):
        return getattr(module, "channel_dim", 1)
    return before


def crossed_dims(
    before: nn.Module, norm: nn.Module, dims: int
) -> tuple[int, int] | None:
    """Return the dimension of the features before a norm, and that which it takes.

    None where they are one, or where the layers do not say. A recurrent layer and a
    convolution over time name one dimension of sequences, the other is time. A linear
    layer does not: it may mix the positions of channels that come first.

    Args:
        before: The layer whose unchanged output is the norm's input.
        norm: The norm: a batch norm, or a layer or RMS norm over one dimension.
        dims: Dimensions of that tensor.
    """
    if dims != 3:
        return None
    if isinstance(before, nn.RNNBase):
        given = 2
    elif isinstance(before, nn.Conv1d | nn.ConvTranspose1d):
        given = 1
    else:
        return None
    if is_batch_norm(norm):
        taken = getattr(norm, "channel_dim", 1) % dims
    elif isinstance(norm, nn.LayerNorm | nn.RMSNorm) and len(norm.normalized_shape) < 2:
        taken = getattr(norm, "channel_dim", -1) % dims
    else:
        return None
    return None if given == taken else (given, taken)

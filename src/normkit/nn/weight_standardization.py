"""Weight standardization: normalize the weight instead of the activations.

    w = (v − mean)/√(var + eps)·gain           over all inputs of one output

A parametrization, like `torch.nn.utils.parametrizations.weight_norm` and
`.spectral_norm`, which are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.errors import ArgumentError
from normkit.functional import normalize

__all__ = ["WeightStandardization", "weight_standardization"]


class WeightStandardization(nn.Module):
    """Map of a free weight to one of mean 0 and variance 1 for each output.

    Args:
        out_features: Outputs of the layer, for the learned gain.
        dim: The dimension that outputs lie along: 0 for linear and convolutional
            layers, 1 for transposed convolutions without groups.
        eps: Added to the variance, inside the root.
        gain: Learn a factor per output, from 1, shape `(out_features,)`.
        scale_by_fan_in: Divide by √fan-in, so that outputs have the variance of the
            inputs: for networks without another norm. Before a group norm, which undoes
            any scale, it does not matter.
        device: Device of the gain.
        dtype: Its dtype.
    """

    gain: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        *,
        dim: int = 0,
        eps: float = 1e-5,
        gain: bool = False,
        scale_by_fan_in: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.scale_by_fan_in = dim, eps, scale_by_fan_in
        start = torch.ones(out_features, device=device, dtype=dtype) if gain else None
        self.register_parameter("gain", None if start is None else nn.Parameter(start))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the standardized weight."""
        dims = tuple(d for d in range(weight.dim()) if d != self.dim)
        shape = [1] * weight.dim()
        shape[self.dim] = -1
        gain = None if self.gain is None else self.gain.view(shape)
        y, _ = normalize(weight, dims, gain, None, self.eps)
        if not self.scale_by_fan_in:
            return y
        fan_in = weight.numel() // max(weight.shape[self.dim], 1)
        return y * fan_in**-0.5

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return an assigned weight unchanged; reading it standardizes it."""
        return weight

    def extra_repr(self) -> str:
        """Return the arguments that differ between layers."""
        return (
            f"dim={self.dim}, eps={self.eps}, gain={self.gain is not None}, "
            f"scale_by_fan_in={self.scale_by_fan_in}"
        )


def weight_standardization(
    module: nn.Module,
    name: str = "weight",
    *,
    eps: float = 1e-5,
    gain: bool = False,
    scale_by_fan_in: bool = False,
) -> nn.Module:
    """Standardize a weight whenever it is read.

    Args:
        module: A layer with a weight, changed in place. The free weight is kept as
            `module.parametrizations.weight.original`.
        name: Name of the parameter.
        eps: Added to the variance, inside the root.
        gain: Learn a factor per output.
        scale_by_fan_in: Divide by √fan-in, for networks without another norm.

    Returns:
        `module`. For inference, `torch.nn.utils.parametrize.remove_parametrizations(
        module, name)` leaves the standardized weight.

    Raises:
        ArgumentError: There is no such parameter, it has fewer than 2 dimensions, or
            it belongs to a transposed convolution with groups.

    Example:
        >>> conv = weight_standardization(nn.Conv2d(3, 8, 5))
        >>> torch.allclose(conv.weight.mean((1, 2, 3)), torch.zeros(8), atol=1e-6)
        True

    References:
        Qiao, Wang, Liu, Shen & Yuille, "Micro-Batch Training with Batch-Channel
        Normalization and Weight Standardization", 2019.
        Brock, De & Smith, "Characterizing signal propagation to close the performance
        gap in unnormalized ResNets", ICLR 2021: the gain and the fan-in.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        shape = (
            f"of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else None
        )
        raise ArgumentError(
            f"weight_standardization needs a parameter of at least 2 dimensions, "
            f"{type(module).__name__}.{name} is {shape}; name another"
        )
    is_transposed = getattr(module, "transposed", False)
    if is_transposed and getattr(module, "groups", 1) != 1:
        raise ArgumentError(
            "weight_standardization cannot tell the outputs of a "
            f"{type(module).__name__} with {module.groups} groups apart; use groups=1"
        )
    dim = 1 if is_transposed else 0
    made = WeightStandardization(
        weight.shape[dim],
        dim=dim,
        eps=eps,
        gain=gain,
        scale_by_fan_in=scale_by_fan_in,
        device=weight.device,
        dtype=weight.dtype,
    )
    parametrize.register_parametrization(module, name, made)
    return module

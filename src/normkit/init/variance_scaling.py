"""Random weights of a chosen variance: one function, and its named specialisations.

Var[w] = scale / n          n: a fan, so that n·Var[w] = scale is what a layer
                            multiplies the mean square of its input by

constant        Var[w] = 0                        every unit stays equal for ever
normal          Var[w] = std²                     n·Var[w] depends on the width
Xavier          scale = gain², n = (fan_in + fan_out)/2
Kaiming         scale = gain², n = fan_in or fan_out, gain of the activation
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.init.fans import Fans
from normkit.init.theory import gain_of

__all__ = [
    "NOT_SO_SMALL_STD",
    "SMALL_STD",
    "constant_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "normal_",
    "orthogonal_",
    "variance_scaling_",
    "xavier_normal_",
    "xavier_uniform_",
]

SMALL_STD = 0.01
"""The "small random numbers": activations die out with depth in wide tanh layers."""
NOT_SO_SMALL_STD = 0.05
"""The "not so small" ones: the same layers, 4096 wide, saturate."""

# A standard normal cut at ±2 has this standard deviation.
_STD_OF_CUT_NORMAL = 0.87962566103423978

Activation = str | Callable[[Tensor], Tensor]


def variance_scaling_(
    weight: Tensor,
    *,
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "normal",
    fans: Fans | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill `weight` in place with independent numbers of mean 0, variance scale / n.

    Args:
        weight: A weight; `(out, in, *kernel)` unless `fans` are given.
        scale: What n·Var[w] becomes.
        mode: What n is: `"fan_in"`, `"fan_out"` or `"fan_avg"`, their mean.
        distribution: `"normal"`, `"uniform"`, or `"truncated_normal"`, cut at two
            standard deviations of the normal and as wide as the others after it.
        fans: Fans of the layer, from `linear_maps`: those of transposed and strided
            convolutions differ from what the weight's shape says.
        generator: Source of random numbers; None is torch's global one.

    Returns:
        `weight`.

    Raises:
        ArgumentError: An unknown mode or distribution, a negative scale, a fan of 0.

    Example:
        >>> weight = torch.empty(500, 200)
        >>> source = torch.Generator().manual_seed(0)
        >>> _ = variance_scaling_(weight, scale=2.0, generator=source)
        >>> round(200 * float(weight.var()), 2)
        2.0
    """
    modes = ("fan_in", "fan_out", "fan_avg")
    distributions = ("normal", "uniform", "truncated_normal")
    if mode not in modes:
        raise ArgumentError(f"mode={mode!r} must be one of {modes}")
    if distribution not in distributions:
        raise ArgumentError(
            f"distribution={distribution!r} must be one of {distributions}"
        )
    if not 0 <= scale < math.inf:
        raise ArgumentError(
            f"scale={scale} must be finite and not negative: it is n·Var[w]"
        )
    n = (fans or Fans.of_tensor(weight)).mean(mode)
    if not n > 0:
        raise ArgumentError(
            f"a weight of shape {tuple(weight.shape)} sums {n:g} terms; there is no "
            "variance to scale"
        )
    std = math.sqrt(scale / n)
    with torch.no_grad():
        if distribution == "normal":
            return weight.normal_(0.0, std, generator=generator)
        if distribution == "uniform":
            bound = math.sqrt(3.0) * std
            return weight.uniform_(-bound, bound, generator=generator)
        # By the inverse of the distribution function: exact, and no value is redrawn.
        edge = math.erf(math.sqrt(2.0))
        weight.uniform_(-edge, edge, generator=generator)
        return weight.erfinv_().mul_(math.sqrt(2.0) * std / _STD_OF_CUT_NORMAL)


def constant_(weight: Tensor, value: float) -> Tensor:
    """Fill with one value; all units of a layer are equal, and stay so in training."""
    with torch.no_grad():
        return weight.fill_(value)


def normal_(
    weight: Tensor, std: float = SMALL_STD, *, generator: torch.Generator | None = None
) -> Tensor:
    """Fill with normal numbers of a fixed std; n·Var[w] = n·std², whatever n is."""
    return variance_scaling_(
        weight, scale=std * std, fans=Fans(1, 1), generator=generator
    )


def xavier_normal_(
    weight: Tensor,
    *,
    gain: float = 1.0,
    fans: Fans | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill as Glorot & Bengio 2010, normal: Var[w] = gain²·2/(fan_in + fan_out)."""
    return variance_scaling_(
        weight, scale=gain**2, mode="fan_avg", fans=fans, generator=generator
    )


def xavier_uniform_(
    weight: Tensor,
    *,
    gain: float = 1.0,
    fans: Fans | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill as Glorot & Bengio 2010, uniform within gain·√(6/(fan_in + fan_out))."""
    return variance_scaling_(
        weight,
        scale=gain**2,
        mode="fan_avg",
        distribution="uniform",
        fans=fans,
        generator=generator,
    )


def kaiming_normal_(
    weight: Tensor,
    *,
    mode: str = "fan_in",
    activation: Activation = "relu",
    slope: float = 0.01,
    fans: Fans | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill as He et al. 2015, normal: Var[w] = gain²/n.

    gain² is 2/(1 + slope²) for leaky ReLU. `mode="fan_in"` keeps the size of
    activations, `"fan_out"` that of gradients.
    """
    scale = gain_of(activation, slope) ** 2
    return variance_scaling_(
        weight, scale=scale, mode=mode, fans=fans, generator=generator
    )


def kaiming_uniform_(
    weight: Tensor,
    *,
    mode: str = "fan_in",
    activation: Activation = "relu",
    slope: float = 0.01,
    fans: Fans | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill as He et al. 2015, uniform within gain·√(3/n)."""
    scale = gain_of(activation, slope) ** 2
    return variance_scaling_(
        weight,
        scale=scale,
        mode=mode,
        distribution="uniform",
        fans=fans,
        generator=generator,
    )


def orthogonal_(
    weight: Tensor, *, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Fill `(…, out, terms)` with orthonormal rows or columns, times gain.

    Saxe et al. 2014. A square matrix keeps every length forward and backward, not only
    on average. With more outputs than terms, the outputs have the mean square of the
    inputs only in sum, not one by one; n·Var[w] says how much each has.
    """
    if weight.dim() < 2:
        raise ArgumentError(
            f"orthogonal_ needs a matrix, got shape {tuple(weight.shape)}"
        )
    with torch.no_grad():
        matrix = weight if weight.dim() > 2 else weight.unsqueeze(0)
        rows, columns = matrix.shape[-2:]
        tall = (*matrix.shape[:-2], max(rows, columns), min(rows, columns))
        # In float64 where the device has it, and independent of the weight's dtype.
        wide = torch.float64 if weight.device.type != "mps" else torch.float32
        sample = torch.empty(tall, dtype=wide, device=weight.device)
        sample.normal_(generator=generator)
        q, r = torch.linalg.qr(sample)
        # The signs of r's diagonal make q uniform over orthonormal matrices.
        q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
        if rows < columns:
            q = q.transpose(-2, -1)
        return weight.copy_(q.reshape(weight.shape) * gain)

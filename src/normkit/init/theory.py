"""Signal propagation by calculation: mean squares through layers.

For wide layers of independent weights, pre-activations are normal and

    q_{l+1} = fan_in·Var[w]·E[φ(√q_l·z)²] + Var[b]         z ~ N(0, 1)
    g_l     = fan_out·Var[w]·E[φ'(√q_l·z)²]·g_{l+1}

for the mean squares q of pre-activations and g of their gradients. The product of these
factors over the layers decides whether a deep network starts alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.errors import ArgumentError

__all__ = [
    "Signal",
    "gain_of",
    "gaussian_mean",
    "kept_gradient",
    "kept_signal",
    "variance_recursion",
]

Function = Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, Function] = {
    "linear": lambda z: z,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "selu": F.selu,
    "elu": F.elu,
    "celu": F.celu,
    "softplus": F.softplus,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "softsign": F.softsign,
}


def activation_function(activation: str | Function, slope: float = 0.01) -> Function:
    """Return the function of a name, or the function itself.

    Raises:
        ArgumentError: No activation of that name.
    """
    if callable(activation):
        return activation
    if activation == "leaky_relu":
        return lambda z: F.leaky_relu(z, slope)
    if activation not in _ACTIVATIONS:
        names = sorted([*_ACTIVATIONS, "leaky_relu"])
        raise ArgumentError(
            f"activation={activation!r} must be a function of a tensor, or one of "
            f"{names}"
        )
    return _ACTIVATIONS[activation]


def gaussian_mean(function: Function) -> float:
    """Return E[f(z)] over z ~ N(0, 1), to about 1e-9 for smooth functions.

    Gauss's rule on panels of ±12, which a kink costs less than the Gauss–Hermite rule:
    none at 0, 1e-6 elsewhere.
    """
    with torch.no_grad():
        values = function(_NODES).to(torch.float64)
    return float((_WEIGHTS * values).sum())


def _panels() -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(12)
    edges = np.linspace(-12.0, 12.0, 97)
    half = (edges[1] - edges[0]) / 2
    middle = (edges[1:] + edges[:-1]) / 2
    nodes = (middle[:, None] + half * x[None, :]).ravel()
    weights = np.tile(half * w, len(middle))
    density = np.exp(-nodes * nodes / 2) / math.sqrt(2 * math.pi)
    return torch.from_numpy(nodes), torch.from_numpy(weights * density)


_NODES, _WEIGHTS = _panels()


def kept_signal(
    activation: str | Function,
    mean_square: float = 1.0,
    slope: float = 0.01,
    *,
    mean: float = 0.0,
) -> float:
    """Return E[φ(z)²] for z normal, the mean square after an activation.

    Args:
        activation: A name, or a function of a tensor.
        mean_square: E[z²].
        slope: Negative slope of a leaky ReLU.
        mean: E[z], as behind a sum of outputs of a ReLU.
    """
    function = activation_function(activation, slope)
    std = _std(mean_square, mean)
    return gaussian_mean(lambda z: function(mean + std * z).square())


def kept_gradient(
    activation: str | Function,
    mean_square: float = 1.0,
    slope: float = 0.01,
    *,
    mean: float = 0.0,
) -> float:
    """Return E[φ'(z)²], the factor on the gradient's mean square; see `kept_signal`."""
    function = activation_function(activation, slope)
    std = _std(mean_square, mean)

    def squared_derivative(z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = (mean + std * z).detach().requires_grad_()
            (derivative,) = torch.autograd.grad(function(z).sum(), z)
        return derivative.square()

    return gaussian_mean(squared_derivative)


def _std(mean_square: float, mean: float) -> float:
    variance = mean_square - mean * mean
    if variance < -1e-9 * mean_square:  # that of a constant is 0, up to rounding
        raise ArgumentError(
            f"mean={mean} has a square of {mean * mean:.4g}, above mean_square="
            f"{mean_square:.4g}; E[z]² is at most E[z²]"
        )
    return math.sqrt(max(variance, 0.0))


def gain_of(activation: str | Function, slope: float = 0.01) -> float:
    """Return 1/√E[φ(z)²], the factor on the std of weights that keeps q at 1.

    √2 for ReLU, √(2/(1 + slope²)) for leaky ReLU, 1 for linear, as everywhere. Others
    are calculated: tanh is 1.59 here and the rule of thumb 5/3 in torch; sigmoid 1.85
    and 1. Keeping the size of activations says nothing about gradients: see
    `kept_gradient`.

    Example:
        >>> round(gain_of("relu"), 6), round(gain_of("tanh"), 4)
        (1.414214, 1.5925)
    """
    # Closed forms: exact, where the calculation is to 1e-15 anyhow.
    if activation == "leaky_relu":
        return math.sqrt(2.0 / (1.0 + slope * slope))
    if activation == "relu":
        return math.sqrt(2.0)
    if activation == "linear":
        return 1.0
    return 1.0 / math.sqrt(kept_signal(activation, 1.0, slope))


@dataclass(frozen=True)
class Signal:
    """Mean squares at one layer of a plain stack.

    Attributes:
        before: That of the pre-activation.
        after: That of the activation.
        gradient: That of the gradient of the pre-activation, relative to that of the
            last layer's activation.
    """

    before: float
    after: float
    gradient: float


def variance_recursion(
    forward: Sequence[float],
    activation: str | Function,
    *,
    backward: Sequence[float] | None = None,
    mean_square: float = 1.0,
    bias_variance: float = 0.0,
    slope: float = 0.01,
) -> list[Signal]:
    """Follow the mean square of signal and gradient through a stack of layers.

    Args:
        forward: fan_in·Var[w] of each layer, first to last.
        activation: After each layer: a name, or a function of a tensor.
        backward: fan_out·Var[w] of each layer; None takes `forward`, as in square
            layers.
        mean_square: E[x²] of the input.
        bias_variance: Var[b].
        slope: Negative slope of a leaky ReLU.

    Returns:
        One Signal per layer.

    Example:
        Six tanh layers of 4096 units with weights of std 0.01 (4096·0.01² = 0.41):

        >>> signals = variance_recursion([0.4096] * 6, "tanh")
        >>> [round(signal.after**0.5, 2) for signal in signals]
        [0.49, 0.29, 0.18, 0.11, 0.07, 0.05]
    """
    backward = forward if backward is None else backward
    before: list[float] = []
    after: list[float] = []
    q = mean_square
    for factor in forward:
        before.append(factor * q + bias_variance)
        q = kept_signal(activation, before[-1], slope)
        after.append(q)
    gradients: list[float] = []
    g = 1.0
    for i in reversed(range(len(before))):
        g *= kept_gradient(activation, before[i], slope)
        gradients.append(g)
        g *= backward[i]
    gradients.reverse()
    return [Signal(*each) for each in zip(before, after, gradients, strict=True)]

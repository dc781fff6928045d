"""`initialize`: variance in, variance out, for every linear map of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from normkit.errors import ArgumentError
from normkit.init.fans import LinearMap, linear_maps, sample_variance
from normkit.init.report import InitLine, InitReport
from normkit.init.theory import gain_of
from normkit.init.variance_scaling import (
    SMALL_STD,
    Activation,
    constant_,
    normal_,
    orthogonal_,
    variance_scaling_,
)

__all__ = ["initialize"]

SCHEMES = ("constant", "normal", "xavier", "kaiming", "orthogonal")


def initialize(
    model: nn.Module,
    scheme: str = "kaiming",
    *,
    activation: Activation | None = None,
    slope: float = 0.01,
    gain: float | None = None,
    mode: str = "fan_in",
    distribution: str = "normal",
    std: float = SMALL_STD,
    value: float = 0.0,
    bias: float | None = 0.0,
    layers: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> InitReport:
    """Draw the weights of every linear map of a model anew, in place.

    Linear, convolutions, transposed convolutions, the projections of attention and each
    gate of an RNN have the fans of what they compute; the report says n·Var[w] of each,
    as meant and as drawn. Normalizations and embeddings are left alone.

    Args:
        model: Any module.
        scheme: What the variance of the weights is,

            - `"constant"`: all weights `value`. No two units of a layer ever differ.
            - `"normal"`: std² for every layer. 0.01 is the "small" of the textbooks,
              0.05 the "not so small": at width 4096 activations vanish and saturate.
            - `"xavier"`: gain²·2/(fan_in + fan_out).
            - `"kaiming"`: gain²/fan_in (or fan_out by `mode`), gain of `activation`.
            - `"orthogonal"`: orthonormal rows or columns, times gain.
        activation: What follows the layers: a name (`"relu"`, `"tanh"`, …) or a
            function of a tensor. None is ReLU for Kaiming, linear for the others.
        slope: Of a leaky ReLU.
        gain: Factor on the std; None takes that of `activation`.
        mode: For Kaiming: `"fan_in"` keeps the size of activations, `"fan_out"` that of
            gradients, `"fan_avg"` something between.
        distribution: `"normal"`, `"uniform"` or `"truncated_normal"`.
        std: For `"normal"`.
        value: For `"constant"`.
        bias: All biases become this; None keeps them.
        layers: Dotted names, `*` for any part, of the layers to draw; None is all.
        generator: Source of random numbers; None is torch's global one.

    Returns:
        An InitReport with a line per linear map.

    Raises:
        ArgumentError: An argument that cannot be used. Nothing has been written then.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> source = torch.Generator().manual_seed(0)
        >>> report = initialize(model, "kaiming", generator=source)
        >>> [(line.name, round(line.predicted, 6)) for line in report.lines]
        [('0', 2.0), ('2', 2.0)]

    References:
        Glorot & Bengio, "Understanding the difficulty of training deep feedforward
        neural networks", AISTATS 2010. He et al., "Delving Deep into Rectifiers", ICCV
        2015. Saxe et al., "Exact solutions to the nonlinear dynamics of learning in
        deep linear neural networks", ICLR 2014.
    """
    if scheme not in SCHEMES:
        raise ArgumentError(f"scheme={scheme!r} must be one of {SCHEMES}")
    if not 0 <= std < math.inf:
        raise ArgumentError(f"std={std} must be finite and not negative")
    if gain is None:
        named = activation
        if named is None:
            named = "relu" if scheme == "kaiming" else "linear"
        gain = gain_of(named, slope)
    maps, left = linear_maps(model)
    maps = chosen_maps(maps, layers, left)
    draw = _Draw(scheme, gain, mode, distribution, std, value, generator)
    _check(draw, maps)
    lines: list[InitLine] = []
    for each in maps:
        lines.append(draw(each))
        _set_bias(each, bias)
    return InitReport(scheme, tuple(lines), left)


class _Draw:
    """Draws one linear map after the other by one scheme."""

    def __init__(
        self,
        scheme: str,
        gain: float,
        mode: str,
        distribution: str,
        std: float,
        value: float,
        generator: torch.Generator | None,
    ) -> None:
        self.scheme = scheme
        self.gain = gain
        self.mode = "fan_avg" if scheme == "xavier" else mode
        self.distribution = distribution
        self.std = std
        self.value = value
        self.generator = generator

    def __call__(self, each: LinearMap) -> InitLine:
        with torch.no_grad():
            var, rule = self._drawn(each)
        return line_of(each, rule, var)

    def _drawn(self, each: LinearMap) -> tuple[float, str]:
        """Write the weight; E[w²] as meant, and the rule in words."""
        if self.scheme == "constant":
            constant_(each.weight, self.value)
            return self.value**2, f"constant {self.value:g}"
        if self.scheme == "normal":
            normal_(each.weight, self.std, generator=self.generator)
            return self.std**2, f"normal, std {self.std:g}"
        if self.scheme == "orthogonal":
            rows = each.rows().clone()
            orthogonal_(rows, gain=self.gain, generator=self.generator)
            each.set_rows(rows)
            return self.gain**2 / max(
                rows.shape[-2:]
            ), f"orthogonal, gain {self.gain:.4g}"
        variance_scaling_(
            each.weight,
            scale=self.gain**2,
            mode=self.mode,
            distribution=self.distribution,
            fans=each.fans,
            generator=self.generator,
        )
        rule = f"{self.scheme} {self.distribution}, {self.mode}, gain {self.gain:.4g}"
        return self.gain**2 / each.fans.mean(self.mode), rule


def line_of(each: LinearMap, rule: str, var: float) -> InitLine:
    """The report's line for a weight that was drawn with E[w²] = var."""
    fan_in, fan_out = each.fans.fan_in, each.fans.fan_out
    drawn = sample_variance(each.weight)
    return InitLine(
        name=each.name,
        kind=each.kind,
        rule=rule,
        fan_in=fan_in,
        fan_out=fan_out,
        predicted=fan_in * var,
        measured=fan_in * drawn,
        predicted_back=fan_out * var,
        measured_back=fan_out * drawn,
    )


def chosen_maps(
    maps: list[LinearMap], patterns: Sequence[str] | None, left: dict[str, str]
) -> list[LinearMap]:
    """The maps whose layer a pattern names; the others go to `left`.

    Raises:
        ArgumentError: A pattern that names none.
    """
    if patterns is None:
        return maps
    for pattern in patterns:
        if not any(fnmatchcase(each.name, pattern) for each in maps):
            names = sorted({each.name for each in maps})
            raise ArgumentError(
                f"layers={pattern!r} matches no linear map; there are {names}"
            )
    chosen = [m for m in maps if any(fnmatchcase(m.name, p) for p in patterns)]
    for each in maps:
        if each not in chosen:
            left[each.name] = "not named in layers="
    return chosen


def _check(draw: _Draw, maps: Sequence[LinearMap]) -> None:
    """Raise what drawing would raise, before anything is written."""
    source = torch.Generator().manual_seed(0)
    if draw.scheme in ("xavier", "kaiming"):
        variance_scaling_(
            torch.empty(1, 1),
            scale=draw.gain**2,
            mode=draw.mode,
            distribution=draw.distribution,
            generator=source,
        )
    for each in maps:
        if not each.weight.numel():
            raise ArgumentError(
                f"layer {each.name!r} has a weight of shape {tuple(each.weight.shape)} "
                "without elements; leave it out by layers="
            )


def _set_bias(each: LinearMap, bias: float | None) -> None:
    if bias is not None and each.bias is not None:
        with torch.no_grad():
            each.bias.fill_(bias)

"""Fans: the number of products that outputs and gradients of a linear map sum.

    forward   Var[y]  = fan_in·Var[w]·E[x²]
    backward  Var[dx] = fan_out·Var[w]·E[dy²]

for independent weights of mean 0. With K positions in the kernel, s = Π stride:

    linear             fan_in = in             fan_out = out
    convolution        fan_in = in/g·K         fan_out = out/g·K/s
    transposed conv.   fan_in = in/g·K/s       fan_out = out/g·K

A fan divided by s is the number of terms on average: strided positions meet different
numbers of kernel positions. Zero padding makes the sums at the border shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from normkit.fold.algebra import (
    LINEAR,
    WeightLayout,
    conv_layout,
    conv_transpose_layout,
)
from normkit.modeling.norm_types import is_norm

__all__ = ["Fans", "LinearMap", "linear_maps"]


@dataclass(frozen=True)
class Fans:
    """Terms in the sums of a linear map.

    Attributes:
        fan_in: Products that one output sums.
        fan_out: Products that the gradient of one input sums.
    """

    fan_in: float
    fan_out: float

    @classmethod
    def of_tensor(cls, weight: Tensor) -> Fans:
        """Return the fans of a weight `(out, in, *kernel)`, from its shape alone."""
        positions = math.prod(weight.shape[2:])
        columns = weight.shape[1] if weight.dim() > 1 else 1
        return cls(columns * positions, weight.shape[0] * positions)

    def mean(self, mode: str) -> float:
        """Return `"fan_in"`, `"fan_out"` or `"fan_avg"`, their arithmetic mean."""
        return {
            "fan_in": self.fan_in,
            "fan_out": self.fan_out,
            "fan_avg": (self.fan_in + self.fan_out) / 2,
        }[mode]


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One weight of a model that multiplies and sums.

    Attributes:
        name: Dotted name of the layer.
        kind: Class name of the layer, with the parameter where that is not `weight`.
        weight: The parameter, or the part of it that is one map (a gate of an RNN).
        bias: Its bias, or the part that belongs; None without.
        fans: Its fans.
        layout: Where the weight keeps groups, outputs and inputs.
        is_frozen: No weight of the layer requires a gradient.
    """

    name: str
    kind: str
    weight: Tensor
    bias: Tensor | None
    fans: Fans
    layout: WeightLayout = LINEAR
    is_frozen: bool = False

    def rows(self) -> Tensor:
        """Return weights as `(groups, outputs, terms of a sum)`, a view or a copy."""
        return self.layout.to_goik(self.weight).flatten(2)

    def set_rows(self, rows: Tensor) -> None:
        """Write changed `rows` back, in place."""
        shape = self.layout.to_goik(self.weight).shape
        whole = self.layout.from_goik(rows.reshape(shape), tuple(self.weight.shape))
        self.weight.copy_(whole)


def linear_maps(model: nn.Module) -> tuple[list[LinearMap], dict[str, str]]:
    """Return the linear maps of a model in the order of its modules, each weight once.

    A weight that a module which is no linear map holds as well, as the one that an
    output layer shares with an embedding, is that module's.

    Returns:
        The maps, and the reason against each layer with a weight that is none and no
        normalization.
    """
    maps: list[LinearMap] = []
    left: dict[str, str] = {}
    owners: dict[int, str] = {}
    layers = [
        (name, module, own)
        for name, module in model.named_modules()
        if (own := dict(module.named_parameters(recurse=False)))
    ]
    # Before any map: the output layer may come before the embedding.
    for name, module, own in layers:
        if (reason := _reason_against(module)) is not None:
            left[name] = reason
            for parameter in own.values():
                owners.setdefault(id(parameter), name)
    for name, module, own in layers:
        if name in left or is_norm(module):
            continue
        shared = (
            owners[id(parameter)]
            for label, parameter in own.items()
            if "weight" in label and id(parameter) in owners
        )
        if (owner := next(shared, None)) is not None:
            left[name] = f"shares its weight with {owner!r}"
            if owner in left:
                left[name] += ", which is left alone"
            continue
        for parameter in own.values():
            owners.setdefault(id(parameter), name)
        weights = [own[label] for label in own if "weight" in label]
        is_frozen = bool(weights) and not any(p.requires_grad for p in weights)
        maps += [replace(m, is_frozen=is_frozen) for m in _maps_of(name, module)]
    return maps, left


_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _reason_against(module: nn.Module) -> str | None:
    if any(
        isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)
    ):
        return "lazy: run the model once first"
    if parametrize.is_parametrized(module) or hasattr(module, "weight_g"):
        return "its weight is computed from others (a parametrization)"
    known = (nn.Linear, *_CONV, *_TRANSPOSED, nn.RNNBase, nn.RNNCellBase)
    if is_norm(module) or isinstance(module, (*known, nn.MultiheadAttention)):
        return None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "looks rows up and sums nothing"
    return f"a {type(module).__name__} is no linear map that is known here"


def _maps_of(name: str, module: nn.Module) -> list[LinearMap]:
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        fans = Fans(module.in_features, module.out_features)
        return [LinearMap(name, kind, module.weight, module.bias, fans)]
    if isinstance(module, (*_CONV, *_TRANSPOSED)):
        is_transposed = isinstance(module, _TRANSPOSED)
        positions = math.prod(module.kernel_size)
        stride = math.prod(int(s) for s in module.stride)
        into = module.in_channels / module.groups * positions
        out = module.out_channels / module.groups * positions
        layout = conv_transpose_layout if is_transposed else conv_layout
        fans = Fans(into / stride, out) if is_transposed else Fans(into, out / stride)
        return [
            LinearMap(
                *(name, kind, module.weight, module.bias, fans),
                layout=layout(module.groups),
            )
        ]
    if isinstance(module, nn.MultiheadAttention):
        return _attention_maps(name, kind, module)
    return _gate_maps(name, kind, module)


def _attention_maps(
    name: str, kind: str, module: nn.MultiheadAttention
) -> list[LinearMap]:
    # out_proj is a Linear of its own and found as such.
    parts = ("query", "key", "value")
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.detach().chunk(3)
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = tuple(getattr(module, n).detach() for n in names)
    biases: tuple[Tensor | None, ...] = (None, None, None)
    if module.in_proj_bias is not None:
        biases = tuple(module.in_proj_bias.detach().chunk(3))
    return [
        LinearMap(name, f"{kind}.{part}", w, b, Fans.of_tensor(w))
        for part, w, b in zip(parts, weights, biases, strict=True)
    ]


def _gate_maps(name: str, kind: str, module: nn.Module) -> list[LinearMap]:
    has_four, has_three = (nn.LSTM, nn.LSTMCell), (nn.GRU, nn.GRUCell)
    gates = 4 if isinstance(module, has_four) else 1
    gates = 3 if isinstance(module, has_three) else gates
    maps: list[LinearMap] = []
    for label, weight in module.named_parameters(recurse=False):
        if not label.startswith("weight"):
            continue
        bias = getattr(module, label.replace("weight", "bias", 1), None)
        count = 1 if label.startswith("weight_hr") else gates
        biases = (None,) * count if bias is None else bias.detach().chunk(count)
        for i, part in enumerate(weight.detach().chunk(count)):
            suffix = f"{label}[{i}]" if count > 1 else label
            fans = Fans.of_tensor(part)
            maps.append(LinearMap(name, f"{kind}.{suffix}", part, biases[i], fans))
    return maps


def sample_variance(weight: Tensor) -> float:
    """Return E[|w|²], the variance of weights drawn with mean 0."""
    return float(weight.detach().abs().to(torch.float64).square().mean())

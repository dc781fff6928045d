"""Overhead of a call against torch.nn's, in microseconds, with hardly any kernel work.

Each layer runs on 256 values under `normkit.backend("cpu")`: otherwise so small an
input could run torch's operator. In training, with one thread: the forward with its
graph, and the forward with the gradients of input and parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import normkit
from normkit.bench.timing import in_turns

__all__ = ["CallCost", "call_cost"]

# An instance needs positions: 4 channels of 8 of them are as many values.
_LAYERS: dict[str, tuple[tuple[int, ...], tuple[Any, ...], dict[str, bool]]] = {
    "BatchNorm1d": ((8, 32), (32,), {}),
    "GroupNorm": ((8, 32), (8, 32), {}),
    "LayerNorm": ((8, 32), (32,), {}),
    "RMSNorm": ((8, 32), (32,), {}),
    "InstanceNorm1d": ((8, 4, 8), (4,), {"affine": True}),
}


@dataclass(frozen=True)
class CallCost:
    """Median microseconds of one layer, process CPU time.

    Attributes:
        layer: Name in torch.nn and normkit.nn.
        shape: Shape of the input.
        forward: Time of normkit's forward.
        torch_forward: Time of torch.nn's.
        step: Time of normkit's forward and backward.
        torch_step: Time of torch.nn's.
    """

    layer: str
    shape: tuple[int, ...]
    forward: float
    torch_forward: float
    step: float
    torch_step: float

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> CallCost:
        """Read one entry of a record."""
        fields = {**entry, "shape": tuple(entry["shape"])}
        return cls(**fields)

    @property
    def over_forward(self) -> float:
        """Microseconds of a forward beyond torch.nn's."""
        return self.forward - self.torch_forward

    @property
    def over_step(self) -> float:
        """Microseconds of forward and backward beyond torch.nn's."""
        return self.step - self.torch_step


def call_cost(seconds: float) -> tuple[CallCost, ...]:
    """Measure all layers; none where the kernels of the CPU cannot run.

    Args:
        seconds: Time for all of them, shared evenly.
    """
    if normkit.explain(torch.empty(8, 32), (0,)).reasons["cpu"]:
        return ()
    share = seconds / (2 * len(_LAYERS))
    return tuple(_measured(layer, share) for layer in _LAYERS)


def _measured(name: str, seconds: float) -> CallCost:
    shape, sizes, options = _LAYERS[name]
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    layers = {
        "ours": getattr(normkit.nn, name)(*sizes, **options),
        "torch": getattr(torch.nn, name)(*sizes, **options),
    }

    def forward(layer: torch.nn.Module) -> Callable[[], Any]:
        return lambda: layer(x)

    def step(layer: torch.nn.Module) -> Callable[[], Any]:
        wanted = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x), wanted, dy)

    micros: list[float] = []
    with normkit.backend("cpu"):
        for ready in (forward, step):
            contestants = {name: ready(layer) for name, layer in layers.items()}
            for call in contestants.values():
                call()
            found = in_turns(contestants, seconds)
            micros += [round(1e6 * found[n].cpu_median, 2) for n in ("ours", "torch")]
    return CallCost(name, shape, *micros)

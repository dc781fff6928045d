"""Whole training steps of networks.

A residual network in plain torch.nn, and the same with
`normkit.convert(model, to="normkit", example_inputs=x)`, with all activations kept, and
under `less_memory`. A step is forward, loss and backward; the optimizer is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import normkit
from normkit.bench.timing import Timing, in_turns
from normkit.functional.memory.less_memory import less_memory
from normkit.functional.memory.saved_memory import saved_memory

__all__ = ["STEPS", "Step", "measure_step", "resnet"]

# (network, layout)
STEPS = tuple(
    (name, layout) for name in ("resnet18", "resnet50") for layout in ("nchw", "nhwc")
)
_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


@dataclass(frozen=True)
class Step:
    """Measurement of one contestant on one network.

    Attributes:
        network: `"resnet18"` or `"resnet50"`, and the shape of its input.
        layout: `"nchw"` or `"nhwc"`.
        contestant: `"normkit"`; under `less_memory` its mode.
        timing: Time of ours.
        torch: Time of the same network in torch.nn.
        kept: Bytes that our forward keeps for the backward.
        torch_kept: Bytes that torch.nn's forward keeps.
    """

    network: str
    layout: str
    contestant: str
    timing: Timing
    torch: Timing
    kept: int
    torch_kept: int

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Step:
        """Read the plain data of `dataclasses.asdict`."""
        timings: dict[str, Any] = {k: Timing(**data[k]) for k in ("timing", "torch")}
        return cls(**data | timings)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def to_row(self) -> str:
        """Return a row of a table."""
        ratio = self.torch.cpu / self.timing.cpu
        cells = [
            *(f"{self.network} {self.layout}", self.contestant),
            f"{self.timing.cpu * 1e3:,.0f}",
            f"{ratio:.2f}" + (" (slower)" if ratio < 0.995 else ""),
            *(f"{self.kept / 1e6:,.0f} MB", f"{self.kept / self.torch_kept:.2f}"),
        ]
        return f"| {' | '.join(cells)} |"


def measure_step(network: str, layout: str, seconds: float) -> Iterator[Step]:
    """Measure one network in one layout: all contestants within `seconds`."""
    shape = (4, 3, 160, 160)
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    plain: Any = resnet(network)
    plain.to(memory_format=form)
    x = torch.randn(shape).contiguous(memory_format=form)
    fused = copy.deepcopy(plain)
    normkit.convert(fused, to="normkit", example_inputs=x)
    models: dict[str, tuple[nn.Module, str | None]] = {
        "torch": (plain, None),
        "normkit": (fused, None),
        "recompute": (fused, "recompute"),
        "int8": (fused, "int8"),
    }
    kept = {name: _kept(*given, x) for name, given in models.items()}
    calls = {name: _step(*given, x) for name, given in models.items()}
    timings = in_turns(calls, seconds)
    label = f"{network} {'×'.join(map(str, shape))}"
    for name in list(models)[1:]:
        yield Step(
            *(label, layout, name, timings[name], timings["torch"]),
            *(kept[name], kept["torch"]),
        )


def _forward(model: nn.Module, mode: Any, x: Tensor) -> Tensor:
    if mode is None:
        return model(x)
    with less_memory(mode):
        return model(x)


def _step(model: nn.Module, mode: str | None, x: Tensor) -> Callable[[], object]:
    parameters = list(model.parameters())

    def run() -> object:
        return torch.autograd.grad(_forward(model, mode, x).square().sum(), parameters)

    return run


def _kept(model: nn.Module, mode: str | None, x: Tensor) -> int:
    with saved_memory() as saved:
        _forward(model, mode, x)
    return saved.bytes


class _Block(nn.Module):
    """relu(convolutions(x) + shortcut(x)), with 2 or 3 convolutions."""

    def __init__(
        self, channels: int, width: int, stride: int, *, is_deep: bool
    ) -> None:
        super().__init__()
        out = 4 * width if is_deep else width
        if is_deep:
            sizes = ((channels, width, 1, 1), (width, width, 3, stride))
            sizes += ((width, out, 1, 1),)
        else:
            sizes = ((channels, width, 3, stride), (width, width, 3, 1))
        layers: list[nn.Module] = []
        for before, after, size, step in sizes:
            layers += [
                nn.Conv2d(before, after, size, step, size // 2, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        y += self.shortcut(x)
        return self.relu(y)


def resnet(name: str, classes: int = 1000) -> nn.Sequential:
    """Build a residual network in plain torch.nn, with random weights.

    Args:
        name: `"resnet18"` or `"resnet50"`.
        classes: Number of outputs.

    References:
        He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
    """
    is_deep = name == "resnet50"
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for stage, count in enumerate(_BLOCKS[name]):
        width = 64 * 2**stage
        for k in range(count):
            stride = 2 if stage and not k else 1
            layers.append(_Block(channels, width, stride, is_deep=is_deep))
            channels = 4 * width if is_deep else width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers)

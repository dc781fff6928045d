"""Whole training steps of networks.

A residual network in plain torch.nn, and the same after
`normkit.convert(model, to="normkit")`: with `example_inputs=`, so that activations and
sums are fused into the norms, and without ("not fused"); with all activations kept, and
under `less_memory`. A step is forward, loss and backward; the optimizer is left out.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import normkit
from normkit.bench.timing import Timing, in_turns, seeded
from normkit.environment import environment
from normkit.functional.memory.less_memory import less_memory
from normkit.functional.memory.saved_memory import saved_memory

__all__ = ["STEPS", "Step", "StepCase", "Steps", "resnet", "steps"]

_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


class StepCase(NamedTuple):
    """A network of `_BLOCKS`, a batch of square images, and their layout."""

    network: str
    batch: int
    pixels: int
    layout: str

    def __str__(self) -> str:
        return (
            f"{self.network} {self.batch}×3×{self.pixels}×{self.pixels} {self.layout}"
        )


STEPS = tuple(
    StepCase(*case, layout)
    for case in (("resnet18", 8, 64), ("resnet18", 4, 160), ("resnet50", 4, 160))
    for layout in ("nchw", "nhwc")
)


@dataclass(frozen=True)
class Step:
    """Measurement of one contestant on one network.

    Attributes:
        case: The network, the batch and the layout.
        threads: Number of threads of torch and of the kernels.
        contestant: "normkit" or "not fused"; under `less_memory` its mode.
        timing: Time of ours.
        torch: Time of the same network in torch.nn.
        kept: Bytes that our forward keeps for the backward.
        torch_kept: Bytes that torch.nn's forward keeps.
    """

    case: StepCase
    threads: int
    contestant: str
    timing: Timing
    torch: Timing
    kept: int
    torch_kept: int

    @property
    def ratio(self) -> float:
        """Torch's median time over ours: of CPU time, with several threads of wall."""
        # CPU time adds up the threads.
        if self.threads == 1:
            return self.torch.cpu_median / self.timing.cpu_median
        return self.torch.wall_median / self.timing.wall_median

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Step:
        """Read the plain data of `dataclasses.asdict`."""
        parts: dict[str, Any] = {k: Timing(**data[k]) for k in ("timing", "torch")}
        parts["case"] = StepCase(*data["case"])
        return cls(**data | parts)

    def to_row(self) -> str:
        """Return a row of a table."""
        ratio = self.ratio
        cells = [
            *(str(self.case), str(self.threads), self.contestant),
            f"{self.timing.wall_median * 1e3:,.0f}",
            f"{ratio:.2f}" + (" (slower)" if ratio < 0.995 else ""),
            *(f"{self.kept / 1e6:,.0f} MB", f"{self.kept / self.torch_kept:.2f}"),
        ]
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Steps:
    """Record of `normkit bench steps`: the steps, and the machine they ran on."""

    steps: tuple[Step, ...]
    environment: dict[str, Any]

    @property
    def threads(self) -> tuple[int, ...]:
        """Numbers of threads in the record."""
        return tuple(dict.fromkeys(step.threads for step in self.steps))

    @classmethod
    def from_json(cls, text: str) -> Steps:
        """Read the result of `to_json`."""
        data = json.loads(text)
        return cls(tuple(map(Step.from_json, data["steps"])), data["environment"])

    def to_json(self) -> str:
        """Return all measurements as plain data."""
        data = {"environment": self.environment, "steps": list(map(asdict, self.steps))}
        return json.dumps(data, indent=1)

    def to_markdown(self) -> str:
        """Return the table."""
        head = (
            "| training step | threads | | ms | torch ÷ ours | kept for backward | of "
            "torch's |\n| --- | ---: | --- | ---: | ---: | ---: | ---: |"
        )
        return "\n".join([head, *(step.to_row() for step in self.steps)])


def steps(
    cases: Sequence[StepCase] = STEPS,
    *,
    threads: Sequence[int] = (1, 2),
    budget: float = 480.0,
) -> Steps:
    """Measure training steps with each number of threads.

    Args:
        cases: Networks, batches and layouts.
        threads: Numbers of threads of torch and the kernels; restored afterwards.
        budget: Seconds for everything; a contestant has at least three turns, so that a
            slow machine may need more.
    """
    end = time.perf_counter() + budget
    measured: list[Step] = []
    plan = [(count, case) for count in threads for case in cases]
    costs = [_cost(case) for _, case in plan]
    with seeded(threads=1):
        for number, (count, case) in enumerate(plan):
            torch.set_num_threads(count)
            share = costs[number] / sum(costs[number:])
            seconds = max(end - time.perf_counter(), 0) * share
            measured += _measured(case, count, seconds)
    return Steps(tuple(measured), json.loads(environment().to_json()))


def _cost(case: StepCase) -> float:
    # A ResNet-50 step takes 3 to 4 times that of a ResNet-18 on the same images.
    return (3 if case.network == "resnet50" else 1) * case.batch * case.pixels**2


def _measured(case: StepCase, threads: int, seconds: float) -> Iterator[Step]:
    shape = (case.batch, 3, case.pixels, case.pixels)
    form = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format
    plain: Any = resnet(case.network)
    plain.to(memory_format=form)
    x = torch.randn(shape).contiguous(memory_format=form)
    fused, not_fused = copy.deepcopy(plain), copy.deepcopy(plain)
    normkit.convert(fused, to="normkit", example_inputs=x)
    normkit.convert(not_fused, to="normkit")
    models: dict[str, tuple[nn.Module, str | None]] = {
        "torch": (plain, None),
        "normkit": (fused, None),
        "not fused": (not_fused, None),
        "recompute": (fused, "recompute"),
        "int8": (fused, "int8"),
    }
    kept = {name: _kept(*given, x) for name, given in models.items()}
    calls = {name: _step(*given, x) for name, given in models.items()}
    timings = in_turns(calls, seconds, avoid_waiting=True)
    for name in list(models)[1:]:
        yield Step(
            *(case, threads, name, timings[name], timings["torch"]),
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

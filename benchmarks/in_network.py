"""The time of batch norms inside a network, where caches hold other things.

`normkit bench calls` repeats one call, so that its code and data stay in the caches. In
a network each norm runs after convolutions that have displaced them, and Python feels
it most. Here the norms of a ResNet-50 at batch 4 and 160 px are timed where they stand:
forward by hooks on the layer, backward by hooks on its output and its input, the same
for every contestant. `function` is torch's own kernels in an autograd function of a
dozen lines of Python: what any layer pays that is not written in C++.

Contestants take turns; least of the turns, averaged over the layers of a row. One
thread. Run: `python benchmarks/in_network.py [turns] [nchw|nhwc]`.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import normkit
from normkit.bench.steps import resnet

BATCH, PIXELS = 4, 160
# Upper limits of the number of values in a row of the table.
LIMITS = (60_000, 150_000, 300_000, 600_000, 2_000_000)

Times = dict[tuple[str, str], list[float]]


class Function(torch.autograd.Function):
    """Batch norm in training by torch's operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *running: Tensor):
        """Return y and keep what the backward reads."""
        y, mean, inv_std = torch.native_batch_norm(
            x, weight, bias, *running, training=True, momentum=0.1, eps=1e-5
        )
        ctx.save_for_backward(x, weight, *running, mean, inv_std)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        """Return the gradients of x, weight and bias."""
        (dy,) = grad_outputs
        grads = torch.ops.aten.native_batch_norm_backward(
            dy, *ctx.saved_tensors, True, 1e-5, [True] * 3
        )
        return (*grads, None, None)


class ByFunction(nn.BatchNorm2d):
    """A batch norm that calls `Function`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize the input."""
        running = self.running_mean, self.running_var
        return Function.apply(input, self.weight, self.bias, *running)


def contestants() -> dict[str, nn.Module]:
    """Return the network in torch.nn, with `ByFunction`, and with normkit's layers."""
    plain = resnet("resnet50").train()
    wrapped, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    for layer in wrapped.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = ByFunction
    normkit.convert(ours, to="normkit")
    return {"torch.nn": plain, "function": wrapped, "normkit": ours}


def timed(model: nn.Module, times: Times, values: dict[str, int]) -> None:
    """Record times and sizes of each norm of the model by hooks."""

    def attach(name: str, layer: nn.Module) -> None:
        began: dict[str, float] = {}

        def before(*_: Any) -> None:
            began["forward"] = time.perf_counter()

        def after(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            times["forward", name].append(time.perf_counter() - began["forward"])
            values[name] = y.numel()
            y.register_hook(lambda _: began.update(backward=time.perf_counter()))
            inputs[0].register_hook(
                lambda _: times["backward", name].append(
                    time.perf_counter() - began["backward"]
                )
            )

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    for name, layer in model.named_modules():
        if "BatchNorm" in type(layer).__name__ or isinstance(layer, ByFunction):
            attach(name, layer)


def measure(turns: int, layout: torch.memory_format) -> tuple[dict[str, Times], Any]:
    """Return the times of each contestant, and the size of each layer's input."""
    x = torch.randn(BATCH, 3, PIXELS, PIXELS).contiguous(memory_format=layout)
    y = torch.arange(BATCH)
    models = contestants()
    times: dict[str, Times] = {name: defaultdict(list) for name in models}
    values: dict[str, int] = {}
    for name, model in models.items():
        convert_layout: Any = model.to
        timed(convert_layout(memory_format=layout), times[name], values)
    for turn in range(turns + 1):
        for name, model in models.items():
            cross_entropy(model(x), y).backward()
            model.zero_grad()
            if not turn:  # the first asks the system for memory
                times[name].clear()
    return times, values


def rows(times: dict[str, Times], values: dict[str, int]) -> list[str]:
    """Return the table."""
    lines = [
        "| values | layers | "
        + " | ".join(f"{name}, forward" for name in times)
        # The spaces make the two halves readable as text.
        + " | "
        + " | ".join(f"{name}, backward" for name in times)
        + " |",
        "| --- " * 2 + "| ---: " * 2 * len(times) + "|",
    ]
    low = 0
    for high in LIMITS:
        names = [n for n, count in values.items() if low < count <= high]
        low = high
        if names:
            least = [
                statistics.mean(min(times[who][way, n]) for n in names) * 1e6
                for way in ("forward", "backward")
                for who in times
            ]
            sizes = sorted({values[n] for n in names})
            span = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if sizes[1:] else "")
            cells = " | ".join(f"{micros:,.0f}" for micros in least)
            lines.append(f"| {span} | {len(names)} | {cells} |")
    return lines


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if sys.argv[1:] else 20
    is_last = sys.argv[2:] == ["nhwc"]
    form = torch.channels_last if is_last else torch.contiguous_format
    print(*rows(*measure(count, form)), sep="\n")

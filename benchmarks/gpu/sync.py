"""SyncBatchNorm on one device: its launches and its time, with a group of one rank.

A layer in a group of one rank is a plain batch norm and must launch the same. Its
halves joined by NCCL are measured by asking for the group all the same: statistics,
one all_reduce in loopback, apply; and one all_reduce in the backward. Two ranks on
one device NCCL refuses.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from benchmarks.gpu.stages import Case, Row
from benchmarks.gpu.timing import Bench
from torch import Tensor

import normkit
from normkit.functional.engine import normalize

__all__ = ["cases"]


def cases(bench: Bench) -> list[Case]:
    """Join a group of one rank; return the cases."""
    backend = "gloo" if bench.device.type == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    shapes = [(2, 16, 4, 4)] if bench.is_dry else [(64, 256, 56, 56), (8, 256, 14, 14)]
    return [
        Case(f"{run.__name__.strip('_')} {shape}", functools.partial(run, bench, shape))
        for shape in shapes
        for run in (_world_of_one, _loopback)
    ]


def _world_of_one(bench: Bench, shape: tuple[int, ...]) -> Iterator[Row]:
    """Measure the layer against torch's, and against the plain batch norm."""
    classes = {
        "ours": normkit.nn.SyncBatchNorm,
        "plain": normkit.nn.BatchNorm2d,
        "eager": torch.nn.SyncBatchNorm,
    }
    if bench.is_dry:
        del classes["eager"]  # torch's refuses a CPU
    layers = {name: of(shape[1], device=bench.device) for name, of in classes.items()}
    yield from _both_ways(bench, shape, "SyncBatchNorm, world of 1", layers)


def _loopback(bench: Bench, shape: tuple[int, ...]) -> Iterator[Row]:
    """Measure the layer's two halves around a collective of one rank."""
    weight, bias = (
        torch.rand(1, shape[1], 1, 1, device=bench.device).requires_grad_()
        for _ in range(2)
    )

    def run(x: Tensor) -> Tensor:
        group = dist.group.WORLD
        return normalize(x, (0, 2, 3), weight, bias, 1e-5, group=group)[0]

    yield from _both_ways(bench, shape, "SyncBatchNorm, loopback", {"ours": run})


def _both_ways(
    bench: Bench,
    shape: tuple[int, ...],
    what: str,
    functions: dict[str, Callable[[Tensor], Tensor]],
) -> Iterator[Row]:
    x = torch.randn(shape, device=bench.device)
    x = x.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn_like(x)

    def backward(run: Callable[[Tensor], Tensor]) -> Callable[[int], object]:
        y = run(x)
        return lambda turn: torch.autograd.grad(y, x, dy, retain_graph=True)

    forwards = {name: (lambda turn, r=run: r(x)) for name, run in functions.items()}
    backwards = {name: backward(run) for name, run in functions.items()}
    for direction, calls, per_element in (
        ("forward", forwards, 6),
        ("backward", backwards, 10),
    ):
        times = bench.medians(calls)
        launches = {
            name: _launches(functools.partial(call, 0)) for name, call in calls.items()
        }
        row: Row = {"what": what, "shape": shape, "pass": direction, "times": times}
        yield {**row, "bytes": per_element * x.numel(), "launches": launches}


def _launches(call: Callable[[], object]) -> dict[str, int]:
    """Count what a call starts on the device by name; on a CPU, torch's operations."""
    on_device = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CUDA] if on_device else [kinds.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if on_device:
            torch.cuda.synchronize()
    found: dict[str, int] = {}
    for event in profile.events():
        if on_device or event.name.startswith(("aten::", "c10d::")):
            found[event.name[:60]] = found.get(event.name[:60], 0) + 1
    return found

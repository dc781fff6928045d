"""Measured cost of a synchronized layer on gloo processes, beside plain batch norm.

Every rank is a process with one thread. In each of them take turns

    plain      normkit's BatchNorm2d, on this rank alone
    sync       normkit's SyncBatchNorm
    torch      a plain emulation of the collectives of torch.nn.SyncBatchNorm, which
               refuses a CPU: an all_gather forward, an all_reduce backward
    messages   the two all_reduces of "sync" and nothing else: what gloo takes
    unsent     "sync" without its messages: what the layer itself takes

forward and backward; up to two processes also the 53 layers of a ResNet-50, on inputs
so small that only what a call costs is seen. gloo shows what the processor does and how
many bytes are sent. It does not show what NCCL's latencies are, nor launches on a GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.bench.ranks_model import RESNET50
from normkit.errors import RanksError
from normkit.nn import BatchNorm2d, SyncBatchNorm
from normkit.results import Result

__all__ = ["Measured", "MeasuredRow", "measure_ranks"]

SHAPE = (16, 64, 14, 14)
# Of newer versions of torch, which deprecate the other.
_GATHER = (
    "all_gather_single"
    if hasattr(dist, "all_gather_single")
    else "all_gather_into_tensor"
)
_TURN = 20  # calls in a turn: the clock is coarse, and ranks meet at its ends


@dataclass(frozen=True)
class MeasuredRow:
    """Cost of one layer on some ranks, forward and backward, per rank.

    Attributes:
        ranks: Number of processes.
        layer: "plain", "sync", "torch", "messages" or "unsent", with " × 53" for a
            ResNet-50's.
        cpu: Milliseconds of processor time, all threads; the least of many turns, as
            other work on the machine only adds to it.
        wall: Milliseconds on the clock, the median turn.
        collectives: Number of collectives.
        sent: Bytes of the messages that a rank gives.
        received: Bytes that it is given.
    """

    ranks: int
    layer: str
    cpu: float
    wall: float
    collectives: int
    sent: int
    received: int


@dataclass(frozen=True, repr=False)
class Measured(Result):
    """The measurements for several numbers of ranks.

    Attributes:
        shape: Shape of each rank's batch.
        rows: One per number of ranks and layer.
    """

    shape: tuple[int, ...]
    rows: tuple[MeasuredRow, ...]

    def beyond_plain(self, ranks: int, layer: str) -> float:
        """Return the milliseconds of processor time of a layer beyond plain's."""
        cpu = {r.layer: r.cpu for r in self.rows if r.ranks == ranks}
        name, times, number = layer.partition(" × ")
        # Messages alone are all beyond it.
        return cpu[layer] - (0 if name == "messages" else cpu[f"plain{times}{number}"])

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per number of ranks and layer."""
        return [vars(row).copy() for row in self.rows]

    def to_text(self) -> str:
        """Return a table."""
        return "\n".join(
            [
                f"one layer on {'×'.join(map(str, self.shape))}, forward and backward, "
                "per rank; gloo, one thread",
                f"{'ranks':>6} {'layer':>13} {'cpu ms':>8} {'beyond plain':>13} "
                f"{'wall ms':>8} {'collectives':>12} {'sent B':>8} {'received B':>11}",
                *(
                    f"{r.ranks:6d} {r.layer:>13} {r.cpu:8.3f} "
                    f"{self.beyond_plain(r.ranks, r.layer):13.3f} {r.wall:8.3f} "
                    f"{r.collectives:12d} {r.sent:8d} {r.received:11d}"
                    for r in self.rows
                ),
            ]
        )

    def to_markdown(self) -> str:
        """Return the table for a page."""
        head = (
            "| ranks | layer | processor, ms | beyond plain, ms | clock, ms | "
            "collectives | sent, bytes | received, bytes |\n"
            "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        )
        return head + "".join(
            f"| {r.ranks} | {r.layer} | {r.cpu:.2f} | "
            f"{self.beyond_plain(r.ranks, r.layer):.2f} | {r.wall:.2f} | "
            f"{r.collectives} | {r.sent:,} | {r.received:,} |\n"
            for r in self.rows
        )


def measure_ranks(
    sizes: tuple[int, ...] = (1, 2, 4, 8),
    *,
    seconds: float = 5.0,
    shape: tuple[int, ...] = SHAPE,
) -> Measured:
    """Measure a layer on as many gloo processes as `sizes` say, one after the other.

    Args:
        sizes: Numbers of processes.
        seconds: Time for each of them.
        shape: Shape of each rank's batch, `(N, C, H, W)`.

    Raises:
        RanksError: A process failed; with its error.
    """
    rows: list[MeasuredRow] = []
    for size in sizes:
        rows += _on_processes(size, seconds, shape)
    return Measured(shape, tuple(rows))


def _on_processes(
    size: int, seconds: float, shape: tuple[int, ...]
) -> list[MeasuredRow]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        store = str(Path(folder) / "store")
        workers = [
            context.Process(
                target=_work, args=(rank, size, store, seconds, shape, results)
            )
            for rank in range(size)
        ]
        for worker in workers:
            worker.start()
        found: list[Any] = []
        while len(found) < size:
            with suppress(queue.Empty):
                found.append(results.get(timeout=1))
            ended = [k for k, w in enumerate(workers) if w.exitcode is not None]
            if ended and len(found) < size:
                found = [f"rank {ended[0]} of {size} ended; see its error"]
                break
        for worker in workers:
            # Ended, not waited for: destroying a gloo group may hang.
            worker.terminate()
            worker.join()
    failed = [told for told in found if isinstance(told, str)]
    if failed:
        raise RanksError("; ".join(failed))
    return [
        MeasuredRow(
            *(size, name),
            *(1e3 * mean(one[name][k] for one in found) for k in (0, 1)),
            *found[0][name][2:],
        )
        for name in found[0]
    ]


def _work(
    rank: int,
    size: int,
    store: str,
    seconds: float,
    shape: tuple[int, ...],
    results: Any,
) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),  # pyright: ignore[reportPrivateImportUsage]
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=120),
        )
        torch.manual_seed(rank)
        results.put(_measured(seconds, shape))
    except Exception as error:
        results.put(f"rank {rank} of {size}: {type(error).__name__}: {error}")
    time.sleep(60)  # until it is ended


def _measured(seconds: float, shape: tuple[int, ...]) -> dict[str, tuple[Any, ...]]:
    cases = _cases([shape], "", _TURN)
    if dist.get_world_size() <= 2:
        layers = [(2, channels, 2, 2) for channels in RESNET50]
        cases |= _cases(layers, f" × {len(layers)}", 1)
    counted = {name: _counted(step) for name, (step, _) in cases.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    # The number of turns has to be the same on every rank.
    once = time.perf_counter()
    for step, turn in cases.values():
        for _ in range(turn):
            step()
    turns = torch.tensor(seconds / max(time.perf_counter() - once, 1e-6))
    dist.all_reduce(turns, dist.ReduceOp.MIN)
    for _ in range(max(5, int(turns))):
        for name, (step, turn) in cases.items():
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(turn):
                step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            taken[name].append((cpu / turn, wall / turn))
    return {
        name: (min(t[0] for t in turns), median(t[1] for t in turns), *counted[name])
        for name, turns in taken.items()
    }


def _cases(
    shapes: list[tuple[int, ...]], suffix: str, turn: int
) -> dict[str, tuple[Callable[[], None], int]]:
    """Return a step of layers on these shapes, by name, and its calls in a turn."""
    inputs = [(torch.randn(s, requires_grad=True), torch.randn(s)) for s in shapes]

    def step_of(kind: Callable[[int], nn.Module]) -> Callable[[], None]:
        layers = [kind(shape[1]) for shape in shapes]

        def step() -> None:
            for layer, (x, dy) in zip(layers, inputs, strict=True):
                layer(x).backward(dy)
                layer.zero_grad()
                x.grad = None

        return step

    messages = [
        torch.zeros(size, dtype=torch.float64)
        for shape in shapes
        for size in (2 * shape[1] + 1, 2 * shape[1])
    ]

    def send() -> None:
        for message in messages:
            dist.all_reduce(message)

    sync, real = step_of(SyncBatchNorm), dist.all_reduce
    c10d: Any = dist

    def unsent() -> None:
        # By hand: mock.patch would take as long as a small layer.
        c10d.all_reduce = lambda *_, **__: None
        try:
            sync()
        finally:
            c10d.all_reduce = real

    steps = {
        "plain": step_of(BatchNorm2d),
        "sync": sync,
        "torch": step_of(Gathered),
        "messages": send,
        "unsent": unsent,
    }
    return {f"{name}{suffix}": (step, turn) for name, step in steps.items()}


def _counted(step: Callable[[], None]) -> tuple[int, int, int]:
    """Return the collectives of a step, the bytes sent and those received."""
    calls: list[tuple[int, int]] = []
    reduce, gather = dist.all_reduce, getattr(dist, _GATHER)

    def all_reduce(x: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((x.nbytes, x.nbytes))
        return reduce(x, *args, **options)

    def all_gather(into: Tensor, x: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((x.nbytes, into.nbytes - x.nbytes))
        return gather(into, x, *args, **options)

    with (
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(dist, _GATHER, all_gather),
    ):
        step()
    return len(calls), sum(s for s, _ in calls), sum(r for _, r in calls)


class Gathered(nn.Module):
    """The collectives of torch.nn.SyncBatchNorm in torch operations, on any device."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the statistics of all ranks; update the running ones."""
        return _Gathered.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var
        )


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
    ) -> Tensor:
        channels, world = x.shape[1], dist.get_world_size()
        local_var, local_mean = torch.var_mean(x, (0, 2, 3), correction=0)
        count = torch.full((1,), x.numel() / channels)
        mine = torch.cat([local_mean, torch.rsqrt(local_var + 1e-5), count])
        found = torch.empty(world * (2 * channels + 1))
        getattr(dist, _GATHER)(found, mine)
        parts = found.view(world, -1).split([channels, channels, 1], 1)
        means, inv_stds, counts = parts
        total = counts.sum()
        whole_mean = (means * counts).sum(0) / total
        within = inv_stds.pow(-2) - 1e-5
        whole_var = ((within + (means - whole_mean) ** 2) * counts).sum(0) / total
        inv_std = torch.rsqrt(whole_var + 1e-5)
        mean.lerp_(whole_mean, 0.1)
        var.lerp_(whole_var * total / (total - 1), 0.1)
        ctx.save_for_backward(x, weight, whole_mean, inv_std, total)
        # torch's own kernel of eval mode: one pass.
        return torch.batch_norm(
            *(x, weight, bias, whole_mean, whole_var, False, 0.0, 1e-5, False)
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, weight, mean, inv_std, total = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        rest = x - mean.view(shape)
        sum_dy, sum_dyx = dy.sum((0, 2, 3)), (dy * rest).sum((0, 2, 3))
        dweight, dbias = sum_dyx * inv_std, sum_dy
        sums = torch.cat([sum_dy, sum_dyx])
        dist.all_reduce(sums)
        g, gx = (s / total for s in sums.split(x.shape[1]))
        factor = (inv_std * weight).view(shape)
        dx = (dy - g.view(shape) - rest * (inv_std**2 * gx).view(shape)) * factor
        return dx, dweight, dbias, None, None

"""What the ranks run in test_faults.py."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from normkit.errors import RanksError
from normkit.nn import SyncBatchNorm
from normkit.sync import check_ranks, join

SECONDS = 3


def model(group: Any, channels: int = 4) -> nn.Module:
    blocks = [
        nn.Sequential(nn.Linear(4, 4), SyncBatchNorm(4, process_group=group))
        for _ in range(2)
    ]
    blocks.append(nn.Sequential(SyncBatchNorm(channels, process_group=group)))
    return nn.Sequential(*blocks)


def _error(run: Any) -> str:
    try:
        run()
    except RanksError as error:
        return str(error)
    return ""


def checked(rank: int, fault: str) -> Any:
    """One fault under `check_ranks`."""
    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    odd = rank == 1
    net = model(group, channels=5 if odd and fault == "channels" else 4)
    x = torch.randn(6, 4)

    def run() -> None:
        if fault == "order":
            layers = [net[0][1], net[1][1]]
            for layer in layers[::-1] if odd else layers:
                layer(x)
        elif fault == "mode":
            net.train(not odd)
            net(x)
        elif fault == "channels":
            net[2](torch.randn(6, 5) if odd else x)
        elif fault == "backward":
            y = net[0](x)
            if odd:
                net[1](x)
            else:
                y.sum().backward()
        elif fault == "none":
            net(x).square().sum().backward()
            net.eval()(x)

    with check_ranks():
        return _error(run)


def unchecked(rank: int) -> Any:
    """A rank that does not come."""
    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    net = model(group)
    return "" if rank == 1 else _error(lambda: net(torch.randn(6, 4)))


def unchecked_difference(rank: int, fault: str) -> Any:
    """Rank 1 is in eval mode, or leaves after the forward; it comes to no more sums."""
    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    net = model(group)
    if fault == "mode":
        net.train(rank != 1)

    def run() -> None:
        y = net(torch.randn(6, 4))
        if fault == "mode" or rank != 1:
            y.square().sum().backward()

    return _error(run)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def unlike_models(rank: int, sums: int, route: str) -> Any:
    """The last layer has more channels on rank 1; `sums` sums are taken before it."""
    group = dist.new_group(timeout=timedelta(seconds=20))
    net = model(group, channels=4 + rank)
    x = torch.randn(6, 4)
    with torch.no_grad():
        for _ in range(sums):
            net[0](x)
    empty = route == "empty" and rank == 0
    # Under a mode, as in a compiled step, the sum is an operation of torch.
    with Watching() if route == "mode" and rank == 1 else nullcontext():
        return _error(lambda: net[2](torch.randn(0 if empty else 6, 4 + rank)))


def unlike_dtypes(rank: int) -> Any:
    """A float32 batch on rank 0, halves and doubles on the others."""
    dtype = (torch.float32, torch.bfloat16, torch.float64)[rank]
    layer = SyncBatchNorm(4, momentum=1.0)
    torch.manual_seed(rank)
    x = (torch.randn(6, 4) + rank).to(dtype).requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y) * (rank + 1))
    return x.detach(), y.detach(), x.grad, layer.running_mean, layer.running_var


def mixed_silently(rank: int) -> Any:
    """Two equal layers in another order on one rank, as torch would do it, too."""
    a, b = SyncBatchNorm(4, momentum=1.0), SyncBatchNorm(4, momentum=1.0)
    torch.manual_seed(rank)
    x, y = torch.randn(32, 4), torch.randn(32, 4) + 5
    for layer, z in ((b, y), (a, x)) if rank == 1 else ((a, x), (b, y)):
        layer(z)
    return float(a.running_mean.mean())


def train(rank: int, batches: list[list[Any]]) -> Any:
    """Uneven numbers of batches: losses are sums, over the samples of all ranks."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), SyncBatchNorm(6), nn.ReLU(), nn.Linear(6, 2))
    net = net.double()
    parallel = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in join(batches[rank]):
        samples = torch.tensor(float(len(x)))
        dist.all_reduce(samples)
        loss = (parallel(x) - y).square().sum() / samples * dist.get_world_size()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()], net[1].running_var


def join_with_a_failure(rank: int) -> str:
    def batches() -> Any:
        yield torch.ones(2, 1)
        if rank == 2:
            raise OSError("the disk of one rank is gone")
        yield torch.ones(2, 1)

    try:
        for _ in join(batches()):
            pass
    except (OSError, RanksError) as error:
        return str(error)
    return ""

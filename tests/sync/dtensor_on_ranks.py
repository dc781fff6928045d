"""What the ranks run in test_dtensor.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.distributed import _functional_collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import normkit

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: normkit.nn.LayerNorm(8),
    "layer_2d": lambda: normkit.nn.LayerNorm((6, 8)),
    "rms": lambda: normkit.nn.RMSNorm(8),
    "group": lambda: normkit.nn.GroupNorm(3, 6),
    "batch": lambda: normkit.nn.BatchNorm1d(6),
    "sync": lambda: normkit.nn.SyncBatchNorm(6),
}

PLACEMENTS = {
    "replicate": Replicate(),
    "shard0": Shard(0),
    "shard1": Shard(1),
    "shard2": Shard(2),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(1)
    layer = LAYERS[name]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def _whole(t: Any) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def step(rank: int, name: str, placement: str, x: Tensor, dy: Tensor) -> Any:
    """Outputs, gradients, buffers, and the collectives that they took."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    where = [PLACEMENTS[placement]]
    layer = distribute_module(built(name), mesh)
    x = distribute_tensor(x, mesh, where).requires_grad_()
    dy = distribute_tensor(dy, mesh, where)
    eager: list[int] = []
    real = dist.all_reduce

    def counted(t: Tensor, *args: Any, **options: Any) -> Any:
        eager.append(t.numel())
        return real(t, *args, **options)

    comm = CommDebugMode()
    with comm:
        # c10d in eager mode is no functional collective, and is counted by itself.
        y = layer(x)
        y.backward(dy)
    # Again, without a mode that has to see every operation.
    layer.zero_grad()
    for buffer in layer.buffers():
        _local(buffer).copy_(
            _local(buffer) * 0 + (0 if buffer.dtype == torch.int64 else 1)
        )
    x = x.detach().requires_grad_()
    with mock.patch.object(dist, "all_reduce", counted):
        y = layer(x)
        y.backward(dy)
    grads = [_whole(p.grad) for p in layer.parameters()]
    return (
        *(_whole(y).detach(), _whole(x.grad), grads),
        [_whole(b) for b in layer.buffers()],
        *(comm.get_total_counts(), eager, tuple(map(str, y.placements))),
    )


def _local(t: Any) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def own_channels(rank: int, x: Tensor, dy: Tensor) -> Any:
    """A synchronized layer whose ranks have channels of their own, and all samples."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer: Any = built("sync")
    for kind in (layer._parameters, layer._buffers):
        for key, t in kind.items():
            if t is not None and t.dim():
                new: Any = distribute_tensor(t.detach(), mesh, [Shard(0)])
                kind[key] = nn.Parameter(new) if kind is layer._parameters else new
    x = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
    y = layer(x)
    y.backward(distribute_tensor(dy, mesh, [Shard(1)]))
    return _whole(y).detach(), _whole(x.grad), _whole(layer.running_var)


def sequence_parallel(rank: int, x: Tensor, dy: Tensor, compiles: bool) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = nn.Sequential(built("layer"), built("rms"))
    plan = {"0": SequenceParallel(), "1": SequenceParallel()}
    parallelize_module(model, mesh, plan)
    x = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
    dy = distribute_tensor(dy, mesh, [Shard(1)])
    y, taken = _stepped(model, x, dy, compiles)
    return (
        _whole(y).detach(),
        _whole(x.grad),
        [_whole(p.grad) for p in model.parameters()],
        taken,
    )


def _stepped(
    model: nn.Module, x: Tensor, dy: Tensor, compiles: bool
) -> tuple[Tensor, list[str]]:
    """Forward and backward; the output, and the collectives that they took."""
    if compiles:
        torch._dynamo.reset()
        backend = AotEagerAndRecordGraphs()
        y = torch.compile(model, backend=backend, fullgraph=True)(x)
        y.backward(dy)
        nodes = [
            str(node.target)
            for graph in (*backend.fw_graphs, *backend.bw_graphs)
            for node in graph.graph.nodes
        ]
        assert nodes
        return y, [
            name
            for name in nodes
            if ("c10d" in name and "wait_tensor" not in name) or "over_ranks" in name
        ]
    taken: list[str] = []

    def counted(place: Any, name: str) -> Any:
        real = getattr(place, name)

        def call(*args: Any, **options: Any) -> Any:
            taken.append(name)
            return real(*args, **options)

        return mock.patch.object(place, name, call)

    names = ("all_gather_tensor", "reduce_scatter_tensor", "all_to_all_single")
    with ExitStack() as stack:
        # c10d's and, for a redistribution of DTensors, the functional ones. No mode
        # counts them: under one the layers run other operations.
        stack.enter_context(counted(dist, "all_reduce"))
        stack.enter_context(counted(dist, "all_gather"))
        for name in ("all_reduce", *names):
            stack.enter_context(counted(_functional_collectives, name))
        y = model(x)
        y.backward(dy)
    return y, taken


def compiled_batch(rank: int, x: Tensor, dy: Tensor) -> Any:
    """A batch norm of a batch that is sharded, compiled."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = distribute_module(built("batch"), mesh)
    x = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    y, taken = _stepped(layer, x, distribute_tensor(dy, mesh, [Shard(0)]), True)
    grads = [_whole(p.grad) for p in layer.parameters()]
    return _whole(y).detach(), _whole(x.grad), grads, taken


def over_dp_and_tp(rank: int, x: Tensor, dy: Tensor) -> Any:
    """Batches over dp, channels over tp: DTensors over tp alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layer = normkit.nn.SyncBatchNorm(6, process_group=(mesh, "dp")).double()

    def cut(_: str, module: nn.Module, over: Any) -> None:
        for kind in (module._parameters, module._buffers):
            for key, t in kind.items():
                if t is not None and t.dim():
                    new: Any = distribute_tensor(t.detach(), over, [Shard(0)])
                    kind[key] = nn.Parameter(new) if kind is module._parameters else new

    distribute_module(layer, mesh["tp"], cut)
    mine = x.chunk(2)[mesh["dp"].get_local_rank()]
    own = distribute_tensor(mine, mesh["tp"], [Shard(1)]).requires_grad_()
    dys = dy.chunk(2)[mesh["dp"].get_local_rank()]
    dys = distribute_tensor(dys, mesh["tp"], [Shard(1)])
    y, taken = _stepped(layer, own, dys, False)
    return (
        *(_whole(y).detach(), _whole(own.grad)),
        *(_whole(layer.running_mean), _whole(layer.running_var), taken),
    )


def seconds(rank: int, shape: tuple[int, ...], turns: int) -> dict[str, float]:
    """Processor time of a layer norm sharded over rows, forward and backward.

    normkit's and torch's in turns, so that both meet the same load; the least of each.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    calls: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    for name, made in (("normkit", normkit.nn), ("torch", nn)):
        x, dy = (distribute_tensor(torch.randn(shape), mesh, [Shard(0)]) for _ in "xy")
        layer = distribute_module(made.LayerNorm(shape[-1]), mesh)
        calls[name] = layer, x.requires_grad_(), dy
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(turns):
        for name, (layer, x, dy) in calls.items():
            start = time.process_time()
            layer(x).backward(dy)
            least[name] = min(least[name], time.process_time() - start)
            layer.zero_grad()
            x.grad = None
    return least


def second_derivative(rank: int, x: Tensor, dy: Tensor) -> Any:
    """The gradient of a gradient, and a backward that is run twice."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = distribute_module(built("layer"), mesh)
    x = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    dy = distribute_tensor(dy, mesh, [Shard(0)])
    y = layer(x)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (twice,) = torch.autograd.grad(again, x, dy)
    return [_whole(t).detach() for t in (first, again, twice)]


def batch_norm_differentiated_twice(rank: int, x: Tensor, dy: Tensor) -> Any:
    """Running statistics after a backward that builds a graph."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = distribute_module(normkit.nn.BatchNorm1d(4).double(), mesh)
    x = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    y = layer(x)
    dy = distribute_tensor(dy, mesh, [Shard(0)])
    torch.autograd.grad(y, x, dy, create_graph=True)
    mean, var = _whole(layer.running_mean), _whole(layer.running_var)
    return mean, var, int(_whole(layer.num_batches_tracked))


def kept_for_backward(rank: int) -> tuple[bool, int]:
    """Return whether hooks see x, and how many other numbers they see."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = distribute_module(normkit.nn.LayerNorm(8, bias=False), mesh)
    x = distribute_tensor(torch.randn(4, 3, 8), mesh, [Shard(0)]).requires_grad_()
    seen: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        seen.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    others = [t for t in seen if not isinstance(t, DTensor)]
    x_is_seen = any(t.shape == x.shape for t in seen if isinstance(t, DTensor))
    return x_is_seen, sum(t.numel() for t in others)

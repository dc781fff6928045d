"""What the ranks run in test_sync_batch_norm.py."""

from __future__ import annotations

import gc
import sys
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import normkit

_groups: dict[int, Any] = {}


def first(size: int) -> Any:
    """The group of the first `size` ranks; every rank has to ask, once."""
    if size not in _groups:
        _groups[size] = dist.new_group(range(size))
    return _groups[size]


def built(state: dict[str, Tensor], group: Any, **extras: Any) -> Any:
    channels = state["weight"].numel()
    layer = normkit.nn.SyncBatchNorm(
        channels, process_group=group, dtype=state["weight"].dtype, **extras
    )
    layer.load_state_dict(state)
    return layer


def train_step(
    rank: int,
    size: int,
    state: dict[str, Tensor],
    parts: list[Tensor],
    masks: list[Tensor] | None,
    cotangents: list[Tensor],
    extras: dict[str, Any],
) -> dict[str, Tensor | None] | None:
    group = first(size)
    if rank >= size:
        return None
    layer = built(state, group, **extras)
    x = parts[rank].clone().requires_grad_()
    mask = None if masks is None else masks[rank]
    y = layer(x, mask=mask)
    y.backward(cotangents[rank])
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": layer.weight.grad,
        "dbias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "batches": layer.num_batches_tracked,
    }


def named_groups(rank: int, state: dict[str, Tensor], parts: list[Tensor]) -> Any:
    """The same pair of ranks, named in every way that a layer takes."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    group = mesh.get_group("b")
    found = []
    for name in (group, group.group_name, mesh["b"], (mesh, 1)):
        layer = built(state, name)
        found.append(layer(parts[rank]).detach())
    return found


def collectives(rank: int, state: dict[str, Tensor], parts: list[Tensor]) -> Any:
    layer, x = built(state, first(2)), parts[rank].clone().requires_grad_()
    calls: list[int] = []
    if rank >= 2:
        return calls
    real = dist.all_reduce

    def counted(x: Tensor, **options: Any) -> Any:
        calls.append(x.numel())
        return real(x, **options)

    with mock.patch.object(dist, "all_reduce", counted):
        layer(x).square().sum().backward()
    return calls


def holders(rank: int, x: Tensor) -> tuple[int, int]:
    """Return the references to the group before and after a step of a living layer."""
    layer = normkit.nn.SyncBatchNorm(x.shape[1])
    group = dist.group.WORLD
    gc.collect()
    before = sys.getrefcount(group)
    layer(x.clone().requires_grad_()).sum().backward()
    gc.collect()
    return before, sys.getrefcount(group)


def second_derivative(
    rank: int, state: dict[str, Tensor], parts: list[Tensor], dy: list[Tensor]
) -> Any:
    size = len(parts)
    group = first(size)
    if rank >= size:
        return None
    layer = built(state, group)
    x = parts[rank].clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x), x, dy[rank], create_graph=True)
    (dx**2).sum().backward()
    return x.grad


def under_ddp(rank: int, seed: int, x: Tensor) -> Any:
    """Two forwards, one backward, averaged gradients."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 6), normkit.nn.SyncBatchNorm(6), nn.ReLU(), nn.Linear(6, 2)
    )
    parallel = nn.parallel.DistributedDataParallel(model)
    mine = x.view(2, dist.get_world_size(), -1, 4)[:, rank]
    loss = parallel(mine[0]).square().mean() + parallel(mine[1]).abs().mean()
    loss.backward()
    return [p.grad for p in model.parameters()], model[1].running_var


def two_forwards_frozen(rank: int, x: Tensor) -> str:
    """With frozen statistics, which the first forward's backward still needs."""
    norm = normkit.nn.BatchNorm1d(6)
    parallel = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), norm))
    norm.eval()
    loss = parallel(x).square().mean() + parallel(2 * x).abs().mean()
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


def torch_refuses_a_cpu(rank: int, x: Tensor) -> str:
    group = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    try:
        nn.SyncBatchNorm(3, process_group=group)(x)
    except ValueError as error:
        return str(error)
    return ""


def compiled(rank: int, state: dict[str, Tensor], parts: list[Tensor]) -> Any:
    group = first(2)
    if rank >= 2:
        return None
    found = []
    for compiles in (False, True):
        layer = built(state, group)
        step = (
            torch.compile(layer, fullgraph=True, backend="aot_eager")
            if compiles
            else layer
        )
        x = parts[rank].clone().requires_grad_()
        y = step(x)
        (y * parts[rank].cos()).sum().backward()
        found.append([y.detach(), x.grad, layer.weight.grad, layer.running_var])
    return found


def copied(rank: int, state: dict[str, Tensor], parts: list[Tensor]) -> Any:
    import copy
    import pickle

    group = first(2)
    if rank >= 2:
        return None
    layer = built(state, group)
    twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    return [module(parts[rank]).detach() for module in (layer, *twins)]


def sharded(rank: int) -> Any:
    """FSDP2 with bfloat16 parameters: what the buffers are before and after."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), normkit.nn.BatchNorm1d(8))
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    )
    y = model(torch.randn(16, 4))
    y.float().square().sum().backward()
    return y.dtype, model[1].running_mean, model[1].running_var.dtype


def accumulated(
    rank: int, state: dict[str, Tensor], parts: list[Tensor], masks: list[Tensor]
) -> Any:
    """Ghosts of masked values, in two parts a rank, over two ranks, in one update."""
    group = first(2)
    if rank >= 2:
        return None
    layer = built(state, group, ghost_size=2)
    with normkit.nn.accumulate(layer):
        for x, mask in zip(parts[rank].split(4), masks[rank].split(4), strict=True):
            layer(x, mask=mask)
    return layer.running_mean, layer.running_var, layer.num_batches_tracked


def ghosts_at_once(rank: int, state: dict[str, Tensor], parts: list[Tensor]) -> Any:
    """Three layers with ghosts, the last one called on rank 0 alone; and no message."""
    group = first(2)
    if rank >= 2:
        return None
    model = nn.ModuleList(built(state, group, ghost_size=2) for _ in range(3))
    sizes: list[int] = []
    real = dist.all_reduce

    def counted(x: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(x.numel())
        return real(x, *args, **options)

    x = parts[rank]
    with (
        mock.patch.object(dist, "all_reduce", counted),
        normkit.nn.accumulate(model),
    ):
        model[0](x)
        model[1](x + 1e6)
        model[1](x[:0] + torch.nan if rank else x * torch.nan)
        if rank == 0:
            model[2](x)
        inside = len(sizes)
    return inside, sizes, [(*layer.buffers(), layer.skipped) for layer in model]


def as_whole(
    rank: int, state: dict[str, Tensor], parts: list[Tensor], dy: list[Tensor]
) -> Any:
    """The gradients of two ranks' parts, as of one batch in one process."""
    group = first(2)
    if rank >= 2:
        return None
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.Tanh())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    model.append(built(state, group))
    normkit.nn.backward_as_whole(
        model,
        list(zip(parts[rank].split(3), dy[rank].split(3), strict=True)),
        lambda part: (model(part[0]) * part[1]).sum(),
    )
    return [p.grad for p in model.parameters()], model[2].running_var


def with_buffers(rank: int, dtypes: list[Any], parts: list[Tensor]) -> Any:
    """Train with running statistics and a counter of each dtype, between ones."""
    found = []
    for of_statistics, of_counter in dtypes:
        layer = normkit.nn.SyncBatchNorm(parts[rank].shape[1])
        memory = [torch.ones(9, dtype=of_statistics) for _ in range(2)]
        counters = torch.ones(3, dtype=of_counter)
        layer.running_mean, layer.running_var = (m[3:6] for m in memory)
        layer.num_batches_tracked = counters[1]
        # The second time the call is remembered.
        refusals = {_refusal(layer, parts[rank]) for _ in range(2)}
        found.append(("".join(refusals), *memory, counters))
    return found


def _refusal(layer: torch.nn.Module, x: Tensor) -> str:
    try:
        layer(x)
    except normkit.errors.DtypeError as error:
        return str(error)
    return ""

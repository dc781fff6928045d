"""What the ranks run in test_groups.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import normkit
from normkit.sync import alone, is_group


def _attempt(group: Any) -> str:
    layer = normkit.nn.SyncBatchNorm(3, process_group=group)
    try:
        layer(torch.randn(8, 3, 4, 4))
    except ValueError as error:
        return str(error)
    return "" if is_group(group) else "alone"


def every_name(rank: int) -> list[str]:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    flat = init_device_mesh("cpu", (1, size), mesh_dim_names=("replicate", "shard"))
    groups = (mesh, (mesh, "dp"), (mesh, 0), (mesh, -1), flat, (flat, "shard"))
    return [_attempt(group) for group in groups]


def bad_names(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    groups = ("no such group", 5, (mesh, "tp"), (mesh, 1), (mesh,), object())
    return [_attempt(group) for group in groups]


def ambiguous(rank: int) -> str:
    return _attempt(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))


def outside(rank: int) -> list[str]:
    group = dist.new_group([0])
    name = [None]
    if rank == 0:
        name = [group.group_name]
    dist.broadcast_object_list(name, 0)
    return [_attempt(group), _attempt(name[0])]


def on_one_rank(rank: int) -> Any:
    """Rank 0 trains and diagnoses a synchronized model, while the others do nothing."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), normkit.nn.SyncBatchNorm(8))
    x = 5 + 3 * torch.randn(40, 32, 4)
    if rank == 0:
        with alone():
            y = model(x[0])
        assert float(y.mean(0).abs().max()) < 1e-5
        model[1].momentum = 0.001
        with alone():
            for batch in x:
                model(batch)
        found = normkit.diagnose(model, list(x))
        assert found.confirm  # the method exists where there is no loss
        return found.named
    return None

"""What the ranks run in test_sharded.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from normkit.calibrate import calibrate
from normkit.convert import convert
from normkit.errors import ArgumentError, CalibrationError


class Net(nn.Module):
    """Two batch norms with a non-linearity between."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 4)
        self.bn2 = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.linear(self.bn1(x)).relu())


def _net(state: dict[str, Tensor]) -> Net:
    model = Net()
    model.load_state_dict(state)
    return model


def sharded(
    rank: int, state: dict[str, Tensor], shards: list[list[Tensor]], options: Any
) -> tuple[dict[str, bytes], dict[str, Tensor], list[Any]]:
    model = _net(state)
    group = dist.group.WORLD
    report = calibrate(model, shards[rank], process_group=group, **options)
    after = {name: b.clone() for name, b in model.named_buffers()}
    errors = [
        (la.count, la.batches, la.mean_error, la.var_error) for la in report.layers
    ]
    return {n: b.numpy().tobytes() for n, b in after.items()}, after, errors


def sharded_with_a_failure(
    rank: int, state: dict[str, Tensor], shards: list[list[Tensor]], culprit: int
) -> tuple[str, bool]:
    model = _net(state)

    def failing() -> Iterator[Tensor]:
        yield shards[rank][0]
        if rank == culprit:
            raise OSError("the disk of one rank is gone")

    try:
        calibrate(model, failing(), process_group=dist.group.WORLD)
    except OSError as error:
        said = str(error)
    except CalibrationError as error:
        said = str(error)
    else:
        said = "nothing"
    unchanged = all(
        torch.equal(value, state[name]) for name, value in model.state_dict().items()
    )
    return said, unchanged


def without_a_group(rank: int, state: dict[str, Tensor]) -> str:
    try:
        calibrate(_net(state), [torch.randn(4, 3)])
    except ArgumentError as error:
        return str(error)
    return "nothing"


def alone(rank: int, state: dict[str, Tensor], shards: list[list[Tensor]]) -> Tensor:
    model = _net(state)
    if rank == 1:
        calibrate(model, shards[rank], process_group="local")
    return model.bn1.running_mean.clone()


def running_over_ranks(rank: int, state: dict[str, Tensor]) -> str:
    try:
        calibrate(
            _net(state),
            [torch.randn(4, 3)],
            mode="running",
            process_group=dist.group.WORLD,
        )
    except ArgumentError as error:
        return str(error)
    return "nothing"


def wrapped_in_ddp(
    rank: int, state: dict[str, Tensor], shards: list[list[Tensor]]
) -> Tensor:
    model = nn.parallel.DistributedDataParallel(_net(state))
    # Uneven shards: DDP's own forward would wait for the others for ever.
    calibrate(model, shards[rank], process_group=dist.group.WORLD)
    return model.module.bn2.running_mean.clone()


def in_step(
    rank: int, state: dict[str, Tensor], shards: list[list[Tensor]], options: Any
) -> dict[str, Tensor]:
    """Synchronized layers: each batch is normalized by all ranks' values."""
    model = _net(state)
    convert(model, to="sync")
    calibrate(model, shards[rank], process_group=dist.group.WORLD, **options)
    return dict(model.named_buffers())


def under_fsdp(rank: int, state: dict[str, Tensor], shards: list[list[Tensor]]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _net(state)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    calibrate(model, shards[rank], process_group=dist.group.WORLD)
    return model.bn2.running_mean


def padded(rank: int, state: dict[str, Tensor], x: Tensor, order: str) -> Any:
    """A DistributedSampler repeats samples so that all ranks have equally many."""
    data = TensorDataset(x)
    sampler = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, 4, sampler=sampler)
    model = _net(state)
    report = calibrate(model, loader, order=order, process_group=dist.group.WORLD)
    return dict(model.named_buffers()), report.layers[0].count, len(sampler)


def failing_in_step(
    rank: int, state: dict[str, Tensor], shards: list[list[Tensor]]
) -> tuple[str, bool]:
    model = _net(state)
    convert(model, to="sync")

    def data() -> Iterator[Tensor]:
        yield shards[rank][0]
        if rank == 2:
            raise OSError("the disk of one rank is gone")
        yield shards[rank][0]

    try:
        calibrate(model, data(), process_group=dist.group.WORLD)
    except (OSError, RuntimeError) as error:
        kept = torch.equal(model.bn1.running_mean, state["bn1.running_mean"])
        return str(error), kept
    return "", False

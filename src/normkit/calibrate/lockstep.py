"""Passes in which all ranks run the model equally often.

A synchronized layer normalizes by the batch of all ranks, and FSDP gathers parameters
in every forward: then a rank that runs out of data goes on with empty batches.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import torch
from torch import nn

from normkit.nn.batch_statistics import BatchStatisticsLayer
from normkit.nn.layer_ranks import ranks_of
from normkit.sync import is_group, join
from normkit.sync.groups import Group, process_group_of
from normkit.sync.join import empty_of

__all__ = ["in_step", "needs_step", "ranks_of_layer"]

_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}


def ranks_of_layer(module: nn.Module) -> Group:
    """Return the ranks whose batches a layer normalizes together; None for this one."""
    if isinstance(module, BatchStatisticsLayer):
        return ranks_of(module) if module.is_over_ranks() else None
    if isinstance(module, torch.nn.SyncBatchNorm) and is_group(module.process_group):
        return process_group_of(module.process_group)
    return None


def needs_step(model: nn.Module, group: Group) -> bool:
    """Return whether a forward of `model` waits for the other ranks of `group`."""
    return group is not None and any(
        ranks_of_layer(module) is not None
        or not _SHARDED.isdisjoint(cls.__name__ for cls in type(module).__mro__)
        for module in model.modules()
    )


def in_step(batches: Iterable[Any], group: Group) -> Generator[tuple[bool, Any]]:
    """Iterate until all ranks are done; True with a batch of this rank's data."""
    own = ((True, batch) for batch in batches)
    return join(own, group, empty=lambda pair: (False, empty_of(pair[1])))

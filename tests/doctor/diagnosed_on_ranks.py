"""What the ranks run in test_over_ranks.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import normkit


def _model() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), normkit.nn.SyncBatchNorm(8), nn.ReLU())
    batches = list(torch.randn(40, 32, 4))
    with normkit.sync.alone():
        for batch in batches:
            model(batch)
    return model, batches


def diagnosed(rank: int) -> Any:
    """The data of rank 1 are unlike those of training."""
    model, batches = _model()
    if rank == 1:
        batches = [5 + 3 * batch for batch in batches]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = normkit.diagnose(model, batches, process_group=dist.group.WORLD)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    alone = normkit.diagnose(model, batches)
    return (
        *(found.named, alone.named),
        [(f.id, f.evidence, f.details.get("ranks")) for f in found.readings],
    )


def with_a_failure(rank: int) -> str:
    model, batches = _model()
    data = ["no tensor"] if rank == 2 else batches
    try:
        normkit.diagnose(model, data, process_group=dist.group.WORLD)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""

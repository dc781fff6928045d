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


def confirmed(rank: int) -> Any:
    """Running statistics of rank 1's data alone are wrong; so its rank alone gains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    x = torch.randn(80, 32, 4)
    batches = [(b, (b[:, 0] > 0).long()) for b in x]
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-4.0, 0, 0, 0], [4, 0, 0, 0]]))
        model[1].bias.zero_()
    for b, _ in batches:
        model(b)
    if rank == 1:
        batches = [(5 + 3 * b, y) for b, y in batches]
    loss = nn.functional.cross_entropy
    found = normkit.diagnose(model, batches, loss, process_group=dist.group.WORLD)
    found = found.confirm()
    alone = normkit.diagnose(model, batches, loss).confirm()
    return (
        [(c.id, c.helps, c.before, c.after) for c in found.confirmations],
        *([f.id for f in found.errors], [f.id for f in alone.errors]),
    )


def _loop(rank: int, steps: int) -> tuple[nn.Module, Any, Any]:
    """A loop over ranks that on rank 1 goes on in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(asked: int = steps) -> None:
        model.train()
        for step in range(asked):
            if step == 5 and rank == 1:
                model.eval()
            parallel(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return model, optimizer, train


def _told(findings: Any) -> list[Any]:
    return [(f.id, f.where, f.evidence, f.details.get("ranks")) for f in findings]


def watched(rank: int) -> Any:
    model, optimizer, train = _loop(rank, 12)
    with normkit.watch(model, optimizer, every=1) as seen:
        train()
    return _told(seen.findings(dist.group.WORLD)), _told(seen.findings())


def own_loop(rank: int) -> Any:
    model, optimizer, train = _loop(rank, 12)
    batches = list(torch.randn(40, 32, 4))
    found = normkit.diagnose(model, batches, process_group=dist.group.WORLD)
    after = found.train(12, optimizer, train)
    return _told(after.findings)


def trial(rank: int) -> Any:
    """Trial training on copies, which fails on one rank."""
    model, optimizer, _ = _loop(rank, 0)

    def loss(y: torch.Tensor, _: Any) -> torch.Tensor:
        if rank == 2 and y.requires_grad and fails:
            raise OSError("the disk of one rank is gone")
        return y.square().mean()

    batches, fails = [(b, b[:, 0]) for b in torch.randn(40, 32, 4)], False
    found = normkit.diagnose(model, batches, loss, process_group=dist.group.WORLD)
    told = [_told(found.train(4, optimizer).readings)]
    fails = True
    try:
        found.train(4, optimizer)
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
    return told

"""Watching takes no part where a compiler or other ranks do."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from doctor.models import batches, build
from normkit.doctor import watch
from ranks import Ranks

LOSS = nn.CrossEntropyLoss()


def steps(model: nn.Module, wrapped: Any, *, every: int | None) -> tuple[Any, Any]:
    """Six steps of `wrapped`, which calls `model`; all that changed, and the watch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []

    def train() -> None:
        for x, y in batches()[:6]:
            loss = LOSS(wrapped(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    torch.manual_seed(5)
    seen = None
    if every is None:
        train()
    else:
        seen = watch(wrapped, optimizer, every=every)
        with seen:
            train()
    values = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    return (losses, values, torch.get_rng_state()), seen


class Own(nn.Module):
    """A compiler skips the frames of torch.nn's own containers."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def assert_same(a: Any, b: Any) -> None:
    assert a[0] == b[0]
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))
    assert torch.equal(a[2], b[2])


@pytest.mark.parametrize("is_warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", ".compile"])
def test_a_compiled_model_is_left_alone_and_not_judged(
    is_warm: bool, in_place: bool
) -> None:
    found, graphs = [], []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    numbers = []
    for every in (None, 2):
        torch._dynamo.reset()
        graphs.clear()
        model = Own(build("mlp", depth=2, dropout=0.2))
        wrapped: Any = model
        if in_place:
            model.compile(backend=counted)
        else:
            wrapped = torch.compile(model, backend=counted)
        if is_warm:
            torch.manual_seed(4)
            wrapped(batches()[0][0])
        made, seen = steps(model, wrapped, every=every)
        found.append(made)
        numbers.append(len(graphs))
    assert_same(*found)
    assert numbers[0] == numbers[1] > 0
    (reading,) = seen.readings()
    assert reading.severity == "not_judged"
    assert "compiled" in reading.evidence


def parallel(rank: int, net: str) -> dict[str, Any]:
    """On every rank: watched and not, it trains bitwise the same."""
    start = build(net, dropout=0.0)
    found = []
    for every in (None, 2):
        model = copy.deepcopy(start)
        made, seen = steps(model, DistributedDataParallel(model), every=every)
        found.append(made)
    assert_same(*found)
    return seen.history


@pytest.mark.parametrize("net", ["mlp", "residual"])
def test_a_parallel_model_trains_bitwise_the_same(three_ranks: Ranks, net: str) -> None:
    for history in three_ranks.run(parallel, net):
        assert history["steps"] == [0, 2, 4]
        assert not any(name.startswith("module.") for name in history["layers"])
        first = next(iter(history["layers"].values()))
        assert None not in first["gradient_norm"]

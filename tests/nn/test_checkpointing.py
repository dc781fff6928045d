"""A forward that activation checkpointing repeats moves running statistics once."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit.nn as n
from normkit.errors import ArgumentError

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch": (lambda: n.BatchNorm1d(4), (8, 4, 5)),
    "batch, of ghosts": (lambda: n.BatchNorm1d(4, ghost_size=4), (8, 4, 5)),
    "batch, debiased": (lambda: n.BatchNorm1d(4, debias=True), (8, 4, 5)),
    "sync": (lambda: n.SyncBatchNorm(4), (8, 4, 5)),
    "domain": (lambda: n.DomainBatchNorm(n.BatchNorm1d(4), ("a", "b")), (8, 4, 5)),
    "instance": (lambda: n.InstanceNorm1d(4, track_running_stats=True), (8, 4, 5)),
    "instance, all alike": (
        lambda: n.InstanceNorm1d(4, momentum=None, track_running_stats=True),
        (8, 4, 5),
    ),
    "per activation": (lambda: n.PerActivationBatchNorm((4, 5)), (8, 4, 5)),
    "recurrent": (lambda: n.RecurrentBatchNorm(4, 3), (3, 8, 4)),
    "whitening": (lambda: n.WhiteningBatchNorm(4), (8, 4, 5)),
    "lstm": (lambda: n.BatchNormLSTM(4, 3, max_steps=3), (3, 8, 4)),
}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_and_counters_are_those_of_one_forward(
    name: str, reentrant: bool
) -> None:
    build, shape = LAYERS[name]
    layer = build()
    once, start = copy.deepcopy(layer), copy.deepcopy(layer)
    x = torch.randn(shape, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    (y if isinstance(y, torch.Tensor) else y[0]).square().sum().backward()
    assert x.grad is not None
    once(x)
    moved = 0
    for key, found in layer.named_buffers():
        torch.testing.assert_close(found, once.get_buffer(key), msg=key)
        moved += not torch.equal(found, start.get_buffer(key))
    assert moved >= 2


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_small_batch_by_running_statistics_that_moved_is_refused(
    masked: bool, reentrant: bool
) -> None:
    layer = n.BatchNorm1d(3, on_small_batch="renorm", activation="sigmoid")
    x = torch.randn(4 if masked else 1, 3, requires_grad=True)
    mask = torch.tensor([[True, True, True]] + [[True, False, True]] * 3)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return layer(x, mask=mask if masked else None)

    y = checkpoint(forward, x, use_reentrant=reentrant)
    with pytest.raises(ArgumentError, match="leave the layer out"):
        y.sum().backward()


def test_a_large_batch_is_recomputed_whatever_the_policy_on_small_ones() -> None:
    layer = n.BatchNorm1d(3, on_small_batch="renorm", activation="sigmoid")
    plain = copy.deepcopy(layer)
    x, dy = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    y = checkpoint(layer, x, use_reentrant=False)
    (found,) = torch.autograd.grad(y, x, dy)
    (wanted,) = torch.autograd.grad(plain(x), x, dy)
    assert torch.equal(found, wanted)

"""Layers on DTensors are the layers on whole tensors, with the fewest collectives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ranks import Ranks
from sync import dtensor_on_ranks as on_ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


# All that a step may take: messages of statistics and of their gradients. None where
# dimensions keep their statistics.
EXPECTED = {
    "layer": {"shard2": 2},
    "layer_2d": {"shard1": 2, "shard2": 2},
    "rms": {"shard2": 2},
    "group": {"shard2": 2},
    "batch": {"shard0": 2, "shard2": 2},
    "sync": {"shard0": 2, "shard2": 2},
}
# Running statistics are replicated here, and channels are not: operations of DTensors.
BY_OPERATIONS = ("batch", "shard1")


@pytest.mark.parametrize("placement", list(on_ranks.PLACEMENTS))
@pytest.mark.parametrize("name", list(on_ranks.LAYERS))
def test_a_sharded_layer_equals_the_whole(
    three_ranks: Ranks, name: str, placement: str
) -> None:
    if (name, placement) == ("sync", "shard1"):
        pytest.skip("its running statistics have to be sharded, too: below")
    x = torch.randn(5, 6, 8, dtype=torch.float64) * 2 + 3
    dy = torch.randn_like(x)
    found = three_ranks.run(on_ranks.step, name, placement, x, dy)
    layer = on_ranks.built(name)
    for buffer in layer.buffers():
        buffer.fill_(0 if buffer.dtype == torch.int64 else 1)
    whole = x.clone().requires_grad_()
    y = layer(whole)
    y.backward(dy)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for output, dx, grads, buffers, _, eager, placements in found:
        torch.testing.assert_close(output, y, **close)
        torch.testing.assert_close(dx, whole.grad, **close)
        for ours, parameter in zip(grads, layer.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, **close)
        torch.testing.assert_close(buffers, list(layer.buffers()), **close)
        if (name, placement) != BY_OPERATIONS:
            assert placements == (str(on_ranks.PLACEMENTS[placement]),)
            assert len(eager) == EXPECTED[name].get(placement, 0)


def test_ranks_with_channels_of_their_own_are_not_mixed(three_ranks: Ranks) -> None:
    x = torch.randn(5, 6, 8, dtype=torch.float64) * torch.arange(1, 7.0).view(1, 6, 1)
    dy = torch.randn_like(x)
    found = three_ranks.run(on_ranks.own_channels, x, dy)
    layer, whole = on_ranks.built("sync"), x.clone().requires_grad_()
    y = layer(whole)
    y.backward(dy)
    for output, dx, var in found:
        torch.testing.assert_close(output, y.detach())
        torch.testing.assert_close(dx, whole.grad)
        torch.testing.assert_close(var, layer.running_var)


OLD_COMPILER = pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="the compiler of torch 2.6 breaks the graph of a row norm on DTensors",
)


@pytest.mark.parametrize(
    "compiles",
    [False, pytest.param(True, marks=OLD_COMPILER)],
    ids=["eager", "compiled"],
)
def test_sequence_parallel(two_ranks: Ranks, compiles: bool) -> None:
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    dy = torch.randn_like(x)
    found = two_ranks.run(on_ranks.sequence_parallel, x, dy, compiles)
    layer, rms = on_ranks.built("layer"), on_ranks.built("rms")
    whole = x.clone().requires_grad_()
    y = rms(layer(whole))
    y.backward(dy)
    truth = [p.grad for p in (*layer.parameters(), *rms.parameters())]
    for output, dx, grads, taken in found:
        torch.testing.assert_close(output, y.detach())
        torch.testing.assert_close(dx, whole.grad)
        torch.testing.assert_close(grads, truth)
        assert taken == []


def test_a_compiled_batch_norm_takes_two_collectives(two_ranks: Ranks) -> None:
    x = torch.randn(6, 6, 4, dtype=torch.float64) + 2
    dy = torch.randn_like(x)
    found = two_ranks.run(on_ranks.compiled_batch, x, dy)
    layer, whole = on_ranks.built("batch"), x.clone().requires_grad_()
    y = layer(whole)
    y.backward(dy)
    for output, dx, grads, taken in found:
        torch.testing.assert_close(output, y.detach())
        torch.testing.assert_close(dx, whole.grad)
        torch.testing.assert_close(grads, [p.grad for p in layer.parameters()])
        assert len(taken) == 2


def test_batches_over_dp_with_channels_over_tp(four_ranks: Ranks) -> None:
    x = torch.randn(8, 6, 5, dtype=torch.float64) + 2
    dy = torch.randn_like(x)
    found = four_ranks.run(on_ranks.over_dp_and_tp, x, dy)
    layer = torch.nn.BatchNorm1d(6).double()
    whole = x.clone().requires_grad_()
    y = layer(whole)
    y.backward(dy)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for rank, (output, dx, mean, var, taken) in enumerate(found):
        assert taken == ["all_reduce"] * 2
        mine = rank // 2
        torch.testing.assert_close(output, y.detach().chunk(2)[mine], **close)
        torch.testing.assert_close(dx, whole.grad.chunk(2)[mine], **close)
        torch.testing.assert_close(mean, layer.running_mean, **close)
        torch.testing.assert_close(var, layer.running_var, **close)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 8, 64), (4, 512, 1024)], ids=str)
def test_a_sharded_layer_norm_costs_what_torchs_does(
    two_ranks: Ranks, shape: tuple[int, ...]
) -> None:
    for least in two_ranks.run(on_ranks.seconds, shape, 200):
        bound = 5e-4 if shape[-1] == 64 else least["torch"] * 1.1
        assert least["normkit"] < bound, least


def test_running_statistics_move_once_in_a_second_derivative(two_ranks: Ranks) -> None:
    x, dy = torch.randn(2, 6, 4).double()
    found = two_ranks.run(on_ranks.batch_norm_differentiated_twice, x, dy)
    layer = torch.nn.BatchNorm1d(4).double()
    layer(x)
    for mean, var, batches in found:
        torch.testing.assert_close(mean, layer.running_mean)
        torch.testing.assert_close(var, layer.running_var)
        assert batches == 1


def test_hooks_on_saved_tensors_see_what_a_sharded_layer_keeps(
    two_ranks: Ranks,
) -> None:
    for x_is_seen, numbers in two_ranks.run(on_ranks.kept_for_backward):
        assert x_is_seen
        # Mean and 1/√(var + eps) of this rank's 2 rows of 3.
        assert numbers == 2 * 2 * 3


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="to_local and from_local of torch 2.6 and 2.9 have no second derivative",
)
def test_second_derivatives_of_shards(two_ranks: Ranks) -> None:
    x, dy = torch.randn(2, 4, 8).double()
    found = two_ranks.run(on_ranks.second_derivative, x, dy)
    layer, whole = on_ranks.built("layer"), x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(whole), whole, dy, create_graph=True)
    (twice,) = torch.autograd.grad(dx, whole, dy)
    for first, again, second in found:
        torch.testing.assert_close(first, dx)
        torch.testing.assert_close(again, dx)
        torch.testing.assert_close(second, twice)

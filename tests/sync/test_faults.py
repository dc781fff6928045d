"""Ranks that do not do the same end with the name of the layer, and do not hang."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from normkit.nn import BatchNorm1d
from ranks import Ranks
from sync import faults_on_ranks as on_ranks


def test_ranks_that_agree_pass_the_check(three_ranks: Ranks) -> None:
    assert three_ranks.run(on_ranks.checked, "none") == [""] * 3


@pytest.mark.parametrize(
    ("fault", "odd", "usual"),
    [
        ("order", "forward of '1.1'", "forward of '0.1'"),
        ("mode", "eval forward of '0.1'", "forward of '0.1'"),
        (
            "channels",
            "'2.0' (SyncBatchNorm, 5 channels)",
            "(SyncBatchNorm, 4 channels)",
        ),
        ("backward", "forward of '1.1'", "backward of '0.1'"),
    ],
)
def test_a_rank_that_does_otherwise_is_named(
    three_ranks: Ranks, fault: str, odd: str, usual: str
) -> None:
    for told in three_ranks.run(on_ranks.checked, fault):
        assert "the ranks are not at the same layer" in told
        assert f"rank 1: {odd}" in told or f"rank 1: forward of {odd}" in told
        assert usual in told.split("rank 2: ")[1]
        assert "look at what rank 1 does differently" in told


def test_without_the_check_equal_layers_mix_as_torchs_do(three_ranks: Ranks) -> None:
    """What the check is for: of three parts in each mean one is the other layer's."""
    means = three_ranks.run(on_ranks.mixed_silently)
    for mean, wrong in zip(means, (5 / 3, 10 / 3, 5 / 3), strict=True):
        assert abs(mean - wrong) < 0.5


def test_a_rank_that_does_not_come_is_an_error_with_the_layers_name(
    three_ranks: Ranks,
) -> None:
    told = three_ranks.run(on_ranks.unchecked)
    assert told[1] == ""
    for error in (told[0], told[2]):
        assert "the forward of '0.1' (SyncBatchNorm, 4 channels) did not get" in error
        assert "NORMKIT_CHECK_RANKS=1" in error


@pytest.mark.parametrize(
    ("fault", "named"),
    [("mode", "the forward of '0.1'"), ("backward", "the backward of '2.0'")],
    ids=["mode", "gone"],
)
def test_a_rank_in_another_mode_or_gone_is_an_error_with_the_layers_name(
    three_ranks: Ranks, fault: str, named: str
) -> None:
    """Within the timeout of the group, 3 s, without `check_ranks`."""
    told = three_ranks.run(on_ranks.unchecked_difference, fault)
    assert told[1] == ""
    for error in (told[0], told[2]):
        assert error.startswith(f"{named} (SyncBatchNorm, 4 channels) did not get")


@pytest.fixture
def two_ranks() -> Iterator[Ranks]:
    """A pool of its own: where a check fails, gloo ends a worker."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("sums", "route"),
    [(0, "eager"), (30, "eager"), (0, "mode"), (0, "empty")],
)
def test_models_that_differ_are_named_without_the_check(
    two_ranks: Ranks, sums: int, route: str
) -> None:
    """Gloo ends rank 0 at a message of 11 numbers where it waits for 9."""
    for told in two_ranks.run(on_ranks.unlike_models, sums, route):
        assert "the ranks are not at the same layer" in told
        first, second = told.split("rank 1: ")
        assert "'2.0' (SyncBatchNorm, 4 channels), 9 numbers" in first
        assert "11 numbers" in second
        assert ("(SyncBatchNorm, 5 channels)" in second) is (route != "mode")


def test_ranks_of_unlike_dtypes_share_their_statistics(three_ranks: Ranks) -> None:
    found = three_ranks.run(on_ranks.unlike_dtypes)
    whole = torch.cat([x.double() for x, *_ in found]).requires_grad_()
    y = nn.functional.batch_norm(whole, None, None, training=True)
    y.backward(torch.arange(1, 4).repeat_interleave(6)[:, None].expand(18, 4).double())
    for rank, (x, output, dx, mean, var) in enumerate(found):
        assert output.dtype == dx.dtype == x.dtype
        rows = slice(6 * rank, 6 * rank + 6)
        error = 1e-5 + 4 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(output.double(), y[rows], rtol=error, atol=error)
        torch.testing.assert_close(
            dx.double(), whole.grad[rows], rtol=error, atol=error
        )
        assert torch.equal(mean, found[0][3])
        assert torch.equal(var, found[0][4])


def test_uneven_numbers_of_batches_train_as_one_process(three_ranks: Ranks) -> None:
    """DistributedDataParallel's own join() aborts with synchronized layers."""
    counts = (3, 0, 1)
    batches = [
        [(torch.randn(5, 4).double(), torch.randn(5, 2).double()) for _ in range(count)]
        for count in counts
    ]
    found = three_ranks.run(on_ranks.train, batches)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    net = net.double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for k in range(max(counts)):
        at = [own[k] for own in batches if k < len(own)]
        x, y = (torch.cat(pair) for pair in zip(*at, strict=True))
        loss = (net(x) - y).square().sum() / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameters, running_var in found:
        for ours, truth in zip(parameters, net.parameters(), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(running_var, net[1].running_var)


def test_a_failing_loader_ends_the_join_on_every_rank(three_ranks: Ranks) -> None:
    *others, culprit = three_ranks.run(on_ranks.join_with_a_failure)
    assert culprit == "the disk of one rank is gone"
    for told in others:
        assert told.startswith("1 of 3 ranks raised an error at a batch")

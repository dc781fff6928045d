"""Moments across ranks: the merge of all, whatever each rank holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.moments import Moments, moments
from normkit.sync import merge_all_over, merge_over, sum_over
from ranks import Ranks
from sync import on_ranks

SIZES = (5, 1, 12)


def shards(offset: float = 0.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n, 4, dtype=dtype) + offset for n in SIZES]


def assert_same_bytes(results: list[tuple[Tensor, ...]]) -> None:
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert ours.numpy().tobytes() == theirs.numpy().tobytes()


def test_ranks_of_uneven_size_merge_to_the_moments_of_the_whole(
    three_ranks: Ranks,
) -> None:
    parts = shards(offset=3.0)
    results = three_ranks.run(on_ranks.merged, parts, 0, None, None)
    assert_same_bytes(results)
    count, mean, m2 = results[0]
    whole = moments(torch.cat(parts), 0)
    assert int(count) == sum(SIZES)
    assert count.dtype == torch.int64
    torch.testing.assert_close(mean, whole.mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(m2, whole.m2, rtol=1e-13, atol=0)


def test_masked_ranks_merge_by_their_counts_per_channel(three_ranks: Ranks) -> None:
    parts = shards()
    masks = [torch.rand(p.shape) < 0.6 for p in parts]
    masks[0][:, 1] = False  # a channel that one rank has nothing of
    results = three_ranks.run(on_ranks.merged, parts, 0, masks, None)
    whole = moments(torch.cat(parts), 0, torch.cat(masks))
    count, mean, m2 = results[2]
    assert torch.equal(count, whole.count)
    torch.testing.assert_close(mean, whole.mean, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(m2, whole.m2, rtol=1e-13, atol=1e-14)


def test_ranks_without_values_leave_the_rest_unchanged(three_ranks: Ranks) -> None:
    x = torch.randn(7, 3, dtype=torch.float64)
    results = three_ranks.run(on_ranks.merged_with_an_empty_rank, x)
    assert_same_bytes(results)
    count, mean, m2 = results[0]
    assert int(count) == 7
    torch.testing.assert_close(mean, moments(x, 0).mean, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(m2, moments(x, 0).m2, rtol=1e-13, atol=0)


def test_no_values_on_any_rank_are_the_identity(three_ranks: Ranks) -> None:
    empty = [torch.empty(0, 4)] * 3
    count, mean, m2 = three_ranks.run(on_ranks.merged, empty, 0, None, None)[0]
    assert int(count) == 0
    assert torch.equal(mean, torch.zeros(4))
    assert torch.equal(m2, torch.zeros(4))


def test_the_float64_sums_keep_the_variance_at_an_offset(three_ranks: Ranks) -> None:
    """At mean/std = 1e4 the naive float32 sums give a variance of 0 or of 24."""
    parts = shards(offset=1e4, dtype=torch.float32)
    _, _, m2 = three_ranks.run(on_ranks.merged, parts, 0, None, None)[0]
    exact = moments(torch.cat(parts).double(), 0).m2
    # Limited by float32 means of the parts: 5e-4 of a unit at 1e4.
    torch.testing.assert_close(m2.double(), exact, rtol=2e-3, atol=0)
    wide = [p.double() for p in parts]
    _, _, m2 = three_ranks.run(on_ranks.merged, wide, 0, None, None)[0]
    torch.testing.assert_close(m2, exact, rtol=1e-7, atol=0)


def test_a_pivot_keeps_the_variance_at_any_offset(three_ranks: Ranks) -> None:
    parts = shards(offset=1e9)
    exact = moments(torch.cat(parts), 0)
    around = three_ranks.run(on_ranks.merged, parts, 0, None, torch.full((4,), 1e9))
    torch.testing.assert_close(around[1][2], exact.m2, rtol=1e-7, atol=0)
    plain = three_ranks.run(on_ranks.merged, parts, 0, None, None)
    assert not torch.allclose(plain[1][2], exact.m2, rtol=1e-2)


def test_a_nan_on_one_rank_reaches_all_ranks_and_no_other_channel(
    three_ranks: Ranks,
) -> None:
    parts = shards()
    parts[1][0, 2] = torch.nan
    results = three_ranks.run(on_ranks.merged, parts, 0, None, None)
    for _, mean, m2 in results:
        assert mean.isnan().tolist() == [False, False, True, False]
        assert m2.isnan().tolist() == [False, False, True, False]


def test_a_subgroup_merges_its_own_ranks(three_ranks: Ranks) -> None:
    parts = shards()
    first, left_out, last = three_ranks.run(on_ranks.merged_in_a_subgroup, parts)
    assert left_out is None
    assert torch.equal(first, last)
    whole = moments(torch.cat([parts[0], parts[2]]), 0)
    torch.testing.assert_close(first, whole.mean, rtol=1e-14, atol=1e-14)


def test_a_device_mesh_is_a_group(three_ranks: Ranks) -> None:
    parts = shards()
    means = three_ranks.run(on_ranks.merged_over_a_mesh, parts)
    whole = moments(torch.cat(parts), 0)
    torch.testing.assert_close(means[0], whole.mean, rtol=1e-14, atol=1e-14)


def test_many_moments_travel_in_one_collective(three_ranks: Ranks) -> None:
    parts = shards()
    sizes = [size for size, _ in three_ranks.run(on_ranks.merged_together, parts)]
    assert sizes == [3 + 2 * (4 + 4 + 2)] * 3


def test_gradients_across_ranks_equal_those_of_the_whole(three_ranks: Ranks) -> None:
    parts = shards(offset=2.0)
    cotangents = [(torch.randn(4).double(), torch.randn(4).double()) for _ in range(3)]
    found = three_ranks.run(on_ranks.gradients, parts, cotangents)
    x = torch.cat(parts).requires_grad_()
    whole = moments(x, 0)
    # The loss of the whole is the sum of the ranks' losses.
    loss = sum(
        (whole.mean * d_mean).sum() + (whole.m2 * d_m2).sum()
        for d_mean, d_m2 in cotangents
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(torch.cat(found), x.grad, rtol=1e-12, atol=1e-12)


def test_sums_of_mixed_shapes_come_back_as_they_went(three_ranks: Ranks) -> None:
    total, ones = three_ranks.run(on_ranks.sums, 1.5)[1]
    assert float(total) == 9.0
    assert torch.equal(ones, torch.full((2,), 3.0, dtype=torch.float64))


def test_without_a_process_group_the_moments_are_returned_as_they_are() -> None:
    alone = moments(torch.randn(3, 2), 0)
    assert merge_over(alone) is alone
    assert merge_all_over([]) == []
    assert torch.equal(sum_over([torch.ones(2)])[0], torch.ones(2).double())


def test_pivots_that_do_not_match_are_refused(three_ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="got 1 pivots for 2 Moments"):
        three_ranks.run(on_ranks.mismatched_pivots)
    assert issubclass(ArgumentError, ValueError)
    assert isinstance(Moments.empty((1,)), Moments)

"""What must hold for every Moments value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import oracles
from normkit import Moments, moments
from normkit.errors import ArgumentError, DtypeError, NormkitError
from strategies import FILLS, filled, tensors

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def assert_same(a: Moments, b: Moments, scale: float = 1.0) -> None:
    torch.testing.assert_close(
        a.count.expand(a.mean.shape), b.count.expand(b.mean.shape)
    )
    torch.testing.assert_close(a.mean, b.mean, **EXACT)
    # m2 is a sum of squares of deviations: rounding the mean costs n·(ulp·mean)².
    atol = 1e-13 + scale * 1e-15
    torch.testing.assert_close(a.m2, b.m2, rtol=1e-9, atol=atol)


def size(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


@given(tensors())
def test_empty_is_the_identity_of_merge(x: torch.Tensor) -> None:
    m = moments(x, 0)
    nothing = Moments.empty((x.shape[1],), dtype=x.dtype)
    for merged in (m.merge(nothing), nothing.merge(m)):
        assert int(merged.count) == x.shape[0]
        assert torch.equal(merged.mean, m.mean)
        assert torch.equal(merged.m2, m.m2)


@given(tensors(), st.integers(0, 31))
def test_merge_of_any_split_equals_whole(x: torch.Tensor, at: int) -> None:
    at = min(at, x.shape[0])
    parts = moments(x[:at], 0).merge(moments(x[at:], 0))
    assert_same(parts, moments(x, 0), size(x) ** 2)


@given(tensors(min_rows=2))
def test_merge_is_commutative(x: torch.Tensor) -> None:
    a, b = moments(x[:1], 0), moments(x[1:], 0)
    assert_same(a.merge(b), b.merge(a), size(x) ** 2)


@given(tensors(min_rows=3), st.sampled_from(FILLS))
def test_merge_is_associative(x: torch.Tensor, fill: str) -> None:
    a, b = moments(x[:1], 0), moments(x[1:], 0)
    other = filled((5, x.shape[1]), fill, 3)
    c = moments(other, 0)
    scale = max(size(x), size(other)) ** 2
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    torch.testing.assert_close(left.mean, right.mean, **EXACT)
    torch.testing.assert_close(left.m2, right.m2, rtol=1e-9, atol=1e-13 + scale * 1e-15)


@given(tensors(min_rows=2), st.integers(1, 5))
def test_merge_all_equals_whole(x: torch.Tensor, parts: int) -> None:
    merged = Moments.merge_all([moments(p, 0) for p in x.tensor_split(parts)])
    assert_same(merged, moments(x, 0), size(x) ** 2)


@given(tensors(min_rows=1))
def test_merging_along_a_dimension_equals_reducing_it(x: torch.Tensor) -> None:
    x = x.unsqueeze(-1).expand(*x.shape, 3) * torch.tensor([1.0, -2.0, 0.5])
    by_channel = moments(x, 2)
    assert_same(by_channel.merge_dim(1), moments(x, (1, 2)), size(x) ** 2)


@given(tensors(min_rows=1), st.floats(-1e6, 1e6))
def test_a_shift_moves_the_mean_and_leaves_m2(x: torch.Tensor, shift: float) -> None:
    m, moved = moments(x, 0), moments(x + shift, 0)
    scale = (size(x) + abs(shift)) ** 2
    torch.testing.assert_close(moved.mean, m.mean + shift, rtol=1e-12, atol=1e-9)
    # x + shift itself is rounded: each deviation moves by half an ulp of the sum.
    spread = float(m.m2.max().sqrt())
    atol = 1e-14 * scale + 1e-14 * math.sqrt(scale) * spread * x.shape[0]
    torch.testing.assert_close(moved.m2, m.m2, rtol=1e-9, atol=atol)


@given(tensors(), st.sampled_from([-3.0, 0.0, 0.5, 1e3]))
def test_a_factor_scales_the_mean_and_squares_into_m2(
    x: torch.Tensor, factor: float
) -> None:
    m, scaled = moments(x, 0), moments(x * factor, 0)
    torch.testing.assert_close(scaled.mean, m.mean * factor, rtol=1e-12, atol=1e-12)
    atol = 1e-13 + 1e-15 * (size(x) * factor) ** 2
    torch.testing.assert_close(scaled.m2, m.m2 * factor**2, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("shape", [(1000, 3), (1, 3), (4099, 2)])
def test_float32_statistics_err_relative_to_the_spread(
    fill: str, shape: tuple[int, int]
) -> None:
    x = filled(shape, fill, 0, torch.float32)
    m = moments(x, 0)
    _, mean, m2 = oracles.statistics(x, (0,))
    # Half an ulp of the mean, and a few float32 roundings of the spread around it.
    spread = float((m2 / shape[0]).max().sqrt())
    atol = 1e-7 * spread + 1e-12
    torch.testing.assert_close(m.mean.double(), mean[0], rtol=6e-8, atol=atol)
    # m2 keeps 6 digits at any offset.
    torch.testing.assert_close(m.m2.double(), m2[0], rtol=2e-6, atol=1e-12)


def test_no_values_have_count_0_and_no_variance() -> None:
    m = moments(torch.empty(0, 2), 0)
    assert int(m.count) == 0
    assert m.mean.tolist() == [0.0, 0.0]
    assert m.m2.tolist() == [0.0, 0.0]
    assert m.var.isnan().all()
    assert m.unbiased_var.isnan().all()
    assert m.inv_std(1e-5).isnan().all()


def test_one_value_has_variance_0_and_no_unbiased_variance() -> None:
    m = moments(torch.tensor([[7.0, -1.0]]), 0)
    assert m.var.tolist() == [0.0, 0.0]
    assert m.unbiased_var.isnan().all()


def test_derived_values_follow_their_definitions() -> None:
    x = filled((50, 4), "offset", 1)
    m = moments(x, 0)
    torch.testing.assert_close(m.var, x.var(0, correction=0), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        m.unbiased_var, x.var(0, correction=1), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(m.mean_square, x.square().mean(0), **EXACT)
    torch.testing.assert_close(m.inv_std(0.25), (m.var + 0.25) ** -0.5, **EXACT)


def test_counts_pass_the_end_of_float32() -> None:
    big = Moments(torch.tensor(2**24), torch.zeros(1), torch.zeros(1))
    one = moments(torch.zeros(1, 1), 0)
    assert int(big.merge(one).count) == 2**24 + 1


def test_counts_do_not_round_a_float64_merge() -> None:
    """int64 / int64 is float32 in torch; a merge through it errs by 7e-9."""
    x = filled((1000, 1), "normal", 2)
    merged = moments(x[:333], 0).merge(moments(x[333:], 0))
    torch.testing.assert_close(merged.mean, moments(x, 0).mean, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("fill", FILLS)
def test_a_mask_leaves_out_what_it_hides(fill: str) -> None:
    x = filled((6, 5, 4), fill, 4)
    mask = torch.rand(6, 1, 4) > 0.4
    hidden = x.masked_fill(~mask.expand_as(x), math.nan)
    m = moments(hidden, (0, 2), mask)
    for c in range(5):
        kept = x[:, c][mask[:, 0]]
        assert int(m.count[c]) == len(kept)
        torch.testing.assert_close(m.mean[c], kept.mean(), **EXACT)
        expected = (kept - kept.mean()).square().sum()
        atol = 1e-13 + 1e-15 * size(x) ** 2
        torch.testing.assert_close(m.m2[c], expected, rtol=1e-9, atol=atol)


def test_a_mask_that_hides_everything_is_the_identity() -> None:
    m = moments(torch.randn(3, 2), 0, torch.zeros(3, 2, dtype=torch.bool))
    assert m.count.tolist() == [0, 0]
    assert m.mean.tolist() == [0.0, 0.0]
    whole = moments(torch.tensor([[1.0, 2.0]]), 0)
    torch.testing.assert_close(m.merge(whole).mean, whole.mean, rtol=0, atol=0)


def test_integer_weights_count_like_repetition() -> None:
    x = filled((4, 2), "normal", 5)
    times = torch.tensor([1.0, 3.0, 0.0, 2.0], dtype=torch.float64).view(4, 1)
    repeated = x.repeat_interleave(times[:, 0].long(), 0)
    m, expected = moments(x, 0, times), moments(repeated, 0)
    torch.testing.assert_close(m.mean, expected.mean, **EXACT)
    torch.testing.assert_close(m.m2, expected.m2, **EXACT)
    assert m.count.tolist() == [6.0, 6.0]


def test_merging_under_masks_weighs_each_position_by_its_count() -> None:
    x = filled((8, 3), "normal", 6)
    mask = torch.rand(8, 3) > 0.5
    parts = moments(x[:5], 0, mask[:5]).merge(moments(x[5:], 0, mask[5:]))
    assert_same(parts, moments(x, 0, mask))


def test_a_nan_or_inf_shows_and_stays_in_its_channel() -> None:
    x = torch.tensor([[1.0, math.nan, math.inf], [3.0, 1.0, 1.0]])
    m = moments(x, 0)
    assert m.mean[0] == 2.0
    assert m.mean[1].isnan()
    assert m.mean[2].isinf()
    assert m.var[2].isnan()


def test_an_empty_part_does_not_clean_a_nan() -> None:
    bad = moments(torch.full((2, 1), math.nan), 0)
    assert bad.merge(Moments.empty((1,))).mean.isnan()
    assert Moments.empty((1,)).merge(bad).mean.isnan()


@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_differentiable_to_second_order(masked: bool) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True]).view(4, 1) if masked else None

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        m = moments(x, 0, mask)
        return m.mean, m.m2

    assert gradcheck(both, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(both, (x,))


def test_a_merge_is_differentiable() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def merged(x: torch.Tensor) -> torch.Tensor:
        return moments(x[:2], 0).merge(moments(x[2:], 0)).inv_std(1e-3)

    assert gradcheck(merged, (x,))


def test_half_values_are_measured_in_float32() -> None:
    x = torch.randn(1000, 2).to(torch.bfloat16)
    m = moments(x, 0)
    assert m.mean.dtype == torch.float32
    torch.testing.assert_close(
        m.mean.double(), x.double().mean(0), rtol=1e-5, atol=1e-7
    )


@settings(max_examples=20)
@given(st.permutations([0, 1, 2]))
def test_strides_do_not_matter(order: list[int]) -> None:
    x = filled((5, 4, 6), "normal", 7)
    view = x.permute(order)[:, ::2]
    dim = (0, 2)
    torch.testing.assert_close(
        moments(view, dim).m2, moments(view.contiguous(), dim).m2, **EXACT
    )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(2, dtype=torch.int64), 0), DtypeError, "torch.int64"),
        ((torch.zeros(2, 3), (0, 0)), ArgumentError, "distinct"),
        ((torch.zeros(2, 3), 2), ArgumentError, "dim=2"),
        ((torch.zeros(2, 3), 0, torch.ones(4).bool()), ArgumentError, "broadcast"),
        ((torch.zeros(2, 3), 0, torch.ones(3).int()), ArgumentError, "torch.int32"),
    ],
)
def test_errors_name_what_arrived(arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        moments(*arguments)


def test_merging_nothing_says_what_to_use() -> None:
    with pytest.raises(NormkitError, match="empty"):
        Moments.merge_all([])

"""Native parts over ranks agree with the primitives, and lose no digits far from 0."""

from __future__ import annotations

import pytest
import torch

import oracles
from normkit.kernels.cpu.loading import library
from ranks import Ranks
from sync import short_way_on_ranks as on_ranks
from sync.test_sync_batch_norm import parts_of, state_of

pytestmark = pytest.mark.skipif(library() is None, reason="no native kernels here")

SIZES = (5, 3, 1)


@pytest.mark.parametrize("is_last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_native_parts_agree_with_the_primitives(
    three_ranks: Ranks, activation: str, adds: bool, is_masked: bool, is_last: bool
) -> None:
    parts = parts_of(SIZES, (4, 3, 5), torch.float32)
    masks = [torch.rand(p.shape) < 0.7 for p in parts] if is_masked else None
    residuals = [torch.randn_like(p) for p in parts] if adds else None
    cotangents = [torch.randn_like(p) for p in parts]
    found = three_ranks.run(
        on_ranks.both_ways,
        *(state_of(4, torch.float32), parts, masks, residuals, cotangents),
        *({"activation": activation}, is_last),
    )
    for native, reference in found[:2]:
        torch.testing.assert_close(native, reference, rtol=2e-5, atol=2e-5)


def test_a_plain_input_takes_the_short_way(three_ranks: Ranks) -> None:
    """So the tests above compare two ways; a part without values has no native one."""
    kinds = three_ranks.run(on_ranks.route, parts_of(SIZES, (4, 3), torch.float32))
    assert kinds[:2] == [["RanksCall", "RanksCall", "Passes"]] * 2


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("ratio", [1.0, 1e4, 1e6])
def test_statistics_hold_far_from_zero(
    three_ranks: Ranks, ratio: float, name: str
) -> None:
    """At 1e6 standard deviations sums around 0 are off by 7.6e-5 in y.

    A second collective, around the means of the first, is taken only there.
    """
    parts = [p.float() + ratio for p in parts_of(SIZES, (6, 7, 3), torch.float64)]
    parts = [p * torch.tensor([1.0, -1, 2, 1, 1, 1]).view(1, 6, 1, 1) for p in parts]
    found = three_ranks.run(on_ranks.far_off, parts, name)
    x = torch.cat(parts[:2]).double().requires_grad_()
    y = oracles.batch_norm(x, None, None, 1e-5)
    cotangent = torch.cat(parts[:2]).cos().double()
    (dx,) = torch.autograd.grad(y, x, cotangent)
    ys = torch.cat([f[0] for f in found[:2]])
    assert float((ys - y.detach()).abs().max()) <= 2e-6 * float(y.detach().abs().max())
    dxs = torch.cat([f[1] for f in found[:2]]).double()
    torch.testing.assert_close(dxs, dx, rtol=1e-5, atol=2e-6)
    for _, _, mean, var, calls in found[:2]:
        assert torch.equal(mean, found[0][2])
        assert torch.equal(var, found[0][3])
        assert len(calls) == (2 if ratio > 1e5 else 1)


def test_a_constant_channel_takes_no_second_collective(three_ranks: Ranks) -> None:
    """The eps bounds what rounding can do: 1 is not far from 0 with a variance of 0."""
    parts = [torch.ones(n, 3, 2) for n in SIZES]
    found = three_ranks.run(on_ranks.far_off, parts, "cpu")
    assert [len(f[-1]) for f in found[:2]] == [1, 1]


def test_torch_func_crosses_ranks(three_ranks: Ranks) -> None:
    """The SyncBatchNorm of torch raises under every transform of torch.func."""
    parts = parts_of(SIZES, (4, 3), torch.float64)
    state = state_of(4, torch.float64)
    found = three_ranks.run(on_ranks.derivative, state, parts)
    x = torch.cat(parts[:2]).requires_grad_()
    y = oracles.batch_norm(x, state["weight"], state["bias"], 1e-5)
    (truth,) = torch.autograd.grad((y**3).sum(), x)
    for k, which in ((0, "autograd"), (1, "func")):
        grads = torch.cat([f[k] for f in found[:2]])
        torch.testing.assert_close(grads, truth, rtol=1e-10, atol=1e-10, msg=which)
    # Each rank's loss moves with all ranks' tangents.
    tangent = torch.cat([f[3] for f in found[:2]])
    total = found[0][2] + found[1][2]
    torch.testing.assert_close(total, (truth * tangent).sum(), rtol=1e-9, atol=1e-9)
    for by_autograd, _, _, _, mapped, other in found[:2]:
        torch.testing.assert_close(mapped[0], by_autograd)
        torch.testing.assert_close(mapped[1], other)


def test_recompute_keeps_one_input_over_ranks(three_ranks: Ranks) -> None:
    plain = three_ranks.run(on_ranks.kept, None)[:2]
    less = three_ranks.run(on_ranks.kept, "recompute")[:2]
    for (before, y, dx), (after, again, dx_again) in zip(plain, less, strict=True):
        assert before > 1.9
        assert after < 1.01
        assert torch.equal(y, again)
        assert torch.equal(dx, dx_again)

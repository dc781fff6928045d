"""Two vectors of bfloat16 at once give each value its own result.

With given statistics a value has one chain of float32 operations and one rounding, so
that the kernels of float32, rounded, have the same bits. Statistics are sums, whose
order may differ: there the outputs agree to one step of bfloat16.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import normkit.functional as F

# Around one and two vectors of every instruction set, and past the caches.
LENGTHS = [1, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65, 100]
LARGE = (2, 3, 750_011)  # more than 8 MB, so that outputs are streamed
STEP = 2.0**-7

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def given(channels: int) -> tuple[Tensor, ...]:
    mean, weight, bias = torch.randn(3, channels).unbind()
    return mean, torch.rand(channels) + 0.5, weight, bias


def both(x: Tensor, options: dict[str, object]) -> list[tuple[Tensor, Tensor]]:
    """Return output and gradient of x in bfloat16, and those of float32, rounded."""
    mean, var, weight, bias = given(x.shape[1])
    residual = options.get("residual")
    dy, found = rounded(torch.randn_like(x)), []
    for dtype in (torch.bfloat16, torch.float32):
        there = x.detach().to(dtype).requires_grad_()
        extras = dict(options)
        if isinstance(residual, Tensor):
            extras["residual"] = residual.to(dtype)
        y = F.batch_norm(there, mean, var, weight, bias, training=False, **extras)
        (dx,) = torch.autograd.grad(y, there, dy.to(dtype))
        found.append((rounded(y.detach()), rounded(dx)))
    return found


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_given_statistics(activation: str, adds: bool, channels_last: bool) -> None:
    shapes = [(3, 5, 1, n) for n in LENGTHS] + [(5, n, 3, 3) for n in LENGTHS]
    shapes += [(2, 64, 9, 7), (40, 64, 4, 4), (1, 1030, 5, 5), (2, 3, 41, 100)]
    for shape in shapes:
        x = rounded(torch.randn(shape))
        residual = rounded(torch.randn(shape)) if adds else None
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        ours, theirs = both(x, {"activation": activation, "residual": residual})
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), shape


def test_outputs_past_the_caches() -> None:
    for shape in (LARGE, (750_011, 6, 1)):
        x = rounded(torch.randn(shape))
        ours, theirs = both(x, {})
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), shape


def test_a_nan_is_one_nan() -> None:
    x = rounded(torch.randn(2, 3, 100))
    for place in range(100):
        holed = x.clone()
        holed[1, 2, place] = float("nan")
        ours, _ = both(holed, {})
        assert ours[0].isnan().nonzero().tolist() == [[1, 2, place]]


@pytest.mark.parametrize("n", [*LENGTHS[7:], 768, 1000])
def test_measured_statistics(n: int) -> None:
    x, dy = 3 + rounded(torch.randn(6, 8, n)), rounded(torch.randn(6, 8, n))
    calls: tuple[tuple[Call, int], ...] = (
        (lambda v, w, z: F.batch_norm(v, None, None, w, z, training=True), 8),
        (lambda v, w, z: F.group_norm(v, 2, w, z), 8),
        (lambda v, w, z: F.instance_norm(v, None, None, w, z), 8),
        (lambda v, w, z: F.layer_norm(v, (n,), w, z), n),
    )
    for call, size in calls:
        weight, bias = rounded(torch.randn(2, size)).unbind()
        results = []
        for dtype in (torch.bfloat16, torch.float32):
            given = [t.to(dtype).requires_grad_() for t in (rounded(x), weight, bias)]
            y = call(*given)
            gradients = torch.autograd.grad(y, given, dy.to(dtype))
            results.append([y.detach().float(), *(g.float() for g in gradients)])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=STEP, atol=STEP * float(b.std()) / 16)

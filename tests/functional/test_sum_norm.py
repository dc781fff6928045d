"""Layer and RMS norm of x + residual, against a sum and a norm in two steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from normkit.errors import ShapeError
from normkit.functional import layer_norm, rms_norm, sum_norm
from normkit.kernels.cpu.loading import library

needs_library = pytest.mark.skipif(library() is None, reason="needs the native kernels")
SHAPES = [(3, 5), (2, 7, 33), (40, 256), (2, 1, 40000), (1, 1, 3), (0, 4), (17, 1000)]


def norms(
    width: int, affine: bool, dtype: torch.dtype
) -> dict[str, Callable[..., Any]]:
    weight = (torch.rand(width, dtype=dtype) + 0.5) if affine else None
    bias = torch.randn(width, dtype=dtype) if affine else None
    if weight is not None and bias is not None:
        weight.requires_grad_()
        bias.requires_grad_()
    return {
        "layer": lambda x, **more: layer_norm(x, (width,), weight, bias, **more),
        "rms": lambda x, **more: rms_norm(x, (width,), weight, **more),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_sum_and_gradients_are_those_of_two_steps(
    shape: tuple[int, ...], name: str, affine: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    norm = norms(shape[-1], affine, dtype)[name]
    x, residual = (
        torch.randn(shape, dtype=dtype).add(3).requires_grad_() for _ in range(2)
    )
    dy, dsum = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    y, total = norm(x, residual=residual)
    assert torch.equal(total, x + residual)
    expected = norm(total.detach().double() if dtype == torch.float32 else total)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 0.02}[dtype]
    assert (y - expected).abs().max() <= tolerance * 4 if y.numel() else True
    got = torch.autograd.grad((y * dy + total * dsum).sum(), (x, residual))
    wide = (x + residual).detach().double().requires_grad_()
    reference = norm(wide) if not affine else norm(wide).double()
    (dwide,) = torch.autograd.grad(
        (reference * dy.double() + wide * dsum.double()).sum(), wide
    )
    for g in got:
        assert g.dtype == dtype
        if g.numel():
            # One rounding, whatever the dtype: the sum's gradient joins before it.
            unit = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.008}
            bound = unit[dtype] * dwide.abs().clamp(min=dwide.abs().mean())
            assert ((g.double() - dwide).abs() <= bound * 4).all()


@needs_library
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_the_kernel_runs_once_and_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    honest = sum_norm.SumNorm.forward

    def forward(*args: Any) -> Any:
        ran.append("kernel")
        return honest(*args)

    monkeypatch.setattr(sum_norm.SumNorm, "forward", staticmethod(forward))
    norm = norms(33, True, torch.float32)[name]
    x = torch.randn(4, 33)
    for _ in range(3):
        norm(x, residual=x * 2)
    y, _ = norm(x, residual=x.t().contiguous().t())
    torch.testing.assert_close(y, norm(x + x))
    assert ran == ["kernel"] * 4
    with normkit.backend("reference"):
        norm(x, residual=x * 2)
    with normkit.less_memory():
        norm(x, residual=x * 2)
    norm(x.double(), residual=x)
    assert ran == ["kernel"] * 4


@pytest.mark.parametrize("used", ["y", "sum", "both"])
def test_either_output_may_be_unused(used: str) -> None:
    x = torch.randn(6, 9, requires_grad=True)
    residual = torch.randn(6, 9)
    y, total = rms_norm(x, (9,), residual=residual)
    loss = {"y": y.sin(), "sum": total.sin(), "both": y.sin() + total}[used].sum()
    (dx,) = torch.autograd.grad(loss, x)
    s = x.detach().double().requires_grad_()
    wide = s + residual
    z = torch.nn.functional.rms_norm(wide, (9,), eps=torch.finfo(torch.float32).eps)
    loss = {"y": z.sin(), "sum": wide.sin(), "both": z.sin() + wide}[used].sum()
    (expected,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=1e-6)


def test_second_derivatives_and_transforms() -> None:
    weight = torch.rand(5, dtype=torch.float64).requires_grad_()
    bias = torch.rand(5, dtype=torch.float64).requires_grad_()
    x, residual = (
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )

    def both(*given: Tensor) -> tuple[Tensor, Tensor]:
        a, b, w, z = given
        return layer_norm(a, (5,), w, z, residual=b)

    assert torch.autograd.gradcheck(both, (x, residual, weight, bias))
    assert torch.autograd.gradgradcheck(both, (x, residual, weight, bias))
    y, total = both(x, residual, weight, bias)
    mapped = torch.vmap(lambda a, b: both(a, b, weight, bias))(x, residual)
    torch.testing.assert_close(mapped[0], y)
    torch.testing.assert_close(mapped[1], total)
    _, (dy, dsum) = torch.func.jvp(
        lambda a: both(a, residual, weight, bias), (x,), (torch.ones_like(x),)
    )
    torch.testing.assert_close(dsum, torch.ones_like(x))
    # A constant offset changes no layer norm.
    torch.testing.assert_close(dy, torch.zeros_like(x))


def test_layers_masks_and_refusals() -> None:
    layer = normkit.nn.LayerNorm(6)
    x, branch = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    h, total = layer(x, residual=branch)
    torch.testing.assert_close(h, layer(x + branch))
    mask = torch.rand(2, 3, 6) > 0.3
    h, total = layer(x, mask=mask, residual=branch)
    torch.testing.assert_close(h, layer(x + branch, mask=mask))
    over_channels = normkit.nn.LayerNorm(3, channel_dim=1)
    h, total = over_channels(x, residual=branch)
    torch.testing.assert_close(h, over_channels(x + branch))
    rms = normkit.nn.RMSNorm(6)
    h, total = rms(x, residual=branch)
    torch.testing.assert_close(h, rms(x + branch))
    assert torch.equal(total, x + branch)
    with pytest.raises(ShapeError, match=r"residual of shape \(3, 6\)"):
        rms(x, residual=branch[0])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, residual=branch), layer(x, residual=branch))

"""Every normalization and its gradients agree with float64 definitions.

Cotangents, weights and biases are random: with ones and zeros, or `.sum()` as the
loss, a wrong backward of a normalization passes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import normkit
import normkit.functional as F
import oracles
from normkit.kernels.epilogue import activate


@dataclass(frozen=True)
class Norm:
    """A normalization, its definition, and the shape of its learned vectors."""

    name: str
    ours: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    has_bias: bool = True

    def __str__(self) -> str:
        return self.name


def channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[1],)


NORMS = [
    Norm(
        "batch",
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        oracles.batch_norm,
        channels,
    ),
    Norm(
        "layer",
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        lambda x, w, b: oracles.layer_norm(x, x.shape[-1:], w, b),
        lambda s: s[-1:],
    ),
    Norm(
        "layer-over-two",
        lambda x, w, b: F.layer_norm(x, x.shape[-2:], w, b),
        lambda x, w, b: oracles.layer_norm(x, x.shape[-2:], w, b),
        lambda s: s[-2:],
    ),
    Norm(
        "group",
        lambda x, w, b: F.group_norm(x, 2, w, b),
        lambda x, w, b: oracles.group_norm(x, 2, w, b),
        channels,
    ),
    Norm(
        "instance",
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        oracles.instance_norm,
        channels,
    ),
    Norm(
        "rms",
        lambda x, w, b: F.rms_norm(x, x.shape[-1:], w, 1e-5),
        lambda x, w, b: oracles.rms_norm(x, x.shape[-1:], w),
        lambda s: s[-1:],
        has_bias=False,
    ),
]
SHAPES = [(5, 4, 6), (3, 4, 5, 7), (2, 6, 3, 3, 4), (7, 2, 1, 13)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def gradients(f: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = f(*leaves, *[None] * (3 - len(leaves)))
    return y, torch.autograd.grad(y, leaves, dy.to(y.dtype))


@pytest.fixture(params=["chosen", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything runs on the backend that is chosen, and on the definition of right."""
    if request.param == "chosen":
        yield
    else:
        with normkit.backend(request.param):
            yield


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "offset"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_outputs_and_gradients_agree_with_float64(
    norm: Norm, shape, dtype, layout: str, offset: float
) -> None:
    x = LAYOUTS[layout]((torch.randn(shape).double() * 2 + offset).to(dtype))
    inputs = [x, torch.randn(norm.shape(shape)).to(dtype)]
    if norm.has_bias:
        inputs.append(torch.randn(norm.shape(shape)).to(dtype))
    dy = torch.randn(shape).to(dtype)
    y, grads = gradients(norm.ours, inputs, dy)
    wide = [t.double() for t in inputs]
    y64, grads64 = gradients(norm.oracle, wide, dy.double())
    near = 1e-11 if dtype == torch.float64 else 2e-6
    # An offset costs the oracle itself digits in float64: 1e4 of 1e16.
    near = max(near, 1e-9 if offset and dtype == torch.float64 else 0.0)
    assert ((y - y64).abs() <= near * y64.abs().clamp(min=1)).all()
    for got, expected in zip(grads, grads64, strict=True):
        size = expected.abs().max()
        error = (got - expected).abs().max()
        assert error <= (1e-5 if dtype == torch.float32 else 1e-8) * size, error / size


@pytest.mark.parametrize("shape", [(4, 4, 3)], ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_derivatives_of_every_kind_pass_gradcheck(norm: Norm, shape) -> None:
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True)]
    vectors = 2 if norm.has_bias else 1
    for _ in range(vectors):
        vector = torch.randn(norm.shape(shape), dtype=torch.float64)
        inputs.append(vector.requires_grad_())

    def f(*tensors: Tensor) -> Tensor:
        return norm.ours(*tensors, *[None] * (3 - len(tensors)))

    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_batched_grad=True)


def test_eval_derivatives_pass_gradcheck() -> None:
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    inputs = [
        torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(3, dtype=torch.float64, requires_grad=True),
        torch.randn(3, dtype=torch.float64, requires_grad=True),
    ]

    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, w, b)

    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("kind", ["bool", "weights"])
def test_masked_derivatives_pass_gradcheck(kind: str) -> None:
    mask = torch.rand(4, 1, 5) > 0.3
    if kind == "weights":
        mask = mask * torch.rand(4, 1, 5).double()
    inputs = [
        torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(3, dtype=torch.float64, requires_grad=True),
        torch.randn(3, dtype=torch.float64, requires_grad=True),
    ]

    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, w, b, True, mask=mask)

    assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_where_weight_and_residual_are_computed_from_the_input(
    activation: str, training: bool
) -> None:
    """Against torch's own operators; the parts share a graph behind them."""
    x = torch.randn(5, 3, 4, dtype=torch.double, requires_grad=True)
    dy = torch.randn_like(x)
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def twice(is_ours: bool) -> tuple[Tensor, Tensor]:
        weight, bias = x.sin().sum((0, 2)), x.cos().mean((0, 2))
        residual = x.sigmoid() * x
        given = (x, mean.clone(), var.clone(), weight, bias, training)
        if is_ours:
            y = F.batch_norm(*given, activation=activation, residual=residual)
        else:
            plain = torch.nn.functional.batch_norm(*given) + residual
            y = activate(activation, plain)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return dx, torch.autograd.grad((dx * dy.sin()).sum(), x)[0]

    for ours, theirs in zip(twice(True), twice(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_third_order_derivatives_are_exact() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    u, v = torch.randn(2, 5, 2, dtype=torch.float64).unbind()

    def third(f: Callable[[Tensor], Tensor]) -> Tensor:
        y = f(x)
        (g,) = torch.autograd.grad(y, x, u, create_graph=True)
        (h,) = torch.autograd.grad(g, x, v, create_graph=True)
        return torch.autograd.grad(h, x, u * v)[0]

    ours = third(lambda x: F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(ours, third(oracles.batch_norm), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_what_a_mask_hides_reaches_neither_output_nor_gradient(fill: float) -> None:
    x = torch.randn(6, 3, 4)
    mask = (torch.rand(6, 1, 4) > 0.4).expand(6, 3, 4)
    dy = torch.randn(6, 3, 4)
    seen = []
    for hidden in (x, x.masked_fill(~mask, fill)):
        hidden = hidden.clone().requires_grad_()
        y = F.batch_norm(hidden, None, None, training=True, mask=mask)
        (dx,) = torch.autograd.grad(y, hidden, dy)
        seen.append((y, dx))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert (seen[1][0][~mask] == 0).all()
    assert (seen[1][1][~mask] == 0).all()


def test_masked_gradients_equal_those_of_the_values_alone() -> None:
    """Padding a ragged batch and masking it is the unpadded batch."""
    values = torch.randn(11, 3, dtype=torch.float64)
    padded = torch.zeros(4, 3, 5, dtype=torch.float64)
    mask = torch.zeros(4, 1, 5, dtype=torch.bool)
    mask[0, :, :4] = mask[1, :, :1] = mask[2, :, :5] = mask[3, :, 2:3] = True
    rows = mask[:, 0].nonzero()
    padded[rows[:, 0], :, rows[:, 1]] = values
    dy = torch.randn_like(padded)
    flat, wide = values.requires_grad_(), padded.requires_grad_()
    y = F.batch_norm(flat, None, None, training=True)
    z = F.batch_norm(wide, None, None, training=True, mask=mask)
    (expected,) = torch.autograd.grad(y, flat, dy[rows[:, 0], :, rows[:, 1]])
    (got,) = torch.autograd.grad(z, wide, dy)
    torch.testing.assert_close(z[rows[:, 0], :, rows[:, 1]], y)
    torch.testing.assert_close(got[rows[:, 0], :, rows[:, 1]], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "silu", "gelu"])
@pytest.mark.parametrize("layout", ["plain", "negated", "masked"])
def test_the_gradient_of_a_residual_in_halves_is_rounded_once(
    layout: str, activation: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(8, 4, 6).to(dtype) for _ in range(3))
    weight, bias = torch.rand(4), torch.randn(4)
    mask = (torch.arange(6) < 4).expand(8, 1, 6) if layout == "masked" else None

    def gradients(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, residual, weight, bias, dy = given
        leaves = x.detach().requires_grad_(), residual.detach().requires_grad_()
        seen = torch._neg_view(-leaves[0]) if layout == "negated" else leaves[0]
        y = normkit.functional.batch_norm(
            *(seen, None, None, weight, bias, True),
            mask=mask,
            activation=activation,
            residual=leaves[1],
        )
        return torch.autograd.grad(y, leaves, dy)

    _, found = gradients(x, residual, weight, bias, dy)
    wide = (t.double() for t in (x, residual, weight, bias, dy))
    _, exact = gradients(*wide)
    info = torch.finfo(dtype)
    allowed = exact.abs() * info.eps / 2 * 1.01 + info.smallest_normal
    assert ((found.double() - exact).abs() <= allowed).all()

"""torch's operator on small inputs: tried where it is as exact as the kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normkit.functional import aten, group_norm, layer_norm

Taken = list[torch.Size]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """Shapes of the inputs that torch's operators got."""
    shapes: Taken = []
    for name in ("native_layer_norm", "native_group_norm"):
        plain = getattr(torch, name)

        def run(x: Tensor, *others: object, plain: object = plain) -> object:
            shapes.append(x.shape)
            return plain(x, *others)  # type: ignore[operator]

        monkeypatch.setattr(torch, name, run)
    return shapes


def named(value: object) -> str:
    """Name a case: a function's own text holds its address."""
    return getattr(value, "__name__", str(value))


def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return layer_norm(x, w.shape, w, b)


def group(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return group_norm(x, 2, w, b)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize(
    ("norm", "shape", "channels"),
    [
        (layer, (65_536, 2), 2),
        (layer, (262_144, 2), 2),
        (layer, (32_768, 4), 4),
        (layer, (32_768, 16), 16),
        (layer, (8192, 64), 64),
        (group, (16_384, 2, 4), 2),
        (group, (4096, 8, 8), 8),
    ],
    ids=named,
)
def test_gradients_of_many_small_statistics_are_exact(
    norm: Callable[..., Tensor], shape: tuple[int, ...], channels: int, offset: float
) -> None:
    torch.manual_seed(0)
    given = [torch.randn(shape), torch.rand(channels), torch.rand(channels)]
    dy = torch.randn(shape) + offset
    inputs = [t.requires_grad_() for t in given]
    exact = [t.detach().double().requires_grad_() for t in given]
    ours = torch.autograd.grad(norm(*inputs), inputs, dy)
    theirs = torch.autograd.grad(norm(*exact), exact, dy.double())
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 4e-6 * b.norm()


def test_it_is_tried_on_inputs_that_need_a_gradient(taken: Taken) -> None:
    x, w, b = torch.randn(64, 32), torch.rand(32), torch.rand(32)
    layer(x, w, b)
    layer(x.requires_grad_(), w, b)
    layer(x, w, b)
    assert taken == [(64, 32)] * 2


@pytest.mark.parametrize(
    ("norm", "shape", "channels"),
    [
        (layer, (aten.MAX_LAYER_VALUES // 64 + 1, 64), 64),
        (layer, (aten.MAX_STATISTICS + 1, 16), 16),
        (layer, (64, 8), 8),
        (group, (aten.MAX_GROUP_VALUES // 256 + 1, 16, 16), 16),
    ],
    ids=named,
)
def test_it_is_not_tried_where_the_kernels_are_faster_or_more_exact(
    norm: Callable[..., Tensor],
    shape: tuple[int, ...],
    channels: int,
    taken: Taken,
) -> None:
    x, w, b = torch.randn(shape), torch.rand(channels), torch.rand(channels)
    for _ in range(2):
        norm(x.requires_grad_(), w, b)
    assert not taken


def test_a_bias_without_a_weight_has_a_gradient(taken: Taken) -> None:
    """The backward of torch's group norm raises there: the weight has no device."""
    x, b = torch.randn(8, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    y = group_norm(x, 2, None, b)
    dx, db = torch.autograd.grad(y.square().sum(), [x, b])
    assert not taken
    torch.testing.assert_close(db, 2 * y.detach().sum(0))
    assert dx.isfinite().all()


@pytest.mark.parametrize(("rows", "width"), [(512, 512), (1024, 512), (8192, 64)])
def test_the_bias_gradient_of_equal_numbers_does_not_drift(
    rows: int, width: int
) -> None:
    """A loss that is a mean sends one number everywhere; a plain sum of it drifts."""
    x = torch.randn(rows, width, requires_grad=True)
    w, b = (torch.ones(width, requires_grad=True) for _ in range(2))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads, shorter sums
    try:
        for value in (0.1, 1 / 3, 0.7123):
            dy = torch.full((rows, width), value)
            (db,) = torch.autograd.grad(layer(x, w, b), [b], dy)
            wanted = rows * dy[0].double()
            assert ((db - wanted).abs() <= 6e-6 * wanted).all()
    finally:
        torch.set_num_threads(before)

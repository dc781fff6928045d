"""What must hold for every Affine."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normkit import Affine, moments
from normkit.errors import ArgumentError

numbers = st.floats(-100, 100).filter(lambda v: abs(v) > 1e-3)
affines = st.builds(
    lambda a, b: Affine(
        torch.tensor([a, -a], dtype=torch.float64),
        torch.tensor([b, 2 * b], dtype=torch.float64),
    ),
    numbers,
    numbers,
)
x = torch.tensor([[1.5, -2.0], [0.0, 3.0]], dtype=torch.float64)


def assert_equal_maps(f: Affine, g: Affine) -> None:
    torch.testing.assert_close(f.scale, g.scale, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(f.shift, g.shift, rtol=1e-9, atol=1e-6)


@given(affines)
def test_identity_changes_nothing(f: Affine) -> None:
    one = Affine.identity((2,), dtype=torch.float64)
    assert_equal_maps(f.then(one), f)
    assert_equal_maps(one.then(f), f)


@given(affines, affines, affines)
def test_then_is_associative(f: Affine, g: Affine, h: Affine) -> None:
    assert_equal_maps(f.then(g).then(h), f.then(g.then(h)))


@given(affines, affines)
def test_then_is_one_map_after_the_other(f: Affine, g: Affine) -> None:
    torch.testing.assert_close(f.then(g)(x), g(f(x)), rtol=1e-9, atol=1e-6)


@given(affines)
def test_the_inverse_undoes(f: Affine) -> None:
    torch.testing.assert_close(f.inverse()(f(x)), x, rtol=1e-9, atol=1e-6)


def test_standardizing_gives_mean_0_and_mean_square_var_over_var_plus_eps() -> None:
    values = torch.randn(500, 2, dtype=torch.float64) * 3 + 5
    m = moments(values, 0)
    y = Affine.standardize(m, eps=0.5)(values)
    torch.testing.assert_close(y.mean(0), torch.zeros(2).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.square().mean(0), m.var / (m.var + 0.5))


def test_channels_may_lie_along_any_dimension() -> None:
    f = Affine(torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 0.0, -1.0]))
    values = torch.randn(5, 3, 7)
    expected = f(values.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(f(values, dim=1), expected)


def test_a_wrong_number_of_channels_is_named() -> None:
    f = Affine.identity((3,))
    with pytest.raises(ArgumentError, match=r"3 channels .* \(2, 4\)"):
        f(torch.zeros(2, 4))

"""The algebra on weights against torch's own operations, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from normkit import Affine
from normkit.errors import ShapeError
from normkit.fold.algebra import (
    LINEAR,
    MATMUL,
    WeightLayout,
    conv_layout,
    conv_transpose_layout,
    fold_input_affine,
    fold_output_affine,
    identity_kernel,
)

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def case(op, spatial, groups, outputs, inputs):
    """(y = op(x, w, b), w, b, x, layout, channel dim) of one kind of linear map."""
    kernel, size = (2, 3, 1)[:spatial], (5, 4, 3)[:spatial]
    x = normal(2, groups * inputs, *size)
    bias = normal(groups * outputs)
    if op == "conv":
        weight = normal(groups * outputs, inputs, *kernel)
        run, layout = CONVS[spatial], conv_layout(groups)
    elif op == "conv_transpose":
        weight = normal(groups * inputs, outputs, *kernel)
        run, layout = TRANSPOSED[spatial], conv_transpose_layout(groups)
    elif op == "linear":
        x, weight = normal(2, 3, inputs), normal(outputs, inputs)
        return F.linear, weight, normal(outputs), x, LINEAR, -1
    else:
        x, weight = normal(2, 3, inputs), normal(inputs, outputs)
        return lambda x, w, b: x @ w + b, weight, normal(outputs), x, MATMUL, -1
    return lambda x, w, b: run(x, w, b, groups=groups), weight, bias, x, layout, 1


maps = st.tuples(
    st.sampled_from(["conv", "conv_transpose", "linear", "matmul"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
)


@given(maps)
def test_folding_the_map_after_equals_applying_it_after(kind):
    run, w, b, x, layout, dim = case(*kind)
    channels = layout.output_channels(tuple(w.shape))
    after = Affine(normal(channels), normal(channels))
    w2, b2 = fold_output_affine(w, b, after, layout)
    torch.testing.assert_close(after(run(x, w, b), dim), run(x, w2, b2))
    w3, b3 = fold_output_affine(w, None, after, layout)
    torch.testing.assert_close(after(run(x, w, 0 * b), dim), run(x, w3, b3))


@given(maps.filter(lambda kind: kind[0] != "conv_transpose"))
def test_folding_the_map_before_equals_applying_it_before(kind):
    run, w, b, x, layout, dim = case(*kind)
    channels = layout.input_channels(tuple(w.shape))
    before = Affine(normal(channels), normal(channels))
    w2, b2 = fold_input_affine(w, b, before, layout)
    torch.testing.assert_close(run(before(x, dim), w, b), run(x, w2, b2))


@given(maps)
def test_folding_a_mere_scale_before_is_exact_for_every_map(kind):
    run, w, b, x, layout, dim = case(*kind)
    channels = layout.input_channels(tuple(w.shape))
    scale = Affine(normal(channels), torch.zeros(channels, dtype=torch.float64))
    w2, b2 = fold_input_affine(w, b, scale, layout)
    torch.testing.assert_close(run(scale(x, dim), w, b), run(x, w2, b2))


@given(maps)
def test_two_folds_are_one_fold_of_the_composed_map(kind):
    _, w, b, _, layout, _ = case(*kind)
    channels = layout.output_channels(tuple(w.shape))
    first, second = (Affine(normal(channels), normal(channels)) for _ in range(2))
    twice = fold_output_affine(*fold_output_affine(w, b, first, layout), second, layout)
    once = fold_output_affine(w, b, first.then(second), layout)
    torch.testing.assert_close(twice, once)


@given(maps)
def test_a_layout_gives_back_the_weight_it_took(kind):
    _, w, _, _, layout, _ = case(*kind)
    assert torch.equal(layout.from_goik(layout.to_goik(w), tuple(w.shape)), w)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_identity_kernel_multiplies_each_channel(groups):
    scale = normal(4)
    w = identity_kernel((4, 4 // groups, 3, 3), conv_layout(groups), 4, scale=scale)
    x = normal(1, 4, 5, 6)
    y = F.conv2d(x, w, padding=1, groups=groups)
    torch.testing.assert_close(y, x * scale.view(1, 4, 1, 1))


def test_an_identity_between_different_channels_is_refused():
    with pytest.raises(ShapeError, match="got 2 and 3"):
        identity_kernel((2, 3, 1), conv_layout(), 0, scale=normal(2))


def test_a_weight_that_does_not_fit_its_layout_is_refused():
    with pytest.raises(ShapeError, match="6 channels must divide into 4 groups"):
        conv_layout(4).to_goik(normal(6, 1, 3))
    with pytest.raises(ShapeError, match="needs 2 or more dimensions"):
        WeightLayout(("O", "I")).to_goik(normal(3))
    with pytest.raises(ShapeError, match=r"got shape \(3, 2, 1\)"):
        LINEAR.to_goik(normal(3, 2, 1))


def test_half_weights_are_folded_in_float64():
    w, after = torch.randn(2, 3).half(), Affine(normal(2), normal(2))
    new, bias = fold_output_affine(w, None, after, LINEAR)
    assert new.dtype == bias.dtype == torch.float64
    torch.testing.assert_close(new, w.double() * after.scale[:, None])

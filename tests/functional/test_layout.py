"""Outputs lie in memory as torch's do, so that what programs do with them works."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import normkit.nn
from normkit.functional import engine, instance_norm, layer_norm

# Of transposed values, as the patches of an image are, of slices, of channels_last.
INPUTS: dict[str, Callable[[], Tensor]] = {
    "tokens": lambda: torch.randn(2, 16, 5).transpose(1, 2),
    "images behind a transpose": lambda: torch.randn(16, 4, 5, 6).transpose(0, 1),
    "slices": lambda: torch.randn(4, 16, 5, 12)[..., ::2],
    "channels_last": lambda: torch.randn(4, 5, 6, 16).permute(0, 3, 1, 2),
    "volumes in channels_last": lambda: torch.randn(2, 3, 5, 6, 16).movedim(-1, 1),
}
LAYERS = {
    "BatchNorm": lambda lib, x: {
        3: lib.BatchNorm1d,
        4: lib.BatchNorm2d,
        5: lib.BatchNorm3d,
    }[x.dim()](x.shape[1]),
    "GroupNorm": lambda lib, x: lib.GroupNorm(1, x.shape[1]),
    "LayerNorm": lambda lib, x: lib.LayerNorm(x.shape[-1]),
    "RMSNorm": lambda lib, x: lib.RMSNorm(x.shape[-1]),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_an_output_lies_as_that_of_torch(name: str, given: str, training: bool) -> None:
    x = INPUTS[given]()
    if name == "LayerNorm" and "channels_last" in given:
        pytest.skip("torch's does not keep channels_last")
    ours, theirs = (
        LAYERS[name](lib, x).train(training) for lib in (normkit.nn, torch.nn)
    )
    wanted = theirs(x)
    for _ in range(2):  # the long way, and the call that it has cached
        y = ours(x)
        assert y.stride() == wanted.stride()
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def test_tokens_of_patches_are_seen_as_rows_after_the_norm() -> None:
    x = torch.randn(2, 16, 4, 4).flatten(2).transpose(1, 2).requires_grad_()
    layer = normkit.nn.LayerNorm(16)
    for _ in range(2):
        layer(x).view(-1, 16).square().sum().backward()
    once = torch.autograd.grad(nn.LayerNorm(16)(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, 2 * once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_call_is_cached_in_every_layout(name: str, given: str) -> None:
    """The long way took eight times as long as torch for tokens of a small image."""
    if name in ("LayerNorm", "RMSNorm") and "channels_last" in given:
        pytest.skip("no kernel takes rows across the memory, and torch's are kept")
    x = INPUTS[given]()
    layer = LAYERS[name](normkit.nn, x)
    for needs_gradient in (False, True):
        values = x.detach().requires_grad_(needs_gradient)
        layer(values)
        with mock.patch.object(engine, "_run", side_effect=AssertionError):
            y = layer(values)
        torch.testing.assert_close(y, layer(x.contiguous()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_the_strides_of_the_input_can_be_asked_for(needs_gradient: bool) -> None:
    """Also of small inputs that need a gradient, on which torch's operator is tried."""
    tokens = torch.randn(2, 16, 5).transpose(1, 2).requires_grad_(needs_gradient)
    samples = torch.randn(8, 2, 32).transpose(0, 1).requires_grad_(needs_gradient)
    for x in (tokens, samples):
        for _ in range(2):
            y = layer_norm(x, x.shape[-1:], lies_as_input=True)
            assert y.stride() == x.stride()
            assert layer_norm(x, x.shape[-1:]).is_contiguous()
            assert instance_norm(x, lies_as_input=True).stride() == x.stride()
            assert instance_norm(x).is_contiguous()

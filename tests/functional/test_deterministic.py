"""`normkit.deterministic()`: a sample alone is the sample in any batch, bit by bit."""

import pytest
import torch
from torch import Tensor, nn

import normkit
import normkit.nn as n
from normkit.kernels.cpu.loading import library, why_absent
from normkit.kernels.deterministic import is_deterministic, pairwise_sum
from normkit.kernels.epilogue import ACTIVATIONS
from normkit.torch_state import number_of_threads

C = 8
LAYERS = {
    "batch, vectors": (lambda: n.BatchNorm1d(C), (C,)),
    "batch, images": (lambda: n.BatchNorm2d(C), (C, 7, 9)),
    "batch, channels behind": (lambda: n.BatchNorm1d(C, channel_dim=-1), (37, C)),
    "renorm": (lambda: n.BatchRenorm1d(C), (C, 37)),
    "per activation": (lambda: n.PerActivationBatchNorm((C, 7)), (C, 7)),
    "whitening": (lambda: n.WhiteningBatchNorm(C, 2), (C,)),
    "whitening, images": (lambda: n.WhiteningBatchNorm(C), (C, 7, 9)),
    "instance": (lambda: n.InstanceNorm2d(C, affine=True), (C, 33, 35)),
    "filter response": (lambda: n.FilterResponseNorm(C), (C, 7, 9)),
    "filter response, eps": (
        lambda: n.FilterResponseNorm(C, learnable_eps=True),
        (C, 33, 35),
    ),
    "layer, few": (lambda: n.LayerNorm(C), (5, C)),
    "layer, many": (lambda: n.LayerNorm(1001), (3, 1001)),
    "layer, images": (lambda: n.LayerNorm((C, 33, 35)), (C, 33, 35)),
    "layer over channels": (lambda: n.LayerNorm(C, channel_dim=1), (C, 7, 9)),
    "layer-large": (lambda: n.LayerNorm((1, 300, 300)), (1, 300, 300)),
    "group": (lambda: n.GroupNorm(2, C), (C, 33, 35)),
    "rms": (lambda: n.RMSNorm(1001), (3, 1001)),
}


def layer_of(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[name]
    layer = build().eval()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point() and tensor.dim():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return layer, 3 + torch.randn(40, *shape)


def laid(x: Tensor, layout: str) -> Tensor:
    if layout == "channels-last":
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


@torch.no_grad()
def differences(layer: nn.Module, x: Tensor, layout: str) -> list[tuple[int, ...]]:
    """(batch, place, threads) at which sample 5 comes out differently."""
    found, wanted = [], layer(laid(x, layout))[5].clone()
    for count in (1, 2):
        with number_of_threads(count):
            for batch, at in (
                (40, 5),
                (1, 0),
                (2, 0),
                (2, 1),
                (3, 2),
                (7, 4),
                (33, 32),
            ):
                others = x[6 : 6 + batch - 1] if batch < 40 else None
                part = x
                if others is not None:
                    part = torch.cat([others[:at], x[5:6], others[at:]])
                if not torch.equal(layer(laid(part, layout))[at], wanted):
                    found.append((batch, at, count))
    return found


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_sample_does_not_depend_on_its_batch_or_the_threads(
    name: str, dtype: torch.dtype, layout: str
) -> None:
    layer, x = layer_of(name)
    if layout == "channels-last" and x.dim() != 4:
        pytest.skip("only images have channels last")
    with normkit.deterministic():
        assert not differences(layer, x.to(dtype), layout)
    with normkit.deterministic(), normkit.backend("reference"):
        assert not differences(layer, x.to(dtype), layout)


ON_REFERENCE = {
    ("layer, images", "channels-last"),
    ("layer over channels", "contiguous"),
}
ON_KERNELS = [n for n in LAYERS if "whitening" not in n and "filter" not in n]


@pytest.mark.skipif(library() is None, reason=why_absent() or "the library is there")
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("name", ON_KERNELS)
def test_kernels_hold_it_without_the_block(name: str, layout: str) -> None:
    layer, x = layer_of(name)
    if layout == "channels-last" and x.dim() != 4:
        pytest.skip("only images have channels last")
    if (name, layout) in ON_REFERENCE:
        pytest.skip("weights along an outer dimension: no kernel is written for it")
    for activation in ACTIVATIONS if hasattr(layer, "activation") else ("none",):
        layer.activation = activation
        assert not differences(layer, x, layout)


@pytest.mark.parametrize("name", ["layer over channels", "layer-large"])
def test_without_it_the_reference_depends_on_batch_or_threads(name: str) -> None:
    layer, x = layer_of(name)
    with normkit.backend("reference"):
        assert differences(layer, x, "contiguous")


@pytest.mark.parametrize("name", ["layer, many", "group", "batch, images", "whitening"])
def test_it_is_as_exact_as_ever(name: str) -> None:
    layer, x = layer_of(name)
    usual = layer(1e3 + x)
    with normkit.deterministic():
        torch.testing.assert_close(layer(1e3 + x), usual, rtol=1e-5, atol=2e-5)


def test_the_block_ends_with_the_block() -> None:
    assert not is_deterministic()
    with normkit.deterministic():
        assert is_deterministic()
    assert not is_deterministic()


@pytest.mark.parametrize("shape", [(3, 0), (3, 1), (3, 2), (3, 7), (3, 64), (3, 1001)])
def test_a_pairwise_sum_is_the_sum(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = pairwise_sum(x, (1,))
    torch.testing.assert_close(found, x.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)
    assert found.shape == (3, 1)


def test_a_pairwise_sum_errs_by_the_logarithm_of_the_count() -> None:
    x = torch.rand(1, 100_003)
    error = pairwise_sum(x, (1,)).double() - x.double().sum()
    assert error.abs().item() < 20 * 2**-24 * x.sum().item()


def test_any_dims_are_summed_and_kept() -> None:
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    for dims in ((0,), (1, 3), (0, 2, 3), (0, 1, 2, 3)):
        found = pairwise_sum(x.transpose(1, 2), dims)
        torch.testing.assert_close(found, x.transpose(1, 2).sum(dims, keepdim=True))


def test_an_input_without_samples_has_an_empty_output() -> None:
    x = torch.randn(0, 3, 4, dtype=torch.float64)
    assert pairwise_sum(x, (2,)).shape == (0, 3, 1)
    assert pairwise_sum(x, (0,)).tolist() == torch.zeros(1, 3, 4).tolist()
    layers = [n.RMSNorm(4), n.FilterResponseNorm(3), n.WhiteningBatchNorm(3).eval()]
    with normkit.deterministic():
        for layer in layers:
            assert layer.double()(x).shape == x.shape


@pytest.mark.parametrize("activation", ["silu", "gelu", "sigmoid"])
def test_a_residual_that_is_negated_lazily_keeps_a_sample_its_bits(
    activation: str,
) -> None:
    """Torch's activations round the rest of a vector in another way than its whole."""
    layer = normkit.nn.BatchNorm1d(16, activation=activation).eval()
    x, residual = torch.randn(2, 2, 16, 33).unbind()
    residual = torch._neg_view(residual)
    with normkit.deterministic(), torch.no_grad():
        whole = layer(x, residual=residual)
        for k in range(2):
            one = slice(k, k + 1)
            alone = layer(x[one].clone(), residual=residual[one].resolve_neg())
            assert torch.equal(whole[one], alone)


@pytest.mark.parametrize("activation", ["silu", "gelu", "tanh"])
def test_weights_of_a_mask_select_alone_where_statistics_are_given(
    activation: str,
) -> None:
    """In eval a sample keeps its bits under weights, as under a mask of bools."""
    layer = normkit.nn.BatchNorm1d(3, activation=activation).eval()
    for length in range(1, 20):
        x = torch.randn(3, 3, length)
        weights = torch.rand(3, 1, length).mul(2).sub(0.5).clamp(min=0)
        with normkit.deterministic(), torch.no_grad():
            whole = layer(x, mask=weights)
            assert torch.equal(whole, layer(x, mask=weights > 0))
            for k in range(3):
                one = slice(k, k + 1)
                alone = layer(x[one].clone(), mask=weights[one])
                assert torch.equal(whole[one], alone)

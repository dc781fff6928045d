"""`channel_dim=`: channels where they are, without a permuted copy."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normkit
import normkit.nn
from normkit.errors import ArgumentError, ShapeError

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")

C = 3
# name, sizes without channels, channel_dim; the twin takes channels at `usual`.
CASES = [
    ("BatchNorm1d", (5, 7), -1, 1),
    ("BatchNorm2d", (5, 4, 6), -1, 1),
    ("BatchNorm2d", (5, 4, 6), 2, 1),
    ("BatchNorm3d", (5, 2, 3, 4), -1, 1),
    ("BatchRenorm1d", (5, 7), 2, 1),
    ("InstanceNorm1d", (5, 7), -1, 1),
    ("InstanceNorm2d", (5, 4, 6), 3, 1),
    ("InstanceNorm3d", (5, 2, 3, 4), -1, 1),
    ("LayerNorm", (5, 7), 1, -1),
    ("LayerNorm", (5, 4, 6), 1, -1),
    ("LayerNorm", (5, 4, 6), -4, -1),
]
each_case = pytest.mark.parametrize(("name", "sizes", "dim", "usual"), CASES, ids=str)


def pair(name: str, dim: int) -> tuple[nn.Module, nn.Module]:
    kwargs = {}
    if name.startswith("Instance"):
        kwargs = {"affine": True, "track_running_stats": True}
    if name.startswith("BatchRenorm"):
        kwargs = {"renorm_from": 0, "d_max_at": 0, "r_max_at": 0}
    build = getattr(normkit.nn, name)
    layer, twin = build(C, channel_dim=dim, **kwargs), build(C, **kwargs)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(C) + 0.5)
    twin.load_state_dict(layer.state_dict())
    return layer, twin


def placed(sizes: tuple[int, ...], dim: int) -> Tensor:
    shape = list(sizes)
    shape.insert(dim % (len(sizes) + 1), C)
    return 10 + torch.randn(shape)


@each_case
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_usual_layer_with_channels_elsewhere(
    name: str, sizes, dim: int, usual: int, training: bool
) -> None:
    layer, twin = (m.train(training) for m in pair(name, dim))
    x = placed(sizes, dim).requires_grad_()
    y, dy = layer(x), torch.randn(x.shape)
    wanted = twin(x.movedim(dim, usual).contiguous()).movedim(usual, dim)
    torch.testing.assert_close(y, wanted, rtol=2e-6, atol=2e-6)
    found = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    exact = torch.autograd.grad(wanted, [x, *twin.parameters()], dy)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@each_case
def test_a_mask_lies_as_the_input_does(name: str, sizes, dim: int, usual: int) -> None:
    layer, twin = pair(name, dim)
    x = placed(sizes, dim).double()
    layer, twin = layer.double(), twin.double()
    mask = torch.rand(x.shape) > 0.3
    y = layer(torch.where(mask, x, math.nan), mask=mask)
    turned = (t.movedim(dim, usual) for t in (x, mask))
    x_usual, mask_usual = turned
    wanted = twin(x_usual.masked_fill(~mask_usual, 0), mask=mask_usual)
    torch.testing.assert_close(y, wanted.movedim(usual, dim))


class Copies(TorchDispatchMode):
    """Counts the operations that copy a whole tensor to lay it out anew."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("clone", "copy_", "contiguous", "_to_copy"):
            whole = [
                a for a in args if isinstance(a, Tensor) and a.numel() == self.size
            ]
            if whole:
                self.found.append(str(func))
        return out


@pytest.mark.parametrize("route", ["kernels"], indirect=True)
@each_case
def test_nothing_is_permuted_and_the_output_lies_as_the_input(
    name: str, sizes, dim: int, usual: int
) -> None:
    layer, _ = pair(name, dim)
    x = placed(sizes, dim)
    for laid in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        with Copies(x.numel()) as copies, torch.no_grad():
            y = layer(laid)
        assert not copies.found
        assert y.stride() == laid.stride()


def test_one_sample_of_instance_norm_has_its_channels_at_the_same_place() -> None:
    layer, _ = pair("InstanceNorm1d", -1)
    x = placed((1, 7), -1)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    layer, _ = pair("InstanceNorm2d", 2)
    x = placed((1, 4, 6), 2)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    with pytest.raises(ArgumentError, match="channel_dim=2"):
        layer(torch.randn(4, 4, 4))


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d", "LayerNorm"])
def test_it_is_said_where_the_layer_is_printed_and_survives_a_copy(name: str) -> None:
    dim = 1 if name == "LayerNorm" else -1
    layer, twin = pair(name, dim)
    assert f"channel_dim={dim}" in repr(layer)
    assert "channel_dim" not in repr(twin)


def test_a_fold_puts_it_into_the_linear_layer_before() -> None:
    norm, _ = pair("BatchNorm1d", -1)
    model = nn.Sequential(nn.Linear(4, C), norm).eval()
    x = torch.randn(2, 7, 4)
    folded, _ = normkit.fold(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm1d)]


def test_calibration_measures_along_it() -> None:
    norm, _ = pair("BatchNorm1d", -1)
    x = placed((5, 7), -1)
    normkit.calibrate(nn.Sequential(norm), [x])
    torch.testing.assert_close(norm.running_mean, x.mean((0, 1)))


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ArgumentError, match="channels behind the batch"):
        normkit.nn.BatchNorm1d(C, channel_dim=0)
    with pytest.raises(ArgumentError, match="needs one size"):
        normkit.nn.LayerNorm((4, 5), channel_dim=1)
    with pytest.raises(ShapeError, match=r"3 channels along dim=1, got shape \(5, 4\)"):
        normkit.nn.LayerNorm(C, channel_dim=1)(torch.randn(5, 4))
    with pytest.raises(ShapeError, match="should contain 7 elements"):
        normkit.nn.BatchNorm1d(C, channel_dim=-1)(torch.randn(5, 3, 7))

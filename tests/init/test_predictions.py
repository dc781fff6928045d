"""Predicted sizes beside measured ones: parts where theory alone fails, and networks.

A prediction takes each operation by itself; what it must know besides is how
gradients meet and where kernels lie outside their input.
"""

from __future__ import annotations

import math
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit.nn
from normkit.init import initialize, linear_maps
from normkit.init.tracer import trace_signals


def ratios(model: nn.Module, x: Tensor, what: str = "gradient") -> list[float]:
    """Return predicted per measured mean square of each layer, with "kaiming"."""
    draw = torch.Generator().manual_seed(0)
    report = initialize(model, "kaiming", example_inputs=x, generator=draw)
    found: list[float] = []
    for line in report.lines:
        predicted = getattr(line, f"{what}_predicted")
        measured = getattr(line, f"{what}_measured")
        assert predicted is not None, line.name
        assert measured, line.name
        found.append(predicted / measured)
    return found


def farthest(found: list[float]) -> float:
    return math.exp(max(abs(math.log(each)) for each in found))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("what", ["signal", "gradient"])
def test_padding_is_no_product(what: str) -> None:
    """On maps of 3x3 values six layers of 3x3 kernels keep .6 each: .047 of it all."""
    layers = [
        nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()) for _ in range(6)
    ]
    model = nn.Sequential(*layers)
    assert farthest(ratios(model, torch.randn(64, 64, 3, 3), what)) < 2


def test_the_products_of_a_convolution_are_counted() -> None:
    convolutions = [
        (nn.Conv2d(4, 6, 3, padding=1), (4, 3, 3)),
        (nn.Conv2d(4, 4, 5, padding=2, groups=4, stride=2), (4, 7, 6)),
        (nn.Conv1d(4, 6, 3, padding="same", dilation=2), (4, 5)),
        (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (4, 3, 5)),
    ]
    for conv, shape in convolutions:
        maps = linear_maps(conv)[0]
        graph = trace_signals(conv, torch.randn(2, *shape), maps)
        (step,) = (s for s in graph.steps if s.kind == "linear")
        fans = maps[0].fans
        x = torch.ones(1, *shape, requires_grad=True)
        with torch.no_grad():
            conv.weight.fill_(1.0)
            conv.bias.zero_()
        y = conv(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        mean = float(y.detach().mean())
        expected = mean / fans.fan_in, float(gradient.mean()) / fans.fan_out
        assert step.inside == pytest.approx(expected)
        assert step.inside[0] < 1


def test_a_relu_before_a_choice_of_the_largest_keeps_the_gradient() -> None:
    """A half for each of the three would be an eighth of it."""
    layers = [
        nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3))
        for _ in range(3)
    ]
    assert farthest(ratios(nn.Sequential(*layers), torch.randn(8, 32, 54, 54))) < 1.5


class Dense(nn.Module):
    """Each layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                *(normkit.nn.BatchNorm2d(32 + 8 * i), nn.ReLU()),
                nn.Conv2d(32 + 8 * i, 8, 3, padding=1),
            )
            for i in range(24)
        )
        self.head = nn.Linear(32 + 8 * 24, 10)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer in self.layers:
            values.append(layer(torch.cat(values, 1)))
        return self.head(torch.cat(values, 1).mean((2, 3)))


def test_gradients_of_many_readers_meet_as_they_do() -> None:
    assert farthest(ratios(Dense(), torch.randn(16, 32, 6, 6))) < 1.6


class Pooled(nn.Module):
    """Attention of which the mean over tokens is read."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x.mean(1)


def test_the_gradient_of_a_mean_over_tokens_is_followed() -> None:
    """The gradients of tokens are equal: attention sums them, as no noise."""
    assert farthest(ratios(Pooled(), torch.randn(8, 50, 64))) < 1.6


class Sums(nn.Module):
    """Residual blocks whose sums are rectified: their means grow."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), normkit.nn.BatchNorm2d(32))
            for _ in range(12)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(x + layer(x))
        return x


def test_a_sum_of_rectified_values_is_followed_with_its_mean() -> None:
    """A ReLU keeps more than a half of the gradient of inputs with a positive mean."""
    found = ratios(Sums(), torch.randn(16, 32, 12, 12).relu())
    assert farthest(found) < 3


class Ghost(nn.Module):
    """A branch that ends with a norm and with what a second norm makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 8, 1)
        self.norm = normkit.nn.BatchNorm2d(8)
        self.cheap = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = normkit.nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        half = self.norm(self.first(x))
        return x + torch.cat([half, self.second(self.cheap(half))], 1)


def test_a_norm_that_another_norm_reads_does_not_start_at_zero() -> None:
    """The second would divide constants by the root of eps."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Ghost(), Ghost())
    initialize(model, example_inputs=torch.randn(4, 3, 8, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool(module.weight.all())


class PartlyFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.body(x) * self.scale)
        y = self.head(x)
        y[:, :8].mul_(self.scale[:8])  # in place, on a view
        return y * 1.0


def test_no_grad_and_writing_in_place_on_a_view_are_followed() -> None:
    draw = torch.Generator().manual_seed(0)
    report = initialize(
        PartlyFrozen(), "kaiming", example_inputs=torch.randn(32, 64), generator=draw
    )
    body, head = report.lines
    assert body.gradient_measured is None
    assert head.gradient_predicted == pytest.approx(head.gradient_measured, rel=0.3)


class Force(nn.Module):
    """A model that differentiates in its forward, as those of energies do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        energy = self.last(torch.tanh(self.first(x)))
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, force


def test_a_model_that_differentiates_in_its_forward_is_followed() -> None:
    report = initialize(Force(), "kaiming", example_inputs=torch.randn(64, 4))
    assert all(line.gradient_measured for line in report.lines)


# How far the farthest layer may be off. Where a gate of eight channels squeezes and
# excites, or most maps are depthwise, normal pre-activations and weights that are
# independent of the gradient are a rough guess: those have the wide bounds.
FIELD = {
    **dict.fromkeys(("resnet18", "resnext50_32x4d", "vgg11_bn", "densenet121"), 2.5),
    **dict.fromkeys(("regnety_002", "nf_regnet_b0", "convnext_atto"), 2.5),
    **dict.fromkeys(("inception_v3", "dla34", "poolformer_s12"), 2.5),
    **dict.fromkeys(("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"), 2.5),
    **dict.fromkeys(("mixer_s32_224", "gmlp_ti16_224", "resmlp_12_224"), 2.5),
    "hrnet_w18_small": 4.0,
    **dict.fromkeys(("efficientnet_b0", "mobilenetv3_small_050"), 15.0),
    "ghostnet_050": 100.0,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELD)
def test_gradients_of_networks_of_the_field(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():  # timm's residual branches start at 0
        weight = getattr(module, "weight", None)
        if weight is not None and not weight.any():
            nn.init.ones_(weight)
    size = 224 if "224" in name else 96
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, size, size, generator=draw)
    report = initialize(model, residual=False, example_inputs=x, generator=draw)
    pairs = [(line.gradient_predicted, line.gradient_measured) for line in report.lines]
    # Weight standardization is no map that is followed.
    found = [predicted / measured for predicted, measured in pairs if measured]
    assert len(found) > 0.2 * len(pairs)
    assert farthest(found) < FIELD[name]
    assert 0.4 < median(found) < 3

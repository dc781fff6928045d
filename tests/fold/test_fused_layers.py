"""A batch norm that adds and activates in the same pass goes; the rest of it stays."""

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.bench.steps import resnet
from normkit.fold.torch.remains import Sum
from normkit.kernels.epilogue import ACTIVATIONS
from normkit.nn import BatchNorm2d

x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def lively(model: nn.Module) -> nn.Module:
    """With statistics and weights that a wrong fold would show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
    return model.eval()


def check(model: nn.Module, folded: int, of: int) -> tuple[nn.Module, str]:
    result, ledger = normkit.fold(lively(model), x)
    text = ledger.to_text()
    assert f"{folded} of {of} batch norms folded" in text, text
    assert ledger.max_difference < 1e-12
    torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-5)
    return result, text


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_stays(activation: str) -> None:
    norm = BatchNorm2d(4, activation=activation, negative_slope=0.3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 2, 1))
    folded, _ = check(model, 1, 1)
    assert type(folded[1]).__name__.lower() == {
        "none": "identity",
        "leaky_relu": "leakyrelu",
    }.get(activation, activation)


def test_a_shift_that_has_to_stay_comes_before_the_activation() -> None:
    model = nn.Sequential(BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 4, 3))
    folded, _ = check(model, 0, 1)
    assert [type(part).__name__ for part in folded[0]] == ["Shift", "ReLU"]


class Residual(nn.Module):
    """As one writes it for the fused layers."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3), BatchNorm2d(4, activation="relu")
        self.b, self.m = nn.Conv2d(4, 4, 1), BatchNorm2d(4, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.a(x))
        return self.m(self.b(y), residual=y)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_the_sum_with_a_residual_stays(activation: str) -> None:
    folded, _ = check(Residual(activation), 2, 2)
    assert isinstance(folded.m, Sum)
    assert isinstance(folded.n, nn.ReLU)


def test_a_network_that_was_converted_and_fused_folds_like_the_plain_one() -> None:
    model = lively(resnet("resnet18", 5))
    images = torch.randn(2, 3, 33, 33)
    expected, plain = normkit.fold(model, images)
    normkit.convert(model, to="normkit", example_inputs=images)
    folded, ledger = normkit.fold(model, images)
    assert len(ledger.folded) == len(plain.folded) == 20
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(images), expected(images), rtol=1e-4, atol=1e-4)


class OneRelu(nn.Module):
    """torchvision's block: one relu in three places, once behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.b, self.m = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.c, self.o = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.n(self.a(x)))
        y = self.relu(self.m(self.b(y)))
        y = self.o(self.c(y))
        y += x
        return self.relu(y)


def test_a_relu_in_three_places_stays_in_each() -> None:
    model = OneRelu()
    normkit.convert(model, to="normkit", example_inputs=x)
    assert model.n.defers
    folded, _ = check(model, 3, 3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 3, 1), BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.a(x))
        return self.n(self.a(y), residual=y)


def test_a_layer_that_is_called_with_a_residual_and_without_stays() -> None:
    _, text = check(Twice(), 0, 1)
    assert "is called in several ways" in text


class Doubled(BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_what_a_subclass_adds_to_the_forward_is_not_lost() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4, activation="relu"))
    _, text = check(model, 0, 1)
    assert "calls batch_norm as a function among other things" in text

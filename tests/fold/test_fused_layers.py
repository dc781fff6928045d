"""A batch norm that adds and activates in the same pass goes; the rest of it stays."""

import copy

import pytest
import torch
import torch.nn.functional as F
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


def test_a_layer_that_is_called_with_a_residual_and_without_stays_as_a_call() -> None:
    folded, text = check(Twice(), 1, 1)
    assert isinstance(folded.n, BatchNorm2d)
    assert "its call stays, and changes nothing" in text


class Doubled(BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_what_a_subclass_adds_to_the_forward_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4, activation="relu"))
    folded, text = check(model, 1, 1)
    assert isinstance(folded[1], Doubled)
    assert torch.equal(folded[1].running_mean, torch.zeros(4))
    assert "its call stays, and changes nothing" in text


class Flat(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.view(len(y), 4 * 4 * 4)


def test_what_depends_on_the_size_of_the_input_is_not_fixed() -> None:
    folded, _ = check(nn.Sequential(nn.Conv2d(3, 4, 3), Flat(4)), 1, 1)
    assert len(folded(torch.cat([x, x, x]))) == 6


class Activated(nn.BatchNorm2d):
    """As in many a repository: norm and activation in one class."""

    def __init__(self, channels: int, activate: object) -> None:
        super().__init__(channels)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(super().forward(x))


@pytest.mark.parametrize(
    "activate",
    [
        F.relu,
        F.gelu,
        torch.tanh,
        Tensor.relu_,
        lambda x: F.leaky_relu(x, 0.3, inplace=True),
        lambda x: F.dropout(F.silu(x), 0.5, training=False),
    ],
)
def test_operations_in_the_class_of_a_batch_norm_stay(activate: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4, activate))
    model.append(nn.Conv2d(4, 2, 1))
    folded, _ = check(model, 1, 1)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(copy.deepcopy(folded)(x), folded(x))


def test_an_operation_that_reads_the_input_too_keeps_the_module() -> None:
    class Skipping(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    folded, text = check(nn.Sequential(nn.Conv2d(3, 4, 3), Skipping(4)), 0, 1)
    assert isinstance(folded[1], Skipping), text


class Called(nn.Module):
    """batch_norm as a function, upon buffers of a larger module, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        for name in ("one", "two"):
            self.register_buffer(f"{name}_mean", torch.randn(4))
            self.register_buffer(f"{name}_var", torch.rand(4) + 0.5)
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv(x), self.one_mean, self.one_var, self.weight)
        y = F.batch_norm(torch.sigmoid(y), self.two_mean, self.two_var, eps=1e-3)
        return self.last(y)


def test_a_call_of_batch_norm_is_left_without_effect() -> None:
    model = Called()
    folded, text = check(model, 2, 2)
    assert torch.equal(folded.one_mean, torch.zeros(4))
    assert torch.equal(folded.two_var, torch.full((4,), 1 - 1e-3))
    assert torch.equal(folded.weight, torch.ones(4))
    assert "one_mean" in text
    assert "two_mean" in text

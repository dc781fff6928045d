"""An activation and a residual behind batch norm, in the layer itself."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import normkit
from normkit.errors import ArgumentError, ShapeError
from normkit.kernels.epilogue import ACTIVATIONS, activate

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")


def drawn(**options: Any) -> normkit.nn.BatchNorm2d:
    layer = normkit.nn.BatchNorm2d(5, **options)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("extras", [{}, {"ghost_size": 2}], ids=["plain", "ghosts"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_layer_the_sum_and_the_activation_one_after_another(
    activation: str, extras: dict[str, Any], is_training: bool
) -> None:
    together = drawn(activation=activation, negative_slope=0.2, **extras)
    together.train(is_training)
    alone = copy.deepcopy(together)
    alone.activation = "none"
    x, residual, dy = torch.randn(3, 4, 5, 6, 7).unbind()

    def run(layer: normkit.nn.BatchNorm2d, is_fused: bool) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, residual)]
        if is_fused:
            y = layer(inputs[0], residual=inputs[1])
        else:
            y = activate(activation, layer(inputs[0]) + inputs[1], 0.2)
        learned = [layer.weight, layer.bias]
        return [y, *torch.autograd.grad(y, [*inputs, *learned], dy)]

    for got, expected in zip(run(together, True), run(alone, False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # Not the same bits: alone, a small input runs on torch's operator.
    torch.testing.assert_close(
        together.state_dict(), alone.state_dict(), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("extras", [{}, {"ghost_size": 2}], ids=["plain", "ghosts"])
def test_masked_places_are_0_after_an_activation_that_is_not_0_at_0(
    extras: dict[str, Any],
) -> None:
    layer = drawn(activation="sigmoid", **extras)
    mask = torch.rand(4, 1, 6, 7) > 0.4
    y = layer(torch.randn(4, 5, 6, 7), mask=mask, residual=torch.randn(4, 5, 6, 7))
    assert (y.masked_select(~mask) == 0).all()
    assert (y.masked_select(mask) > 0).all()


def test_a_symbolic_trace_keeps_the_call_whole() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = drawn(activation="relu")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, residual=x)

    net = Net()
    traced = torch.fx.symbolic_trace(net)
    assert [n.op for n in traced.graph.nodes] == [
        "placeholder",
        "call_module",
        "output",
    ]
    x = torch.randn(3, 5, 2, 2)
    assert torch.equal(traced.eval()(x), net.eval()(x))


def test_the_state_is_that_of_torch() -> None:
    layer = drawn(activation="gelu")
    torch.nn.BatchNorm2d(5).load_state_dict(layer.state_dict())
    assert "activation='gelu'" in repr(layer)
    assert "activation" not in repr(normkit.nn.BatchNorm2d(5))


def test_a_copied_layer_keeps_its_activation() -> None:
    layer = copy.deepcopy(drawn(activation="relu")).eval()
    x = torch.randn(3, 5, 2, 2)
    plain = F.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias
    )
    torch.testing.assert_close(layer(x), plain.relu())


def test_an_unknown_activation_is_named_with_the_known() -> None:
    with pytest.raises(ArgumentError, match="'leaky_relu'"):
        normkit.nn.BatchNorm2d(5, activation="swish")
    with pytest.raises(ShapeError, match="residual of shape"):
        drawn()(torch.randn(4, 5, 2, 2), residual=torch.randn(4, 5, 1, 1))

"""Dropout behind the last layer with weights, and in places where it may stand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import Finding, diagnose


class Net(nn.Module):
    """A layer, and what follows it."""

    def __init__(self, units: int, end: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, units)
        self.drop, self.end = nn.Dropout(0.4), end

    def forward(self, x: Tensor) -> object:
        return self.end(self, self.first(x).relu())


def mse(y: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(y.view_as(t), t)


def told(model: nn.Module, loss: Callable[..., Tensor] = mse) -> list[Finding]:
    """Return the findings of D11 on a network, before any training."""
    torch.manual_seed(0)
    data = []
    for _ in range(4):
        x = torch.randn(32, 6)
        is_class = loss in (F.cross_entropy, head, other_half)
        data.append((x, (x[:, 0] > 0).long() if is_class else x[:, :1] + 2))
    found = diagnose(model, data, loss).findings
    return [f for f in found if f.id == "D11" and f.is_alarm]


def by_module(net: nn.Module, h: Tensor) -> Tensor:
    return net.drop(net.last(h))


def by_function(net: nn.Module, h: Tensor) -> Tensor:
    return F.dropout(net.last(h), 0.4, net.training).flatten(1)


@pytest.mark.parametrize(
    ("units", "loss"), [(1, mse), (2, F.cross_entropy)], ids=["values", "classes"]
)
@pytest.mark.parametrize(("end", "name"), [(by_module, "drop"), (by_function, "")])
def test_answers_that_are_dropped_are_told(
    end: Callable[..., object], name: str, units: int, loss: Callable[..., Tensor]
) -> None:
    (found,) = told(Net(units, end), loss)
    assert (found.layer, found.value) == (name, 0.4)
    assert "40% of them are exactly zero" in found.evidence


def head(features: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(features @ torch.ones(16, 2), y)


def other_half(found: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(found[1], y)


@pytest.mark.parametrize(
    ("end", "loss"),
    [
        (lambda net, h: net.last(net.drop(h)), mse),
        # Dropout of nothing, as a configuration may have it.
        (lambda net, h: F.dropout(net.last(h), 0.0, net.training), mse),
        # Features that the loss reads by a layer of its own, or beside the answers.
        (lambda net, h: net.drop(h), head),
        (lambda net, h: (net.drop(h), net.last(h)), other_half),
        # Answers as they are, of which something else takes some.
        (lambda net, h: (y := net.last(h), net.drop(y)), lambda y, t: mse(y[0], t)),
        # A branch that is dropped, added to the answers.
        (lambda net, h: net.drop(net.last(h)) + net.last(h), mse),
        (lambda net, h: net.drop(net.last(h)).add_(net.last(h)), mse),
    ],
)
def test_dropout_that_is_not_last_is_no_fault(
    end: Callable[..., object], loss: Callable[..., Tensor]
) -> None:
    assert not told(Net(2 if loss in (head, other_half) else 1, end), loss)


def test_a_loss_of_the_answers_alone_may_drop_them() -> None:
    """Two dropouts of one code are two views of it."""

    def spread(y: Tensor, _: Tensor) -> Tensor:
        return (y - y.roll(1, 0)).square().mean()

    assert not told(Net(1, by_module), spread)

"""Answers that are not compared with their own targets, and layers without an owner."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import Finding, diagnose
from normkit.doctor.examination.graph import softmax_dim
from normkit.doctor.examination.unregistered import unregistered


def told(
    model: nn.Module, loss: Any, target: Callable[[Tensor], Tensor]
) -> list[Finding]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=draw)
    data = [(part, target(part)) for part in x.split(32)]
    found = diagnose(model, data, loss).readings
    return [f for f in found if f.id == "D34" and f.is_alarm]


def network(units: int, *end: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, units), *end)


def sums(x: Tensor) -> Tensor:
    return x.sum(1)


def squeezed(y: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(y.squeeze(1), target)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    "loss", [F.mse_loss, F.l1_loss, lambda y, t: (y - t).square().mean()]
)
def test_a_loss_of_each_answer_with_every_target_is_told(loss: Any) -> None:
    (found,) = told(network(1), loss, sums)
    assert found.severity == "error"
    assert "(32, 1)" in found.evidence
    assert "(32,)" in found.evidence
    assert not told(network(1), loss, lambda x: sums(x)[:, None])


def test_a_loss_that_brings_both_to_one_shape_is_no_fault() -> None:
    assert not told(network(1), squeezed, sums)


def classes(x: Tensor) -> Tensor:
    return x[:, :3].argmax(1)


@pytest.mark.parametrize("dim", [0, -2, 1, -1])
@pytest.mark.parametrize("kind", [nn.Softmax, nn.LogSoftmax])
def test_a_softmax_over_the_samples_is_told(kind: Any, dim: int) -> None:
    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(y if kind is nn.LogSoftmax else y.log(), target)

    found = told(network(3, kind(dim)), loss, classes)
    is_wrong = dim in (0, -2)
    assert [f.severity for f in found] == ["error"] * is_wrong
    assert all("dimension 0" in f.evidence for f in found)


def test_the_dimension_of_a_softmax_is_that_of_its_call() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert [softmax_dim(x.softmax(dim)) for dim in (0, 2, -1, -3)] == [0, 2, 2, 0]
    assert softmax_dim(x.sigmoid()) is None


class Owner(nn.Module):
    def __init__(self, keep: Callable[[list[nn.Module]], Any], *, reads: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.kept = keep([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.shared = [self.first]
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        with torch.set_grad_enabled(self.reads and torch.is_grad_enabled()):
            kept = self.kept.values() if isinstance(self.kept, dict) else self.kept
            side = sum(layer(x).tanh() for layer in kept)
        return self.last(h + side)


def paired(layers: list[nn.Module]) -> dict[str, nn.Module]:
    return dict(zip("ab", layers, strict=True))


@pytest.mark.parametrize(
    ("keep", "reads", "expected"),
    [
        (list, True, "kept.0.weight"),
        (tuple, True, "kept.0.weight"),
        (paired, True, "kept.a.weight"),
        (nn.ModuleList, True, ""),
        # A teacher that is hidden from parameters() on purpose.
        (list, False, ""),
    ],
)
def test_layers_that_the_model_does_not_own_are_told(
    keep: Any, reads: bool, expected: str
) -> None:
    torch.manual_seed(0)
    found = told(Owner(keep, reads=reads), F.cross_entropy, classes)
    assert [f.severity for f in found] == ["warning"] * bool(expected)
    assert all(expected in f.evidence for f in found)


def test_a_plain_tensor_that_requires_gradients_is_told_by_its_name() -> None:
    model: Any = network(3)
    model.scale = torch.ones(1, requires_grad=True)
    x = torch.randn(4, 8)
    assert unregistered(model, model(x) * model.scale) == ["scale"]
    assert unregistered(model, model(x)) == []

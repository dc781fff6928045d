"""Norms over single samples that take away what the targets depend on: D29."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import diagnose
from normkit.doctor.examination.erased import erased
from normkit.doctor.finding import Finding

Target = Callable[[Tensor], Tensor]


def series(target: Target) -> list[tuple[Tensor, Tensor]]:
    """Windows of 24 steps with a level and a size of their own."""
    torch.manual_seed(0)
    found = []
    for _ in range(4):
        size = torch.randn(64, 1, 1).exp()
        x = 3 * torch.randn(64, 1, 1) + size * torch.randn(64, 1, 24)
        found.append((x, target(x)))
    return found


def level(x: Tensor) -> Tensor:
    return x.mean((1, 2))[:, None] + 0.1 * torch.randn(len(x), 1)


def size(x: Tensor) -> Tensor:
    return x.std((1, 2)).log()[:, None]


def shape(x: Tensor) -> Tensor:
    return (x[:, :, 0] - x[:, :, 1]) / x.std(2)


def is_high(x: Tensor) -> Tensor:
    return (x.mean((1, 2)) > 0).long()


class Returning(nn.Module):
    """Normalizes each window, and gives its level back to the forecast."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * x.std((1, 2))[:, None] + x.mean((1, 2))[:, None]


def network(norm: nn.Module, outputs: int = 1) -> nn.Module:
    torch.manual_seed(1)
    layers = [norm, nn.Flatten(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, outputs)]
    return nn.Sequential(*layers)


def told(
    model: nn.Module, target: Target, loss: Callable[..., Tensor] = F.mse_loss
) -> list[Finding]:
    found = diagnose(model, series(target), loss).readings
    return [f for f in found if f.id == "D29" and f.is_alarm]


@pytest.mark.parametrize("target", [level, size])
def test_a_norm_of_samples_takes_level_and_size_away(target: Target) -> None:
    (found,) = told(network(nn.InstanceNorm1d(1)), target)
    assert found.layer == "0"
    assert found.threshold > 0.9 > found.value
    assert ("the mean" if target is level else "the size") in found.evidence


def test_so_does_one_in_front_of_a_classifier() -> None:
    model = network(nn.GroupNorm(1, 1), outputs=2)
    (found,) = told(model, is_high, F.cross_entropy)
    assert "the mean" in found.evidence


def test_what_the_targets_do_not_depend_on_is_no_loss() -> None:
    assert told(network(nn.InstanceNorm1d(1)), shape) == []


def test_a_network_that_sees_the_level_may_not_have_learned_it() -> None:
    assert told(network(nn.BatchNorm1d(1)), level) == []
    assert told(network(nn.Identity()), level) == []


def test_a_level_that_is_given_back_is_not_lost() -> None:
    assert told(Returning(network(nn.InstanceNorm1d(1))), level) == []


def test_it_takes_no_forward_where_no_target_is_explained() -> None:
    calls = []

    def answers(batch: Tensor) -> Tensor:
        calls.append(batch)
        return batch.flatten(1)[:, :1]

    ((x, y), *_) = series(shape)
    assert erased(answers, (x, y), torch.randn(64, 1), y) is None
    assert calls == []
    few = (x[:16], level(x)[:16])
    assert erased(answers, few, torch.randn(16, 1), few[1]) is None


def test_of_the_mean_and_the_size_the_one_that_is_taken_away_is_named() -> None:
    """Both explain the target; a shift reaches the answers, and a factor does not."""
    torch.manual_seed(0)
    size = torch.randn(64)
    x = torch.randn(64, 400) * size.exp()[:, None] + 3 * size[:, None]
    target = size[:, None]

    def answers(batch: Any) -> Tensor:
        scaled = batch[0] / batch[0].std(1, keepdim=True)
        return scaled.mean(1, keepdim=True).tanh()

    found = erased(answers, (x, target), answers((x, target)), target)
    assert found is not None
    assert (found.what, found.change < 1e-5) == ("size", True)

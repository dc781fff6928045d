"""D24 of a training in which no parameter gets a gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches, build
from normkit.doctor import Finding, watch


class LowRank(nn.Module):
    """A frozen layer, and a product of two factors that are trained."""

    def __init__(self, layer: nn.Linear, *, is_drawn: bool) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        draw = torch.randn if is_drawn else torch.zeros
        self.a = nn.Parameter(draw(4, layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T


def adapted(*, is_drawn: bool) -> nn.Module:
    torch.manual_seed(0)
    model = build("mlp").requires_grad_(False)
    model[-1] = LowRank(model[-1], is_drawn=is_drawn)
    return model


def told(
    model: nn.Module, *, is_cleared: bool = False, scale: float = 1.0, steps: int = 10
) -> list[Finding]:
    """Train, and return the errors of D24."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1, weight_decay=1e-4)
    with watch(model, optimizer) as seen:
        for x, y in batches()[:steps]:
            optimizer.zero_grad()
            loss = scale * F.cross_entropy(model(x), y)
            loss.backward()
            if is_cleared:
                optimizer.zero_grad()
            optimizer.step()
            seen.log(loss=loss.item())
    return [f for f in seen.findings() if f.id == "D24" and f.severity == "error"]


def test_two_factors_that_start_at_zero_are_told() -> None:
    (found,) = told(adapted(is_drawn=False))
    assert "in all 10 steps" in found.evidence
    assert "is zero" in found.evidence
    assert not told(adapted(is_drawn=True))


def test_gradients_that_are_cleared_before_the_step_are_told() -> None:
    (found,) = told(build("mlp"), is_cleared=True)
    assert "is None" in found.evidence
    assert not told(build("mlp"))


def test_a_loss_of_zero_and_a_few_steps_are_no_fault() -> None:
    assert not told(build("mlp"), scale=0.0)
    assert not told(adapted(is_drawn=False), steps=4)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_part_that_is_not_trained_beside_a_head_is_no_fault(is_frozen: bool) -> None:
    model, head = build("mlp"), nn.Linear(10, 10)
    model.requires_grad_(not is_frozen)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], 0.1)
    with watch(model, optimizer) as seen:
        for x, y in batches()[:10]:
            optimizer.zero_grad()
            F.cross_entropy(head(model(x).detach()), y).backward()
            optimizer.step()
    assert not [f for f in seen.findings() if f.id == "D24" and f.severity == "error"]


@pytest.mark.parametrize("is_kept", [False, True])
def test_gradients_of_a_closure_count(is_kept: bool) -> None:
    model = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def closure(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with watch(model, optimizer) as seen:
        for x, y in batches()[:8]:
            optimizer.step(partial(closure, x, y))
            if not is_kept:
                optimizer.zero_grad()
    assert not [f for f in seen.findings() if f.id == "D24" and f.severity == "error"]

"""Gradients that are never cleared: D34 in a watch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normkit.doctor import Watch, watch

Clear = Callable[[nn.Module, torch.optim.Optimizer], None]


def trained(clear: Clear | None, *, after: bool = False, every: int = 1) -> Watch:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer) as seen:
        for step in range(20):
            x = torch.randn(32, 4)
            loss = F.cross_entropy(model(x), (x[:, 0] > 0).long())
            if clear is not None and not after and step % every == 0:
                clear(model, optimizer)
            loss.backward()
            if (step + 1) % every == 0:
                optimizer.step()
                if clear is not None and after:
                    clear(model, optimizer)
            seen.log(loss=loss.item())
    return seen


def told(seen: Watch) -> list[str]:
    return [f.evidence for f in seen.findings() if "cleared before none" in f.evidence]


def test_gradients_that_add_up_over_all_steps_are_an_error() -> None:
    seen = trained(None)
    assert told(seen) == [
        "the gradient was cleared before none of 19 steps: each follows the sum of all "
        "gradients since the first"
    ]
    assert (seen.findings()[0].id, seen.findings()[0].severity) == ("D34", "error")


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    "clear",
    [
        lambda model, _: model.zero_grad(),
        lambda _, optimizer: optimizer.zero_grad(set_to_none=False),
    ],
)
def test_cleared_gradients_are_none(clear: Clear, *, after: bool, every: int) -> None:
    assert told(trained(clear, after=after, every=every)) == []


def test_a_critic_that_the_generator_adds_gradients_to_is_cleared() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    generator = nn.Linear(4, 4)
    mine = torch.optim.SGD(critic.parameters(), 0.01)
    other = torch.optim.SGD(generator.parameters(), 0.01)
    with watch(critic, mine) as seen:
        for _ in range(20):
            mine.zero_grad()
            real, made = torch.randn(16, 4), generator(torch.randn(16, 4))
            loss = F.softplus(-critic(real)) + F.softplus(critic(made.detach()))
            loss.mean().backward()
            mine.step()
            other.zero_grad()
            F.softplus(-critic(made)).mean().backward()
            other.step()
    assert told(seen) == []

"""Critics, losses and models beside the examined one are left as they were."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit
from normkit.errors import ArgumentError

BATCHES = [
    (x, (x[:, 0] > 0).long())
    for x in torch.randn(20, 32, 4, generator=torch.Generator().manual_seed(0))
]


def network(units: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, units)
    return nn.Sequential(*layers)


def state(module: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in module.state_dict().values()]


def is_untouched(module: nn.Module, before: list[Tensor]) -> bool:
    same = all(torch.equal(a, b) for a, b in zip(state(module), before, strict=True))
    return same and all(p.grad is None for p in module.parameters())


class Centers(nn.Module):
    """A loss with a weight of its own, and centers that it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("centers", torch.zeros(2))
        self.calls = 0

    def forward(self, y: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        self.centers: Tensor
        self.centers.lerp_(y.detach().mean(0), 0.1)
        return F.cross_entropy(self.scale * (y - self.centers), targets)


VERBS: dict[str, Callable[..., object]] = {
    "diagnose": normkit.diagnose,
    "confirm": lambda *a: normkit.diagnose(*a).confirm(),
    "repair": lambda *a: normkit.diagnose(*a).repair(),
    "train": lambda m, *a: normkit.diagnose(m, *a).train(
        3, torch.optim.SGD(m.parameters(), 0.1)
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_critic_in_the_loss_keeps_its_statistics_and_gets_no_gradients(
    verb: str,
) -> None:
    generator, critic = network(4), network(1)
    before = state(critic)

    def loss(y: Tensor, _: Tensor) -> Tensor:
        return F.softplus(-critic(y)).mean()

    VERBS[verb](generator, BATCHES, loss)
    assert is_untouched(critic, before)


@pytest.mark.parametrize("verb", VERBS)
def test_a_loss_that_is_a_module_keeps_its_state(verb: str) -> None:
    loss = Centers()
    before = state(loss)
    VERBS[verb](network(), BATCHES, loss)
    assert is_untouched(loss, before)
    assert loss.calls == 0


def test_a_penalty_on_the_weights_leaves_the_gradients_that_were_there() -> None:
    model = network()

    def loss(y: Tensor, targets: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(y, targets) + 1e-2 * penalty

    loss(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    normkit.diagnose(model, BATCHES, loss)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_forward_that_calls_another_model_than_the_given_is_an_error() -> None:
    model = network()
    before = state(model)
    with pytest.raises(ArgumentError, match="calls the model it is given"):
        normkit.diagnose(
            model, BATCHES, F.cross_entropy, forward=lambda _, b: model(b[0])
        )
    assert is_untouched(model, before)


class Momentum(nn.Module):
    """A model that cannot be copied, with a queue and a counter as plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.lock = network(), threading.Lock()
        self.steps, self.queue = 0, torch.zeros(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        self.steps += 1
        self.queue[self.steps % 8] = y[0].detach()
        return y


def test_a_model_that_cannot_be_copied_keeps_its_plain_attributes() -> None:
    model = Momentum()
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    normkit.diagnose(model, BATCHES, F.cross_entropy)
    assert (model.steps, model.queue.abs().sum().item()) == (0, 0.0)

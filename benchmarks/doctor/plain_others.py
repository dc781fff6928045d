"""Healthy programs on a graph, and of control."""

from __future__ import annotations

from typing import Any

import torch
from calm_base import Data
from plain_base import program
from quiet_base import Subject, Training
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _GraphConvolutions(nn.Module):
    """Two graph convolutions by hand; the graph is fixed."""

    def __init__(self, i: int, hidden: int, o: int, links: Tensor) -> None:
        super().__init__()
        self.w1, self.w2 = (
            nn.Parameter(torch.empty(i, hidden)),
            nn.Parameter(torch.empty(hidden, o)),
        )
        self.b1, self.b2 = (
            nn.Parameter(torch.zeros(hidden)),
            nn.Parameter(torch.zeros(o)),
        )
        self.register_buffer("links", links)
        nn.init.xavier_uniform_(self.w1)
        nn.init.xavier_uniform_(self.w2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, self.training)
        x = F.relu(self.links @ (x @ self.w1) + self.b1)
        x = F.dropout(x, 0.5, self.training)
        return self.links @ (x @ self.w2) + self.b2


@program
def graph_convolutions() -> Training:
    """GCN: 20 known nodes in each of 4 groups of a graph of 400, full batch, Adam.

    Decay 5e-4, dropout 0.5; nodes without labels: 94 %.
    """
    n = 400
    group = torch.arange(n) % 4
    chance = torch.where(group[:, None] == group, 0.05, 0.01)
    upper = (torch.rand(n, n) < chance).triu(1).float()
    links = upper + upper.T + torch.eye(n)
    degree = links.sum(1).rsqrt()
    links = degree[:, None] * links * degree
    x = 0.6 * torch.randn(4, 24)[group] + torch.randn(n, 24)
    is_known = torch.arange(n) < 80
    known = torch.where(is_known, group, -100)
    hidden = torch.where(is_known, -100, group)

    def score(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            said = net(data[0]).argmax(1)
        return float((said == data[1])[data[1] >= 0].float().mean())

    model = _GraphConvolutions(24, 32, 4, links)
    optimizer = optim.Adam(model.parameters(), 1e-2, weight_decay=5e-4)

    def step(_: int) -> float:
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), known)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(
        [Subject(model, lambda: [(x, known)], F.cross_entropy, optimizer)],
        step, 200, lambda: score(model, (x, hidden)), 0.85,
    )  # fmt: skip


class _ActorCritic(nn.Module):
    """Mean and deviation of a push, and the worth of a state; tanh, orthogonal."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, 32), nn.Linear(32, 32)
        self.mean, self.worth = nn.Linear(32, 1), nn.Linear(32, 1)
        self.log_std = nn.Parameter(torch.full((1,), -0.5))
        gains = (2**0.5, 2**0.5, 0.01, 1.0)
        layers = (self.fc1, self.fc2, self.mean, self.worth)
        for layer, gain in zip(layers, gains, strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.fc2(torch.tanh(self.fc1(state))))
        std = self.log_std.exp().expand(len(state))
        return self.mean(h)[:, 0], std, self.worth(h)[:, 0]


def _moved(state: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state of a mass after a push, and the reward."""
    speed = 0.95 * state[:, 1] + 0.3 * push.clamp(-2, 2)
    place = state[:, 0] + 0.3 * speed
    reward = -0.03 * (place.square() + 0.1 * speed.square() + 0.1 * push.square())
    return torch.stack((place, speed), 1), reward


@program
def mass_actor_critic() -> Training:
    """A2C with a Gaussian policy pushes a mass to the origin: 64 masses, 30 moves.

    Generalized advantages, Adam, clipped: 99 % less cost than
    without a push.
    """
    model = _ActorCritic()
    optimizer = optim.Adam(model.parameters(), 4e-3, eps=1e-5)

    def batch() -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        state, seen, pushes, rewards, worths = torch.randn(64, 2), [], [], [], []
        with torch.no_grad():
            for _ in range(30):
                mean, std, worth = model(state)
                push = mean + std * torch.randn(64)
                seen.append(state)
                worths.append(worth)
                pushes.append(push)
                state, reward = _moved(state, push)
                rewards.append(reward)
            worths.append(model(state)[2])
        gain, gains = torch.zeros(64), []
        for t in reversed(range(30)):
            surprise = rewards[t] + 0.95 * worths[t + 1] - worths[t]
            gain = surprise + 0.95 * 0.95 * gain
            gains.append(gain)
        gained = torch.cat(gains[::-1])
        returns = gained + torch.cat(worths[:-1])
        gained = (gained - gained.mean()) / (gained.std() + 1e-8)
        return torch.cat(seen), (torch.cat(pushes), returns, gained)

    def loss_fn(out: Any, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        (mean, std, worth), (push, returns, gained) = out, target
        policy = torch.distributions.Normal(mean, std)
        actor = -(policy.log_prob(push) * gained).mean()
        critic = F.mse_loss(worth, returns)
        return actor + 0.5 * critic - 0.001 * policy.entropy().mean()

    def step(_: int) -> float:
        model.train()
        x, y = batch()
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return float(loss.detach())

    def score() -> float:
        model.eval()
        moved = still = torch.randn(500, 2)
        cost, idle = torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            for _ in range(30):
                moved, reward = _moved(moved, model(moved)[0])
                still, other = _moved(still, torch.zeros(500))
                cost, idle = cost - reward.sum(), idle - other.sum()
        return float(1 - cost / idle)

    return Training(
        [Subject(model, lambda: [batch() for _ in range(10)], loss_fn, optimizer)],
        step, 200, score, 0.7,
    )  # fmt: skip

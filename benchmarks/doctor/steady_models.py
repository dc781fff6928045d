"""Healthy generative, metric, graph and reinforcement programs."""

from __future__ import annotations

import math
from typing import Any

import torch
from calm_base import Data, conv_norm, update
from mild_base import shifted
from quiet_base import Subject, Training, digits, supervised
from steady_base import program
from still_base import scaled_digits
from torch import Tensor, nn, optim
from torch.distributions import Categorical
from torch.nn import functional as F


@program
def dcgan() -> Training:
    """DCGAN of digits in [-1, 1]: N(0, 0.05) weights, BN, Adam(0.5, 0.999), batch 64.

    In eval mode the mean and covariance of the pictures have a Fréchet distance of
    2.3 from held-out ones, where noise of the right mean and variances has 7.3. All
    ten digits are drawn about equally often.
    """
    (x, _), (held, _) = digits()
    x, held = 2 * x - 1, 2 * held - 1
    maker = nn.Sequential(
        nn.ConvTranspose2d(24, 64, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip
    judge = nn.Sequential(
        nn.Conv2d(1, 32, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 2), nn.Flatten(0),
    )  # fmt: skip
    for each in (*maker, *judge):
        if isinstance(each, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(each.weight, 0.0, 0.05)
        elif isinstance(each, nn.BatchNorm2d):
            nn.init.normal_(each.weight, 1.0, 0.02)
    maker_adam = optim.Adam(maker.parameters(), 1e-3, betas=(0.5, 0.999))
    judge_adam = optim.Adam(judge.parameters(), 2e-3, betas=(0.5, 0.999))
    loss_fn = F.binary_cross_entropy_with_logits
    one, zero = torch.ones(64), torch.zeros(64)

    def step(_: int) -> float:
        maker.train()
        judge.train()
        real = x[torch.randint(len(x), (64,))]
        fake = maker(torch.randn(64, 24, 1, 1))
        update(
            judge_adam, loss_fn(judge(real), one) + loss_fn(judge(fake.detach()), zero)
        )
        return update(maker_adam, loss_fn(judge(fake), one))

    def score() -> float:
        with torch.no_grad():
            made = maker.eval()(torch.randn(2000, 24, 1, 1)).flatten(1)
        true = held.flatten(1)
        cross = torch.linalg.eigvals(made.T.cov() @ true.T.cov())
        apart = (made.mean(0) - true.mean(0)).square().sum()
        spread = made.var(0).sum() + true.var(0).sum()
        return -float(apart + spread - 2 * cross.real.clamp(min=0).sqrt().sum())

    def noise() -> list[Data]:
        return [(torch.randn(64, 24, 1, 1), one) for _ in range(20)]

    return Training(
        [Subject(maker, noise, lambda out, y: loss_fn(judge(out), y), maker_adam)],
        step, 450, score, -4.5,
    )  # fmt: skip


class _Sigma(nn.Module):
    """VAE whose decoder has one learned variance for all pixels (sigma-VAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64), nn.SiLU(),
            nn.Linear(64, 16),
        )  # fmt: skip
        self.decode = nn.Sequential(
            nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)
        )
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        z = mean
        if self.training:
            z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        return self.decode(z), mean, log_var, self.log_sigma


@program
def sigma_vae() -> Training:
    """VAE of digits with a learned variance of the decoder, SiLU, Adam, batch 50.

    Its reconstruction from the mean explains 77 % of the variance held out.
    """
    (x, _), (held, _) = scaled_digits()
    x, held = x.flatten(1), held.flatten(1)

    def loss_fn(out: tuple[Tensor, ...], y: Tensor) -> Tensor:
        made, mean, log_var, log_sigma = out
        error = (made - y).square() / (2 * log_sigma).exp() / 2 + log_sigma
        kl = (mean.square() + log_var.exp() - log_var - 1) / 2
        return error.mean() + kl.sum(1).mean() / 64

    def kept(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            left = (net(data[0])[0] - data[1]).square().mean()
        return float(1 - left / (data[1] - data[1].mean(0)).square().mean())

    model = _Sigma()
    return supervised(
        model, (x, x), (held, held), optim.Adam(model.parameters(), 2e-3), size=50,
        steps=700, goal=0.6, loss_fn=loss_fn, score=kept,
    )  # fmt: skip


class _Agent(nn.Module):
    """Actor and critic of two tanh layers each, orthogonal weights (CleanRL)."""

    def __init__(self) -> None:
        super().__init__()

        def layer(i: int, o: int, gain: float = math.sqrt(2)) -> nn.Linear:
            linear = nn.Linear(i, o)
            nn.init.orthogonal_(linear.weight, gain)
            nn.init.zeros_(linear.bias)
            return linear

        self.critic = nn.Sequential(
            layer(4, 48), nn.Tanh(), layer(48, 48), nn.Tanh(), layer(48, 1, 1.0)
        )
        self.actor = nn.Sequential(
            layer(4, 48), nn.Tanh(), layer(48, 48), nn.Tanh(), layer(48, 5, 0.01)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(x), self.critic(x)[:, 0]


@program
def proximal_policy() -> Training:
    """PPO steers 16 points with inertia on a plane to the origin, GAE, clip 0.2.

    4 epochs of 4 batches of 128 a rollout, Adam(eps 1e-5), rate annealed, entropy
    0.01: a mean reward of -0.17 a move, where random moves have -1.8.
    """
    push = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]) * 0.25

    def begin(n: int) -> Tensor:
        return torch.cat((3 * torch.rand(n, 2) - 1.5, torch.zeros(n, 2)), 1)

    def moved(s: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        speed = 0.8 * s[:, 2:] + push[action]
        place = (s[:, :2] + 0.5 * speed).clamp(-3, 3)
        return torch.cat((place, speed), 1), -place.norm(dim=1)

    agent, steps = _Agent(), 320
    optimizer = optim.Adam(agent.parameters(), 3e-3, eps=1e-5)
    schedule = optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)

    @torch.no_grad()
    def rollout() -> list[Any]:
        """Return 4 batches of 16 points over 32 moves: what was seen, done, gained."""
        s, seen = begin(16), []
        for _ in range(32):
            logits, value = agent(s)
            choice = Categorical(logits=logits)
            action = choice.sample()
            after, reward = moved(s, action)
            seen.append((s, action, choice.log_prob(action), value, reward))
            s = after
        states, actions, logs, values, rewards = (
            torch.stack(part) for part in zip(*seen, strict=True)
        )
        upcoming = torch.cat((values[1:], agent(s)[1][None]))
        gains, last = torch.zeros_like(rewards), torch.zeros(16)
        for t in reversed(range(32)):
            delta = 0.2 * rewards[t] + 0.9 * upcoming[t] - values[t]
            gains[t] = last = delta + 0.9 * 0.95 * last
        parts = (states, actions, logs, gains, gains + values)
        states, *others = (p.flatten(0, 1) for p in parts)
        return [
            (states[p], tuple(o[p] for o in others))
            for p in torch.randperm(512).split(128)
        ]

    def loss_fn(out: tuple[Tensor, Tensor], data: tuple[Tensor, ...]) -> Tensor:
        (logits, value), (action, log, gain, target) = out, data
        choice = Categorical(logits=logits)
        ratio = (choice.log_prob(action) - log).exp()
        gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        policy = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
        return (
            0.5 * (value - target).square().mean()
            - policy
            - 0.01 * choice.entropy().mean()
        )

    def collected() -> Any:
        while True:
            batches = rollout()
            for _ in range(4):
                yield from batches

    source = collected()

    def step(_: int) -> float:
        x, data = next(source)
        optimizer.zero_grad()
        loss = loss_fn(agent(x), data)
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        return float(loss.detach())

    @torch.no_grad()
    def score() -> float:
        s, total = begin(200), 0.0
        for _ in range(32):
            s, reward = moved(s, agent(s)[0].argmax(1))
            total += float(reward.mean()) / 32
        return total

    def batches() -> list[Any]:
        return [b for _ in range(4) for b in rollout()]

    return Training(
        [Subject(agent, batches, loss_fn, optimizer)], step, steps, score, -0.3
    )


class _Attention(nn.Module):
    """Graph attention of several heads (Veličković et al. 2018)."""

    def __init__(self, i: int, o: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.w = nn.Linear(i, o * heads, bias=False)
        self.source = nn.Parameter(torch.empty(heads, o))
        self.target = nn.Parameter(torch.empty(heads, o))
        for p in (self.w.weight, self.source, self.target):
            nn.init.xavier_uniform_(p)

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        h = self.w(x).view(len(x), self.heads, -1)
        a, b = (h * self.source).sum(2), (h * self.target).sum(2)
        e = F.leaky_relu(a[:, None] + b[None], 0.2)
        weight = e.masked_fill(~links[:, :, None], -math.inf).softmax(1)
        weight = F.dropout(weight, 0.2, self.training)
        return torch.einsum("ijh,jhc->ihc", weight, h)


class _GAT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = _Attention(32, 8, 4), _Attention(32, 4, 1)

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        x = F.dropout(x, 0.3, self.training)
        x = F.elu(self.conv1(x, links).flatten(1))
        x = F.dropout(x, 0.3, self.training)
        return self.conv2(x, links).mean(1)


@program
def graph_attention() -> Training:
    """GAT of 240 nodes in four communities, 100 of them labelled, full batch.

    Dropout of inputs and attention, Adam 5e-3 with decay 5e-4: 94 % of the others,
    where the features alone allow 75 % and two hops of averages 96 %.
    """
    n = 240
    y = torch.arange(4).repeat(n // 4)
    x = 0.4 * torch.randn(4, 32)[y] + 1.2 * torch.randn(n, 32)
    chance = torch.where(y[:, None] == y, 0.10, 0.01)
    upper = (torch.rand(n, n) < chance).triu(1)
    links = upper | upper.T | torch.eye(n, dtype=torch.bool)
    known = torch.arange(n) < 100
    x, target = x / x.std(), torch.where(known, y, -100)
    model = _GAT()
    optimizer = optim.Adam(model.parameters(), 5e-3, weight_decay=5e-4)

    def loss_fn(out: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(out, label, ignore_index=-100)

    def step(_: int) -> float:
        model.train()
        return update(optimizer, loss_fn(model(x, links), target))

    def score() -> float:
        model.eval()
        with torch.no_grad():
            right = model(x, links).argmax(1) == y
        return float(right[~known].float().mean())

    return Training(
        [Subject(model, lambda: [((x, links), target)] * 8, loss_fn, optimizer)],
        step, 200, score, 0.9,
    )  # fmt: skip


class _Embedder(nn.Module):
    """A small net with a batch norm as neck; cosines to one centre a class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(1, 24), conv_norm(24, 48, 2), nn.Flatten(),
            nn.Linear(768, 32, bias=False), nn.BatchNorm1d(32),
        )  # fmt: skip
        self.centres = nn.Parameter(torch.empty(10, 32))
        nn.init.xavier_uniform_(self.centres)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x), dim=1) @ F.normalize(self.centres, dim=1).T


@program
def arc_face() -> Training:
    """ArcFace of digits: angular margin 0.2, scale 16, BN neck, SGD, batch 64.

    Digits are moved by up to a pixel, each on its own: 98 % held out.
    """
    train, test = scaled_digits()

    def loss_fn(cosine: Tensor, y: Tensor) -> Tensor:
        angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
        right = F.one_hot(y, 10).bool()
        return F.cross_entropy(16 * torch.where(right, (angle + 0.2).cos(), cosine), y)

    def moved(batch: Data) -> Data:
        return shifted(batch[0] - train[0].min(), 1) + train[0].min(), batch[1]

    model = _Embedder()
    optimizer = optim.SGD(
        model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    return supervised(
        model, train, test, optimizer, size=64, steps=200, goal=0.94, loss_fn=loss_fn,
        change=moved, schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 210),
    )  # fmt: skip

"""Healthy generative, implicit and composed models."""

from __future__ import annotations

import math

import torch
from calm_base import Data, r2
from plain_base import program
from quiet_base import Training, digits, split, supervised
from still_base import scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Variational(nn.Module):
    """The VAE of tutorials: two linear layers each way, ReLU, no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.mu, self.log_var = (
            nn.Linear(64, 96),
            nn.Linear(96, 4),
            nn.Linear(96, 4),
        )
        self.fc3, self.fc4 = nn.Linear(4, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.fc1(2 * x - 1))
        mu, log_var = self.mu(h), self.log_var(h)
        z = mu
        if self.training:
            z = mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)
        return self.fc4(F.relu(self.fc3(z))), mu, log_var


@program
def tutorial_vae() -> Training:
    """VAE of binary digits as rows, 4 latents, cross entropy, Adam 1e-3, batch 64.

    Variance kept of held-out binary pixels: 0.52, evidence bound -19 nats.
    """
    (x, _), (a, _) = digits()
    x, a = (x.flatten(1) > 0.4).float(), (a.flatten(1) > 0.4).float()

    def loss_fn(out: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        logits, mu, log_var = out
        error = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        divergence = -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum()
        return (error + divergence) / len(x)

    def score(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            made = torch.sigmoid(net(data[0])[0])
        left = (made - data[1]).square().mean()
        return float(1 - left / (data[1] - data[1].mean(0)).square().mean())

    model = _Variational()
    return supervised(
        model, (x, x), (a, a), optim.Adam(model.parameters(), 1e-3), size=64,
        steps=1200, goal=0.35, loss_fn=loss_fn, score=score,
    )  # fmt: skip


class _FlowStep(nn.Module):
    """Glow's step: scale and shift of each column, linear map, affine coupling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(3))
        self.shift = nn.Parameter(torch.zeros(3))
        self.turn = nn.Parameter(nn.init.orthogonal_(torch.empty(3, 3)))
        self.fc1, self.fc2 = nn.Linear(1, width), nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 4)
        nn.init.zeros_(self.fc3.weight)
        nn.init.zeros_(self.fc3.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = (x * self.log_scale.exp() + self.shift) @ self.turn.T
        volume = self.log_scale.sum() + torch.linalg.slogdet(self.turn)[1]
        known, rest = x[:, :1], x[:, 1:]
        h = torch.tanh(self.fc2(torch.tanh(self.fc1(known))))
        log_s, t = self.fc3(h).chunk(2, 1)
        log_s = 2 * torch.tanh(log_s / 2)
        return torch.cat((known, rest * log_s.exp() + t), 1), volume + log_s.sum(1)


class _Glow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_FlowStep(32) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = torch.zeros(len(x))
        for step in self.steps:
            x, more = step(x)
            volume = volume + more
        return x, volume


@program
def glow_roll() -> Training:
    """Glow's steps on a Swiss roll in space, couplings from 0, Adam, clipped, cosine.

    Batch 200: held-out nats above a Gaussian: 0.83.
    """
    from sklearn.datasets import make_swiss_roll

    x = torch.tensor(make_swiss_roll(4000, noise=0.3, random_state=0)[0]).float()
    x = (x - x[:3200].mean(0)) / x[:3200].std(0)
    train, test = split(x, torch.zeros(4000), 3200)

    def loss_fn(out: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
        z, volume = out
        density = -0.5 * z.square().sum(1) - 1.5 * math.log(2 * math.pi)
        return -(density + volume).mean()

    def score(net: nn.Module, data: Data) -> float:
        net.eval()
        gauss = torch.distributions.MultivariateNormal(
            train[0].mean(0), train[0].T.cov()
        )
        with torch.no_grad():
            return float(
                -loss_fn(net(data[0]), data[1]) - gauss.log_prob(data[0]).mean()
            )

    model = _Glow()
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=200, steps=450, goal=0.5, clip=5.0,
        loss_fn=loss_fn, score=score,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 450),
    )  # fmt: skip


class _Experts(nn.Module):
    """Four experts of one tanh layer, mixed by a softmax gate (Jacobs 1991)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate1, self.gate2 = nn.Linear(5, 24), nn.Linear(24, 4)
        self.hidden = nn.ModuleList(nn.Linear(5, 20) for _ in range(4))
        self.outs = nn.ModuleList(nn.Linear(20, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.softmax(self.gate2(torch.tanh(self.gate1(x))), 1)
        pairs = zip(self.hidden, self.outs, strict=True)
        said = torch.cat([out(torch.tanh(hidden(x))) for hidden, out in pairs], 1)
        return (gate * said).sum(1)


@program
def soft_experts() -> Training:
    """Another linear law in each quarter of the plane, soft mixture of experts, MSE.

    Adam, batch 80: R² 0.95 of 0.99.
    """
    n = 3600
    x, law = torch.randn(n, 5), torch.randn(4, 3)
    quarter = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    y = (law[quarter] * x[:, 2:]).sum(1)
    y = y / y[:3000].std() + 0.1 * torch.randn(n)
    train, test = split(x, y, 3000)
    model = _Experts()
    optimizer = optim.Adam(model.parameters(), 8e-3)
    return supervised(
        model, train, test, optimizer, size=80, steps=1200, goal=0.85,
        loss_fn=F.mse_loss, score=r2,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 1200),
    )  # fmt: skip


class _Hyper(nn.Module):
    """A network that writes the weights of another, 1-12-1, for each task.

    Its last layer starts so that the written weights have LeCun's variances.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 64), nn.Linear(64, 64)
        self.first, self.bias = nn.Linear(64, 12), nn.Linear(64, 12)
        self.second, self.last = nn.Linear(64, 12), nn.Linear(64, 1)
        nn.init.normal_(self.first.weight, std=64**-0.5)
        nn.init.normal_(self.bias.weight, std=64**-0.5)
        nn.init.normal_(self.second.weight, std=(64 * 12) ** -0.5)
        for layer in (self.first, self.bias, self.second, self.last):
            nn.init.zeros_(layer.bias)

    def forward(self, task: Tensor, x: Tensor) -> Tensor:
        h = F.silu(self.fc2(F.silu(self.fc1(task))))
        inner = x[:, :, None] * self.first(h)[:, None] + self.bias(h)[:, None]
        return (torch.tanh(inner) @ self.second(h)[:, :, None])[:, :, 0] + self.last(h)


@program
def hyper_network() -> Training:
    """Height, rate and phase of a wave give the weights of its own network; MSE.

    20 places a wave, AdamW, cosine, batch 64 waves: R² 1.00.
    """
    n = 3000
    task, x = 2 * torch.rand(n, 3) - 1, 4 * torch.rand(n, 20) - 2
    phase = (1.6 + 0.5 * task[:, 1:2]) * x + 1.5 * task[:, 2:]
    y = (1 + 0.5 * task[:, :1]) * phase.sin() / 0.75
    train, test = split((task / 0.58, x), y, 2500)
    model = _Hyper()
    optimizer = optim.AdamW(model.parameters(), 5e-3, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=64, steps=600, goal=0.9,
        loss_fn=F.mse_loss, score=r2,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 600),
    )  # fmt: skip


class _Equilibrium(nn.Module):
    """Fixed point of tanh(W z + U x + b), |W| = 0.8, found without gradients.

    Two further steps carry the gradient (Jacobian-free backpropagation).
    """

    def __init__(self, i: int, width: int, o: int) -> None:
        super().__init__()
        self.inject, self.out = nn.Linear(i, width), nn.Linear(width, o)
        self.raw = nn.Parameter(nn.init.orthogonal_(torch.empty(width, width)))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.inject(x)
        weight = 0.8 * self.raw / torch.linalg.matrix_norm(self.raw, 2)
        z = torch.zeros_like(inside)
        with torch.no_grad():
            for _ in range(20):
                z = torch.tanh(z @ weight.T + inside)
        for _ in range(2):
            z = torch.tanh(z @ weight.T + inside)
        return self.out(z)


@program
def deep_equilibrium() -> Training:
    """Digits as rows by a fixed point of 48, Adam, step decay, batch 70.

    Held out: 98 %.
    """
    (x, y), (a, b) = scaled_digits()
    model = _Equilibrium(64, 48, 10)
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, (x.flatten(1), y), (a.flatten(1), b), optimizer, size=70, steps=250,
        goal=0.93, schedule=optim.lr_scheduler.StepLR(optimizer, 150, 0.3),
    )  # fmt: skip


class _Flowing(nn.Module):
    """Augmented neural ODE, Runge-Kutta of order 4 in 6 steps, a linear reading."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 32), nn.Linear(32, 4)
        self.out = nn.Linear(4, 2)

    def slope(self, z: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(z)))

    def forward(self, x: Tensor) -> Tensor:
        z, h = F.pad(x, (0, 2)), 1 / 6
        for _ in range(6):
            k1 = self.slope(z)
            k2 = self.slope(z + h / 2 * k1)
            k3 = self.slope(z + h / 2 * k2)
            k4 = self.slope(z + h * k3)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.out(z)


@program
def neural_ode() -> Training:
    """Neural ODE with two added dimensions tells a disc from a ring about it, Adam.

    Batch 50: held out 100 %.
    """
    n = 1600
    y, angle = torch.randint(2, (n,)), 2 * math.pi * torch.rand(n)
    radius = torch.where(y == 0, torch.rand(n).sqrt(), 1.3 + 0.7 * torch.rand(n))
    x = radius[:, None] * torch.stack((angle.cos(), angle.sin()), 1)
    train, test = split(x + 0.05 * torch.randn(n, 2), y, 1000)
    model = _Flowing()
    optimizer = optim.Adam(model.parameters(), 1e-2)
    return supervised(model, train, test, optimizer, size=50, steps=250, goal=0.96)

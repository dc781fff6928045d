"""Healthy programs of teaching: small perceptrons, full batches and mini-batches."""

from __future__ import annotations

import itertools
import math

import torch
from calm_base import r2
from plain_base import program
from quiet_base import Training, accuracy, split, supervised
from still_base import scaled_digits, table
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Perceptron(nn.Module):
    """Input, two layers with a ReLU between, Kaiming weights, biases of zero."""

    def __init__(self, i: int, hidden: int, o: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(i, hidden), nn.Linear(hidden, o)
        nn.init.kaiming_normal_(self.fc1.weight, nonlinearity="relu")
        nn.init.kaiming_normal_(self.fc2.weight, nonlinearity="linear")
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


@program
def iris_full_batch() -> Training:
    """Iris, 16 ReLU from Kaiming, gradient descent on all 105 flowers, rate 0.1.

    Held out: 96 %.
    """
    from sklearn.datasets import load_iris

    train, test = table(load_iris, 105)
    model = _Perceptron(4, 16, 3)
    optimizer = optim.SGD(model.parameters(), 0.1)
    return supervised(
        model, train, test, optimizer, size=105, steps=400, goal=0.9
    )  # fmt: skip


@program
def spiral_full_batch() -> Training:
    """Three arms of a spiral, 100 ReLU, full batch of 300, momentum 0.9, decay 1e-3.

    Held out: 99 %.
    """

    def arms(n: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(3).repeat_interleave(n)
        radius = torch.linspace(0.05, 1, n).repeat(3)
        angle = 4 * radius + 4.0 * y + 0.2 * torch.randn(3 * n)
        return radius[:, None] * torch.stack((angle.sin(), angle.cos()), 1) * 2, y

    train, test = arms(100), arms(200)
    model = _Perceptron(2, 100, 3)
    optimizer = optim.SGD(model.parameters(), 0.3, momentum=0.9, weight_decay=1e-3)
    return supervised(model, train, test, optimizer, size=300, steps=800, goal=0.92)


class _Sigmoids(nn.Module):
    """One hidden layer of sigmoids, from Xavier."""

    def __init__(self, i: int, hidden: int, o: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(i, hidden), nn.Linear(hidden, o)
        for layer in (self.hidden, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.hidden(x)))


@program
def wine_sigmoids() -> Training:
    """Wine, 12 sigmoids from Xavier, SGD 0.1 with momentum 0.9, decay 1e-3, batch 16.

    Held out: 98 %.
    """
    from sklearn.datasets import load_wine

    train, test = table(load_wine, 128)
    model = _Sigmoids(13, 12, 3)
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    return supervised(model, train, test, optimizer, size=16, steps=300, goal=0.92)


class _TwoTanh(nn.Module):
    """Two hidden layers of tanh, from Xavier with the gain of tanh; one logit."""

    def __init__(self, i: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(i, hidden), nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)
        for layer, gain in ((self.fc1, 5 / 3), (self.fc2, 5 / 3), (self.out, 1.0)):
            nn.init.xavier_normal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x))
        x = torch.tanh(self.fc2(x))
        return self.out(x)[:, 0]


def _signed(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy of a logit."""
    model.eval()
    with torch.no_grad():
        return float(((model(data[0]) > 0) == (data[1] > 0.5)).float().mean())


@program
def moons_full_batch() -> Training:
    """Two moons, tanh of 16 and 16, one logit, full batch of 300, plain rate 0.3.

    Held out: 98 %.
    """
    from sklearn.datasets import make_moons

    def moons(n: int, seed: int) -> tuple[Tensor, Tensor]:
        x, y = make_moons(n, noise=0.15, random_state=seed)
        x = (torch.tensor(x, dtype=torch.float32) - torch.tensor([0.5, 0.25])) / 0.7
        return x, torch.tensor(y, dtype=torch.float32)

    model = _TwoTanh(2, 16)
    return supervised(
        model, moons(300, 1), moons(1000, 2), optim.SGD(model.parameters(), 0.3),
        size=300, steps=1500, goal=0.95, loss_fn=F.binary_cross_entropy_with_logits,
        score=_signed,
    )  # fmt: skip


@program
def noisy_xor() -> Training:
    """XOR of four clusters, tanh of 8 and 8, one logit, SGD 0.1, batch 10.

    Held out: 99 %.
    """
    n = 1200
    corner = torch.randint(2, (n, 2)).float()
    x = 2 * corner - 1 + 0.35 * torch.randn(n, 2)
    train, test = split(x, (corner[:, 0] != corner[:, 1]).float(), 400)
    model = _TwoTanh(2, 8)
    return supervised(
        model, train, test, optim.SGD(model.parameters(), 0.1), size=10, steps=800,
        goal=0.96, loss_fn=F.binary_cross_entropy_with_logits, score=_signed,
    )  # fmt: skip


class _Normed(nn.Module):
    """Three hidden layers, batch norm before each ReLU, as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(64, 80, bias=False), nn.BatchNorm1d(80)
        self.fc2, self.bn2 = nn.Linear(80, 60, bias=False), nn.BatchNorm1d(60)
        self.fc3, self.bn3 = nn.Linear(60, 40, bias=False), nn.BatchNorm1d(40)
        self.fc4 = nn.Linear(40, 10)
        for fc in (self.fc1, self.fc2, self.fc3):
            nn.init.kaiming_normal_(fc.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.fc1(x.flatten(1))))
        x = F.relu(self.bn2(self.fc2(x)))
        x = F.relu(self.bn3(self.fc3(x)))
        return self.fc4(x)


@program
def digits_inverse_time() -> Training:
    """Digits as rows, three layers with BN before ReLU, SGD with inverse time decay.

    Batch 28, rate 0.2 / (1 + i / 100): held out 98 %.
    """
    train, test = scaled_digits()
    model = _Normed()
    optimizer = optim.SGD(model.parameters(), 0.2)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i / 100))
    return supervised(
        model, train, test, optimizer, size=28, steps=600, goal=0.94, schedule=schedule
    )


@program
def hinge_linear() -> Training:
    """Linear classifier of digits by the multi-class hinge loss, from small weights.

    SGD, rate falls as 1 / sqrt(i), decay 1e-4, batch 50: held out 95 %.
    """
    (x, y), (a, b) = scaled_digits()
    model = nn.Linear(64, 10)
    nn.init.normal_(model.weight, std=0.01)
    nn.init.zeros_(model.bias)
    optimizer = optim.SGD(model.parameters(), 0.3, weight_decay=1e-4)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / math.sqrt(1 + i))
    return supervised(
        model, (x.flatten(1), y), (a.flatten(1), b), optimizer, size=50, steps=900,
        goal=0.92, loss_fn=F.multi_margin_loss, schedule=schedule,
    )  # fmt: skip


class _SelfNormalizing(nn.Module):
    """Five SELU layers from LeCun's normal weights, alpha dropout of 2 %."""

    def __init__(self) -> None:
        super().__init__()
        widths = (10, 64, 64, 48, 48, 32)
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in itertools.pairwise(widths)
        )
        self.drop, self.out = nn.AlphaDropout(0.02), nn.Linear(32, 1)
        for layer in (*self.layers, self.out):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.selu(layer(x))
        return self.out(self.drop(x))


@program
def friedman_selu() -> Training:
    """Friedman's first function of 5 of 10 columns, self-normalizing net, Adam, MSE.

    Targets standardized, noise of 4 % of the variance, batch 64: R² 0.93.
    """
    n = 2600
    u = torch.rand(n, 10)
    y = 10 * (math.pi * u[:, 0] * u[:, 1]).sin() + 20 * (u[:, 2] - 0.5) ** 2
    y = y + 10 * u[:, 3] + 5 * u[:, 4] + torch.randn(n)
    x, y = (u - 0.5) * math.sqrt(12), ((y - y[:2000].mean()) / y[:2000].std())[:, None]
    train, test = split(x, y, 2000)
    model = _SelfNormalizing()
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=500, goal=0.88,
        loss_fn=F.mse_loss, score=r2,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 500),
    )  # fmt: skip


class _Maxout(nn.Module):
    """Two layers of maxout units of three pieces, dropout before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(30, 3 * 24), nn.Linear(24, 3 * 12)
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x).reshape(-1, 24, 3).amax(2)
        x = self.fc2(x).reshape(-1, 12, 3).amax(2)
        return self.out(F.dropout(x, 0.2, self.training))


@program
def tumours_maxout() -> Training:
    """Breast cancer by maxout of 24 and 12, SGD with Nesterov, halved rate, batch 32.

    Held out: 99 %.
    """
    from sklearn.datasets import load_breast_cancer

    train, test = table(load_breast_cancer, 420)
    model = _Maxout()
    optimizer = optim.SGD(
        model.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    return supervised(
        model, train, test, optimizer, size=32, steps=250, goal=0.92, score=accuracy,
        schedule=optim.lr_scheduler.StepLR(optimizer, 100, 0.5),
    )  # fmt: skip

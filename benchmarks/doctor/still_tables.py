"""Healthy programs on tables and plain networks of one to twelve layers."""

from __future__ import annotations

import math

import torch
from calm_base import Data, endless, flat, r2, update, warm_cosine
from quiet_base import Subject, Training, shuffled, split, supervised
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from still_base import decayed, dense, program, scaled_digits, table
from torch import Tensor, nn, optim
from torch.nn import functional as F


def _arms(n: int, turns: float, noise: float) -> Data:
    """Return points of three spiral arms, about unit variance, and their arms."""
    arm, r = torch.randint(3, (n,)), 0.1 + 0.9 * torch.rand(n)
    angle = 2 * math.pi * (turns * r + arm / 3)
    x = r[:, None] * torch.stack((angle.cos(), angle.sin()), 1)
    return (x + noise * torch.randn(n, 2)) / 0.45, arm


@program
def wine_small_batches() -> Training:
    """Wine, 13 columns, batches of 8, BN of momentum 0.01 before ReLU, SGD, cosine.

    54 held out: 96 %.
    """
    train, test = table(load_wine, 124)
    model = nn.Sequential(
        nn.Linear(13, 24, bias=False), nn.BatchNorm1d(24, momentum=0.01), nn.ReLU(),
        nn.Linear(24, 3),
    )  # fmt: skip
    optimizer = optim.SGD(decayed(model, 1e-3), 0.01, momentum=0.9)
    return supervised(
        model, train, test, optimizer, size=8, steps=1500, goal=0.92,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500),
    )  # fmt: skip


@program
def tumours_tanh() -> Training:
    """Breast cancer, 30 columns, tanh of 16 and 8 from Xavier, one logit, no norm.

    SGD nesterov with decay, batch 32; 169 held out: 96 %.
    """
    train, test = table(load_breast_cancer, 400)
    train, test = ((d[0], d[1].float()[:, None]) for d in (train, test))
    model = nn.Sequential(*dense(30, 16, 8, act=nn.Tanh), nn.Linear(8, 1))
    for each in model:
        if isinstance(each, nn.Linear):
            nn.init.xavier_uniform_(each.weight)
            nn.init.zeros_(each.bias)

    def right(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(data[0]) > 0
        return float((said == (data[1] > 0.5)).float().mean())

    optimizer = optim.SGD(
        model.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=1e-2
    )
    return supervised(
        model, train, test, optimizer, size=32, steps=400, goal=0.94, score=right,
        loss_fn=F.binary_cross_entropy_with_logits,
    )  # fmt: skip


@program
def diabetes_ridge() -> Training:
    """Diabetes, 10 columns, a linear model from 0 with decay 0.05, targets scaled.

    SGD with polynomial decay, batch 34; R² of 102 held out 0.40, as ridge has.
    """
    train, test = table(load_diabetes, 340)
    mean, std = train[1].mean(), train[1].std()
    train, test = (
        (d[0], ((d[1] - mean) / std).float()[:, None]) for d in (train, test)
    )
    model = nn.Linear(10, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = optim.SGD(decayed(model, 0.05), 0.02)
    return supervised(
        model, train, test, optimizer, size=34, steps=500, goal=0.35, score=r2,
        loss_fn=F.mse_loss,
        schedule=optim.lr_scheduler.PolynomialLR(optimizer, 501, 1.0),
    )  # fmt: skip


@program
def softmax_regression() -> Training:
    """Multinomial logistic regression of digits, weights from 0, SGD.

    Momentum 0.9, decay 1e-3, batch 100: 98 %.
    """
    train, test = (flat(d) for d in scaled_digits())
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    return supervised(model, train, test, optimizer, size=100, steps=300, goal=0.93)


@program
def sigmoid_hidden() -> Training:
    """One hidden layer of 40 sigmoids, Xavier, digits as rows, Adam, batch 50.

    97 %.
    """
    train, test = (flat(d) for d in scaled_digits())
    model = nn.Sequential(nn.Linear(64, 40), nn.Sigmoid(), nn.Linear(40, 10))
    for each in (model[0], model[2]):
        nn.init.xavier_normal_(each.weight)
        nn.init.zeros_(each.bias)
    optimizer = optim.Adam(model.parameters(), 5e-3, weight_decay=1e-5)
    return supervised(model, train, test, optimizer, size=50, steps=450, goal=0.93)


@program
def one_input() -> Training:
    """Curve of one input, leaky ReLU of 64, 64 and 32, Kaiming, Adam, cosine.

    Batch 128; R² 0.96, where noise leaves 0.96.
    """
    x = 4 * torch.rand(2400, 1) - 2
    clean = (3 * x).sin() + 0.5 * x
    y = clean + 0.15 * torch.randn_like(x)
    y = (y - y[:2000].mean()) / y[:2000].std()
    train, test = split(x / (4 / math.sqrt(12)), y, 2000)
    model = nn.Sequential(
        *dense(1, 64, 64, 32, act=lambda: nn.LeakyReLU(0.1)), nn.Linear(32, 1)
    )
    for each in model[:-1]:
        if isinstance(each, nn.Linear):
            nn.init.kaiming_normal_(each.weight, a=0.1)
    optimizer = optim.Adam(model.parameters(), 1.5e-3)
    return supervised(
        model, train, test, optimizer, size=128, steps=1000, goal=0.93, score=r2,
        loss_fn=F.mse_loss,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000),
    )  # fmt: skip


@program
def spiral_silu() -> Training:
    """Three arms of a spiral, SiLU of 48, 48 and 48, RMSprop, step decay, batch 100.

    100 %.
    """
    x, y = _arms(2600, 1.0, 0.02)
    train, test = split(x, y, 2000)
    model = nn.Sequential(*dense(2, 48, 48, 48, act=nn.SiLU), nn.Linear(48, 3))
    optimizer = optim.RMSprop(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=100, steps=700, goal=0.93,
        schedule=optim.lr_scheduler.StepLR(optimizer, 250, 0.4),
    )  # fmt: skip


@program
def deep_plain_batch_norm() -> Training:
    """Twelve plain layers of 48, linear, BN, ReLU from Kaiming, on a long spiral.

    SGD momentum 0.9, warmup and cosine, batch 128: 100 %.
    """
    x, y = _arms(3600, 1.2, 0.015)
    train, test = split(x, y, 3000)
    layers: list[nn.Module] = []
    for i in range(12):
        linear = nn.Linear(48 if i else 2, 48, bias=False)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.BatchNorm1d(48), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(48, 3))
    optimizer = optim.SGD(decayed(model, 1e-4), 0.02, momentum=0.9)
    return supervised(
        model, train, test, optimizer, size=128, steps=600, goal=0.95,
        schedule=warm_cosine(optimizer, 40, 600),
    )  # fmt: skip


@program
def norm_after_activation() -> Training:
    """Linear, ReLU, BN of momentum 0.3, twice; 12 columns, 4 classes, batch 256.

    AdamW with exponential decay: 94 %, where the best rule has 97 %.
    """
    n = 9000
    x = torch.randn(n, 12)
    merit = torch.stack(
        (x[:, 0] * x[:, 1], x[:, 2] + 0.5, x[:, 3].abs() - 0.5, x[:, 4] - x[:, 5]), 1
    )
    y = (merit + 0.05 * torch.randn(n, 4)).argmax(1)
    train, test = split(x, y, 8000)
    model = nn.Sequential(
        nn.Linear(12, 96), nn.ReLU(), nn.BatchNorm1d(96, momentum=0.3),
        nn.Linear(96, 48), nn.ReLU(), nn.BatchNorm1d(48, momentum=0.3),
        nn.Linear(48, 4),
    )  # fmt: skip
    optimizer = optim.AdamW(model.parameters(), 5e-3, weight_decay=0.02)
    return supervised(
        model, train, test, optimizer, size=256, steps=400, goal=0.85,
        schedule=optim.lr_scheduler.ExponentialLR(optimizer, 0.992),
    )  # fmt: skip


@program
def missing_values() -> Training:
    """Table with a fifth missing: the mean instead, and a column that says so.

    Layer norm, GELU, AdamW one-cycle, batch 64; R² 0.87, where the conditional mean
    has 0.89.
    """
    n, kept = 5000, 4200
    x = torch.randn(n, 8)
    x[:, 1] = 0.8 * x[:, 0] + 0.6 * x[:, 1]
    y = x[:, 0] + x[:, 1] + (2 * x[:, 2]).tanh() + 0.5 * x[:, 3] ** 2
    y = (y + 0.2 * torch.randn(n))[:, None]
    y = (y - y[:kept].mean()) / y[:kept].std()
    gone = torch.rand(n, 8) < 0.2
    mean = (x * ~gone)[:kept].sum(0) / (~gone)[:kept].sum(0)
    filled = torch.where(gone, mean, x)
    train, test = split(torch.cat((filled, gone.float()), 1), y, kept)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.05),
        nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 1),
    )  # fmt: skip
    optimizer = optim.AdamW(decayed(model, 0.01), 3e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=450, goal=0.6, score=r2,
        loss_fn=F.mse_loss,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=451),
    )  # fmt: skip


class _RmsBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.SiLU(),
            nn.Linear(2 * width, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@program
def arm_kinematics() -> Training:
    """Place of the hand of an arm of three joints, from its angles, residual RMS norm.

    Four blocks, Adam, warmup and cosine, batch 64; R² 0.998.
    """
    angle = (2 * torch.rand(4000, 3) - 1) * 2
    turned = angle.cumsum(1)
    reach = torch.tensor([1.0, 0.8, 0.5])
    y = torch.stack(((reach * turned.cos()).sum(1), (reach * turned.sin()).sum(1)), 1)
    y = (y - y[:3400].mean(0)) / y[:3400].std(0)
    train, test = split(angle / (2 / math.sqrt(3)), y, 3400)
    model = nn.Sequential(
        nn.Linear(3, 48), *(_RmsBlock(48) for _ in range(4)), nn.RMSNorm(48),
        nn.Linear(48, 2),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=450, goal=0.95, score=r2,
        loss_fn=F.mse_loss, clip=1.0, schedule=warm_cosine(optimizer, 30, 450),
    )  # fmt: skip


@program
def many_labels() -> Training:
    """Ten labels, three a row, of 30 columns, BCE, BN then dropout 0.2, Adam.

    Batch 80: balanced accuracy 0.93, where the best rule has 0.95.
    """
    n = 4500
    x = torch.randn(n, 30)
    rules = torch.randn(30, 10) * (torch.rand(30, 10) < 0.25)
    merit = x @ rules / rules.norm(dim=0).clamp(min=1e-6)
    y = (merit + 0.15 * torch.randn(n, 10) > 0.5).float()
    train, test = split(x, y, 3600)
    model = nn.Sequential(
        nn.Linear(30, 80, bias=False), nn.BatchNorm1d(80), nn.LeakyReLU(0.1),
        nn.Dropout(0.2), nn.Linear(80, 10),
    )  # fmt: skip

    def balanced(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = (net.eval()(data[0]) > 0).float()
        hit = (said * data[1]).sum(0) / data[1].sum(0)
        kept = ((1 - said) * (1 - data[1])).sum(0) / (1 - data[1]).sum(0)
        return float((hit + kept).mean() / 2)

    return supervised(
        model, train, test, optim.Adam(model.parameters(), 3e-3), size=80, steps=350,
        goal=0.85, loss_fn=F.binary_cross_entropy_with_logits, score=balanced,
    )  # fmt: skip


@program
def rare_class_weights() -> Training:
    """One row in 15 is positive; weighted cross entropy, BN with momentum None.

    The cumulative averages begin anew with each epoch of 25 batches of 128, as they
    are of weights of that epoch only. Adam: balanced accuracy 0.96.
    """
    n = 4200
    x = torch.randn(n, 12)
    merit = x[:, 0] * x[:, 1] + x[:, 2] + 0.5 * x[:, 3] ** 2
    y = (merit > merit.quantile(1 - 1 / 15)).long()
    train, test = split(x, y, 3200)
    model = nn.Sequential(
        nn.Linear(12, 64, bias=False), nn.BatchNorm1d(64, momentum=None), nn.ReLU(),
        nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32, momentum=None), nn.ReLU(),
        nn.Linear(32, 2),
    )  # fmt: skip
    counts = torch.bincount(train[1]).float()
    weight = counts.sum() / (2 * counts)
    loss_fn = nn.CrossEntropyLoss(weight)
    optimizer = optim.Adam(model.parameters(), 2e-3, weight_decay=1e-4)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    batches = endless(lambda: shuffled(train, 128))

    def step(i: int) -> float:
        model.train()
        if i % 25 == 0:
            for each in model:
                if isinstance(each, nn.BatchNorm1d):
                    each.reset_running_stats()
        x, y = next(batches)
        loss = update(optimizer, loss_fn(model(x), y))
        schedule.step()
        return loss

    def balanced() -> float:
        with torch.no_grad():
            said = model.eval()(test[0]).argmax(1)
        return sum(float((said[test[1] == c] == c).float().mean()) for c in (0, 1)) / 2

    return Training(
        [Subject(model, lambda: shuffled(train, 128), loss_fn, optimizer)],
        step, 400, balanced, 0.85,
    )  # fmt: skip

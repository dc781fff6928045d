"""Healthy programs on tables: regression, rare classes, ordinal, deep, float64."""

from __future__ import annotations

import math

import torch
from quiet_base import Subject, Training, digits, program, shuffled, split, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

Data = tuple[Tensor, Tensor]


def _r2(model: nn.Module, data: Data) -> float:
    model.eval()
    with torch.no_grad():
        left = (model(data[0])[:, :1] - data[1]).square().mean()
    return float(1 - left / data[1].var())


def _standard(x: Tensor, n: int) -> Tensor:
    """Return x standardized by its first n rows."""
    return (x - x[:n].mean(0)) / x[:n].std(0)


@program
def one_hot_table() -> Training:
    """Five numbers and two one-hot categories (one of 20 levels, some rare).

    BN1d MLP, Adam, batch 128: 88 % of a label that is drawn, so that nobody has 100
    %.
    """
    n = 3000
    numbers = torch.randn(n, 5) * torch.tensor([1.0, 3.0, 0.5, 1.0, 10.0])
    level = torch.multinomial(1 / torch.arange(1.0, 21.0), n, replacement=True)
    kind = torch.randint(4, (n,))
    effect, twist = torch.randn(20), torch.tensor([1.0, -1.0, 0.5, 0.0])
    logit = numbers[:, 0] * twist[kind] * 2 + effect[level] * 2 + numbers[:, 1] / 2
    y = (torch.rand(n) < torch.sigmoid(2 * logit)).long()
    x = torch.cat(
        (_standard(numbers, 2400), F.one_hot(level, 20), F.one_hot(kind, 4)), 1
    )
    train, test = split(x.float(), y, 2400)
    model = nn.Sequential(
        nn.Linear(29, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 3e-3, weight_decay=1e-5)
    return supervised(model, train, test, optimizer, size=128, steps=250, goal=0.8)


def _friedman(n: int) -> Data:
    """Return the regression of Friedman 1991: ten inputs, five of which matter."""
    x = torch.rand(n, 10)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y = y + 10 * x[:, 3] + 5 * x[:, 4] + torch.randn(n)
    return x, y[:, None]


@program
def regression_batch_norm() -> Training:
    """Friedman's function, standardized, MLP with batch norm, Adam step decay.

    Batch 64: R² 0.9.
    """
    x, y = _friedman(2500)
    train, test = split(_standard(x, 2000), _standard(y, 2000), 2000)
    model = nn.Sequential(
        nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=400, goal=0.88,
        loss_fn=F.mse_loss, score=_r2,
        schedule=optim.lr_scheduler.StepLR(optimizer, 150, 0.3),
    )  # fmt: skip


@program
def regression_layer_norm_adagrad() -> Training:
    """MLP with layer norm and MC dropout on Friedman's function, Adagrad.

    Smooth L1, batch 32; the mean of 30 draws has R² 0.93.
    """
    x, y = _friedman(2500)
    train, test = split(_standard(x, 2000), _standard(y, 2000), 2000)
    model = nn.Sequential(
        nn.Linear(10, 96), nn.LayerNorm(96), nn.GELU(), nn.Dropout(0.05),
        nn.Linear(96, 96), nn.LayerNorm(96), nn.GELU(), nn.Dropout(0.05),
        nn.Linear(96, 1),
    )  # fmt: skip

    def draws(net: nn.Module, data: Data) -> float:
        net.train()
        with torch.no_grad():
            mean = torch.stack([net(data[0]) for _ in range(30)]).mean(0)
        return float(1 - (mean - data[1]).square().mean() / data[1].var())

    return supervised(
        model, train, test, optim.Adagrad(model.parameters(), 0.02), size=32, steps=600,
        goal=0.85, loss_fn=F.smooth_l1_loss, score=draws,
    )  # fmt: skip


@program
def heteroscedastic_float64() -> Training:
    """One input, float64, tanh net without a norm gives mean and log variance.

    Gaussian NLL, Adam, batch 50: NLL -1.3, where a constant mean and variance have
    -0.8.
    """
    x = 4 * torch.rand(1500, 1).double() - 2
    std = 0.02 + 0.15 * (x + 2) / 2
    y = torch.sin(2 * x) + std * torch.randn_like(x)
    train, test = split(x, y, 1200)
    model = nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    ).double()

    def nll(out: Tensor, y: Tensor) -> Tensor:
        return F.gaussian_nll_loss(out[:, :1], y, out[:, 1:].exp(), eps=1e-6)

    def gained(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            return -float(nll(net.eval()(data[0]), data[1]))

    return supervised(
        model, train, test, optim.Adam(model.parameters(), 5e-3), size=50, steps=900,
        goal=0.5, loss_fn=nll, score=gained,
    )  # fmt: skip


@program
def one_in_hundred() -> Training:
    """Fraud table, 1 % positive, BN MLP, BCE with pos_weight 20, prior bias, AdamW.

    Batch 256: average precision 0.9, where chance has 0.01.
    """
    from sklearn.metrics import average_precision_score

    n = 12000
    y = (torch.rand(n) < 0.01).float()
    x = torch.randn(n, 12)
    x[:, :3] += 2.2 * y[:, None] * torch.tensor([1.0, -1.0, 1.0])
    x[:, 3] = x[:, 3].exp().log1p()
    train, test = split(x, y[:, None], 8000)
    model = nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1),
    )  # fmt: skip
    last = model[-1]
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias, math.log(20 * 0.01 / 0.99))
    weight = torch.tensor(20.0)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out, y, pos_weight=weight)

    def precision(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(data[0])
        return float(average_precision_score(data[1].numpy(), said.numpy()))

    return supervised(
        model, train, test, optim.AdamW(model.parameters(), 1e-3), size=256, steps=300,
        goal=0.75, score=precision,
        loss_fn=loss_fn,
    )  # fmt: skip


class _Thresholds(nn.Module):
    """A score under four ordered thresholds: logits of "above the k-th"."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 1, bias=False)
        )
        self.first = nn.Parameter(torch.tensor([-1.5]))
        self.steps = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        cuts = torch.cat((self.first, self.first + F.softplus(self.steps).cumsum(0)))
        return self.body(x) - cuts


@program
def ordinal() -> Training:
    """Five ordered grades by cumulative logits (CORAL), layer norm, Adam.

    Batch 32:     mean error 0.3 of a grade, where the median grade has 1.2.
    """
    x = torch.randn(2400, 8)
    latent = x[:, 0] + torch.sin(2 * x[:, 1]) + x[:, 2] * x[:, 3] / 2
    cuts = latent.quantile(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    above = (latent[:, None] + 0.2 * torch.randn(2400, 1) > cuts).float()
    train, test = split(x, above, 2000)

    def close(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            grade = (net.eval()(data[0]) > 0).sum(1)
        return -float((grade - data[1].sum(1)).abs().mean())

    model = _Thresholds()
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 5e-3), size=32, steps=500,
        goal=-0.5, score=close, loss_fn=F.binary_cross_entropy_with_logits,
    )  # fmt: skip


@program
def self_normalizing() -> Training:
    """Eight layers of SELU with alpha dropout, LeCun-normal weights, SGD, batch 32.

    The breast cancer table: 97 %.
    """
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(y))
    x, y = torch.tensor(x).float()[order], torch.tensor(y)[order]
    train, test = split(_standard(x, 420), y, 420)
    layers: list[nn.Module] = []
    for i in range(8):
        layers += [nn.Linear(48 if i else 30, 48), nn.SELU(), nn.AlphaDropout(0.02)]
    model = nn.Sequential(*layers, nn.Linear(48, 2))
    for each in model:
        if isinstance(each, nn.Linear):
            nn.init.kaiming_normal_(each.weight, nonlinearity="linear")
            nn.init.zeros_(each.bias)
    optimizer = optim.SGD(model.parameters(), 0.01, momentum=0.9)
    return supervised(model, train, test, optimizer, size=32, steps=300, goal=0.93)


class _Branch(nn.Module):
    """Pre-norm residual branch with LayerScale, as in CaiT and ConvNeXt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.grow, self.shrink = (
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.gamma = nn.Parameter(torch.full((width,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.shrink(F.gelu(self.grow(self.norm(x))))


@program
def deep_pre_norm() -> Training:
    """24 pre-norm residual blocks with LayerScale 1e-2, AdamW cosine with warmup.

    Batch 64, digits as rows: 97 %.
    """
    train, test = digits()
    train, test = ((d[0].flatten(1), d[1]) for d in (train, test))
    blocks = [_Branch(48) for _ in range(24)]
    model = nn.Sequential(
        nn.Linear(64, 48), *blocks, nn.LayerNorm(48), nn.Linear(48, 10)
    )
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    warm = optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    down = optim.lr_scheduler.CosineAnnealingLR(optimizer, 110)
    return supervised(
        model, train, test, optimizer, size=64, steps=130, goal=0.93, clip=1.0,
        schedule=optim.lr_scheduler.SequentialLR(optimizer, [warm, down], [20]),
    )  # fmt: skip


@program
def converged_two_inputs() -> Training:
    """Two moons without overlap, BN MLP of two inputs.

    Trained on long after the median loss is 0.02 (SGD, batch 16): 100 %.
    """
    from sklearn.datasets import make_moons

    x, y = make_moons(800, noise=0.08, random_state=3)
    train, test = split(torch.tensor(x).float(), torch.tensor(y), 600)
    model = nn.Sequential(
        nn.Linear(2, 24), nn.BatchNorm1d(24), nn.ReLU(),
        nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return supervised(model, train, test, optimizer, size=16, steps=1200, goal=0.99)


@program
def averaged_weights() -> Training:
    """SWA over the last half of training with SWALR and update_bn at its end.

    BN MLP, SGD, batch 64: the average has 98 %.
    """
    train, test = digits()
    train, test = ((d[0].flatten(1), d[1]) for d in (train, test))
    model = nn.Sequential(
        nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(),
        nn.Linear(96, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 10),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    average, rate = AveragedModel(model), SWALR(optimizer, 0.02, anneal_epochs=20)
    taken = 0

    def after() -> None:
        nonlocal taken
        taken += 1
        if taken > 150:
            rate.step()
            if taken % 10 == 0:
                average.update_parameters(model)
        if taken == 300:
            update_bn(shuffled(train, 64), average)

    def swa_accuracy(_: nn.Module, data: Data) -> float:
        with torch.no_grad():
            return float((average.eval()(data[0]).argmax(1) == data[1]).float().mean())

    final = Subject(
        average, lambda: shuffled(train, 64), F.cross_entropy, name="average",
        only_at_the_end=True,
    )  # fmt: skip
    return supervised(
        model, train, test, optimizer, size=64, steps=300, goal=0.94, after=after,
        score=swa_accuracy, extra=[final],
    )  # fmt: skip

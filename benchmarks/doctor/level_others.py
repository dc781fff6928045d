"""Healthy programs of further kinds: denoising, episodes, counts, forecasts."""

from __future__ import annotations

import itertools
import math

import torch
from calm_base import Data, conv_norm, r2, update, warm_cosine
from level_base import columns, layered, program
from quiet_base import Subject, Training, accuracy, shuffled, split, supervised
from steady_base import explained
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def noise_to_noise() -> Training:
    """Noisy pictures of waves as targets of other noisy ones, residual, BN, Adam.

    Batch 20: 90 % of the clean pictures' variance; the input explains 1 %.
    """
    n, side = 700, 16
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angle, rate = math.pi * torch.rand(n, 1, 1), 0.3 + 0.5 * torch.rand(n, 1, 1)
    along = angle.cos() * u + angle.sin() * v
    clean = (rate * along + 2 * math.pi * torch.rand(n, 1, 1)).sin()[:, None]
    noisy = clean + 0.7 * torch.randn_like(clean)
    again = clean + 0.7 * torch.randn_like(clean)
    train, _ = split(noisy, again, 600)
    test = (noisy[600:], clean[600:])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                conv_norm(1, 24), conv_norm(24, 24, 1, 5), conv_norm(24, 24, 1, 5),
                nn.Conv2d(24, 1, 3, 1, 1),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    def kept(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = (net.eval()(data[0]) - data[1]).square().mean()
        return float(1 - left / data[1].var())

    model = Net()
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=20, steps=150, goal=0.75,
        loss_fn=F.mse_loss, score=kept,
        schedule=optim.lr_scheduler.StepLR(optimizer, 60, 0.4),
    )  # fmt: skip


@program
def matching_network() -> Training:
    """Five new gratings from three examples each, four queries a class, cosines of 10.

    Each episode draws its classes; BN, Adam, step decay: 100 % on new classes.
    """
    u, v = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")

    def episode(_: int = 0) -> Data:
        angle = (torch.randperm(12)[:5] * math.pi / 12 + 0.1 * torch.rand(()))[:, None]
        rate = 0.6 + 0.9 * torch.rand(5, 1)
        angle = (angle + 0.05 * torch.randn(5, 7))[..., None, None]
        along = angle.cos() * u + angle.sin() * v
        phase = 2 * math.pi * torch.rand(5, 7, 1, 1)
        x = (rate[..., None, None] * along + phase).sin()
        x = x + 0.3 * torch.randn(5, 7, 12, 12)
        x = torch.cat((x[:, :3].flatten(0, 1), x[:, 3:].flatten(0, 1)))[:, None]
        return x, torch.arange(5).repeat_interleave(4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                conv_norm(1, 24), conv_norm(24, 32, 2), conv_norm(32, 32),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 32),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            z = F.normalize(self.body(x), dim=1)
            weight = (10 * z[15:] @ z[:15].T).softmax(1)
            return weight.unflatten(1, (5, 3)).sum(2).clamp(min=1e-8).log()

    model = Net()
    optimizer = optim.Adam(model.parameters(), 3e-3)
    schedule = optim.lr_scheduler.StepLR(optimizer, 150, 0.3)

    def step(_: int) -> float:
        model.train()
        x, y = episode()
        loss = update(optimizer, F.nll_loss(model(x), y))
        schedule.step()
        return loss

    def score() -> float:
        return sum(accuracy(model, episode()) for _ in range(60)) / 60

    subject = Subject(
        model, lambda: [episode() for _ in range(30)], F.nll_loss, optimizer
    )
    return Training([subject], step, 300, score, 0.8)


@program
def counted_discs() -> Training:
    """Count the 0 to 8 discs of a picture of 20 × 20 by the sum over places.

    Poisson loss, log rates, leaky ReLU, no norm, Adam: 97 % of the variance.
    """
    n = 1100
    count = torch.randint(9, (n,))
    u, v = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    x = 0.2 * torch.randn(n, 1, 20, 20)
    for k in range(8):
        at = 2 + 16 * torch.rand(n, 2, 1, 1)
        away = (u - at[:, 0]).square() + (v - at[:, 1]).square()
        x[:, 0] += (-away / 2).exp() * (count > k)[:, None, None]
    train, test = split((x - x.mean()) / x.std(), count.float(), 900)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(1, 16, 3, 1, 1), nn.LeakyReLU(0.1),
                nn.Conv2d(16, 24, 3, 2, 1),
                nn.LeakyReLU(0.1), nn.Conv2d(24, 24, 3, 1, 1), nn.LeakyReLU(0.1),
                nn.Conv2d(24, 1, 1),
            )  # fmt: skip
            nn.init.constant_(self.body[-1].bias, math.log(4 / 100))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).flatten(1).logsumexp(1)

    def told(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = (net.eval()(data[0]).exp() - data[1]).square().mean()
        return float(1 - left / data[1].var())

    model = Net()
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 3e-3), size=30, steps=200,
        goal=0.85, loss_fn=nn.PoissonNLLLoss(), score=told,
    )  # fmt: skip


class _Packed(nn.Module):
    """Four MLPs in one by scales of inputs and outputs (BatchEnsemble, TabM)."""

    def __init__(self, widths: tuple[int, ...], members: int) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairs)
        self.scales = nn.ParameterList(
            torch.randint(2, (members, 1, i)) * 2.0 - 1 if k == 0
            else 1 + 0.1 * torch.randn(members, 1, i)
            for k, (i, _) in enumerate(pairs)
        )  # fmt: skip
        self.heads = nn.Parameter(torch.randn(members, widths[-1], 1) * 0.1)
        self.bias = nn.Parameter(torch.zeros(members, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = x[None]
        for scale, layer in zip(self.scales, self.layers, strict=True):
            y = F.relu(layer(y * scale))
        return (y @ self.heads + self.bias)[..., 0]


@program
def packed_ensemble() -> Training:
    """Four MLPs that share matrices; each has its own loss, their mean is scored.

    Prices of 9 columns, standardized, no norm, AdamW, batch 64: 94 % of the variance.
    """
    n = 2600
    x = torch.randn(n, 9)
    y = 2 * x[:, 0] + (2 * x[:, 1]).sin() + x[:, 2] * x[:, 3] + x[:, 4].abs()
    y = y + 0.3 * torch.randn(n)
    y = (y - y[:2100].mean()) / y[:2100].std()
    train, test = columns(x, y, 2100)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y.expand_as(out))

    def kept(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = (net.eval()(data[0]).mean(0) - data[1]).square().mean()
        return 1 - float(left / data[1].var())

    model = _Packed((9, 64, 64), 4)
    optimizer = optim.AdamW(model.parameters(), 4e-3, weight_decay=3e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=350, goal=0.85, loss_fn=loss_fn,
        score=kept, schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 351),
    )  # fmt: skip


@program
def columns_as_tokens() -> Training:
    """FT-Transformer: ten numbers as tokens and a class token, pre-norm, AdamW.

    No decay of vectors, warm-up and cosine, batch 80: 91 % of the variance.
    """
    n = 3000
    x = torch.randn(n, 10)
    y = (
        x[:, 0]
        + x[:, 1] * x[:, 2].tanh()
        + (1.5 * x[:, 3]).sin()
        + 0.2 * torch.randn(n)
    )
    y = ((y - y[:2500].mean()) / y[:2500].std())[:, None]
    train, test = columns(x, y, 2500)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.3 * torch.randn(10, 24))
            self.bias = nn.Parameter(0.3 * torch.randn(10, 24))
            self.token = nn.Parameter(0.3 * torch.randn(1, 1, 24))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    24, 4, 48, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
            self.head = nn.Sequential(nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = x[..., None] * self.weight + self.bias
            y = torch.cat((self.token.expand(len(x), -1, -1), y), 1)
            for block in self.blocks:
                y = block(y)
            return self.head(y[:, 0])

    model = Net()
    optimizer = optim.AdamW(decayed(model, 0.01), 4e-3)
    return supervised(
        model, train, test, optimizer, size=80, steps=260, goal=0.85, score=explained,
        loss_fn=F.mse_loss, schedule=warm_cosine(optimizer, 25, 261),
    )  # fmt: skip


class _Forecast(nn.Module):
    """GRU encoder of 30 values, GRU decoder of 6 that feeds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(1, 32, batch_first=True)
        self.cell = nn.GRUCell(1, 32)
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, h = self.encoder(x[..., None])
        h, last, made = h[0], x[:, -1:], []
        for _ in range(6):
            h = self.cell(last, h)
            last = last + self.head(h)
            made.append(last)
        return torch.cat(made, 1)


@program
def forecast_decoder() -> Training:
    """Six further values of a standardized seasonal series, from 30, GRUs, AdamW, MSE.

    The decoder is fed what it made; clipped, batch 32: 90 % of the variance.
    """
    time = torch.arange(1500.0)
    series = (2 * math.pi * time / 12).sin() + 0.5 * (2 * math.pi * time / 30).cos()
    noise = torch.zeros(1500)
    for i in range(1, 1500):
        noise[i] = 0.7 * noise[i - 1] + 0.15 * torch.randn(())
    series = series + noise
    series = (series - series[:1100].mean()) / series[:1100].std()
    rows = series.unfold(0, 36, 1)
    train = (rows[:1060, :30], rows[:1060, 30:])
    test = (rows[1110:, :30], rows[1110:, 30:])
    model = _Forecast()
    optimizer = optim.AdamW(model.parameters(), 6e-3, weight_decay=1e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=260, goal=0.8, score=r2,
        loss_fn=F.mse_loss, clip=1.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 261),
    )  # fmt: skip


class _Reader(nn.Module):
    """Language model whose states are pooled for a classifier (ULMFiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.lstm = nn.LSTM(32, 48, batch_first=True)
        self.decode = nn.Linear(48, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.embed(x))[0]


class _Classifier(nn.Module):
    def __init__(self, reader: _Reader) -> None:
        super().__init__()
        self.embed, self.lstm = reader.embed, reader.lstm
        self.head = nn.Sequential(
            nn.BatchNorm1d(144), nn.Linear(144, 32), nn.ReLU(), nn.BatchNorm1d(32),
            nn.Dropout(0.1), nn.Linear(32, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(self.embed(x))[0]
        return self.head(torch.cat((y[:, -1], y.mean(1), y.amax(1)), 1))


@program
def language_model_tuned() -> Training:
    """Four styles of text of 40 words by the states of a language model (ULMFiT).

    Head first, the LSTM from step 60, vectors from 120, rates fall by 2.6; BN: 94 %.
    """
    chance = (2.0 * torch.randn(4, 40, 40)).softmax(2)

    def texts(n: int) -> Data:
        y = torch.randint(4, (n,))
        x = torch.randint(40, (n, 16))
        for t in range(1, 16):
            x[:, t] = torch.multinomial(chance[y, x[:, t - 1]], 1)[:, 0]
        return x, y

    reader = _Reader()
    adam = optim.Adam(reader.parameters(), 5e-3)
    every = texts(2000)
    for _ in range(6):
        for x, _ in shuffled(every, 40):
            logits = reader.decode(reader(x[:, :-1]))
            update(adam, F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()))
    train, test = texts(1500), texts(400)
    model = _Classifier(reader)
    parts = [model.embed, model.lstm, model.head]
    for part in parts[:2]:
        part.requires_grad_(False)
    taken = 0

    def thaw() -> None:
        nonlocal taken
        taken += 1
        if taken in (60, 120):
            parts[2 - taken // 60].requires_grad_(True)

    optimizer = optim.AdamW(layered(parts, 5e-3, 2.6), weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=30, steps=220, goal=0.85, clip=1.0,
        score=accuracy, after=thaw,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 221),
    )  # fmt: skip

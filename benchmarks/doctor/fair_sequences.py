"""Healthy programs on sequences: load, cells, words, chains, recurrences."""

from __future__ import annotations

import math

import torch
from calm_base import Data, r2, warm_cosine
from fair_base import program
from quiet_base import Training, accuracy, split, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Load(nn.Module):
    """A GRU over the last hours, and a linear head of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@program
def load_forecast() -> Training:
    """Forecast a load with days and a slow drift by an hour, from 24 and the clock.

    GRU of 32, no norm, Adam, clipped, batch 64, later hours held out: R² 0.98.
    """
    n = 2600
    hour = torch.arange(float(n))
    drift = torch.zeros(n)
    shocks = 0.1 * torch.randn(n)
    for i in range(1, n):
        drift[i] = 0.95 * drift[i - 1] + shocks[i]
    day = 2 * math.pi * hour / 24
    load = day.sin() + 0.5 * (2 * day + 1).cos() + drift
    load = (load - load[:2000].mean()) / load[:2000].std()
    rows = torch.stack((load, day.sin(), day.cos()), 1).unfold(0, 24, 1).mT[:-1]
    y = load[24:, None]
    train, test = split(rows, y, 2000)
    model = _Load()
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=250, goal=0.9, clip=1.0,
        loss_fn=F.mse_loss, score=r2,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip


class _NormedCell(nn.Module):
    """LSTM cell with layer norm of both sums and of the state (Ba et al. 2016)."""

    def __init__(self, i: int, width: int) -> None:
        super().__init__()
        self.of_input = nn.Linear(i, 4 * width, bias=False)
        self.of_state = nn.Linear(width, 4 * width, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(4 * width) for _ in range(2))
        self.norm, self.width = nn.LayerNorm(width), width
        nn.init.orthogonal_(self.of_state.weight)
        nn.init.constant_(self.norms[0].bias[width : 2 * width], 1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.width)
        for part in self.norms[0](self.of_input(x)).unbind(1):
            i, f, g, o = (part + self.norms[1](self.of_state(h))).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self.norm(c).tanh()
        return h


@program
def layer_norm_lstm() -> Training:
    """Tell whether A came before B among 12 symbols; LSTM with layer norm.

    AdamW, clipped, batch 50: 100 %.
    """
    n, length = 2000, 14
    x = torch.randint(2, 12, (n, length))
    first, second = torch.rand(n, length).topk(2, 1).indices.sort(1).values.T
    y, row = torch.randint(2, (n,)), torch.arange(n)
    x[row, first], x[row, second] = 1 - y, y
    train, test = split(x, y, 1600)
    model = nn.Sequential(nn.Embedding(12, 16), _NormedCell(16, 32), nn.Linear(32, 2))
    optimizer = optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=50, steps=200, goal=0.93, clip=1.0
    )


class _Bag(nn.Module):
    """The mean of the words' vectors, and a linear layer (fastText)."""

    def __init__(self, words: int, classes: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(words, 16, mode="mean", padding_idx=0)
        self.head = nn.Linear(16, classes)
        nn.init.uniform_(self.words.weight, -0.1, 0.1)
        with torch.no_grad():
            self.words.weight[0].zero_()
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x))


@program
def fast_text() -> Training:
    """Twelve topics of padded texts of 10 to 30 of 400 words, mean of vectors.

    Adam, linear decay, batch 32: 99 %, where the true distributions give 99.8.
    """
    n, words, topics = 3000, 400, 12
    chance = (1.3 * torch.randn(topics, words)).softmax(1)
    y = torch.randint(topics, (n,))
    x = 1 + torch.multinomial(chance[y], 30, replacement=True)
    x[torch.arange(30) >= torch.randint(10, 31, (n, 1))] = 0
    train, test = split(x, y, 2400)
    model = _Bag(words + 1, topics)
    optimizer = optim.Adam(model.parameters(), 0.02)
    return supervised(
        model, train, test, optimizer, size=32, steps=350, goal=0.9,
        schedule=optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 350),
    )  # fmt: skip


def _turned(x: Tensor) -> Tensor:
    """Turn pairs of features by angles that grow with the place (rotary)."""
    half = x.shape[-1] // 2
    rate = 100 ** (-torch.arange(half) / half)
    angle = torch.arange(x.shape[-2])[:, None] * rate
    a, b = x.chunk(2, -1)
    sin, cos = angle.sin(), angle.cos()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class _Rotary(nn.Module):
    """Pre-norm block: RMS norm, rotary causal attention, SwiGLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.grow = nn.Linear(width, 4 * width, bias=False)
        self.shrink = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.qkv(self.norms[0](x)).unflatten(2, (3, self.heads, -1))
        q, k, v = rows.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(_turned(q), _turned(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        a, b = self.grow(self.norms[1](x)).chunk(2, 2)
        return x + self.shrink(F.silu(a) * b)


@program
def second_order_chain() -> Training:
    """Rotary language model, RMS norm, SwiGLU: the last two of 8 tokens give the next.

    In 90 % of the places. AdamW (0.9, 0.95), warmup and cosine, clipped, batch 64:
    91 % of the tokens after the second, the most that is possible.
    """
    n, length = 2400, 16
    table, row = torch.randint(8, (8, 8)), torch.arange(n)
    text = torch.randint(8, (n, length + 1))
    is_told = torch.rand(n, length + 1) < 0.9
    for i in range(2, length + 1):
        told = table[text[row, i - 2], text[row, i - 1]]
        text[:, i] = torch.where(is_told[:, i], told, text[:, i])
    train, test = split(text[:, :-1], text[:, 1:], 2000)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    def right(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            said = net(data[0]).argmax(2)
        return float((said == data[1])[:, 1:].float().mean())

    model = nn.Sequential(
        nn.Embedding(8, 32), _Rotary(32, 2), _Rotary(32, 2), nn.RMSNorm(32),
        nn.Linear(32, 8, bias=False),
    )  # fmt: skip
    nn.init.normal_(model[0].weight, std=0.5)
    optimizer = optim.AdamW(
        model.parameters(), 5e-3, betas=(0.9, 0.95), weight_decay=0.05
    )
    return supervised(
        model, train, test, optimizer, size=64, steps=250, goal=0.85, clip=1.0,
        loss_fn=loss_fn, score=right, schedule=warm_cosine(optimizer, 25, 250),
    )  # fmt: skip


class _Repeated(nn.Module):
    """An LSTM reads a series; another writes it from the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.LSTM(2, 32, batch_first=True)
        self.code, self.start = nn.Linear(32, 6), nn.Linear(6, 32)
        self.write = nn.LSTM(32, 32, batch_first=True)
        self.out = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        code = self.code(self.read(x)[0][:, -1])
        rows = self.start(code)[:, None].expand(-1, x.shape[1], -1)
        return self.out(self.write(rows)[0])


@program
def series_autoencoder() -> Training:
    """LSTM autoencoder, code of 6, of two sensors that swing together, 16 steps.

    Adam, cosine, clipped, batch 50: 98 % of the variance.
    """
    n, time = 1500, torch.arange(16.0)
    rate, phase = 0.25 + 0.3 * torch.rand(n, 1), 2 * math.pi * torch.rand(n, 1)
    height = 0.5 + torch.rand(n, 1)
    x = torch.stack(
        (height * (rate * time + phase).sin(), height * (rate * time + phase).cos()), 2
    )
    x = x + 0.05 * torch.randn(n, 16, 2)
    x = (x - x[:1200].mean((0, 1))) / x[:1200].std((0, 1))
    train, test = split(x, x, 1200)
    model = _Repeated()
    optimizer = optim.Adam(model.parameters(), 1e-2)
    return supervised(
        model, train, test, optimizer, size=50, steps=400, goal=0.85, clip=1.0,
        loss_fn=F.mse_loss, score=r2,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 400),
    )  # fmt: skip


class _Diagonal(nn.Module):
    """Layer norm, decaying averages of each feature, GLU, residual (after S4D)."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        rate = torch.logspace(-2, 0, width).log()
        self.log_rate = nn.Parameter(rate)
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        rate = self.log_rate.exp()
        kernel = (-rate * torch.arange(self.length)[:, None]).exp() * rate
        spectrum = torch.fft.rfft(kernel, 2 * self.length, 0)
        y = torch.fft.rfft(self.norm(x), 2 * self.length, 1) * spectrum
        y = torch.fft.irfft(y, 2 * self.length, 1)[:, : self.length]
        return x + F.glu(self.mix(F.gelu(y)), 2)


class _Long(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.first = nn.Linear(2, 32)
        self.layers = nn.Sequential(_Diagonal(32, length), _Diagonal(32, length))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.first(x))).mean(1))


@program
def long_averages() -> Training:
    """In 80 steps, how fast a pulse on one channel is answered on the other: 3 kinds.

    Diagonal recurrence by FFT, layer norm, AdamW, cosine, batch 32: 93 %.
    """
    n, length = 1600, 80
    y, time = torch.randint(3, (n,)), torch.arange(float(length))
    pulses = (torch.rand(n, length) < 0.05).float()
    fade = torch.tensor([0.5, 0.15, 0.05])[y, None]
    kernel = (-fade * time).exp() * (2 * fade).sqrt()
    answer = torch.fft.irfft(
        torch.fft.rfft(pulses, 2 * length) * torch.fft.rfft(kernel, 2 * length)
    )[:, :length]
    x = torch.stack((pulses, answer + 0.15 * torch.randn(n, length)), 2)
    x = (x - x[:1300].mean((0, 1))) / x[:1300].std((0, 1))
    train, test = split(x, y, 1300)
    model = _Long(length)
    optimizer = optim.AdamW(model.parameters(), 1e-2, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=32, steps=300, goal=0.9, score=accuracy,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip

"""Healthy programs on sequences: cells, gates and attention written by hand."""

from __future__ import annotations

import math

import torch
from calm_base import Data
from plain_base import program
from quiet_base import Training, split, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _LongMemory(nn.Module):
    """LSTM by hand: orthogonal recurrent weights, bias 1 of the forget gate."""

    def __init__(self, i: int, hidden: int, o: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.x2h = nn.Linear(i, 4 * hidden)
        self.h2h = nn.Linear(hidden, 4 * hidden, bias=False)
        self.out = nn.Linear(hidden, o)
        nn.init.xavier_uniform_(self.x2h.weight)
        nn.init.zeros_(self.x2h.bias)
        with torch.no_grad():
            self.x2h.bias[hidden : 2 * hidden] = 1
            for block in self.h2h.weight.chunk(4):
                nn.init.orthogonal_(block)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.hidden)
        c = torch.zeros_like(h)
        for t in range(x.shape[1]):
            i, f, g, o = (self.x2h(x[:, t]) + self.h2h(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.out(h)


@program
def deepest_bracket() -> Training:
    """Tell how far a walk of 16 steps rose (0 to 6), LSTM by hand, Adam, clipped.

    Batch 64: held out 98 %.
    """
    n = 5000
    steps = 2 * torch.randint(2, (n, 16)) - 1
    top = steps.cumsum(1).amax(1).clamp(0, 6)
    train, test = split(F.one_hot((steps + 1) // 2, 2).float(), top, 4400)
    model = _LongMemory(2, 32, 7)
    optimizer = optim.Adam(model.parameters(), 1e-2)
    return supervised(
        model, train, test, optimizer, size=64, steps=400, goal=0.9, clip=1.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 400),
    )  # fmt: skip


class _Gated(nn.Module):
    """GRU by hand; where a sequence has ended its state stays."""

    def __init__(self, words: int, hidden: int, o: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.embed = nn.Embedding(words, 12, padding_idx=0)
        self.gates = nn.Linear(12 + hidden, 2 * hidden)
        self.new = nn.Linear(12 + hidden, hidden)
        self.out = nn.Linear(hidden, o)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.zeros(len(tokens), self.hidden)
        x = self.embed(tokens)
        for t in range(tokens.shape[1]):
            both = torch.cat((x[:, t], h), 1)
            r, z = torch.sigmoid(self.gates(both)).chunk(2, 1)
            n = torch.tanh(self.new(torch.cat((x[:, t], r * h), 1)))
            h = torch.where(tokens[:, t : t + 1] > 0, (1 - z) * n + z * h, h)
        return self.out(h)


@program
def after_the_marker() -> Training:
    """Tell which of 5 letters follows the last of two markers, padded rows of 6 to 14.

    GRU by hand with a mask, Adam, batch 50: held out 100 %.
    """
    n, length = 4500, 14
    x = torch.randint(2, 7, (n, length))
    ends, rows = torch.randint(6, length + 1, (n,)), torch.arange(n)
    first = (torch.rand(n) * (ends - 4)).long()
    last = first + 2 + (torch.rand(n) * (ends - first - 3)).long()
    x[rows, first] = x[rows, last] = 1
    y = x[rows, last + 1] - 2
    x[torch.arange(length) >= ends[:, None]] = 0
    train, test = split(x, y, 4000)
    model = _Gated(7, 40, 5)
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=400, goal=0.93, clip=1.0
    )


class _Quasi(nn.Module):
    """Quasi-recurrent layer: gates by a causal convolution, then a running mixture."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(i, 3 * o, 3)

    def forward(self, x: Tensor) -> Tensor:
        z, f, o = self.conv(F.pad(x, (2, 0))).chunk(3, 1)
        z, f, o = torch.tanh(z), torch.sigmoid(f), torch.sigmoid(o)
        c, states = torch.zeros_like(z[:, :, 0]), []
        for t in range(x.shape[2]):
            c = f[:, :, t] * c + (1 - f[:, :, t]) * z[:, :, t]
            states.append(c)
        return o * torch.stack(states, 2)


class _QuasiNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = _Quasi(1, 24), _Quasi(24, 24)
        self.out = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer2(self.layer1(x))[:, :, -1])


@program
def order_of_pulses() -> Training:
    """Signs of two pulses in 30 noisy values, in order: 4 kinds; QRNN, RMSprop.

    Batch 32: held out 100 %.
    """
    n, time = 2000, torch.arange(30.0)
    y = torch.randint(4, (n,))
    first, second = 3 + 9 * torch.rand(n, 1), 17 + 9 * torch.rand(n, 1)
    signs = torch.stack((y // 2, y % 2), 1) * 2.0 - 1
    x = 2 * signs[:, :1] * (-((time - first) ** 2) / 2).exp()
    x = x + 2 * signs[:, 1:] * (-((time - second) ** 2) / 2).exp()
    x = x + 0.4 * torch.randn(n, 30)
    train, test = split((x / x[:1600].std())[:, None], y, 1600)
    model = _QuasiNet()
    optimizer = optim.RMSprop(model.parameters(), 3e-3)
    return supervised(model, train, test, optimizer, size=32, steps=300, goal=0.93)


class _GatedConvs(nn.Module):
    """Language model of causal convolutions with linear gates and residuals."""

    def __init__(self, letters: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 3) for _ in range(3))
        self.out = nn.Linear(width, letters)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mT
        for conv in self.convs:
            h, gate = conv(F.pad(x, (2, 0))).chunk(2, 1)
            x = (x + h * torch.sigmoid(gate)) * math.sqrt(0.5)
        return self.out(x.mT)


@program
def gated_letters() -> Training:
    """Next letter of a text of 16 words (3 to 6 of 10 letters) by gated convolutions.

    No norm, Adam, one cycle, batches of 24 rows of 32: held out 74 % of
    letters, where who knows all words and their starts reaches 76 %.
    """
    words = [torch.randint(1, 11, (3 + i % 4,)) for i in range(16)]
    space, n, length = torch.zeros(1, dtype=torch.long), 900, 32
    drawn = torch.randint(16, (9000,)).tolist()
    text = torch.cat([torch.cat((words[w], space)) for w in drawn])
    rows = text[: n * (length + 1)].reshape(n, length + 1)
    train, test = split(rows[:, :-1], rows[:, 1:], 700)
    model = _GatedConvs(11, 40)
    optimizer = optim.Adam(model.parameters(), 8e-3)
    return supervised(
        model, train, test, optimizer, size=24, steps=300, goal=0.7,
        loss_fn=lambda out, t: F.cross_entropy(out.flatten(0, 1), t.flatten()),
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=301),
    )  # fmt: skip


class _Pointer(nn.Module):
    """Attention by hand whose scores point at a member of a padded set."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key1, self.key2 = nn.Linear(2, width), nn.Linear(width, width)
        self.query1, self.query2 = nn.Linear(2, width), nn.Linear(width, width)
        self.scale = width**-0.5

    def forward(self, points: Tensor, query: Tensor, is_there: Tensor) -> Tensor:
        k = self.key2(F.relu(self.key1(points)))
        q = self.query2(F.relu(self.query1(query)))
        scores = (k @ q[:, :, None])[:, :, 0] * self.scale
        return scores.masked_fill(~is_there, -torch.inf)


@program
def nearest_pointer() -> Training:
    """Tell which of 3 to 8 points is nearest to one more; products, AdamW, cosine.

    Padded places are masked, batch 64: held out 95 %.
    """
    n = 6000
    points, query = torch.randn(n, 8, 2), torch.randn(n, 2)
    is_there = torch.arange(8) < torch.randint(3, 9, (n, 1))
    away = (points - query[:, None]).norm(dim=2).masked_fill(~is_there, torch.inf)
    points = points * is_there[:, :, None]
    train, test = split((points, query, is_there), away.argmin(1), 5200)
    model = _Pointer(64)
    optimizer = optim.AdamW(model.parameters(), 5e-3, weight_decay=1e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=600, goal=0.88,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 600),
    )  # fmt: skip


class _Wave(nn.Module):
    """WaveNet: dilated causal convolutions with tanh and sigmoid gates, skips."""

    def __init__(self, width: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 1)
        self.dilations = dilations
        self.gates = nn.ModuleList(
            nn.Conv1d(width, 2 * width, 2, dilation=d) for d in dilations
        )
        self.mixes = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in dilations)
        self.out1, self.out2 = nn.Conv1d(width, width, 1), nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for d, gates, mix in zip(self.dilations, self.gates, self.mixes, strict=True):
            a, b = gates(F.pad(x, (d, 0))).chunk(2, 1)
            left, skip = mix(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
            x = x + left
            skips.append(skip)
        return self.out2(F.relu(self.out1(F.relu(torch.stack(skips).sum(0)))))


@program
def wave_net() -> Training:
    """WaveNet gives the next of 48 values of two summed waves with noise of 0.1; MSE.

    Adam, step decay, batch 16: R² from the 17th value on 0.95.
    """
    n, time = 800, torch.arange(49.0)
    rate = torch.tensor([0.35, 0.8]) + 0.06 * torch.randn(n, 2)
    phase = rate[:, :, None] * time + 2 * math.pi * torch.rand(n, 2, 1)
    x = phase.sin().sum(1, keepdim=True) + 0.1 * torch.randn(n, 1, 49)
    train, test = split(x[:, :, :-1], x[:, :, 1:], 650)

    def score(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            left = (net(data[0]) - data[1])[:, :, 16:].square().mean()
        return float(1 - left / data[1][:, :, 16:].var())

    model = _Wave(20, (1, 2, 4, 8))
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=16, steps=300, goal=0.93,
        loss_fn=F.mse_loss, score=score,
        schedule=optim.lr_scheduler.StepLR(optimizer, 120, 0.4),
    )  # fmt: skip


class _Names(nn.Module):
    """The RNN of tutorials: one linear layer of letter and state, tanh."""

    def __init__(self, letters: int, hidden: int, o: int) -> None:
        super().__init__()
        self.letters, self.hidden = letters, hidden
        self.i2h = nn.Linear(letters + hidden, hidden)
        self.h2o = nn.Linear(hidden, o)

    def forward(self, names: Tensor, ends: Tensor) -> Tensor:
        x = F.one_hot(names, self.letters).float()
        h = torch.zeros(len(names), self.hidden)
        for t in range(names.shape[1]):
            new = torch.tanh(self.i2h(torch.cat((x[:, t], h), 1)))
            h = torch.where(ends[:, None] > t, new, h)
        return self.h2o(h)


@program
def names_of_tongues() -> Training:
    """Names of 4 to 9 letters; their last two tell 5 tongues, a tenth is borrowed.

    Tanh RNN by hand, Adam, cosine, batch 64: held out 0.93 of 0.92 that the borrowed
    ones leave.
    """
    n, letters, length = 4000, 10, 9
    y, rows = torch.randint(5, (n,)), torch.arange(n)
    tongue = torch.where(torch.rand(n) < 0.1, torch.randint(5, (n,)), y)
    pairs = torch.randperm(100)[:15].reshape(5, 3)
    pair = pairs[tongue, torch.randint(3, (n,))]
    names, ends = torch.randint(letters, (n, length)), torch.randint(4, 10, (n,))
    names[rows, ends - 2], names[rows, ends - 1] = pair // 10, pair % 10
    train, test = split((names, ends), y, 3400)
    model = _Names(letters, 64, 5)
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=500, goal=0.85, clip=1.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 500),
    )  # fmt: skip

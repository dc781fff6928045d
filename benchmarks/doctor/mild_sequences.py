"""Healthy programs on sequences: sounds, forecasts, words."""

from __future__ import annotations

import math
from typing import Any

import torch
from calm_base import Data, r2, warm_cosine
from mild_base import program
from quiet_base import Training, accuracy, split, supervised
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class _Spotter(nn.Module):
    """Packed bidirectional GRU, its outputs averaged over the frames there are."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.GELU())
        self.rnn = nn.GRU(24, 24, batch_first=True, bidirectional=True)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(48, 5)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.enter(frames), lengths, batch_first=True, enforce_sorted=False
        )
        y = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]
        return self.head(self.drop(y.sum(1) / lengths[:, None]))


@program
def keyword_spotting() -> Training:
    """Five words of three sounds each, 12 to 27 frames, by a packed BiGRU.

    Layer norm of frames, dropout before the head, Adam, clipped, batch 40: 99 %.
    """
    n, most = 1500, 27
    words = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 3], [2, 3, 0], [3, 1, 0]])
    y = torch.randint(5, (n,))
    spans = torch.randint(4, 10, (n, 3))
    ends, lengths = spans.cumsum(1), spans.sum(1)
    time = torch.arange(most)
    part = (time >= ends[:, :2, None]).sum(1)
    sound = words[y].gather(1, part)
    x = torch.randn(4, 8)[sound] + 0.8 * torch.randn(n, most, 8)
    x = x / 1.28 * (time < lengths[:, None])[:, :, None]
    train, test = split((x, lengths), y, 1200)
    model = _Spotter()
    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=40, steps=150, goal=0.93, clip=1.0,
    )  # fmt: skip


class _Inception(nn.Module):
    """Convolutions of three widths side by side, BN after them together."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv1d(i, o, 1, bias=False) if i > 1 else nn.Identity()
        i = o if i > 1 else 1
        self.convs = nn.ModuleList(
            nn.Conv1d(i, o, k, padding=k // 2, bias=False) for k in (3, 7, 15)
        )
        self.norm = nn.BatchNorm1d(3 * o)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return F.relu(self.norm(torch.cat([conv(x) for conv in self.convs], 1)))


class _InceptionTime(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(_Inception(1, 8), _Inception(24, 8))
        self.last = _Inception(24, 8)
        self.short = nn.Sequential(nn.Conv1d(1, 24, 1, bias=False), nn.BatchNorm1d(24))
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.blocks(x))
        return self.head(F.relu(y + self.short(x)).mean(2))


@program
def inception_time() -> Training:
    """InceptionTime tells five shapes of pulses at unknown times, noise 0.3.

    BN, Adam, cosine, batch 64, each series scaled by up to 15 %: 100 %.
    """
    n, time = 1800, torch.arange(64.0)
    y = torch.randint(5, (n,))
    u = (time - (18 + 28 * torch.rand(n, 1))) / (5 + 2 * torch.rand(n, 1))
    bell = torch.exp(-u.square())
    box, saw = (u.abs() < 1) * 1.0, (u.abs() < 1) * (u + 1)
    waves = torch.stack((bell, box, saw, bell * (4 * u).sin(), -u * bell * 2), 1)
    x = 1.5 * waves[torch.arange(n), y] + 0.3 * torch.randn(n, 64)
    x = ((x - x[:1400].mean()) / x[:1400].std())[:, None]
    train, test = split(x, y, 1400)

    def change(batch: Data) -> Data:
        return batch[0] * (1 + 0.3 * (torch.rand(len(batch[1]), 1, 1) - 0.5)), batch[1]

    model = _InceptionTime(5)
    optimizer = optim.Adam(model.parameters(), 1e-2)
    return supervised(
        model, train, test, optimizer, size=64, steps=180, goal=0.93, change=change,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 180),
    )  # fmt: skip


class _Beats(nn.Module):
    """Blocks that each take their part of the past away and add to the forecast."""

    def __init__(self, past: int, ahead: int, blocks: int, width: int) -> None:
        super().__init__()
        self.past = past
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(past, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                nn.Linear(width, past + ahead),
            )
            for _ in range(blocks)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for block in self.blocks:
            y = block(x)
            x, total = x - y[:, : self.past], total + y[:, self.past :]
        return total


@program
def n_beats() -> Training:
    """N-BEATS, three blocks without norms: 8 further values of a season with trend.

    Windows of 36 less their last value, Adam, step decay, smooth L1, batch 96; R²
    0.97 on the later part.
    """
    t = torch.arange(3000.0)
    x = (2 * math.pi * t / 18).sin() + 0.5 * (2 * math.pi * t / 7.3).cos()
    walk = torch.zeros(3000)
    for i in range(1, 3000):
        walk[i] = 0.98 * walk[i - 1] + 0.06 * torch.randn(())
    windows = (x + walk + 0.1 * torch.randn(3000)).unfold(0, 44, 1)
    windows = windows - windows[:, 35:36]
    windows = windows / windows[:2400].std()
    past, ahead = windows[:, :36], windows[:, 36:]
    model = _Beats(36, 8, 3, 64)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, (past[:2400], ahead[:2400]), (past[2450:], ahead[2450:]), optimizer,
        size=96, steps=400, goal=0.85, score=r2, loss_fn=F.smooth_l1_loss,
        schedule=optim.lr_scheduler.StepLR(optimizer, 150, 0.3),
    )  # fmt: skip


class _SkipGram(nn.Module):
    """Products of a word's vector with the output vectors of some other words."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Embedding(words, width), nn.Embedding(words, width)
        nn.init.uniform_(self.enter.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.leave.weight)

    def forward(self, word: Tensor, others: Tensor) -> Tensor:
        return (self.leave(others) * self.enter(word)[:, None]).sum(2)


@program
def skip_gram() -> Training:
    """Word2vec with 5 negatives on a text whose topic lasts about 20 of 80 words.

    Adam, linear decay, batch 256: 100 % of nearest words share the topic (8 topics).
    """
    words, topics, n = 80, 8, 12000
    is_new = torch.rand(n) < 0.05
    topic = torch.randint(topics, (n,))[is_new.cumsum(0)]
    own = topic * 10 + torch.randint(10, (n,))
    text = torch.where(torch.rand(n) < 0.7, own, torch.randint(words, (n,)))
    word = text[2:-2].repeat(4)
    near = torch.cat((text[:-4], text[1:-3], text[3:-1], text[4:]))
    rare = torch.bincount(text, minlength=words).float().pow(0.75)
    away = torch.multinomial(rare, 5 * len(word), replacement=True).reshape(-1, 5)
    others = torch.cat((near[:, None], away), 1)
    y = torch.zeros(others.shape)
    y[:, 0] = 1
    train, test = split((word, others), y, len(word))[0], ()

    def same(net: Any, _: Data) -> float:
        with torch.no_grad():
            v = F.normalize(net.enter.weight, dim=1)
        likeness = (v @ v.T).fill_diagonal_(-1)
        return float(
            (likeness.argmax(1) // 10 == torch.arange(words) // 10).float().mean()
        )

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(out, y, reduction="none")
        return each.sum(1).mean()

    model = _SkipGram(words, 16)
    optimizer = optim.Adam(model.parameters(), 1e-2)
    return supervised(
        model, train, test, optimizer, size=256, steps=400, goal=0.9,
        loss_fn=loss_fn, score=same,
        schedule=optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 400),
    )  # fmt: skip


class _Auto(nn.Module):
    """GRU that gives mean and deviation of the next value of each series."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = self.head(self.rnn(x)[0]).unbind(2)
        return mean, F.softplus(deviation) + 1e-3


@program
def deep_ar() -> Training:
    """DeepAR: mean and deviation of the next value, Gaussian likelihood, Adam.

    Noise depends on the hour, which is an input; clipped, batch 32. -0.53 nats, where
    the truth has -0.52.
    """
    n, length = 900, 41
    hour = (torch.randint(12, (n, 1)) + torch.arange(length)) % 12
    angle = 2 * math.pi * hour / 12
    deviation = 0.15 + 0.35 * (1 + angle.sin()) / 2
    x = torch.randn(n, length)
    for i in range(2, length):
        noise = deviation[:, i] * torch.randn(n)
        x[:, i] = 1.2 * x[:, i - 1] - 0.5 * x[:, i - 2] + noise
    x = x / x.std()
    inputs = torch.stack((x[:, :-1], angle[:, 1:].sin()), 2)
    train, test = split(inputs, x[:, 1:], 760)

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        mean, deviation = out
        each = ((y - mean) / deviation).square() / 2 + deviation.log()
        return each[:, 5:].mean() + 0.919

    def likely(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            return -float(loss_fn(net.eval()(data[0]), data[1]))

    model = _Auto(24)
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 5e-3), size=32, steps=250,
        goal=-0.55, loss_fn=loss_fn, score=likely, clip=1.0,
    )  # fmt: skip


class _Reader(nn.Module):
    """Post-norm encoder with a mask of padding; the first place gives the answer."""

    def __init__(self, words: int, longest: int, width: int, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.place = nn.Parameter(0.5 * torch.randn(longest, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for each in self.layers.parameters():
            if each.ndim > 1:
                nn.init.xavier_uniform_(each)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x) + self.place
        y = self.layers(y, src_key_padding_mask=x == 0)
        return self.head(y[:, 0])


@program
def marked_word() -> Training:
    """Which of 8 words follows the marker, in padded rows of 6 to 12; post-norm.

    AdamW, warmup and cosine, clipped, batch 64: 100 %.
    """
    n, longest = 3200, 13
    lengths = torch.randint(6, longest, (n,))
    x = torch.randint(3, 11, (n, longest))
    place = 1 + (torch.rand(n) * (lengths - 2)).long()
    row = torch.arange(n)
    x[row, place] = 2
    y = x[row, place + 1] - 3
    x = x * (torch.arange(longest) < lengths[:, None])
    x[:, 0] = 1
    train, test = split(x, y, 2800)
    model = _Reader(11, longest, 32, 8)
    optimizer = optim.AdamW(decayed(model, 0.01), 3e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=400, goal=0.93, clip=1.0,
        score=accuracy, schedule=warm_cosine(optimizer, 60, 400),
    )  # fmt: skip

"""Healthy programs on reviews, waves and series, after well-known examples."""

from __future__ import annotations

import math

import torch
from calm_base import r2
from quiet_base import Training, split, supervised
from steady_base import program
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence


class _Cells(nn.Module):
    """Two LSTM cells by hand over the values of a wave; the next value at each."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm1, self.lstm2 = nn.LSTMCell(1, 32), nn.LSTMCell(32, 32)
        self.linear = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        h1 = c1 = h2 = c2 = torch.zeros(len(x), 32)
        outputs = []
        for value in x.split(1, 1):
            h1, c1 = self.lstm1(value, (h1, c1))
            h2, c2 = self.lstm2(h1, (h2, c2))
            outputs.append(self.linear(h2))
        return torch.cat(outputs, 1)


@program
def time_sequence_prediction() -> Training:
    """Two hand-run LSTM cells tell the next value of sines, Adam, MSE, batch 20.

    After pytorch/examples: R² 0.99 held out over all places of a wave.
    """
    phase, period = torch.rand(500, 1) * 6.28, 16 + 8 * torch.rand(500, 1)
    wave = (2 * math.pi * torch.arange(36.0) / period + phase).sin()
    wave = wave + 0.02 * torch.randn_like(wave)
    train, test = split(wave[:, :-1], wave[:, 1:], 400)
    model = _Cells()
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=20, steps=160, goal=0.94,
        loss_fn=F.mse_loss, score=r2, clip=1.0,
    )  # fmt: skip


def _reviews(n: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return padded words, lengths and whether more words please than displease.

    Words 1 to 8 please, 9 to 16 do not, 17 to 20 turn the next one around.
    """
    lengths = torch.randint(longest // 3, longest + 1, (n,))
    kind = torch.rand(n, longest)
    lean = 0.15 + 0.15 * torch.rand(n, 1)
    lean = torch.where(torch.rand(n, 1) < 0.5, lean, 0.45 - lean)
    x = torch.randint(21, 61, (n, longest))
    x = torch.where(kind < lean, torch.randint(1, 9, (n, longest)), x)
    bad = (kind >= lean) & (kind < 0.45)
    x = torch.where(bad, torch.randint(9, 17, (n, longest)), x)
    x = torch.where(kind > 0.92, torch.randint(17, 21, (n, longest)), x)
    x = x * (torch.arange(longest) < lengths[:, None])
    sign = ((x >= 1) & (x <= 8)).float() - ((x >= 9) & (x <= 16)).float()
    turned = F.pad((x >= 17) & (x <= 20), (1, 0))[:, :-1]
    total = (sign * torch.where(turned, -1.0, 1.0)).sum(1)
    keep = total != 0
    return x[keep], lengths[keep], (total[keep] > 0).long()


class _BiRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 24, padding_idx=0)
        self.encoder = nn.LSTM(24, 24, 2, bidirectional=True, batch_first=True)
        self.decoder = nn.Linear(48, 2)
        for name, p in self.encoder.named_parameters():
            if "weight" in name:
                nn.init.xavier_uniform_(p)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        h = self.encoder(packed)[1][0]
        return self.decoder(torch.cat((h[-2], h[-1]), 1))


@program
def sentiment_bidirectional() -> Training:
    """Packed two-layer BiLSTM with Xavier weights, Adam, batch 64, as d2l's BiRNN.

    Reviews of 8 to 24 words with words that turn the next: 93 % held out.
    """
    x, lengths, y = _reviews(6000, 24)
    train, test = split((x, lengths), y, 4800)
    model = _BiRNN()
    optimizer = optim.Adam(model.parameters(), 1e-2)
    return supervised(
        model, train, test, optimizer, size=64, steps=160, goal=0.88, clip=1.0
    )


class _Reader(nn.Module):
    """Embedded words and places, one post-norm block, mean over words, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(61, 32, padding_idx=0)
        self.places = nn.Embedding(20, 32)
        nn.init.normal_(self.places.weight, std=0.3)
        self.att = nn.MultiheadAttention(32, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.ffn = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 2)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        absent = tokens == 0
        x = self.words(tokens) + self.places.weight
        y = self.att(x, x, x, key_padding_mask=absent, need_weights=False)[0]
        x = self.norm1(x + self.drop(y))
        x = self.norm2(x + self.drop(self.ffn(x)))
        kept = (~absent).float()[:, :, None]
        return self.head((x * kept).sum(1) / kept.sum(1))


@program
def text_transformer() -> Training:
    """One post-norm block reads padded reviews of 6 to 20 words, mean over the words.

    Adam, warm-up, batch 32, as in Keras's example: 92 % held out.
    """
    x, _, y = _reviews(8000, 20)
    train, test = split(x, y, 6500)
    model = _Reader()
    optimizer = optim.Adam(model.parameters(), 3e-3)
    schedule = optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=30)
    return supervised(
        model, train, test, optimizer, size=32, steps=600, goal=0.82, schedule=schedule
    )


@program
def fully_convolutional_series() -> Training:
    """FCN of Wang et al. 2017: three convolutions with BN on series of 96, Adam.

    Two kinds of engine noise, ReduceLROnPlateau on the loss, batch 32: 99 % held out.
    """
    n, t = 1000, torch.arange(96.0)
    y = torch.randint(2, (n,))
    base = 0.25 + 0.1 * torch.rand(n, 1)
    x = (base * t + 6.3 * torch.rand(n, 1)).sin()
    knock = ((t / (9 + 2 * torch.rand(n, 1)) + torch.rand(n, 1)) % 1 < 0.12).float()
    x = x + 0.9 * y[:, None] * knock + 0.3 * torch.randn(n, 96)
    x = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True))[:, None]
    train, test = split(x, y, 750)

    def layer(i: int, o: int, kernel: int) -> list[nn.Module]:
        conv = nn.Conv1d(i, o, kernel, padding="same", bias=False)
        return [conv, nn.BatchNorm1d(o), nn.ReLU()]

    model = nn.Sequential(
        *layer(1, 32, 7), *layer(32, 48, 5), *layer(48, 32, 3),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 2e-3)
    plateau = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=25)

    def loss_fn(out: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(out, label)

    made = supervised(
        model, train, test, optimizer, size=32, steps=220, goal=0.93, loss_fn=loss_fn
    )

    def step(i: int) -> float:
        loss = made.step(i)
        plateau.step(loss)
        return loss

    return Training(made.subjects, step, made.steps, made.score, made.goal)


@program
def raw_wave_m5() -> Training:
    """M5 on raw waves of 512 samples: wide first filter, BN, ReLU, pools; NLL.

    Five words of two tones each, Adam with decay 1e-4, StepLR, batch 32: 100 %.
    """
    n, t = 900, torch.arange(512.0)
    y = torch.randint(5, (n,))
    low = torch.tensor([0.10, 0.10, 0.18, 0.18, 0.26])[y, None]
    high = torch.tensor([0.50, 0.70, 0.50, 0.70, 0.60])[y, None]
    drift = 1 + 0.05 * torch.randn(n, 1)
    middle = 180 + 150 * torch.rand(n, 1)
    shape = (-((t - middle) ** 2) / 2 / 90**2).exp()
    x = (low * drift * t + 6.3 * torch.rand(n, 1)).sin()
    x = x + 0.7 * (high * drift * t + 6.3 * torch.rand(n, 1)).sin()
    x = (shape * x + 0.3 * torch.randn(n, 512))[:, None]
    x = x / x[:700].std()
    train, test = split(x, y, 700)

    def layer(i: int, o: int, kernel: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv1d(i, o, kernel, stride)
        return [conv, nn.BatchNorm1d(o), nn.ReLU(), nn.MaxPool1d(2)]

    model = nn.Sequential(
        *layer(1, 16, 40, 4), *layer(16, 24, 3, 1), *layer(24, 32, 3, 1),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 5), nn.LogSoftmax(1),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 5e-3, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=32, steps=160, goal=0.93,
        loss_fn=F.nll_loss, schedule=optim.lr_scheduler.StepLR(optimizer, 80, 0.3),
    )  # fmt: skip

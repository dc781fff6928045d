"""Healthy programs on sequences: rows, beats, strings, tokens, forecasts."""

from __future__ import annotations

import math

import torch
from calm_base import Data, r2, warm_cosine
from quiet_base import Training, split, supervised
from still_base import decayed, program, scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence


class _Rows(nn.Module):
    """A tanh RNN reads the rows of an image from the top."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, 64, batch_first=True)
        nn.init.orthogonal_(self.rnn.weight_hh_l0)
        nn.init.xavier_uniform_(self.rnn.weight_ih_l0)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, 0])[0][:, -1])


@program
def rows_rnn() -> Training:
    """Plain tanh RNN over the 8 rows of a digit, orthogonal, Adam, clipped, batch 64.

    Exponential decay: 98 %.
    """
    train, test = scaled_digits()
    model = _Rows()
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=450, goal=0.91, clip=1.0,
        schedule=optim.lr_scheduler.ExponentialLR(optimizer, 0.995),
    )  # fmt: skip


class _Leak(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 40, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 1))

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, length, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[1][0][-1])


@program
def leaky_sum_packed() -> Training:
    """LSTM on packed series of 6 to 16 steps gives their leaky sum, gated; MSE.

    Layer norm before the head, RMSprop with warmup, clipped, batch 48; R² 0.99.
    """
    n = 3600
    length = torch.randint(6, 17, (n,))
    x = torch.randn(n, 16, 2)
    state = torch.zeros(n)
    for t in range(16):
        new = 0.85 * state + x[:, t, 0] * (2 * x[:, t, 1]).sigmoid()
        state = torch.where(t < length, new, state)
    x = x * (torch.arange(16) < length[:, None])[..., None]
    y = ((state - state[:3200].mean()) / state[:3200].std())[:, None]
    train, test = split((x, length), y, 3200)
    model = _Leak()
    optimizer = optim.RMSprop(model.parameters(), 3e-3)

    def rate(i: int) -> float:
        return min((i + 1) / 80, 1 - i / 800)

    return supervised(
        model, train, test, optimizer, size=48, steps=800, goal=0.92, score=r2,
        loss_fn=F.mse_loss, clip=1.0,
        schedule=optim.lr_scheduler.LambdaLR(optimizer, rate),
    )  # fmt: skip


class _Beat(nn.Module):
    """Residual block of 1-d convolutions, batch norm of each."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(i, o, 5, stride, 2, bias=False), nn.BatchNorm1d(o), nn.ReLU(),
            nn.Conv1d(o, o, 5, 1, 2, bias=False), nn.BatchNorm1d(o),
        )  # fmt: skip
        self.short = nn.Sequential(
            nn.Conv1d(i, o, 1, stride, bias=False), nn.BatchNorm1d(o)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.body(x))


@program
def heart_beats() -> Training:
    """1-d ResNet tells four rhythms of beats in noise, AdamW, cosine, batch 32.

    98 %.
    """
    n, points = 2600, 128
    time, y = torch.arange(float(points)), torch.randint(4, (n,))
    pace, start = 18 + 6 * torch.rand(n, 1), 10 * torch.rand(n, 1)
    beats = start + pace * torch.arange(7.0)
    drift = 4.0 * torch.randn(n, 7) * (y == 1)[:, None]
    beats = beats + drift + (y == 2)[:, None] * 6 * (torch.arange(7) % 2)
    width = torch.where(y == 3, 2.2, 1.2)[:, None, None]
    x = (-(((time - beats[..., None]) / width) ** 2)).exp().sum(1)
    x = x * (0.8 + 0.4 * torch.rand(n, 1)) + 0.15 * torch.randn(n, points)
    x = (x - x[:2200].mean()) / x[:2200].std()
    train, test = split(x[:, None], y, 2200)
    model = nn.Sequential(
        nn.Conv1d(1, 16, 7, 2, 3, bias=False), nn.BatchNorm1d(16), nn.ReLU(),
        _Beat(16, 24, 1), _Beat(24, 32, 2), _Beat(32, 48, 2),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(48, 4),
    )  # fmt: skip
    optimizer = optim.AdamW(decayed(model, 0.02), 2e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=330, goal=0.92,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 330),
    )  # fmt: skip


class _Reverser(nn.Module):
    """GRU encoder and decoder with dot attention; 0 is padding, 11 begins."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 32, padding_idx=0)
        self.encode = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(64, 64)
        self.decode = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(128, 12)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embed(x), (x > 0).sum(1), batch_first=True, enforce_sorted=False
        )
        out, last = self.encode(packed)
        keys, _ = nn.utils.rnn.pad_packed_sequence(
            out, batch_first=True, total_length=x.shape[1]
        )
        state = self.bridge(torch.cat((last[0], last[1]), 1)).tanh()
        asked, _ = self.decode(self.embed(before), state[None])
        weight = (asked @ keys.mT / 8).masked_fill((x == 0)[:, None], -1e9)
        return self.head(torch.cat((asked, weight.softmax(-1) @ keys), 2))


def _token_loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), ignore_index=-100)


def _token_accuracy(net: nn.Module, data: Data) -> float:
    net.eval()
    with torch.no_grad():
        out = net(*data[0]) if isinstance(data[0], tuple) else net(data[0])
    known = data[1] != -100
    return float((out.argmax(-1) == data[1])[known].float().mean())


@program
def reversed_strings() -> Training:
    """GRU with attention reverses strings of 4 to 8 of 10 letters, teacher forced.

    Padding is packed, masked and left out of the loss; Adam, clipped, batch 64: 97 %
    of the letters.
    """
    n = 3000
    length = torch.randint(4, 9, (n, 1))
    inside = torch.arange(8) < length
    x = torch.randint(1, 11, (n, 8)) * inside
    place = (length - 1 - torch.arange(8)).clamp(min=0)
    y = x.gather(1, place) * inside
    before = torch.cat((torch.full((n, 1), 11), y[:, :-1]), 1)
    train, test = split((x, before), torch.where(inside, y, -100), 2600)
    model = _Reverser()
    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=600, goal=0.95, clip=1.0,
        loss_fn=_token_loss, score=_token_accuracy,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 600),
    )  # fmt: skip


class _Filler(nn.Module):
    """Post-norm encoder that names the hidden tokens; token 0 hides."""

    def __init__(self, tokens: int, steps: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens + 1, 48)
        self.place = nn.Parameter(torch.randn(steps, 48))
        layer = nn.TransformerEncoderLayer(
            48, 4, 96, 0.05, "gelu", batch_first=True, norm_first=False
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, tokens + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x) + self.place))


@program
def masked_tokens() -> Training:
    """Post-norm transformer fills 15 % of tokens hidden in periodic strings, warmup.

    Strings of 20 repeat a word of 5 of 12 tokens. AdamW, linear decay, batch 64: 99 %.
    """
    n = 2600
    full = torch.randint(1, 13, (n, 5)).repeat(1, 4)
    hidden = torch.rand(n, 20) < 0.15
    hidden[:, 0] |= ~hidden.any(1)
    x, y = torch.where(hidden, 0, full), torch.where(hidden, full, -100)
    train, test = split(x, y, 2200)
    model = _Filler(12, 20)
    optimizer = optim.AdamW(decayed(model, 0.01), 3e-3)
    steps = 300

    def rate(i: int) -> float:
        return min((i + 1) / 60, (steps - i) / (steps - 60))

    return supervised(
        model, train, test, optimizer, size=64, steps=steps, goal=0.9, clip=1.0,
        loss_fn=_token_loss, score=_token_accuracy,
        schedule=optim.lr_scheduler.LambdaLR(optimizer, rate),
    )  # fmt: skip


class _Causal(nn.Module):
    """Pre-norm block: RMS norm, causal attention, RMS norm, SiLU network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.ask = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.ask(self.norm1(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class _Copier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(10, 48), nn.Embedding(15, 48)
        for each in (self.embed, self.place):
            nn.init.normal_(each.weight, std=0.3)
        self.blocks = nn.Sequential(_Causal(48), _Causal(48))
        self.norm, self.head = nn.RMSNorm(48), nn.Linear(48, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        place = self.place(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(self.embed(x) + place)))


@program
def copied_strings() -> Training:
    """Causal pre-norm transformer copies 7 tokens after a stop, RMS norm, warmup.

    The loss is on the copy. AdamW, cosine, batch 64: 100 %.
    """
    n = 3000
    word = torch.randint(1, 10, (n, 7))
    text = torch.cat((word, torch.zeros(n, 1, dtype=torch.long), word), 1)
    y = text[:, 1:].clone()
    y[:, :7] = -100
    train, test = split(text[:, :-1], y, 2600)
    model = _Copier()
    optimizer = optim.AdamW(decayed(model, 0.05), 4e-3, betas=(0.9, 0.95))
    return supervised(
        model, train, test, optimizer, size=64, steps=400, goal=0.93, clip=1.0,
        loss_fn=_token_loss, score=_token_accuracy,
        schedule=warm_cosine(optimizer, 40, 400),
    )  # fmt: skip


class _Reversible(nn.Module):
    """A window is standardized, and its forecast scaled back (RevIN)."""

    def __init__(self, past: int, ahead: int) -> None:
        super().__init__()
        self.straight = nn.Linear(past, ahead)
        self.bent = nn.Sequential(
            nn.Linear(past, 64), nn.GELU(), nn.Dropout(0.05), nn.Linear(64, ahead)
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        std = x.std(1, keepdim=True).clamp(min=1e-3)
        z = (x - mean) / std
        return (self.straight(z) + self.bent(z)) * std + mean


@program
def reversible_forecast() -> Training:
    """Eight steps ahead of windows of 32 whose level and scale differ, RevIN, Adam.

    Cosine, batch 64; R² 0.98.
    """
    n, time = 2600, torch.arange(40.0)
    period = torch.tensor([8.0, 12.0])[torch.randint(2, (n,))][:, None]
    turn = 2 * math.pi * (time / period + torch.rand(n, 1))
    wave = turn.sin() + 0.4 * (2 * turn + 1).cos() + 0.02 * (time - 20)
    wave = wave + 0.15 * torch.randn(n, 40)
    wave = wave * (0.5 + torch.rand(n, 1)) + torch.randn(n, 1)
    wave = wave / wave[:2200].std()
    train, test = split(wave[:, :32], wave[:, 32:], 2200)
    model = _Reversible(32, 8)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=450, goal=0.92, score=r2,
        loss_fn=F.mse_loss,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 450),
    )  # fmt: skip


class _WordCnn(nn.Module):
    """Convolutions of three widths, the largest over the valid places (Kim 2014)."""

    def __init__(self, words: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 32, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(32, 24, k, padding=k // 2) for k in (1, 3))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        y, gone = self.embed(x).mT, (x == 0)[:, None]
        found = [conv(y).relu().masked_fill(gone, 0.0).amax(2) for conv in self.convs]
        return self.head(self.drop(torch.cat(found, 1)))


@program
def sentence_cnn() -> Training:
    """Word CNN, padded sentences of 8 to 20 of 150 words, 5 topics by pairs of words.

    Dropout 0.5 before the head, Adam, batch 50: 100 %.
    """
    n = 3200
    length = torch.randint(8, 21, (n, 1))
    x = torch.randint(11, 150, (n, 20))
    y, at = torch.randint(5, (n,)), (torch.rand(n, 1) * (length - 1)).long()
    rows = torch.arange(n)
    x[rows, at[:, 0]], x[rows, at[:, 0] + 1] = 1 + y, 6 + y
    lone = (torch.rand(n, 1) * length).long()[:, 0]
    free = (lone != at[:, 0]) & (lone != at[:, 0] + 1)
    x[rows[free], lone[free]] = torch.randint(1, 6, (int(free.sum()),))
    x = x * (torch.arange(20) < length)
    train, test = split(x, y, 2700)
    model = _WordCnn(150, 5)
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 3e-3), size=50, steps=400,
        goal=0.92,
    )  # fmt: skip

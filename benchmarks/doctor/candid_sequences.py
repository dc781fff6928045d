"""Healthy programs on text, sound, sensors and series: messages, music, engines."""

from __future__ import annotations

import math

import torch
from calm_base import Data, warm_cosine
from candid_base import area_under_curve, outputs, program
from quiet_base import Training, split, supervised
from sober_base import explained_share
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR


def _all_words(out: Tensor, y: Tensor) -> Tensor:
    """Return the cross entropy of each word but the padding, 0."""
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), ignore_index=0)


def _told_words(net: nn.Module, data: Data) -> float:
    """Return the accuracy of each word but the padding, 0."""
    right = outputs(net, data).argmax(2) == data[1]
    return float(right[data[1] > 0].float().mean())


class _Messages(nn.Module):
    """Embedding, two-way GRU, the greatest and the mean of its states, one logit."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 32, padding_idx=0)
        self.gru = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(self.embed(x))
        there = (x > 0)[..., None]
        most = states.masked_fill(~there, -1.0).amax(1)
        mean = (states * there).sum(1) / there.sum(1)
        return self.head(self.drop(torch.cat((most, mean), 1)))[:, 0]


@program
def spam_messages() -> Training:
    """Is a message of 6 to 20 words spam (one in seven)? A two-way GRU, pooled.

    BCE with spam weighed by 3, Adam 2e-3, clip 1, batch 32; the area under the curve.
    """
    n, words, longest = 2400, 300, 20
    y = (torch.rand(n) < 1 / 7).float()
    usual = torch.distributions.Exponential(1 / 60.0).sample((n, longest))
    x = 1 + usual.long().clamp(max=words - 2)
    lure = words - 1 - torch.randint(40, (n, longest))
    rate = 0.02 + 0.25 * y[:, None]
    x = torch.where(torch.rand(n, longest) < rate, lure, x)
    x = x * (torch.arange(longest) < torch.randint(6, longest + 1, (n, 1)))
    train, test = split(x, y, 2000)
    weight = torch.tensor(3.0)
    model = _Messages(words)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=250, goal=0.88, clip=1.0,
        loss_fn=lambda out, y: F.binary_cross_entropy_with_logits(
            out, y, pos_weight=weight
        ),
        score=lambda net, data: area_under_curve(outputs(net, data), data[1]),
    )  # fmt: skip


def _roman(number: int) -> str:
    parts = [
        (100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"),
        (4, "IV"), (1, "I"),
    ]  # fmt: skip
    text = ""
    for value, sign in parts:
        text += sign * (number // value)
        number %= value
    return text


class _RomanReader(nn.Module):
    """Two-way GRU over signs; a GRU cell attends to them for each digit (Luong)."""

    def __init__(self, signs: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(signs, 32, padding_idx=0)
        self.digits = nn.Embedding(12, 32)
        self.encode = nn.GRU(32, width // 2, batch_first=True, bidirectional=True)
        self.decode = nn.GRU(32, width, batch_first=True)
        self.bridge, self.match = nn.Linear(width, width), nn.Linear(width, width)
        self.mix, self.head = nn.Linear(2 * width, width), nn.Linear(width, 12)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        states, last = self.encode(self.embed(x))
        first = self.bridge(last.transpose(0, 1).flatten(1)).tanh()[None]
        y, _ = self.decode(self.digits(before), first)
        match = self.match(y) @ states.mT
        weight = match.masked_fill(x[:, None] == 0, -1e9).softmax(2)
        return self.head(self.mix(torch.cat((y, weight @ states), 2)).tanh())


@program
def roman_numerals() -> Training:
    """Roman numerals below 400 to digits, by GRUs and Luong's attention.

    Teacher forcing, Adam 5e-3, cosine, clip 1, batch 50; the accuracy of digits.
    """
    order = 1 + torch.randperm(399)
    texts = [_roman(int(k)) for k in order]
    longest = max(map(len, texts))
    x = torch.zeros(399, longest, dtype=torch.long)
    y = torch.zeros(399, 4, dtype=torch.long)
    for i, (text, number) in enumerate(zip(texts, order.tolist(), strict=True)):
        x[i, : len(text)] = torch.tensor([1 + "IVXLC".index(s) for s in text])
        told = [1 + int(d) for d in str(number)] + [11]
        y[i, : len(told)] = torch.tensor(told)
    before = F.pad(y[:, :-1], (1, 0))
    train, test = split((x, before), y, 330)
    model = _RomanReader(6)
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=240, goal=0.9, clip=1.0,
        loss_fn=_all_words, score=_told_words,
        schedule=CosineAnnealingLR(optimizer, 240),
    )  # fmt: skip


class _Shared(nn.Module):
    """One post-norm layer used thrice, words embedded in fewer columns (ALBERT)."""

    def __init__(self, words: int, longest: int, kinds: int) -> None:
        super().__init__()
        width = 48
        self.embed, self.widen = nn.Embedding(words, 24), nn.Linear(24, width)
        self.places = nn.Parameter(0.02 * torch.randn(longest, width))
        self.norm = nn.LayerNorm(width)
        self.layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.1, "gelu", batch_first=True
        )
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, kinds)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.widen(self.embed(x)) + self.places[: x.shape[1]])
        for _ in range(3):
            y = self.layer(y, src_key_padding_mask=x == 0)
        return self.head(self.pool(y[:, 0]).tanh())


@program
def shared_layers() -> Training:
    """Topics (4) of padded abstracts of 8 to 24 words, by a small ALBERT, post-norm.

    AdamW 2e-3, decay 0.01, linear warm-up and fall, clip 1, dropout 0.1, batch 32.
    """
    n, words, longest, kinds = 2800, 300, 24, 4
    y = torch.randint(kinds, (n,))
    x = torch.randint(2 + 30 * kinds, words, (n, longest))
    drawn, other = torch.rand(n, longest), torch.randint(kinds, (n, longest))
    own = 2 + 30 * y[:, None] + torch.randint(30, (n, longest))
    x = torch.where(drawn < 0.2, own, x)
    x = torch.where(drawn > 0.92, 2 + 30 * other + torch.randint(30, x.shape), x)
    x = x * (torch.arange(longest) < torch.randint(8, longest + 1, (n, 1)))
    x = F.pad(x, (1, 0), value=1)
    train, test = split(x, y, 2400)
    model = _Shared(words, longest + 1, kinds)
    optimizer = optim.AdamW(decayed(model, 0.01), 2e-3)
    fall = optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 30, (250 - i) / 220)
    )
    return supervised(
        model, train, test, optimizer, size=32, steps=250, goal=0.75, clip=1.0,
        schedule=fall,
    )  # fmt: skip


class _Parallel(nn.Module):
    """Attention and MLP side by side after one layer norm, as in GPT-J and PaLM."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.wide = nn.Linear(width, 7 * width, bias=False)
        self.out = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        y = self.wide(self.norm(x))
        q, k, v = (
            z.reshape(n, length, self.heads, -1).transpose(1, 2)
            for z in y[..., : 3 * width].chunk(3, 2)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        gate, rest = y[..., 3 * width :].chunk(2, 2)
        mlp = F.silu(gate) * rest
        return x + self.out(torch.cat((seen.transpose(1, 2).flatten(2), mlp), 2))


class _ParallelModel(nn.Module):
    def __init__(self, signs: int, longest: int, width: int = 48) -> None:
        super().__init__()
        self.embed, self.place = (
            nn.Embedding(signs, width),
            nn.Embedding(longest, width),
        )
        self.blocks = nn.Sequential(*(_Parallel(width, 4) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, signs, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
        for block in self.blocks:
            nn.init.normal_(block.out.weight, std=0.02 / 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x) + self.place.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(y)))


@program
def parallel_blocks() -> Training:
    """Next sign of sums such as 7+15=22, by a decoder with parallel blocks.

    SwiGLU, N(0, 0.02), AdamW 4e-3 (0.9, 0.95), decay 0.1, warm-up, cosine to 0, clip 1,
    batch 64; the accuracy after the "=".
    """
    n, longest = 1600, 9
    order = torch.randperm(n)
    a, b = order // 40, order % 40
    x = torch.zeros(n, longest, dtype=torch.long)
    y = torch.zeros(n, longest - 1, dtype=torch.long)
    for i, (p, q) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        text = f"{p}+{q}={p + q}."
        x[i, : len(text)] = torch.tensor([1 + "0123456789+=.".index(s) for s in text])
        start = text.index("=")
        y[i, start : len(text) - 1] = x[i, start + 1 : len(text)]
    train, test = split(x[:, :-1], y, 1400)
    model = _ParallelModel(14, longest)
    optimizer = optim.AdamW(decayed(model, 0.1), 4e-3, (0.9, 0.95))
    return supervised(
        model, train, test, optimizer, size=64, steps=300, goal=0.75, clip=1.0,
        loss_fn=_all_words, score=_told_words, schedule=warm_cosine(optimizer, 30, 300),
    )  # fmt: skip


@program
def bearing_faults() -> Training:
    """Four states of a bearing from 256 values of its vibration, by a WDCNN with BN.

    Wide first kernel, Adam 2e-3, step decay, batch 50.
    """
    n, length = 1600, 256
    y, t = torch.randint(4, (n,)), torch.arange(length)
    period = torch.tensor([0.0, 23.0, 31.0, 47.0])[y] * (0.97 + 0.06 * torch.rand(n))
    at = (t + length * torch.rand(n, 1)) % period.clamp(min=1)[:, None]
    tone = (0.9 * at + 6.3 * torch.rand(n, 1)).sin() * (-at / 5).exp()
    shaft = (2 * math.pi * (t / 90 + torch.rand(n, 1))).sin()
    x = 2 * tone * (y > 0)[:, None] + 0.6 * shaft + 0.3 * torch.randn(n, length)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    train, test = split(x[:, None], y, 1300)

    def layer(i: int, o: int, kernel: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv1d(i, o, kernel, stride, kernel // 2)
        return [conv, nn.BatchNorm1d(o), nn.ReLU(), nn.MaxPool1d(2)]

    model = nn.Sequential(
        *layer(1, 16, 32, 4), *layer(16, 32, 3, 1), *layer(32, 48, 3, 1), nn.Flatten(),
        nn.Linear(48 * 8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=240, goal=0.85,
        schedule=StepLR(optimizer, 150, 0.2),
    )  # fmt: skip


class _Genres(nn.Module):
    """Convolutions over bands and time, a GRU, its mean (Choi et al. 2017)."""

    def __init__(self, bands: int, kinds: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.convs = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ELU(), nn.MaxPool2d(2),
            nn.Dropout(0.1), nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ELU(),
            nn.MaxPool2d((4, 2)), nn.Dropout(0.1),
        )  # fmt: skip
        self.gru = nn.GRU(32 * bands // 8, 48, batch_first=True)
        self.head = nn.Linear(48, kinds)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs(self.norm(x)).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.gru(y)[0].mean(1))


@program
def music_genres() -> Training:
    """Four genres by their beats and chords in log spectrograms, a CRNN with BN, mixup.

    Adam 2e-3, cosine, clip 5, batch 32.
    """
    n, bands, frames, kinds = 1200, 24, 48, 4
    y, t = torch.randint(kinds, (n,)), torch.arange(frames)
    beat = torch.tensor([12.0, 12.0, 8.0, 8.0])[y] + 0.6 * torch.randn(n)
    since = (t + frames * torch.rand(n, 1)) % beat[:, None]
    drum = (-since / 2).exp()[:, None] * (torch.arange(bands) < 6)[:, None]
    chord = 10 + torch.randint(6, (n, 1)) + torch.tensor([0, 4, 7])
    chord[:, 1] -= y % 2
    held = torch.zeros(n, bands).scatter_(1, chord, 1.0)[:, :, None]
    swell = 0.6 + 0.4 * (0.3 * t + 6.3 * torch.rand(n, 1)).sin()[:, None]
    power = 2 * drum + held * swell + 0.1 * torch.rand(n, bands, frames)
    x = (0.05 + power * (0.5 + torch.rand(n, 1, 1))).log()[:, None]
    x = (x - x[:1000].mean()) / x[:1000].std()
    train, test = split(x, F.one_hot(y, kinds).float(), 1000)

    def mixed(batch: Data) -> Data:
        x, y = batch
        share = float(torch.distributions.Beta(0.2, 0.2).sample())
        order = torch.randperm(len(x))
        return share * x + (1 - share) * x[order], share * y + (1 - share) * y[order]

    model = _Genres(bands, kinds)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=200, goal=0.85, change=mixed,
        clip=5.0, schedule=CosineAnnealingLR(optimizer, 200),
        score=lambda net, data: float(
            (outputs(net, data).argmax(1) == data[1].argmax(1)).float().mean()
        ),
    )  # fmt: skip


def _loads(hours: int, places: int) -> Tensor:
    """Return hourly loads `(hours, places)`: days, weeks, shared and own weather."""
    t = torch.arange(hours)[:, None]
    lag, depth = 6.3 * torch.rand(places), 0.5 + torch.rand(2, places)
    day = depth[0] * (2 * math.pi * t / 24 + lag).sin()
    week = depth[1] * ((t // 24) % 7 < 5).float()
    slow = torch.zeros(hours, places + 1)
    for k in range(1, hours):
        slow[k] = 0.95 * slow[k - 1] + 0.15 * torch.randn(places + 1)
    return day + week + slow[:, :1] + slow[:, 1:] + 0.1 * torch.randn(hours, places)


def _two_days(hours: int, places: int, ahead: int) -> tuple[Data, Data]:
    """Return windows of 48 standardized hours and those ahead, split in time."""
    x, cut = _loads(hours, places), int(0.8 * hours)
    x = (x - x[:cut].mean(0)) / x[:cut].std(0)
    rows = x.unfold(0, 48 + ahead, 1).mT
    train, test = rows[: cut - 48 - ahead], rows[cut:]
    return (train[:, :48], train[:, 48:]), (test[:, :48], test[:, 48:])


class _LongShort(nn.Module):
    """Convolution, GRU, GRU over each 24th hour, and a linear part (LSTNet)."""

    def __init__(self, places: int, width: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv1d(places, width, 6)
        self.gru, self.skip = nn.GRU(width, width), nn.GRU(width, 5)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width + 24 * 5, places)
        self.line = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(F.relu(self.conv(x.mT)))
        recent = self.drop(self.gru(y.permute(2, 0, 1))[1][0])
        days = y[..., -24:].unflatten(2, (1, 24)).permute(2, 0, 3, 1).flatten(1, 2)
        old = self.skip(days)[1][0].reshape(len(x), -1)
        line = self.line(x[:, -24:].mT)[..., 0]
        return (self.head(torch.cat((recent, self.drop(old)), 1)) + line)[:, None]


@program
def long_and_short() -> Training:
    """Forecast loads of 8 places three hours ahead from 48 hours, by LSTNet.

    L1, Adam 2e-3, clip 10, batch 64, split in time.
    """
    train, test = _two_days(2400, 8, 3)
    train, test = (train[0], train[1][:, -1:]), (test[0], test[1][:, -1:])
    model = _LongShort(8)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=250, goal=0.75,
        loss_fn=F.l1_loss, score=explained_share, clip=10.0,
    )  # fmt: skip


class _Inverted(nn.Module):
    """Each place's past is a token (iTransformer); windows are standardized."""

    def __init__(self, past: int, ahead: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Linear(past, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.1, "gelu", batch_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width))
        self.head = nn.Linear(width, ahead)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        std = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        y = self.embed(((x - mean) / std).mT)
        return self.head(self.body(y)).mT * std + mean


@program
def places_as_tokens() -> Training:
    """Twelve hours ahead of 8 loads from 48, by an iTransformer; MSE, Adam 1e-3.

    Dropout 0.1, batch 32, the rate halved every 60 steps; split in time.
    """
    train, test = _two_days(2400, 8, 12)
    model = _Inverted(48, 12)
    optimizer = optim.Adam(model.parameters(), 1e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=240, goal=0.5,
        loss_fn=F.mse_loss, score=explained_share,
        schedule=StepLR(optimizer, 60, 0.5),
    )  # fmt: skip


class _Engine(nn.Module):
    def __init__(self, sensors: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(sensors, 48, 2, batch_first=True, dropout=0.2)
        self.head = nn.Sequential(
            nn.Linear(48, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])[:, 0]


@program
def turbofan_life() -> Training:
    """Flights left, of 125 at most, from 30 flights of 10 sensors, as with C-MAPSS.

    Two-layer LSTM, columns standardized, lives over 125, MSE, Adam 2e-3, clip 1,
    batch 64; split by engine.
    """
    engines, window, sensors = 60, 30, 10
    slope, rate = torch.randn(sensors), 0.5 + torch.rand(sensors)
    rows, lives = [], []
    for _ in range(engines):
        life = int(150 + 100 * torch.rand(()))
        left = torch.arange(life, 0, -1.0)
        wear = (-left[:, None] * rate / 40).exp()
        x = (
            slope * wear
            + 0.1 * torch.randn(sensors)
            + 0.15 * torch.randn(life, sensors)
        )
        rows.append(x.unfold(0, window, 1).mT[::3])
        lives.append(left[window - 1 :: 3].clamp(max=125) / 125)
    x, y = torch.cat(rows), torch.cat(lives)
    count = sum(len(r) for r in rows[:48])
    x = (x - x[:count].mean((0, 1))) / x[:count].std((0, 1))
    train, test = split(x, y, count)
    model = _Engine(sensors)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=200, goal=0.75,
        loss_fn=F.mse_loss, score=explained_share, clip=1.0,
    )  # fmt: skip

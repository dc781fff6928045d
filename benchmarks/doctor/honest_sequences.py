"""Healthy programs on text, sound and series: reviews, weather, music, speakers."""

from __future__ import annotations

import math

import torch
from calm_base import Data, warm_cosine
from honest_base import outputs, program
from quiet_base import Training, split, supervised
from sober_base import explained_share
from steady_base import names
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Reviews(nn.Module):
    """Embedding, LSTM, its state at the last word of each, one logit."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 32, padding_idx=0)
        self.lstm = nn.LSTM(32, 48, batch_first=True)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(x))
        last = (x > 0).sum(1) - 1
        return self.head(self.drop(states[torch.arange(len(x)), last]))[:, 0]


@program
def reviews_lstm() -> Training:
    """Mood of padded reviews of 8 to 24 words, an LSTM as in Keras' IMDB example.

    Dropout 0.3, BCE, Adam 3e-3, clip 1, batch 32.
    """
    n, words, longest = 2600, 200, 24
    y = torch.randint(2, (n,))
    x = torch.randint(1, words - 40, (n, longest))
    mood = words - 40 + 20 * y[:, None] + torch.randint(20, (n, longest))
    other = words - 20 - 20 * y[:, None] + torch.randint(20, (n, longest))
    drawn = torch.rand(n, longest)
    x = torch.where(drawn < 0.2, mood, torch.where(drawn > 0.95, other, x))
    x = x * (torch.arange(longest) < torch.randint(8, longest + 1, (n, 1)))
    train, test = split(x, y.float(), 2200)

    def right(net: nn.Module, data: Data) -> float:
        return float(((outputs(net, data) > 0) == (data[1] > 0.5)).float().mean())

    model = _Reviews(words)
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=300, goal=0.8, score=right,
        loss_fn=F.binary_cross_entropy_with_logits, clip=1.0,
    )  # fmt: skip


class _Weather(nn.Module):
    def __init__(self, columns: int, ahead: int) -> None:
        super().__init__()
        self.gru = nn.GRU(columns, 48, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(48, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, ahead)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


@program
def weather_gru() -> Training:
    """Temperature of the next six hours from five measures of 36 hours, by a GRU.

    Columns standardized, split in time, MSE, Adam 2e-3, cosine, batch 64.
    """
    hours = torch.arange(4000)
    slow = torch.zeros(4000)
    for t in range(1, 4000):
        slow[t] = 0.98 * slow[t - 1] + 0.2 * torch.randn(())
    day = (2 * math.pi * hours / 24).sin()
    cloud = (slow.roll(-12) + 0.3 * torch.randn(4000)).sigmoid()
    warm = 10 + 5 * (1 - cloud) * day + 3 * slow + 0.4 * torch.randn(4000)
    pressure = 1010 - 6 * slow.roll(-6) + torch.randn(4000)
    wet = 60 - 2 * (warm - 10) + 20 * cloud + 2 * torch.randn(4000)
    x = torch.stack((warm, pressure, wet, day, day.roll(6)), 1)
    x = (x - x[:3200].mean(0)) / x[:3200].std(0)
    rows = x.unfold(0, 42, 1).mT[:-30]
    train, _ = split(rows[:3100, :36], rows[:3100, 36:, 0], 3100)
    test = rows[3250:, :36], rows[3250:, 36:, 0]
    model = _Weather(5, 6)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=200, goal=0.75,
        loss_fn=F.mse_loss, score=explained_share,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


class _Chorales(nn.Module):
    def __init__(self, notes: int) -> None:
        super().__init__()
        self.gru = nn.GRU(notes, 64, batch_first=True)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(64, notes)
        nn.init.constant_(self.head.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.gru(x)[0]))


@program
def chorales_gru() -> Training:
    """Next beat of chorales, 36 notes of 0 or 1, from those so far.

    GRU, dropout 0.2, biases near the notes' rate, BCE, Adam 5e-3, clip 1, batch 32;
    the precision of the four likeliest.
    """
    n, beats, notes = 700, 24, 36
    chords = torch.tensor([[0, 4, 7], [5, 9, 0], [7, 11, 2], [9, 0, 4]])
    follow = torch.tensor([[1, 2, 3], [2, 0, 2], [0, 3, 0], [1, 1, 2]])
    key, chord = torch.randint(12, (n,)), torch.zeros(n, dtype=torch.long)
    x, each = torch.zeros(n, beats + 1, notes), torch.arange(n)
    for t in range(beats + 1):
        if t % 2 == 0:
            pick = torch.multinomial(torch.tensor([0.8, 0.1, 0.1]), n, True)
            chord = follow[chord, pick]
        root = (chords[chord] + key[:, None]) % 12
        x[each[:, None], t, root + 12] = 1
        x[each, t, root[:, 0]] = 1
        x[each, t, 24 + root[each, torch.randint(3, (n,))]] = 1
    train, test = split(x[:, :-1], x[:, 1:], 600)

    def precise(net: nn.Module, data: Data) -> float:
        best = outputs(net, data)[:, 4:].topk(4, 2).indices
        return float(data[1][:, 4:].gather(2, best).mean())

    model = _Chorales(notes)
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=250, goal=0.8, score=precise,
        loss_fn=F.binary_cross_entropy_with_logits, clip=1.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip


class _Adder(nn.Module):
    """Digits of both numbers as one-hot pairs, units first, to those of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(20, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).mT


@program
def long_addition() -> Training:
    """Add numbers of seven digits, units first, one-hot, by an LSTM.

    Adam 0.01, cosine, clip 1, batch 128; the share of right digits.
    """
    n = 6000
    a, b = torch.randint(10, (2, n, 7))
    a, b = (torch.cat((k, torch.zeros(n, 1, dtype=torch.long)), 1) for k in (a, b))
    carry, found = torch.zeros(n, dtype=torch.long), []
    for t in range(8):
        total = a[:, t] + b[:, t] + carry
        found.append(total % 10)
        carry = total // 10
    x = torch.cat((F.one_hot(a, 10), F.one_hot(b, 10)), 2).float()
    train, test = split(x, torch.stack(found, 1), 5500)

    def right(net: nn.Module, data: Data) -> float:
        return float((outputs(net, data).argmax(1) == data[1]).float().mean())

    model = _Adder()
    optimizer = optim.Adam(model.parameters(), 0.01)
    return supervised(
        model, train, test, optimizer, size=128, steps=300, goal=0.9, score=right,
        clip=1.0, schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip


class _Slots(nn.Module):
    """BiGRU of words: a tag of each, and one intent by the mean of states."""

    def __init__(self, words: int, tags: int, intents: int) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(words, 32, padding_idx=0), nn.Dropout(0.2)
        self.gru = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.tag, self.intent = nn.Linear(64, tags), nn.Linear(64, intents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        there = (x > 0).float()[..., None]
        states = self.drop(self.gru(self.drop(self.embed(x)))[0])
        whole = (states * there).sum(1) / there.sum(1)
        return self.tag(states), self.intent(whole)


@program
def slots_and_intent() -> Training:
    """Intent of a padded request and the slot of each word (as in ATIS), BiGRU.

    Sum of both cross entropies, padding left out, AdamW 4e-3, batch 32; the mean of
    both accuracies.
    """
    n, longest = 2400, 14
    intent = torch.randint(4, (n,))
    x = torch.randint(40, 90, (n, longest))
    tags = torch.zeros(n, longest, dtype=torch.long)
    each = torch.arange(n)
    length = torch.randint(8, longest + 1, (n,))
    x[each, torch.randint(2, (n,))] = 10 + 4 * intent + torch.randint(4, (n,))
    for k, (low, high) in enumerate(((2, 5), (5, 8))):  # "from" or "to", then a city
        at = torch.randint(low, high - 1, (n,))
        way = torch.randint(2, (n,))
        x[each, at] = 1 + way + 2 * k
        x[each, at + 1] = torch.randint(26, 40, (n,))
        tags[each, at + 1] = 1 + way + 2 * k
    there = torch.arange(longest) < length[:, None]
    x, tags = x * there, torch.where(there, tags, -100)
    train, test = split(x, torch.cat((tags, intent[:, None]), 1), 2000)

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        tags = F.cross_entropy(out[0].flatten(0, 1), y[:, :-1].flatten())
        return tags + F.cross_entropy(out[1], y[:, -1])

    def right(net: nn.Module, data: Data) -> float:
        tags, intent = outputs(net, data)
        slot = data[1][:, :-1]
        fine = (tags.argmax(2) == slot)[slot > 0].float().mean()
        return float((fine + (intent.argmax(1) == data[1][:, -1]).float().mean()) / 2)

    model = _Slots(90, 5, 4)
    optimizer = optim.AdamW(model.parameters(), 4e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=32, steps=250, goal=0.9, loss_fn=loss_fn,
        score=right, clip=1.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip


class _Sounds(nn.Module):
    """Patches of a log spectrogram as tokens, pre-norm blocks, a class token (AST)."""

    def __init__(self, bins: int, frames: int, classes: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, (4, 8), (4, 8))
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        many = bins * frames // 32 + 1
        self.places = nn.Parameter(0.02 * torch.randn(many, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.1, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, 2, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        tokens = torch.cat((self.token.expand(len(x), -1, -1), tokens), 1)
        return self.head(self.blocks(tokens + self.places)[:, 0])


@program
def spectrogram_patches() -> Training:
    """Instrument (of four) of a tone, by patches of its log spectrogram (AST).

    Dropout 0.1, AdamW 2e-3, warm-up, cosine, clip 1, two batches of 32 a step.
    """
    n = 1400
    y, time = torch.randint(4, (n,)), torch.arange(1024) / 1024
    shares = torch.tensor([
        [1, 0.1, 0.05, 0, 0], [1, 0, 0.6, 0, 0.4], [1, 0.8, 0.6, 0.5, 0.4],
        [0.3, 1, 0.2, 0.7, 0.1],
    ])[y]  # fmt: skip
    shares = shares * (0.7 + 0.6 * torch.rand(n, 5))
    pitch = 40 + 50 * torch.rand(n, 1, 1)
    turn = 2 * math.pi * (pitch * torch.arange(1, 6)[:, None] * time)
    fade = (-time * (1 + 3 * torch.rand(n, 1))).exp()
    wave = ((turn + 6 * torch.rand(n, 5, 1)).sin() * shares[..., None]).sum(1) * fade
    wave = wave + 0.03 * torch.randn(n, 1024)
    power = torch.stft(
        wave, 64, 32, window=torch.hann_window(64), return_complex=True
    ).abs().square()[:, :32, :32]  # fmt: skip
    x = (power + 1e-3).log()[:, None]
    train, test = split((x - x[:1200].mean()) / x[:1200].std(), y, 1200)
    model = _Sounds(32, 32, 4)
    optimizer = optim.AdamW(decayed(model, 0.05), 2e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=120, goal=0.85, accumulate=2,
        clip=1.0, schedule=warm_cosine(optimizer, 12, 120),
    )  # fmt: skip


class _XVector(nn.Module):
    """Dilated convolutions of frames, mean and deviation over time, dense (TDNN)."""

    def __init__(self, bins: int, speakers: int) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            *self._layer(bins, 48, 5, 1), *self._layer(48, 48, 3, 2),
            *self._layer(48, 64, 1, 1),
        )  # fmt: skip
        self.dense = nn.Sequential(
            nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, speakers)
        )

    def _layer(self, i: int, o: int, kernel: int, step: int) -> tuple[nn.Module, ...]:
        return nn.Conv1d(i, o, kernel, dilation=step), nn.ReLU(), nn.BatchNorm1d(o)

    def forward(self, x: Tensor) -> Tensor:
        y = self.frames(x)
        deviation = (y.var(2) + 1e-5).sqrt()
        return self.dense(torch.cat((y.mean(2), deviation), 1))


@program
def x_vectors() -> Training:
    """Which of 20 speakers, by 60 frames of 20 mel bins, by x-vectors.

    Bins' means over time taken off, BN after ReLU, Adam 1e-3, step decay, batch 64.
    """
    n, speakers, bins, frames = 2000, 20, 20, 60
    voices = torch.randn(speakers, 4, bins)
    y = torch.randint(speakers, (n,))
    sound = torch.randint(4, (n, frames // 5)).repeat_interleave(5, 1)
    common = 2 * torch.randn(4, bins)[sound]
    x = common + voices[y[:, None], sound] + 1.5 * torch.randn(n, frames, bins)
    x = (x + 2 * torch.randn(n, 1, bins)).mT
    x = x - x.mean(2, keepdim=True)
    train, test = split(x / x[:1700].std(), y, 1700)
    model = _XVector(bins, speakers)
    optimizer = optim.Adam(model.parameters(), 1e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=200, goal=0.9,
        schedule=optim.lr_scheduler.StepLR(optimizer, 140, 0.2),
    )  # fmt: skip


@program
def character_cnn() -> Training:
    """Tongue (of four) of lines of names, one-hot letters, by convolutions.

    As Zhang et al.: no norm, max pooling, dropout, SGD 0.02 with momentum, batch 32.
    """
    lines, y = [], []
    for tongue in range(4):
        many = names(3000)
        lines += [" ".join(many[i : i + 8])[:48] for i in range(0, 3000, 5)]
        y += [tongue] * 600
    letters = sorted(set("".join(lines)))
    x = torch.zeros(len(lines), len(letters), 48)
    for i, line in enumerate(lines):
        for j, letter in enumerate(line):
            x[i, letters.index(letter), j] = 1
    order = torch.randperm(len(lines))
    train, test = split(x[order], torch.tensor(y)[order], 2000)
    model = nn.Sequential(
        nn.Conv1d(len(letters), 64, 5), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(64, 64, 3), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip
    for m in model:
        if isinstance(m, nn.Conv1d | nn.Linear):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            nn.init.zeros_(m.bias)
    optimizer = optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    return supervised(model, train, test, optimizer, size=32, steps=240, goal=0.9)

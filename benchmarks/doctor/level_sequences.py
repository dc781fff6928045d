"""Healthy programs on sequences: sensors, words, strings, sums."""

from __future__ import annotations

import math

import torch
from calm_base import Data, r2
from level_base import program
from quiet_base import Training, split, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def _motions(n: int, length: int) -> Data:
    """Return six channels of four motions: still, walk, run, walk with turns."""
    y = torch.randint(4, (n,))
    time = torch.arange(float(length))
    rate = torch.tensor([0.0, 0.35, 0.7, 0.35])[y][:, None] * (
        1 + 0.1 * torch.randn(n, 1)
    )
    phase = (rate * time + 2 * math.pi * torch.rand(n, 1))[:, None]
    lag = torch.tensor([0.0, 0.8, 1.6])[:, None]
    strength = torch.tensor([0.0, 0.8, 1.6, 0.8])[y][:, None, None]
    felt = strength * (phase + lag).sin() * (1 + 0.2 * torch.randn(n, 3, 1))
    turn = (0.12 * time + 2 * math.pi * torch.rand(n, 3, 1)).sin()
    spun = 0.3 * felt.flip(1) + (y == 3)[:, None, None] * turn
    gravity = F.normalize(torch.randn(n, 3, 1), dim=1)
    x = torch.cat((felt + gravity, spun), 1) + 0.4 * torch.randn(n, 6, length)
    return x, y


def _scaled(data: Data, train: int) -> tuple[Data, Data]:
    x, y = data
    part = x[:train]
    mean, std = part.mean((0, 2), keepdim=True), part.std((0, 2), keepdim=True)
    return split((x - mean) / std, y, train)


@program
def sensor_convolutions() -> Training:
    """Four motions by six channels of 64 values, BN after ReLU, dropout at the end.

    Each window is scaled and jittered on its own; Adam, batch 32: 100 %.
    """
    train, test = _scaled(_motions(1300, 64), 900)
    layers: list[nn.Module] = []
    for i, o in ((6, 24), (24, 32), (32, 48)):
        layers += [
            nn.Conv1d(i, o, 5, 1, 2), nn.ReLU(), nn.BatchNorm1d(o), nn.MaxPool1d(2)
        ]  # fmt: skip
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(48, 4),
    )  # fmt: skip

    def jittered(batch: Data) -> Data:
        x, y = batch
        scale = 1 + 0.1 * torch.randn(len(x), 6, 1)
        return x * scale + 0.05 * torch.randn_like(x), y

    return supervised(
        model, train, test, optim.Adam(model.parameters(), 2e-3), size=32, steps=140,
        goal=0.93, change=jittered,
    )  # fmt: skip


class _ConvLstm(nn.Module):
    """Convolutions, then an LSTM whose last state is read (DeepConvLSTM)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(6, 24, 5, 2, 2, bias=False), nn.BatchNorm1d(24), nn.ReLU(),
            nn.Conv1d(24, 32, 5, 2, 2, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        )  # fmt: skip
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.body(x).transpose(1, 2))
        return self.head(y[:, -1])


@program
def convolutions_then_lstm() -> Training:
    """Four motions by 48 values of six channels, BN, RMSprop, clipped, batch 25: 99 %.

    The learning rate falls by 0.7 every 40 steps.
    """
    train, test = _scaled(_motions(1300, 48), 900)
    model = _ConvLstm()
    optimizer = optim.RMSprop(model.parameters(), 1.5e-3, alpha=0.9)
    return supervised(
        model, train, test, optimizer, size=25, steps=200, goal=0.93, clip=1.0,
        schedule=optim.lr_scheduler.StepLR(optimizer, 40, 0.7),
    )  # fmt: skip


def _reviews(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return padded words, lengths and labels: word 1 turns the sign of the next.

    Words 2 to 7 are positive and 8 to 13 are negative; 14 to 33 have no sign.
    """
    length = 2 * torch.randint(4, 11, (n,))
    x = torch.randint(14, 34, (n, 10, 2))
    y = torch.randint(2, (n,))
    slot = torch.rand(n, 10).masked_fill(torch.arange(10) >= length[:, None] // 2, 2)
    slot, rows = slot.argsort(1), torch.arange(n)
    for k, as_label in enumerate((True, True, False)):
        is_good = (y == 1) == as_label
        is_turned = torch.rand(n) < 0.35
        word = torch.where(is_good != is_turned, 2, 8) + torch.randint(6, (n,))
        x[rows, slot[:, k], 1] = word
        x[rows, slot[:, k], 0] = x[rows, slot[:, k], 0].masked_fill(is_turned, 1)
    x = x.flatten(1)
    x[torch.arange(20) >= length[:, None]] = 0
    return x, length, y


class _Attentive(nn.Module):
    """Packed BiLSTM; a softmax over the words that are there weighs its states."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 24, padding_idx=0)
        self.lstm = nn.LSTM(24, 24, batch_first=True, bidirectional=True)
        self.weigh = nn.Sequential(nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 1))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(48, 2))

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embed(x), length, batch_first=True, enforce_sorted=False
        )
        y, _ = pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=x.shape[1]
        )
        score = self.weigh(y)[..., 0].masked_fill(x == 0, -math.inf)
        return self.head((score.softmax(1)[..., None] * y).sum(1))


@program
def attentive_lstm() -> Training:
    """Opinion of padded reviews of 8 to 20 words with negations, attention, Adam.

    Packed BiLSTM, dropout 0.2, clipped, batch 32: 100 %.
    """
    x, length, y = _reviews(3400)
    train, test = split((x, length), y, 3000)
    model = _Attentive(34)
    optimizer = optim.Adam(model.parameters(), 1e-2)
    return supervised(
        model, train, test, optimizer, size=32, steps=280, goal=0.88, clip=1.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 281),
    )  # fmt: skip


class _Pooled(nn.Module):
    """Spatial dropout, BiGRU, mean and maximum over the words, six labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(80, 32, padding_idx=0)
        self.drop = nn.Dropout1d(0.1)
        self.gru = nn.GRU(32, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(96, 6)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        z = self.drop(self.embed(x).transpose(1, 2)).transpose(1, 2)
        packed = pack_padded_sequence(z, length, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=x.shape[1]
        )
        there = (x > 0)[..., None]
        mean = (y * there).sum(1) / length[:, None]
        most = y.masked_fill(~there, -math.inf).amax(1)
        return self.head(torch.cat((mean, most), 1))


@program
def comments_of_six_labels() -> Training:
    """Six labels, a tenth to a third of the padded comments of 6 to 24 words each.

    BiGRU with spatial dropout, BCE, AdamW, one-cycle, batch 40: 99.9 % (F1).
    """
    n = 2400
    rate = torch.linspace(0.1, 0.33, 6)
    y = (torch.rand(n, 6) < rate).float()
    length = torch.randint(6, 25, (n,))
    x = torch.randint(31, 80, (n, 24))
    order = (
        torch.rand(n, 24).masked_fill(torch.arange(24) >= length[:, None], 2).argsort(1)
    )
    for k in range(6):
        word = 1 + 5 * k + torch.randint(5, (n,))
        rows = (y[:, k] == 1).nonzero()[:, 0]
        x[rows, order[rows, k]] = word[rows]
    x[torch.arange(24) >= length[:, None]] = 0
    train, test = split((x, length), y, 2000)
    model = _Pooled()
    optimizer = optim.AdamW(model.parameters(), 2e-2, weight_decay=0.01)

    def f1(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = (net.eval()(*data[0]) > 0).float()
        return float(2 * (said * data[1]).sum() / (said.sum() + data[1].sum()))

    return supervised(
        model, train, test, optimizer, size=40, steps=220, goal=0.88, score=f1,
        loss_fn=F.binary_cross_entropy_with_logits,
        schedule=optim.lr_scheduler.OneCycleLR(
            optimizer, 2e-2, total_steps=221, pct_start=0.2
        ),
    )  # fmt: skip


class _Temporal(nn.Module):
    """Two causal dilated convolutions with layer norm, and a residual."""

    def __init__(self, i: int, o: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv1 = nn.Conv1d(i, o, 3, dilation=dilation)
        self.conv2 = nn.Conv1d(o, o, 3, dilation=dilation)
        self.norm1, self.norm2 = nn.LayerNorm(o), nn.LayerNorm(o)
        self.short = nn.Conv1d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.pad(x, (self.pad, 0)))
        y = F.relu(self.norm1(y.transpose(1, 2)).transpose(1, 2))
        y = self.conv2(F.pad(y, (self.pad, 0)))
        y = F.relu(self.norm2(y.transpose(1, 2)).transpose(1, 2))
        return F.relu(y + self.short(x))


class _Adder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _Temporal(2, 24, 1), _Temporal(24, 24, 2), _Temporal(24, 24, 4)
        )  # fmt: skip
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, :, -1])


@program
def adding_problem() -> Training:
    """Sum of the two marked values of 24, by a causal TCN with layer norm, Adam, MSE.

    A row is seen once, batch 64: 96 % of the variance.
    """
    n = 24000
    value = torch.rand(n, 24)
    mark = torch.zeros(n, 24)
    mark[torch.arange(n), torch.randint(12, (n,))] = 1
    mark[torch.arange(n), torch.randint(12, 24, (n,))] = 1
    y = ((value * mark).sum(1, keepdim=True) - 1) * math.sqrt(6)
    train, test = split(torch.stack((value * 2 - 1, mark), 1), y, 23500)
    model = _Adder()
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=360, goal=0.9, score=r2,
        loss_fn=F.mse_loss, clip=1.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 361),
    )  # fmt: skip


class _Unrolled(nn.Module):
    """Packed GRU encoder, additive attention, GRU decoder with the given targets."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Embedding(10, 24, padding_idx=0)
        self.said = nn.Embedding(10, 24, padding_idx=0)
        self.encoder = nn.GRU(24, 32, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(64, 48)
        self.keys = nn.Linear(64, 32, bias=False)
        self.query = nn.Linear(48, 32)
        self.weigh = nn.Linear(32, 1, bias=False)
        self.cell = nn.GRUCell(24 + 64, 48)
        self.head = nn.Linear(48 + 64, 10)

    def forward(self, x: Tensor, length: Tensor, given: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.read(x), length, batch_first=True, enforce_sorted=False
        )
        out, last = self.encoder(packed)
        memory, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        h = self.bridge(last.transpose(0, 1).flatten(1)).tanh()
        keys, absent = self.keys(memory), x == 0
        logits = []
        for each in self.said(given).unbind(1):
            weight = self.weigh((keys + self.query(h)[:, None]).tanh())[..., 0]
            weight = weight.masked_fill(absent, -math.inf).softmax(1)
            context = (weight[..., None] * memory).sum(1)
            h = self.cell(torch.cat((each, context), 1), h)
            logits.append(self.head(torch.cat((h, context), 1)))
        return torch.stack(logits, 1)


@program
def run_lengths() -> Training:
    """Write out runs: b 3 a 1 gives b b b a; GRUs with additive attention, Adam.

    Two to four pairs, loss without the padding, clipped, batch 40: 99 % of signs.
    """
    n = 1800
    x, given = torch.zeros(n, 8).long(), torch.zeros(n, 13).long()
    y = torch.zeros(n, 13).long()
    length = 2 * torch.randint(2, 5, (n,))
    for row in range(n):
        text: list[int] = []
        for at in range(0, int(length[row]), 2):
            letter, times = int(torch.randint(1, 6, ())), int(torch.randint(1, 4, ()))
            x[row, at], x[row, at + 1] = letter, 5 + times
            text += [letter] * times
        text.append(9)
        y[row, : len(text)] = torch.tensor(text)
        given[row, : len(text)] = torch.tensor([9, *text[:-1]])
    train, test = split((x, length, given), y, 1500)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten(), ignore_index=0)

    def right(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(*data[0]).argmax(2)
        there = data[1] > 0
        return float((said == data[1])[there].float().mean())

    model = _Unrolled()
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 4e-3), size=40, steps=240,
        goal=0.93, loss_fn=loss_fn, score=right, clip=1.0,
    )  # fmt: skip

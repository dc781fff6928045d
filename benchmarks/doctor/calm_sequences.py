"""Healthy programs on sequences: waves, forecasts, words, states that are carried."""

from __future__ import annotations

import difflib
import inspect
import math
from typing import Any

import torch
from calm_base import Data, endless, program, r2, warm_cosine
from quiet_base import Subject, Training, split, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

import normkit


class _Gated(nn.Module):
    """Causal dilated convolution with a gate, a residual and a skip (WaveNet)."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = dilation
        self.conv = weight_norm(nn.Conv1d(width, 2 * width, 2, dilation=dilation))
        self.out = weight_norm(nn.Conv1d(width, 2 * width, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, gate = self.conv(F.pad(x, (self.pad, 0))).chunk(2, 1)
        y, skip = self.out(y.tanh() * gate.sigmoid()).chunk(2, 1)
        return x + y, skip


class _WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Embedding(32, 24)
        self.blocks = nn.ModuleList(_Gated(24, 2**i) for i in range(5))
        self.leave = nn.Sequential(
            nn.ReLU(), weight_norm(nn.Conv1d(24, 32, 1)), nn.ReLU(),
            weight_norm(nn.Conv1d(32, 32, 1)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y, total = self.enter(x).transpose(1, 2), 0
        for block in self.blocks:
            y, skip = block(y)
            total = total + skip
        return self.leave(total)


@program
def wave_net() -> Training:
    """WaveNet with weight norm predicts the next of 32 mu-law levels, Adam, batch 24.

    1.6 nats, where even levels have 3.5.
    """
    time, n = torch.arange(81.0), 700
    pitch = 0.15 + 0.5 * torch.rand(n, 2, 1)
    wave = (pitch * time + 2 * math.pi * torch.rand(n, 2, 1)).sin().mean(1)
    wave = (0.9 * wave + 0.02 * torch.randn(n, 81)).clamp(-1, 1)
    squeezed = wave.sign() * (1 + 31 * wave.abs()).log() / math.log(32)
    level = ((squeezed + 1) / 2 * 31).round().long()
    train, test = split(level[:, :-1], level[:, 1:], 600)
    model = _WaveNet()

    def gained(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            return -float(F.cross_entropy(net.eval()(data[0]), data[1]))

    return supervised(
        model, train, test, optim.Adam(model.parameters(), 4e-3), size=24, steps=190,
        goal=-2.2, score=gained,
    )  # fmt: skip


class _NormOfTokens(nn.Module):
    """Batch norm of the features of tokens `(N, T, C)`, as PatchTST has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class _Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm1, self.norm2 = _NormOfTokens(width), _NormOfTokens(width)
        self.body = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(0.05)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(x, x, x, need_weights=False)[0]
        x = self.norm1(x + self.drop(y))
        return self.norm2(x + self.drop(self.body(x)))


class _Patches(nn.Module):
    """Windows `(N, 48)` to 8 further values; each window has its mean, std removed."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 32)
        self.place = nn.Parameter(0.02 * torch.randn(11, 32))
        self.layers = nn.Sequential(_Encoder(32), _Encoder(32))
        self.head = nn.Linear(11 * 32, 8)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
        patches = ((x - mean) / std).unfold(1, 8, 4)
        y = self.layers(self.enter(patches) + self.place)
        return self.head(y.flatten(1)) * std + mean


@program
def patch_forecast() -> Training:
    """PatchTST: transformer with batch norm forecasts 8 of a seasonal series.

    Reversible instance norm, Adam, one-cycle, batch 64: R² 0.8 on the later part.
    """
    t = torch.arange(3200.0)
    season = torch.sin(2 * math.pi * t / 24) + 0.6 * torch.sin(2 * math.pi * t / 12 + 1)
    noise, walk = torch.randn(3200), torch.zeros(3200)
    for i in range(1, 3200):
        walk[i] = 0.9 * walk[i - 1] + 0.15 * noise[i]
    series = season * (1 + 0.3 * torch.sin(2 * math.pi * t / 168)) + walk
    series = (series - series[:2600].mean()) / series[:2600].std()
    windows = series.unfold(0, 56, 1)
    train, test = windows[:2500], windows[2600:]
    model = _Patches()
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, (train[:, :48], train[:, 48:]), (test[:, :48], test[:, 48:]), optimizer,
        size=64, steps=260, goal=0.7, loss_fn=F.mse_loss, score=r2,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=261),
    )  # fmt: skip


class _Languages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(13, 16, padding_idx=0)
        self.rnn = nn.GRU(16, 48, batch_first=True)
        self.norm, self.head = normkit.nn.LayerNorm(48), nn.Linear(48, 4)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.words(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.norm(self.rnn(packed)[1][-1]))


def _right(net: nn.Module, data: Data) -> float:
    net.eval()
    with torch.no_grad():
        right = (net(*data[0]).argmax(1) == data[1]).float().mean()
    net.train()
    return float(right)


@program
def languages_packed() -> Training:
    """GRU on packed words of 6 to 20 letters tells four Markov chains apart.

    Normkit's layer norm on the last state, AdamW, clipped, batch 50: 95 %.
    """
    n = 2000
    y, lengths = torch.randint(4, (n,)), torch.randint(6, 21, (n,))
    chains = (2.5 * torch.randn(4, 12, 12)).softmax(2)
    letters = [torch.randint(12, (n,))]
    for _ in range(19):
        letters.append(torch.multinomial(chains[y, letters[-1]], 1)[:, 0])
    x = (torch.stack(letters, 1) + 1) * (torch.arange(20) < lengths[:, None])
    train, test = split((x, lengths), y, 1600)
    model = _Languages()
    return supervised(
        model, train, test, optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01),
        size=50, steps=220, goal=0.88, clip=1.0, score=_right,
    )  # fmt: skip


class _Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.drop = nn.Embedding(41, 24, padding_idx=0), nn.Dropout(0.1)
        self.rnn = nn.LSTM(24, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.drop(self.rnn(self.drop(self.words(tokens)))[0])).mT


@program
def tagger() -> Training:
    """BiLSTM tags words, 16 of 40 of which take the tag from a neighbour; no norm.

    Padding left out by ignore_index, Adam, batch 40: 98 % of the tags.
    """
    n, most = 1400, 14
    lengths = torch.randint(7, most + 1, (n,))
    x = torch.randint(1, 41, (n, most)) * (torch.arange(most) < lengths[:, None])
    own = torch.randint(5, (41,))
    ahead, behind = x.roll(-1, 1), x.roll(1, 1)
    ahead[:, -1], behind[:, 0] = 0, 0
    tags = torch.where(x <= 8, own[ahead], own[x])
    tags = torch.where((x > 8) & (x <= 16), own[behind], tags)
    train, test = split(x, tags.masked_fill(x == 0, -100), 1200)

    def right(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(data[0]).argmax(1)
        kept = data[1] >= 0
        return float((said == data[1])[kept].float().mean())

    model = _Tagger()
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 8e-3), size=40, steps=300,
        goal=0.93, score=right, loss_fn=nn.CrossEntropyLoss(ignore_index=-100),
    )  # fmt: skip


class _Letters(nn.Module):
    """Letters `(N, T)` and the state before them to logits `(N, K, T)`, the state."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.enter = nn.Embedding(letters, 32)
        self.rnn = nn.LSTM(32, 96, batch_first=True)
        self.norm, self.leave = nn.LayerNorm(96), nn.Linear(96, letters)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        y, state = self.rnn(self.enter(x), (h, c))
        return self.leave(self.norm(y)).mT, state


@program
def carried_state() -> Training:
    """Truncate backpropagation: 24 streams of a text, the LSTM's state carried on.

    Segments of 30 letters in their order, layer norm, Adam, clipped: 1.7 nats a
    letter, where the letters' frequencies have 3.1.
    """
    text = inspect.getsource(difflib)
    kinds = sorted(set(text))
    code = torch.tensor([kinds.index(letter) for letter in text])
    length, kept = 30, len(code) * 9 // 10
    streams = code[: kept // 24 * 24].reshape(24, -1)
    start = torch.zeros(1, 24, 96)
    model = _Letters(len(kinds))
    optimizer = optim.Adam(model.parameters(), 5e-3)
    whole = range(0, streams.shape[1] - length - 1, length)
    places = endless(lambda: list(whole))
    state = (start, start)

    def loss_fn(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(out[0], y)

    def segment(i: int) -> Data:
        return streams[:, i : i + length], streams[:, i + 1 : i + length + 1]

    def batches() -> list[Any]:
        found, h, c = [], start, start
        with torch.no_grad():
            for i in whole[:40]:
                x, y = segment(i)
                found.append(((x, h, c), y))
                _, (h, c) = model(x, h, c)
        return found

    def step(_: int) -> float:
        nonlocal state
        model.train()
        i = next(places)
        if i == 0:
            state = (start, start)
        x, y = segment(i)
        optimizer.zero_grad()
        out = model(x, *state)
        loss = loss_fn(out, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = (out[1][0].detach(), out[1][1].detach())
        return float(loss.detach())

    def score() -> float:
        model.eval()
        rest = code[kept:][None]
        zero = torch.zeros(1, 1, 96)
        with torch.no_grad():
            return -float(loss_fn(model(rest[:, :-1], zero, zero), rest[:, 1:]))

    return Training(
        [Subject(model, batches, loss_fn, optimizer)], step, 330, score, -2.4
    )


class _Denoise(nn.Module):
    """U-Net of two levels on signals `(N, 1, T)`, group norm."""

    def __init__(self) -> None:
        super().__init__()

        def layer(i: int, o: int) -> nn.Sequential:
            conv = nn.Conv1d(i, o, 5, 1, 2, bias=False)
            return nn.Sequential(conv, nn.GroupNorm(4, o), nn.SiLU())

        self.down1, self.down2, self.middle = layer(1, 16), layer(16, 32), layer(32, 32)
        self.up2, self.up1 = layer(64, 24), layer(40, 16)
        self.leave = nn.Conv1d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.avg_pool1d(a, 2))
        y = self.middle(F.avg_pool1d(b, 2))
        y = self.up2(torch.cat((F.interpolate(y, scale_factor=2), b), 1))
        return self.leave(self.up1(torch.cat((F.interpolate(y, scale_factor=2), a), 1)))


@program
def denoise_signals() -> Training:
    """U-Net 1d takes noise from chirps and steps, group norm, L1, AdamW, batch 16.

    Warmup and cosine; a third of the noise's power is left.
    """
    n, time = 900, torch.arange(64.0)
    pitch, drift = 0.1 + 0.3 * torch.rand(n, 1), 0.003 * torch.randn(n, 1)
    clean = ((pitch + drift * time) * time + 6.3 * torch.rand(n, 1)).sin()
    clean = clean + (time > 10 + 44 * torch.rand(n, 1)) * torch.randn(n, 1)
    clean = (clean / clean.std())[:, None]
    train, test = split(clean + 0.5 * torch.randn(n, 1, 64), clean, 760)
    model = _Denoise()
    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)

    def removed(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = (net.eval()(data[0]) - data[1]).square().mean()
        return 1 - float(left / (data[0] - data[1]).square().mean())

    return supervised(
        model, train, test, optimizer, size=16, steps=300, goal=0.6,
        loss_fn=F.l1_loss, score=removed, schedule=warm_cosine(optimizer, 20, 300),
    )  # fmt: skip

"""Healthy programs on sequences: dates, sounds, language models, spans, motifs."""

from __future__ import annotations

import math

import torch
from calm_base import Data, warm_cosine
from gentle_base import area_under_curve, outputs, program
from quiet_base import Training, accuracy, split, supervised
from sober_base import explained_share
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Dates(nn.Module):
    """GRU reader and GRU writer that attends to it, fed the letter before."""

    def __init__(self, letters: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, 24)
        self.read = nn.GRU(24, width // 2, batch_first=True, bidirectional=True)
        self.write = nn.GRU(24, width, batch_first=True)
        self.key = nn.Linear(width, width, bias=False)
        self.head = nn.Sequential(
            nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, letters)
        )

    def forward(self, text: Tensor, before: Tensor) -> Tensor:
        seen, last = self.read(self.embed(text))
        state = last.transpose(0, 1).flatten(1)[None]
        y, _ = self.write(self.embed(before), state)
        score = self.key(y) @ seen.mT / y.shape[2] ** 0.5
        score = score.masked_fill((text == 0)[:, None], -math.inf)
        return self.head(torch.cat((y, score.softmax(2) @ seen), 2))


@program
def dates_rewritten() -> Training:
    """Dates in three styles to six digits by GRUs with attention, teacher forced.

    Adam 5e-3, clip 1, batch 64, cosine; the share of letters right.
    """
    names = "janfebmaraprmayjunjulaugsepoctnovdec"
    months = [names[i : i + 3] for i in range(0, 36, 3)]
    letters = "_ /." + "0123456789" + "abcdefghijklmnopqrstuvwxyz"
    text, told = [], []
    for _ in range(3000):
        d, m, y = (int(torch.randint(a, b, ())) for a, b in ((1, 29), (0, 12), (0, 99)))
        style = int(torch.randint(3, ()))
        name = months[m]
        text.append((f"{d} {name} {y:02}", f"{name} {d}. {y:02}", f"{d}/{name}/{y:02}")[
            style
        ].ljust(10, "_"))  # fmt: skip
        told.append(f"{y:02}{m + 1:02}{d:02}")

    def coded(rows: list[str]) -> Tensor:
        return torch.tensor([[letters.index(c) for c in row] for row in rows])

    x, y = coded(text), coded(told)
    before = torch.cat((torch.zeros_like(y[:, :1]), y[:, :-1]), 1)
    train, test = split((x, before), y, 2600)
    model = _Dates(len(letters))
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=260, goal=0.9, clip=1.0,
        loss_fn=lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 260),
    )  # fmt: skip


class _Events(nn.Module):
    """Convolutions over the spectrogram, a GRU both ways, logits of each frame."""

    def __init__(self, bands: int, kinds: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.MaxPool2d((2, 1)),
            nn.Conv2d(16, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.MaxPool2d((4, 1)),
        )  # fmt: skip
        self.gru = nn.GRU(24 * bands // 8, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, kinds)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).flatten(1, 2).mT
        return self.head(self.gru(y)[0])


@program
def sound_events() -> Training:
    """Frames of chirps, hums and clicks in log spectrograms, which overlap (CRNN).

    Bands standardized, BN, frames' cross entropy, Adam 2e-3, clip 5, batch 32; the
    mean AUC.
    """
    n, frames, size = 500, 40, 32
    steps = torch.arange(frames * size) / size
    wave, y = 0.3 * torch.randn(n, len(steps)), torch.zeros(n, frames, 3)
    for kind in range(3):
        start = 2 + 22 * torch.rand(n, 1)
        end = start + 6 + 6 * torch.rand(n, 1)
        on = (steps >= start) & (steps < end) & (torch.rand(n, 1) < 0.7)
        turn = 2 * math.pi * steps
        rising = (4 + 0.3 * (steps - start)) * (steps - start) * 2 * math.pi
        sound = (
            rising.sin(), (9 * turn).sin(), (12.5 * turn).sin() * (4 * turn).sin() ** 8
        )[kind] * (0.7 + 0.6 * torch.rand(n, 1))  # fmt: skip
        wave += on * sound
        y[..., kind] = on.unflatten(1, (frames, size)).float().mean(2) > 0.5
    power = torch.stft(
        wave, 2 * size, size, window=torch.hann_window(2 * size), return_complex=True
    ).abs()[:, :32, :frames]
    x = (power.square() + 1e-3).log()
    mean, std = x[:400].mean((0, 2)), x[:400].std((0, 2))
    x = (x - mean[:, None]) / std[:, None]
    train, test = split(x[:, None], y, 400)
    model = _Events(32, 3)

    def mean_auc(net: nn.Module, data: Data) -> float:
        out = outputs(net, data)[::4]
        real = data[1][::4]
        each = [area_under_curve(out[..., k], real[..., k]) for k in range(3)]
        return sum(each) / 3

    return supervised(
        model, train, test, optim.Adam(model.parameters(), 2e-3), size=32, steps=110,
        goal=0.92, loss_fn=F.binary_cross_entropy_with_logits, score=mean_auc, clip=5.0,
    )  # fmt: skip


class _Rotary(nn.Module):
    """RMSNorm, causal attention of turned queries and keys, gated MLP."""

    def __init__(self, width: int, length: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        half = width // heads // 2
        turn = torch.arange(length)[:, None] * 1000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", turn.cos())
        self.register_buffer("sin", turn.sin())
        self.heads = heads

    def _turned(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 3)
        cos, sin = self.cos, self.sin
        return torch.cat((a * cos - b * sin, a * sin + b * cos), 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, 2)
        )
        y = F.scaled_dot_product_attention(
            self._turned(q), self._turned(k), v, is_causal=True
        )
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class _Decoder(nn.Module):
    """Blocks between an embedding and its transpose (LLaMA with tied weights)."""

    def __init__(self, words: int, length: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*[_Rotary(width, length) for _ in range(2)])
        self.norm = nn.RMSNorm(width)
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.normal_(m.weight, std=0.08)
        for block in self.blocks:
            for m in (block.out, block.down):
                nn.init.normal_(m.weight, std=0.08 / 4**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(x))) @ self.embed.weight.T


@program
def rotary_decoder() -> Training:
    """Words of a chain of order one with copied pairs, by a small LLaMA, tied weights.

    RMSNorm, rotary places, SwiGLU, AdamW (0.9, 0.95), decay 0.1, warm-up and cosine,
    clip 1, batch 32 of 32 words; nats gained on the words' shares.
    """
    n, words, length = 1500, 40, 33
    chance = (1.8 * torch.randn(words, words)).softmax(1)
    x = torch.zeros(n, length, dtype=torch.long)
    x[:, 0] = torch.randint(words, (n,))
    for t in range(1, length):
        x[:, t] = torch.multinomial(chance[x[:, t - 1]], 1)[:, 0]
        if t > 8:
            again = torch.rand(n) < 0.3
            x[:, t] = torch.where(again, x[:, t - 8], x[:, t])
    share = x[:1250].flatten().bincount(minlength=words) / (1250 * length)
    train, test = split(x[:, :-1], x[:, 1:], 1250)
    alone = -float(share.clamp(min=1e-5).log()[test[1]].mean())
    model = _Decoder(words, length - 1)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    optimizer = optim.AdamW(decayed(model, 0.1), 4e-3, betas=(0.9, 0.95))
    return supervised(
        model, train, test, optimizer, size=32, steps=220, goal=0.7, loss_fn=loss_fn,
        score=lambda net, data: alone - float(loss_fn(outputs(net, data), data[1])),
        clip=1.0, schedule=warm_cosine(optimizer, 22, 220),
    )  # fmt: skip


@program
def replaced_tokens() -> Training:
    """Which words of a text on one topic were replaced by others (as in ELECTRA).

    Pre-norm encoder of two layers, places learned, AdamW with warm-up, clip 1, batch
    32; the AUC over words.
    """
    n, words, length = 2000, 40, 16
    order = torch.randperm(words)
    topic = torch.randint(5, (n, 1))  # of twelve words, four shared with the next
    x = order[(8 * topic + torch.randint(12, (n, length))) % words]
    other = (x + torch.randint(1, words, x.shape)) % words
    wrong = torch.rand(n, length) < 0.15
    train, test = split(torch.where(wrong, other, x), wrong.float(), 1600)

    class Net(nn.Module):
        def __init__(self, width: int = 48) -> None:
            super().__init__()
            self.embed = nn.Embedding(words, width)
            self.place = nn.Parameter(0.1 * torch.randn(length, width))
            layer = nn.TransformerEncoderLayer(
                width, 4, 96, 0.05, "gelu", batch_first=True, norm_first=True
            )
            self.body = nn.TransformerEncoder(
                layer, 2, nn.LayerNorm(width), enable_nested_tensor=False
            )
            self.head = nn.Linear(width, 1)
            nn.init.normal_(self.embed.weight, std=0.3)
            for layer in self.body.layers:  # the encoder copies its layer
                nn.init.xavier_uniform_(layer.linear1.weight)
                nn.init.xavier_uniform_(layer.self_attn.in_proj_weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.embed(x) + self.place))[..., 0]

    model = Net()
    optimizer = optim.AdamW(decayed(model, 0.01), 4e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=260, goal=0.8,
        loss_fn=F.binary_cross_entropy_with_logits, clip=1.0,
        score=lambda net, data: area_under_curve(outputs(net, data), data[1]),
        schedule=warm_cosine(optimizer, 26, 260),
    )  # fmt: skip


class _Spans(nn.Module):
    """Convolutions and a GRU over text and question; logits of start and end."""

    def __init__(self, words: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.mix = nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)
        self.gru = nn.GRU(width, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 2)

    def forward(self, text: Tensor, asked: Tensor) -> Tensor:
        x, q = (
            self.embed(text),
            self.embed(asked)[:, None].expand(-1, text.shape[1], -1),
        )
        y = self.norm(self.mix(torch.cat((x, q, x * q), 2))).relu()
        return self.head(self.gru(y)[0])


@program
def answer_spans() -> Training:
    """Start and end of what follows the asked word up to a full stop (SQuAD style).

    Embeddings, LayerNorm, GRU both ways, AdamW 4e-3, clip 1, batch 64; the share of
    ends exactly right.
    """
    n, length, keys = 3000, 24, 6
    text = torch.randint(7, 40, (n, length))
    at = torch.stack([torch.randperm(4) for _ in range(n)]) * 6
    named = torch.stack([torch.randperm(keys)[:4] for _ in range(n)])
    text.scatter_(1, at, named)
    size = torch.randint(1, 5, (n, 4))
    text.scatter_(1, at + size + 1, 6)
    which = torch.randint(4, (n, 1))
    asked = named.gather(1, which)[:, 0]
    start = at.gather(1, which)[:, 0] + 1
    y = torch.stack((start, start + size.gather(1, which)[:, 0] - 1), 1)
    train, test = split((text, asked), y, 2500)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y)

    def exact(net: nn.Module, data: Data) -> float:
        return float((outputs(net, data).argmax(1) == data[1]).float().mean())

    model = _Spans(40)
    optimizer = optim.AdamW(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=240, goal=0.9, loss_fn=loss_fn,
        score=exact, clip=1.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 240),
    )  # fmt: skip


@program
def binding_motifs() -> Training:
    """One-hot DNA of 60 letters: is one of two motifs there, on noisy letters.

    Convolution, BN, max over places, dropout, OneCycle to 5e-3, batch 64 (DeepBind).
    """
    n, length = 2600, 60
    seen = torch.randint(4, (n, length))
    motif = torch.randint(4, (2, 9))
    y = torch.randint(2, (n,))
    at = torch.randint(length - 9, (n, 1)) + torch.arange(9)
    put = motif[torch.randint(2, (n,))]
    put = torch.where(torch.rand(n, 9) < 0.1, torch.randint(4, (n, 9)), put)
    seen.scatter_(1, at, torch.where(y[:, None] > 0, put, seen.gather(1, at)))
    train, test = split(F.one_hot(seen, 4).float().mT, y, 2100)
    model = nn.Sequential(
        nn.Conv1d(4, 32, 11, padding=5, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2),
    )  # fmt: skip
    optimizer = optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=64, steps=250, goal=0.85, score=accuracy,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, 250),
    )  # fmt: skip


class _Gated(nn.Module):
    """Gated residual map with LayerNorm (of the temporal fusion transformer)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(width, width), nn.ELU(), nn.Linear(width, width), nn.Dropout(0.1),
            nn.Linear(width, 2 * width), nn.GLU(),
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.body(x))


class _Known(nn.Module):
    """LSTM over past loads and known days, gated residuals, a map to each hour."""

    def __init__(self, columns: int, ahead: int, width: int = 40) -> None:
        super().__init__()
        self.past, self.known = nn.Linear(columns, width), nn.Linear(2, width)
        self.read = nn.LSTM(width, width, batch_first=True)
        self.write = nn.LSTM(width, width, batch_first=True)
        self.gates = nn.Sequential(_Gated(width), _Gated(width))
        self.head = nn.Linear(width, 1)

    def forward(self, past: Tensor, known: Tensor) -> Tensor:
        _, state = self.read(self.past(past))
        y, _ = self.write(self.known(known), state)
        return self.head(self.gates(y))[..., 0]


@program
def known_days_ahead() -> Training:
    """Eight further hours of a load from 24 past and known temperature and hour.

    LSTM encoder and decoder, gated residuals, Huber, Adam 4e-3, clip 1, batch 64.
    """
    time = torch.arange(3000.0)
    warm = (2 * math.pi * time / 96).sin() + 0.3 * torch.randn(3000).cumsum(0) / 12
    warm = (warm - warm.mean()) / warm.std()
    hour = (2 * math.pi * time / 24).sin()
    noise = torch.randn(3000)
    for i in range(1, 3000):
        noise[i] += 0.7 * noise[i - 1]
    load = hour + warm.square() - 0.5 * hour * warm + 0.15 * noise
    load = (load - load[:2500].mean()) / load[:2500].std()
    rows = torch.stack((load, warm, hour), 1).unfold(0, 32, 1).mT
    known, y = rows[:, 24:, 1:], rows[:, 24:, 0]
    order = torch.arange(len(rows))
    first, last = order < 2469, order >= 2500
    train = ((rows[first, :24], known[first]), y[first])
    test = ((rows[last, :24], known[last]), y[last])
    model = _Known(3, 8)
    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=180, goal=0.8,
        loss_fn=F.huber_loss, score=explained_share, clip=1.0,
        schedule=optim.lr_scheduler.StepLR(optimizer, 120, 0.3),
    )  # fmt: skip

"""Healthy programs on sequences: forecasts, sounds, letters, tags, what comes next."""

from __future__ import annotations

import math

import torch
from calm_base import Data, warm_cosine
from quiet_base import Training, feed, split, supervised
from sober_base import explained_share, program
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F


def _windows(series: Tensor, past: int, ahead: int, train: int) -> tuple[Data, Data]:
    """Return windows `(n, past, channels)` and what follows; no test row is trained."""
    series = (series - series[:train].mean(0)) / series[:train].std(0)
    rows = series.unfold(0, past + ahead, 1).mT
    cut = train - past - ahead + 1
    first, last = rows[:cut], rows[train:]
    return (first[:, :past], first[:, past:]), (last[:, :past], last[:, past:])


class _MixBlock(nn.Module):
    """Residual maps over the times and over the channels, BN of both (TSMixer)."""

    def __init__(self, past: int, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm1d(past * channels)
        self.norm2 = nn.BatchNorm1d(past * channels)
        self.time = nn.Sequential(nn.Linear(past, past), nn.ReLU(), nn.Dropout(0.1))
        self.channel = nn.Sequential(
            nn.Linear(channels, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x.flatten(1)).view_as(x)
        x = x + self.time(y.mT).mT
        return x + self.channel(self.norm2(x.flatten(1)).view_as(x))


@program
def all_mlp_forecast() -> Training:
    """TSMixer: twelve further values of six seasonal channels from 48, MSE.

    BN over times and channels, dropout 0.1, Adam, cosine, batch 32.
    """
    time = torch.arange(2000.0)[:, None]
    period = torch.tensor([24.0, 24.0, 12.0, 24.0, 36.0, 12.0])
    x = (2 * math.pi * (time / period + torch.rand(6))).sin()
    x = x @ (torch.eye(6) + 0.3 * torch.randn(6, 6))
    noise = torch.randn(2000, 6)
    for i in range(1, 2000):
        noise[i] += 0.6 * noise[i - 1]
    train, test = _windows(x + 0.25 * noise, 48, 12, 1500)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(_MixBlock(48, 6), _MixBlock(48, 6))
            self.head = nn.Linear(48, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(x).mT).mT

    model = Net()
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=300, goal=0.6, loss_fn=F.mse_loss,
        score=explained_share,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip


class _Conformer(nn.Module):
    """Half a step of MLP, attention, convolution with BN, half a step, layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = self._half(width), self._half(width)
        self.norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.before = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width))
        self.conv = nn.Sequential(
            nn.Conv1d(width, width, 7, 1, 3, groups=width, bias=False),
            nn.BatchNorm1d(width), nn.SiLU(), nn.Conv1d(width, width, 1),
            nn.Dropout(0.1),
        )  # fmt: skip
        self.out = nn.LayerNorm(width)

    def _half(self, width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(),
            nn.Dropout(0.1), nn.Linear(2 * width, width), nn.Dropout(0.1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        y = self.norm(x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        x = x + self.conv(F.glu(self.before(x)).mT).mT
        return self.out(x + 0.5 * self.last(x))


def _sound_events(n: int) -> Data:
    """Return 32 frames of 16 log energies, and which of 3 sounds each frame holds."""
    bins, frames = torch.arange(16.0), torch.arange(32)
    energy = 0.1 * -torch.rand(n, 32, 16).clamp(min=1e-6).log()
    held = torch.zeros(n, 32, 3)
    for kind, (low, slope) in enumerate(((3.0, 0.0), (6.0, 0.7), (13.0, -0.7))):
        there = torch.rand(n) < 0.6
        begin, long = torch.randint(24, (n, 1)), torch.randint(6, 13, (n, 1))
        since = frames - begin
        on = (since >= 0) & (since < long) & there[:, None]
        middle = low + slope * since + 0.5 * torch.randn(n, 1)
        shape = (-(bins - middle[..., None]).square() / 2).exp()
        loud = (0.3 * torch.randn(n, 1, 1)).exp()
        energy += loud * shape * on[..., None]
        held[..., kind] = on.float()
    return energy.add(1e-3).log(), held


def _agreement(model: nn.Module, data: Data) -> float:
    """Return the F1 of yes and no, over all of them, in eval mode."""
    model.eval()
    with torch.no_grad():
        told = (feed(model, data) > 0).float()
    return float(2 * (told * data[1]).sum() / (told + data[1]).sum())


@program
def conformer_frames() -> Training:
    """Which of three sounds each frame of a log spectrogram holds; a Conformer block.

    Layer norm, BN in the convolution, AdamW, warm-up and cosine, batch 32, BCE.
    """
    x, y = _sound_events(1000)
    mean, std = x[:800].mean((0, 1)), x[:800].std((0, 1))
    train, test = split((x - mean) / std, y, 800)
    model = nn.Sequential(nn.Linear(16, 40), _Conformer(40), nn.Linear(40, 3))
    optimizer = optim.AdamW(decayed(model, 0.01), 3e-3, betas=(0.9, 0.98))
    return supervised(
        model, train, test, optimizer, size=32, steps=200, goal=0.8, score=_agreement,
        loss_fn=F.binary_cross_entropy_with_logits, clip=1.0,
        schedule=warm_cosine(optimizer, 20, 200),
    )  # fmt: skip


class _StateSpace(nn.Module):
    """Diagonal state space as a long convolution, gated, residual, pre-norm (S4D)."""

    def __init__(self, width: int, states: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        low, high = math.log(0.005), math.log(0.2)
        self.step = nn.Parameter(low + (high - low) * torch.rand(width, 1))
        self.fall = nn.Parameter(torch.full((width, states), 0.5).log())
        self.turn = nn.Parameter(
            math.pi * torch.arange(states).float().repeat(width, 1)
        )
        self.read = nn.Parameter(torch.randn(width, states, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(width))
        self.mix = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        rate = torch.complex(-self.fall.exp(), self.turn)
        step = rate * self.step.exp()
        gain = torch.view_as_complex(self.read) * (step.exp() - 1) / rate
        powers = (step[..., None] * torch.arange(length)).exp()
        kernel = 2 * (gain[..., None] * powers).sum(1).real
        u = self.norm(x).mT
        y = torch.fft.rfft(u, 2 * length) * torch.fft.rfft(kernel, 2 * length)
        y = torch.fft.irfft(y, 2 * length)[..., :length] + u * self.skip[:, None]
        return x + F.glu(self.mix(F.gelu(y).mT))


@program
def diagonal_state_space() -> Training:
    """Rhythm of pulses 9, 11 or 13 apart in 96 noisy values, by two S4D layers.

    Layer norm, rates and frequencies at a fifth of the rate and undecayed, AdamW,
    batch 40.
    """
    n, length = 1200, 96
    y = torch.randint(3, (n,))
    since = (torch.arange(length) + torch.randint(40, (n, 1))) % (9 + 2 * y[:, None])
    x = (since == 0).float() * (1 + 0.3 * torch.randn(n, length))
    x = x + 0.2 * torch.randn(n, length)
    train, test = split(((x - x[:900].mean()) / x[:900].std())[..., None], y, 900)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(1, 32)
            self.layers = nn.Sequential(_StateSpace(32), _StateSpace(32))
            self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(self.into(x)).mean(1))

    model = Net()
    named = dict(model.named_parameters())
    slow = [p for k, p in named.items() if k.endswith((".step", ".fall", ".turn"))]
    rest = [p for k, p in named.items() if not k.endswith((".step", ".fall", ".turn"))]
    optimizer = optim.AdamW(
        [{"params": slow, "lr": 1e-3, "weight_decay": 0.0}, {"params": rest}],
        5e-3, weight_decay=0.01,
    )  # fmt: skip
    return supervised(
        model, train, test, optimizer, size=40, steps=240, goal=0.85,
        schedule=warm_cosine(optimizer, 20, 240),
    )  # fmt: skip


def _sentences(n: int, length: int) -> Tensor:
    """Return strings of a grammar: a bracket of one of 4 kinds closes with its kind."""
    rows = torch.randint(8, 14, (n, length))
    for row in rows:
        t = 0
        while t + 5 < length:
            kind, inside = int(torch.randint(4, ())), int(torch.randint(1, 4, ()))
            row[t], row[t + inside + 1] = kind, 4 + kind
            t += inside + 2 + int(torch.randint(2, ()))
    return rows


class _Alibi(nn.Module):
    """Causal attention with linear biases and a gated MLP, RMS norm before each."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(
            n, length, 3, self.heads, -1
        ).permute(2, 0, 3, 1, 4)  # fmt: skip
        away = torch.arange(length) - torch.arange(length)[:, None]
        slope = 2.0 ** (-8 * torch.arange(1, self.heads + 1) / self.heads)
        bias = (slope[:, None, None] * away).masked_fill(away > 0, -math.inf)
        y = F.scaled_dot_product_attention(q, k, v, bias)
        x = x + self.out(y.transpose(1, 2).reshape(n, length, width))
        a, b = self.gate(self.norm2(x)).chunk(2, 2)
        return x + self.down(F.silu(a) * b)


@program
def linear_biases_accumulated() -> Training:
    """Language model of brackets with ALiBi, two batches of 16 a step, mean of losses.

    Tied embeddings from N(0, 0.16²), RMS norm, AdamW, decay 0.1 of matrices, clipped
    at 1, warm-up; the share of the closing brackets that it foretells.
    """
    rows = _sentences(1400, 24)
    train, test = split(rows[:, :-1], rows[:, 1:], 1200)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(14, 48)
            self.blocks = nn.Sequential(_Alibi(48), _Alibi(48))
            self.norm = nn.RMSNorm(48)
            nn.init.normal_(self.embed.weight, std=0.16)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.norm(self.blocks(self.embed(x))), self.embed.weight)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    def closing(net: nn.Module, data: Data) -> float:
        """Return how often the right kind is likeliest among closing brackets."""
        with torch.no_grad():
            told = net.eval()(data[0])[..., 4:8].argmax(-1) + 4
        where = (data[1] >= 4) & (data[1] < 8)
        return float((told == data[1])[where].float().mean())

    model = Net()
    optimizer = optim.AdamW(decayed(model, 0.1), 3e-3, betas=(0.9, 0.95))
    return supervised(
        model, train, test, optimizer, size=16, steps=150, goal=0.85, loss_fn=loss_fn,
        score=closing, accumulate=2, clip=1.0,
        schedule=warm_cosine(optimizer, 20, 150),
    )  # fmt: skip


class _Tagger(nn.Module):
    """BiLSTM that scores tags, and scores of one tag after another (CRF)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 32)
        self.lstm = nn.LSTM(32, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 4)
        self.then = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.lstm(self.embed(x))[0]), self.then


def _crf_loss(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    """Return minus the mean log-likelihood of the tags' chains, by their length."""
    score, then = out
    right = score.gather(2, y[..., None]).sum((1, 2)) + then[y[:, :-1], y[:, 1:]].sum(1)
    total = score[:, 0]
    for t in range(1, score.shape[1]):
        total = (total[..., None] + then).logsumexp(1) + score[:, t]
    return (total.logsumexp(1) - right).mean() / score.shape[1]


def _best_chain(model: nn.Module, data: Data) -> float:
    """Return the F1 of tagged words (tag not 0), by the best chains."""
    with torch.no_grad():
        score, then = model.eval()(data[0])
    best, back = score[:, 0], []
    for t in range(1, score.shape[1]):
        value, last = (best[..., None] + then).max(1)
        best = value + score[:, t]
        back.append(last)
    tags = [best.argmax(1)]
    for last in reversed(back):
        tags.append(last.gather(1, tags[-1][:, None])[:, 0])
    told = torch.stack(tags[::-1], 1)
    hit = ((told == data[1]) & (told > 0)).sum()
    return float(2 * hit / ((told > 0).sum() + (data[1] > 0).sum()))


@program
def random_field_tagger() -> Training:
    """BiLSTM-CRF marks spans of 2 or 3 words after one of 4 openers, begin and inside.

    The opener tells the kind of a span and its length; Adam, clipped at 5, batch 25.
    """
    n, length = 1000, 18
    x, y = torch.randint(8, 60, (n, length)), torch.zeros(n, length, dtype=torch.long)
    for row, tags in zip(x, y, strict=True):
        t = int(torch.randint(4, ()))
        while t + 4 < length:
            opener = int(torch.randint(4, ()))
            row[t] = opener
            tags[t + 1] = 1
            tags[t + 2 : t + 3 + opener % 2] = 2 + opener // 2
            t += 5 + int(torch.randint(5, ()))
    train, test = split(x, y, 800)
    model = _Tagger()
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 8e-3), size=25, steps=160,
        goal=0.85, loss_fn=_crf_loss, score=_best_chain, clip=5.0,
    )  # fmt: skip


class _Next(nn.Module):
    """Causal attention over the items so far; products with all items (SASRec)."""

    def __init__(self, items: int, length: int, width: int = 48) -> None:
        super().__init__()
        self.items = nn.Embedding(items + 1, width, padding_idx=0)
        self.place = nn.Embedding(length, width)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 2, width, 0.1, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        for table in (self.items, self.place):
            nn.init.normal_(table.weight, std=width**-0.5)
        nn.init.zeros_(self.items.weight[0])

    def forward(self, x: Tensor) -> Tensor:
        length, there = x.shape[1], (x > 0)[..., None]
        y = there * self.drop(
            self.items(x) * 48**0.5 + self.place(torch.arange(length))
        )
        mask = torch.full((length, length), -math.inf).triu(1)
        for block in self.blocks:
            y = there * block(y, mask, is_causal=True)
        return self.norm(y) @ self.items.weight[1:].T


@program
def next_item() -> Training:
    """Next of 80 items, four follow each; sessions of 6 to 16 padded on the left.

    SASRec with all items as negatives, tied, dropout 0.1, Adam(0.9, 0.98), batch 64;
    how often the item is among the five likeliest.
    """
    n, length, items = 2200, 16, 80
    near = torch.randint(items, (items, 4))
    rows = torch.zeros(n, length + 1, dtype=torch.long)
    rows[:, 0] = torch.randint(items, (n,))
    for t in range(1, length + 1):
        way = torch.randint(4, (n,))
        follow = near[rows[:, t - 1], way]
        rows[:, t] = torch.where(
            torch.rand(n) < 0.85, follow, torch.randint(items, (n,))
        )
    rows += 1
    absent = torch.arange(length) < torch.randint(0, 11, (n, 1))
    x = rows[:, :-1].masked_fill(absent, 0)
    y = rows[:, 1:].masked_fill(absent, 0)
    train, test = split(x, y, 1900)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten() - 1, ignore_index=-1)

    def among(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            best = net.eval()(data[0])[:, -1].topk(5, 1).indices + 1
        return float((best == data[1][:, -1:]).any(1).float().mean())

    model = _Next(items, length)
    optimizer = optim.Adam(model.parameters(), 3e-3, betas=(0.9, 0.98))
    return supervised(
        model, train, test, optimizer, size=64, steps=220, goal=0.6, loss_fn=loss_fn,
        score=among, schedule=warm_cosine(optimizer, 20, 220),
    )  # fmt: skip

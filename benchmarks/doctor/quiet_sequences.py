"""Healthy programs on sequences and sets of words: LSTM, GRU, CTC, transformers."""

from __future__ import annotations

import argparse
import inspect
import math

import torch
from quiet_base import Subject, Training, accuracy, program, split, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import normkit

Data = tuple[tuple[Tensor, Tensor], Tensor]


def _warm(optimizer: optim.Optimizer, warm: int, steps: int) -> LambdaLR:
    def rate(i: int) -> float:
        if i < warm:
            return (i + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (i - warm) / (steps - warm)))

    return LambdaLR(optimizer, rate)


def _sentences(n: int, longest: int) -> Data:
    """Return tokens 1..29 padded by 0, lengths, and labels.

    The label is the one of four topics that most words are of; every topic has five
    words, ten words are of none.
    """
    lengths = torch.randint(longest // 3, longest + 1, (n,))
    y = torch.randint(4, (n,))
    of_topic = 1 + 5 * y[:, None] + torch.randint(5, (n, longest))
    other = torch.randint(1, 30, (n, longest))
    words = torch.where(torch.rand(n, longest) < 0.35, of_topic, other)
    words[torch.arange(longest) >= lengths[:, None]] = 0
    return (words, lengths), y


class _PackedLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 32, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(32, 4)
        for name, value in self.lstm.named_parameters():
            if "bias_ih" in name:
                nn.init.zeros_(value)
                nn.init.ones_(value.data[32:64])

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(words), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.lstm(packed)[1][0][-1])


@program
def lstm_packed() -> Training:
    """Two-layer LSTM on packed sentences, forget bias 1, Adam, clipped, batch 32.

    85 % of four topics.
    """
    train, test = split(*_sentences(2000, 18), 1700)
    model = _PackedLSTM()
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=300, goal=0.82, clip=1.0
    )


class _Adder(nn.Module):
    """GRU whose layer-normed output is averaged over the valid steps."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 32, batch_first=True)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        out = self.norm(self.gru(x)[0])
        valid = (torch.arange(x.shape[1]) < lengths[:, None]).float()[..., None]
        return self.head((out * valid).sum(1) / valid.sum(1))


@program
def gru_masked() -> Training:
    """GRU with a mask adds the numbers that are marked (4 of up to 20), MSE.

    RMSprop, batch 64: R² 0.9.
    """
    n, longest = 2500, 20
    lengths = torch.randint(10, longest + 1, (n,))
    mark = torch.zeros(n, longest)
    mark.scatter_(1, torch.rand(n, 10).argsort(1)[:, :4], 1.0)
    values = torch.rand(n, longest)
    y = (values * mark).sum(1, keepdim=True) - 2
    x = torch.stack((values, mark), 2)
    x[torch.arange(longest) >= lengths[:, None]] = 0
    train, test = split((x, lengths), y, 2100)

    def r2(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = (net.eval()(*data[0]) - data[1]).square().mean()
        return float(1 - left / data[1].var())

    model = _Adder()
    return supervised(
        model, train, test, optim.RMSprop(model.parameters(), 2e-3), size=64, steps=450,
        goal=0.85, clip=1.0, loss_fn=F.mse_loss, score=r2,
    )  # fmt: skip


class _Reader(nn.Module):
    """Strokes to characters: BN convolution, BiLSTM, log-probabilities (T, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 32, 3, padding=1)
        self.norm = nn.BatchNorm1d(32)
        self.lstm = nn.LSTM(32, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x))).transpose(1, 2)
        return self.head(self.lstm(y)[0]).log_softmax(2).transpose(0, 1)


@program
def ctc() -> Training:
    """CTC reads 4 characters of 6 from 24 noisy frames, BN convolution and BiLSTM.

    Adam, batch 32: 99 % of the strings are exact.
    """
    n, frames = 1600, 24
    y = torch.randint(1, 7, (n, 4))
    glyph = torch.randn(7, 8, 3)
    glyph[0] = 0
    x = 0.2 * torch.randn(n, 8, frames)
    for i in range(4):
        start = 6 * i + torch.randint(0, 3, (n,))
        for k in range(3):
            x[torch.arange(n), :, start + k] += glyph[y[:, i], :, k]
    train, test = split(x, y, 1400)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        size = len(y)
        return F.ctc_loss(
            out, y, torch.full((size,), frames), torch.full((size,), 4),
            zero_infinity=True,
        )  # fmt: skip

    def exact(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        with torch.no_grad():
            best = net.eval()(data[0]).argmax(2).T
        said = [torch.unique_consecutive(row) for row in best]
        pairs = zip(said, data[1], strict=True)
        return sum(s[s > 0].tolist() == t.tolist() for s, t in pairs) / len(said)

    model = _Reader()
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 5e-3), size=32, steps=220,
        goal=0.9, clip=5.0, loss_fn=loss_fn, score=exact,
    )  # fmt: skip


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 32, padding_idx=0)
        self.place = nn.Parameter(0.02 * torch.randn(18, 32))
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(
            layer, 2, nn.LayerNorm(32), enable_nested_tensor=False
        )
        self.head = nn.Linear(32, 4)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        pad = torch.arange(words.shape[1]) >= lengths[:, None]
        y = self.body(self.embed(words) + self.place, src_key_padding_mask=pad)
        valid = (~pad).float()[..., None]
        return self.head((y * valid).sum(1) / valid.sum(1))


@program
def transformer_padded() -> Training:
    """Pre-norm transformer encoder with a padding mask, AdamW warmup cosine.

    Batch 32: 88 % of four topics.
    """
    train, test = split(*_sentences(2400, 18), 2000)
    model = _Encoder()
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=32, steps=180, goal=0.82, clip=1.0,
        schedule=_warm(optimizer, 20, 180),
    )  # fmt: skip


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = normkit.nn.RMSNorm(width), normkit.nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.grow = nn.Linear(width, 2 * width, bias=False)
        self.shrink = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        parts = self.qkv(self.norm1(x)).view(n, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, c))
        y = self.norm2(x)
        return x + self.shrink(F.silu(self.gate(y)) * self.grow(y))


class _Writer(nn.Module):
    """A language model with tied embeddings, RMS norm and gated units."""

    def __init__(self, tokens: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.place = nn.Embedding(32, width)
        self.blocks = nn.Sequential(*[_Attention(width) for _ in range(3)])
        self.norm = normkit.nn.RMSNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        for each in self.modules():
            if isinstance(each, nn.Linear | nn.Embedding):
                nn.init.normal_(each.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text) + self.place(torch.arange(text.shape[1]))
        return self.head(self.norm(self.blocks(x)))


@program
def causal_language_model() -> Training:
    """Character model of Python's own argparse, tied embeddings, normkit's RMSNorm.

    AdamW(0.9, 0.95) warmup cosine, batch 16 × 32: 2.0 nats, where a unigram has
    2.9.
    """
    text = inspect.getsource(argparse)
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(c) for c in text])
    windows = codes.unfold(0, 33, 33)
    windows = windows[torch.randperm(len(windows))]
    train, test = split(windows[:, :-1], windows[:, 1:], len(windows) - 200)
    model = _Writer(len(letters))
    optimizer = optim.AdamW(
        model.parameters(), 4e-3, betas=(0.9, 0.95), weight_decay=0.1
    )

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    def gained(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        with torch.no_grad():
            return -float(loss_fn(net.eval()(data[0]), data[1]))

    return supervised(
        model, train, test, optimizer, size=16, steps=240, goal=-2.3, clip=1.0,
        loss_fn=loss_fn, score=gained, schedule=_warm(optimizer, 30, 240),
    )  # fmt: skip


class _Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.width = nn.Embedding(12, 32), 32
        self.place: Tensor
        self.body = nn.Transformer(32, 4, 2, 2, 64, 0.0, batch_first=True)
        self.head = nn.Linear(32, 12)
        t, k = torch.arange(10.0)[:, None], torch.arange(0, 32, 2)
        angle = t / 10000 ** (k / 32)
        place = torch.stack((angle.sin(), angle.cos()), 2).flatten(1)
        self.register_buffer("place", place)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        a = self.embed(source) * math.sqrt(self.width) + self.place[: source.shape[1]]
        b = self.embed(target) * math.sqrt(self.width) + self.place[: target.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.body(a, b, tgt_mask=mask, tgt_is_causal=True))


@program
def translator_post_norm() -> Training:
    """nn.Transformer (post-norm) sorts strings of 6 digits.

    Adam(0.9, 0.98) with warmup, label smoothing, batch 64: 99 % of the tokens.
    """
    source = torch.randint(2, 12, (4000, 6))
    target = source.sort(1).values
    shifted = torch.cat((torch.ones(4000, 1, dtype=torch.long), target[:, :-1]), 1)
    train, test = split((source, shifted), target, 3700)
    model = _Translator()
    nn.init.normal_(model.embed.weight, std=32**-0.5)
    for value in model.body.parameters():
        if value.dim() > 1:
            nn.init.xavier_uniform_(value)
    optimizer = optim.Adam(model.parameters(), 2e-3, betas=(0.9, 0.98), eps=1e-9)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten(), label_smoothing=0.1)

    return supervised(
        model, train, test, optimizer, size=64, steps=200, goal=0.9, clip=1.0,
        loss_fn=loss_fn, score=accuracy, schedule=_warm(optimizer, 40, 200),
    )  # fmt: skip


class _Experts(nn.Module):
    """Top-2 of 6 experts by a router; keeps the balance loss of Shazeer et al. 2017."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 6, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))
            for _ in range(6)
        )
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(1)
        top, chosen = share.topk(2, 1)
        top = top / top.sum(1, keepdim=True)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            row, place = (chosen == k).nonzero(as_tuple=True)
            if len(row):
                out = out.index_add(0, row, expert(x[row]) * top[row, place, None])
        used = F.one_hot(chosen, 6).sum(1).float().mean(0) / 2
        self.balance = 6 * (used * share.mean(0)).sum()
        return out


class _Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(10, 32), nn.LayerNorm(32)
        self.experts, self.head = _Experts(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.enter(x)
        y = y + self.experts(self.norm(y))
        return self.head(y), self.experts.balance


@program
def mixture_of_experts() -> Training:
    """Top-2 of 6 experts with a balance loss of 0.01, layer norm, AdamW, batch 128.

    85 % of three classes whose rule differs by region.
    """
    x = torch.randn(3500, 10)
    region = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    rules = torch.randn(4, 10, 3)
    y = torch.einsum("nd,ndk->nk", x, rules[region]).argmax(1)
    train, test = split(x, y, 3000)
    model = _Mixture()

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(out[0], y) + 0.01 * out[1]

    def right(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        with torch.no_grad():
            return float((net.eval()(data[0])[0].argmax(1) == data[1]).float().mean())

    return supervised(
        model, train, test, optim.AdamW(model.parameters(), 5e-3), size=128, steps=350,
        goal=0.78, loss_fn=loss_fn, score=right,
    )  # fmt: skip


class _Causal(nn.Module):
    """Dilated residual convolution of a TCN with weight norm."""

    def __init__(self, inputs: int, dilation: int) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.pad = 2 * dilation
        self.conv1 = norm(nn.Conv1d(inputs, 24, 3, dilation=dilation))
        self.conv2 = norm(nn.Conv1d(24, 24, 3, dilation=dilation))
        self.short = nn.Conv1d(inputs, 24, 1) if inputs != 24 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(F.pad(x, (self.pad, 0))))
        y = F.relu(self.conv2(F.pad(y, (self.pad, 0))))
        return F.relu(y + self.short(x))


@program
def weight_norm_tcn() -> Training:
    """TCN with weight norm classifies four waveforms in noise, Adam, batch 32: 95 %."""
    n, length = 1600, 48
    y = torch.randint(4, (n,))
    phase = 6.28 * torch.rand(n, 1)
    t = torch.linspace(0, 6.28 * 3, length) * (0.8 + 0.4 * torch.rand(n, 1)) + phase
    waves = torch.stack(
        (t.sin(), t.sin().sign(), (t / 6.28) % 1 * 2 - 1, t.sin().abs())
    )
    x = (waves[y, torch.arange(n)] + 0.2 * torch.randn(n, length))[:, None]
    train, test = split(x, y, 1300)
    model = nn.Sequential(
        *[_Causal(24 if i else 1, 2**i) for i in range(3)],
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(model, train, test, optimizer, size=32, steps=250, goal=0.9)


class _MaskedNet(nn.Module):
    """Convolutions over words with normkit's batch norm, which leaves padding out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16, padding_idx=0)
        self.conv1, self.norm1 = (
            nn.Conv1d(16, 32, 3, padding=1),
            normkit.nn.BatchNorm1d(32),
        )
        self.conv2, self.norm2 = (
            nn.Conv1d(32, 32, 3, padding=1),
            normkit.nn.BatchNorm1d(32),
        )
        self.head = nn.Linear(32, 4)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(words.shape[1]) < lengths[:, None])[:, None]
        x = self.embed(words).transpose(1, 2)
        x = F.relu(self.norm1(self.conv1(x), mask=mask)) * mask
        x = F.relu(self.norm2(self.conv2(x), mask=mask)) * mask
        return self.head(x.sum(2) / mask.sum(2))


@program
def masked_batch_norm() -> Training:
    """Normkit's BatchNorm1d with a mask over padded sentences, AdamW, batch 64.

    90 % of four topics.
    """
    train, test = split(*_sentences(2400, 24), 2000)
    model = _MaskedNet()
    optimizer = optim.AdamW(model.parameters(), 3e-3)
    return supervised(model, train, test, optimizer, size=64, steps=220, goal=0.88)


class _Tagger(nn.Module):
    """Frozen word vectors, averaged, under a BN head."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag.from_pretrained(vectors, padding_idx=0, mode="mean")
        self.head = nn.Sequential(
            nn.Linear(24, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 6)
        )

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.bag(words))


@program
def multi_label_frozen_embedding() -> Training:
    """Six labels, several at once, from a mean of frozen word vectors, BCE, BN, Adam.

    Batch 64: 90 % of the labels, where always "no" has 66 %.
    """
    n = 2500
    y = (torch.rand(n, 6) < 0.34).float()
    topic = torch.multinomial(y + 0.05, 20, replacement=True)
    words = 1 + 8 * topic + torch.randint(8, (n, 20))
    words[torch.arange(20) >= torch.randint(14, 21, (n, 1))] = 0
    vectors = torch.randn(6, 1, 24) * 0.7 + torch.randn(6, 8, 24)
    vectors = torch.cat((torch.zeros(1, 24), vectors.reshape(48, 24)))
    train, test = split(words, y, 2100)
    model = _Tagger(vectors)

    def right(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        with torch.no_grad():
            return float(((net.eval()(data[0]) > 0) == (data[1] > 0)).float().mean())

    optimizer = optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=300, goal=0.88, score=right,
        loss_fn=F.binary_cross_entropy_with_logits,
    )  # fmt: skip


class _Graph(nn.Module):
    """Two graph convolutions on a normalized adjacency; the nodes are one-hot."""

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        degree = adjacency.sum(1).rsqrt()
        self.register_buffer("spread", degree[:, None] * adjacency * degree)
        self.first, self.norm = nn.Linear(len(degree), 16), nn.LayerNorm(16)
        self.second = nn.Linear(16, 3)

    def forward(self, nodes: Tensor) -> Tensor:
        x = F.relu(self.norm(self.spread @ self.first(nodes)))
        return self.spread @ self.second(F.dropout(x, 0.5, self.training))


@program
def graph_convolution() -> Training:
    """GCN on a block model of 240 nodes, one-hot nodes, 10 labels a class.

    The whole graph as the batch, Adam with decay: 90 % of the nodes without a
    label.
    """
    y = torch.arange(240) % 3
    near = torch.where(y[:, None] == y, 0.12, 0.015)
    edges = (torch.rand(240, 240) < near).float().triu(1)
    model = _Graph(edges + edges.T + torch.eye(240))
    nodes, known = torch.eye(240), torch.arange(240) < 30
    optimizer = optim.Adam(model.parameters(), 0.01, weight_decay=5e-4)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out[known], y[known])

    def step(_: int) -> float:
        model.train()
        optimizer.zero_grad()
        loss = loss_fn(model(nodes), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def unknown() -> float:
        with torch.no_grad():
            right = model.eval()(nodes).argmax(1) == y
        return float(right[~known].float().mean())

    subject = Subject(model, lambda: [(nodes, y)] * 4, loss_fn, optimizer)
    return Training([subject], step, 200, unknown, 0.85)

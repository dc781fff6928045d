"""Healthy programs on letters and words, after makemore, nanoGPT and d2l."""

from __future__ import annotations

import math

import torch
from calm_base import Data, endless, warm_cosine
from quiet_base import Subject, Training, split, supervised
from steady_base import names, program
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F


def _contexts(words: list[str], block: int) -> tuple[Data, int]:
    """Return the `block` letters before each letter, and it; 0 ends a name."""
    kinds = [".", *sorted(set("".join(words)))]
    x, y = [], []
    for word in words:
        context = [0] * block
        for letter in word + ".":
            code = kinds.index(letter)
            x.append(context)
            y.append(code)
            context = [*context[1:], code]
    return (torch.tensor(x), torch.tensor(y)), len(kinds)


def _minus_nats(net: nn.Module, data: Data) -> float:
    net.eval()
    with torch.no_grad():
        return -float(F.cross_entropy(net(data[0]), data[1]))


class _Tanh(nn.Module):
    """Embedded letters, hidden layers with BN before tanh, a quiet last layer."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.table = nn.Embedding(kinds, 10)
        self.fc1, self.bn1 = nn.Linear(30, 100, bias=False), nn.BatchNorm1d(100)
        self.fc2, self.bn2 = nn.Linear(100, 100, bias=False), nn.BatchNorm1d(100)
        self.out = nn.Linear(100, kinds)
        with torch.no_grad():
            for layer in (self.fc1, self.fc2):
                layer.weight.normal_(0, 5 / 3 / math.sqrt(layer.in_features))
            self.out.weight.normal_(0, 0.01)
            self.out.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.bn1(self.fc1(self.table(x).flatten(1))))
        return self.out(torch.tanh(self.bn2(self.fc2(y))))


@program
def makemore_batch_norm() -> Training:
    """Next letter of a name from the last three, BN before tanh, SGD 0.1, batch 32.

    Weights with the gain 5/3 of tanh, rate / 10 at the end: 1.34 nats held out.
    At the start it has 2.8.
    """
    words = names(1500)
    train, kinds = _contexts(words, 3)
    train, test = split(*train, len(train[1]) * 9 // 10)
    model = _Tanh(kinds)
    optimizer = optim.SGD(model.parameters(), 0.1)
    return supervised(
        model, train, test, optimizer, size=32, steps=900, goal=-1.6,
        score=_minus_nats,
        schedule=optim.lr_scheduler.MultiStepLR(optimizer, [700], 0.1),
    )  # fmt: skip


class _Fuse(nn.Module):
    """Join neighbours of `(N, T, C)`, linear, BN over samples and places, tanh."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2 * i, o, bias=False), nn.BatchNorm1d(o)
        nn.init.xavier_normal_(self.linear.weight, 5 / 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        y = self.linear(x.reshape(n, t // 2, 2 * c))
        return torch.tanh(self.norm(y.flatten(0, 1)).reshape(n, t // 2, -1))


@program
def makemore_hierarchy() -> Training:
    """Eight letters fused by pairs in three layers of BN and tanh, AdamW, batch 64.

    1.31 nats held out, 2.9 at the start.
    """
    words = names(1500)
    train, kinds = _contexts(words, 8)
    train, test = split(*train, len(train[1]) * 9 // 10)
    model = nn.Sequential(
        nn.Embedding(kinds, 16), _Fuse(16, 48), _Fuse(48, 48), _Fuse(48, 48),
        nn.Flatten(), nn.Linear(48, kinds),
    )  # fmt: skip
    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=64, steps=400, goal=-1.6,
        score=_minus_nats,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 400, 1e-4),
    )  # fmt: skip


def _story(length: int) -> tuple[Tensor, int]:
    """Return the letters of sentences of a small grammar, as codes."""
    who = ["the king", "the old cat", "a sailor", "my sister", "nobody"]
    does = ["saw", "followed", "painted", "forgot", "sold"]
    what = ["the sea", "a red house", "seven ships", "an apple", "the moon"]
    text = ""
    while len(text) < length:
        i, j, k = torch.randint(5, (3,)).tolist()
        tail = [".", " at night.", ", and then slept."][int(torch.randint(3, ()))]
        text += f"{who[i]} {does[j]} {what[k]}{tail} "
    kinds = sorted(set(text))
    return torch.tensor([kinds.index(c) for c in text[:length]]), len(kinds)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.c_fc = nn.Linear(width, 4 * width)
        self.mlp_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        parts = self.c_attn(self.ln_1(x)).split(c, 2)
        q, k, v = (p.view(n, t, self.heads, -1).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(n, t, c))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class _GPT(nn.Module):
    def __init__(self, kinds: int, width: int, longest: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(kinds, width), nn.Embedding(longest, width)
        self.h = nn.ModuleList(_Block(width, 4) for _ in range(2))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, kinds, bias=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, 0.0, 0.01 if "proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.lm_head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.h:
            y = block(y)
        return self.lm_head(self.ln_f(y))


def _tokens(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


def _minus_token_nats(net: nn.Module, data: Data) -> float:
    net.eval()
    with torch.no_grad():
        return -float(_tokens(net(data[0]), data[1]))


@program
def nano_gpt() -> Training:
    """GPT of two layers on letters of a small grammar, tied, warm-up and cosine.

    AdamW(0.9, 0.99), decay 0.1 on matrices, clipped, batch 16 of 40 letters: 0.26
    nats a letter held out, 3.3 at the start; the grammar itself has about 0.2.
    """
    code, kinds = _story(24000)
    windows = code.unfold(0, 41, 20)
    train, test = split(windows[:, :-1], windows[:, 1:], 1080)
    model, steps = _GPT(kinds, 64, 40), 300
    optimizer = optim.AdamW(decayed(model, 0.1), 3e-3, betas=(0.9, 0.99))
    return supervised(
        model, train, test, optimizer, size=16, steps=steps, goal=-0.4, clip=1.0,
        loss_fn=_tokens, score=_minus_token_nats,
        schedule=warm_cosine(optimizer, 20, steps + 20),
    )  # fmt: skip


class _Tied(nn.Module):
    """Two LSTM layers with dropout; the decoder shares the encoder's weights."""

    def __init__(self, kinds: int, width: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.encoder = nn.Embedding(kinds, width)
        self.rnn = nn.LSTM(width, width, 2, dropout=0.1)
        self.decoder = nn.Linear(width, kinds)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.rnn(self.drop(self.encoder(x)), (h, c))
        return self.decoder(self.drop(y)).flatten(0, 1), h, c


@program
def word_language_model() -> Training:
    """Words of a small grammar by a tied LSTM, state carried on, SGD clipped at 0.25.

    20 streams of 16 words, rate 20, as pytorch/examples has it: 0.98 nats a word held
    out, where the grammar itself has 0.97.
    """
    who, does, what = torch.arange(1, 16).reshape(3, 5).tolist()
    words: list[int] = []
    for _ in range(3600):
        i, j, k = torch.randint(5, (3,)).tolist()
        words += [who[i], does[(i + j % 2) % 5], what[k], 0]
    code = torch.tensor(words)
    kept, width = 12800, 48
    streams = code[:kept].reshape(20, -1).T
    start = torch.zeros(2, 20, width)
    model = _Tied(16, width)
    optimizer = optim.SGD(model.parameters(), 20.0)
    schedule = optim.lr_scheduler.MultiStepLR(optimizer, [400, 500], 0.25)
    whole = range(0, len(streams) - 17, 16)
    places = endless(lambda: list(whole))
    state = (start, start)

    def loss_fn(out: tuple[Tensor, Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(out[0], y)

    def segment(i: int) -> Data:
        return streams[i : i + 16], streams[i + 1 : i + 17].flatten()

    def batches() -> list[Data]:
        found, h, c = [], start, start
        was = model.training
        model.eval()
        with torch.no_grad():
            for i in whole:
                x, y = segment(i)
                found.append(((x, h, c), y))
                _, h, c = model(x, h, c)
        model.train(was)
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
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        schedule.step()
        state = (out[1].detach(), out[2].detach())
        return float(loss.detach())

    def score() -> float:
        model.eval()
        rest, zero = code[kept:, None], torch.zeros(2, 1, width)
        with torch.no_grad():
            return -float(loss_fn(model(rest[:-1], zero, zero), rest[1:, 0]))

    return Training(
        [Subject(model, batches, loss_fn, optimizer)], step, 600, score, -1.0
    )


class _Scratch(nn.Module):
    """A recurrent net of plain parameters on one-hot letters (d2l)."""

    def __init__(self, kinds: int, hidden: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.w_xh = nn.Parameter(0.1 * torch.randn(kinds, hidden))
        self.w_hh = nn.Parameter(torch.randn(hidden, hidden) / math.sqrt(hidden))
        self.b_h = nn.Parameter(torch.zeros(hidden))
        self.w_hq = nn.Parameter(0.1 * torch.randn(hidden, kinds))
        self.b_q = nn.Parameter(torch.zeros(kinds))

    def forward(self, x: Tensor) -> Tensor:
        inputs = F.one_hot(x, self.kinds).float() @ self.w_xh
        state, outputs = torch.zeros(len(x), len(self.b_h)), []
        for each in inputs.unbind(1):
            state = torch.tanh(each + state @ self.w_hh + self.b_h)
            outputs.append(state @ self.w_hq + self.b_q)
        return torch.stack(outputs, 1)


@program
def rnn_from_scratch() -> Training:
    """RNN of plain parameters on the letters of a grammar, SGD 1.0, clipped at 1.

    Batch 32 of 32 letters: 0.27 nats a letter held out.
    """
    code, kinds = _story(24000)
    windows = code.unfold(0, 33, 16)
    train, test = split(windows[:, :-1], windows[:, 1:], 1350)
    model = _Scratch(kinds, 96)
    optimizer = optim.SGD(model.parameters(), 1.0)
    return supervised(
        model, train, test, optimizer, size=32, steps=450, goal=-0.4, clip=1.0,
        loss_fn=_tokens, score=_minus_token_nats,
        schedule=optim.lr_scheduler.StepLR(optimizer, 300, 0.3),
    )  # fmt: skip

"""Healthy programs on sequences: text, signals, answers, forecasts, films."""

from __future__ import annotations

import math

import torch
from calm_base import Data, warm_cosine
from frank_base import outputs, program
from quiet_base import Training, split, supervised
from sober_base import explained_share
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Block(nn.Module):
    """GPT's block: layer norm, causal attention, layer norm, MLP with GELU."""

    def __init__(self, width: int, heads: int, drop: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width),
            nn.Dropout(drop),
        )  # fmt: skip
        self.heads, self.drop = heads, nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        parts = self.qkv(self.ln_1(x)).reshape(n, t, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.proj(y.transpose(1, 2).reshape(n, t, c)))
        return x + self.mlp(self.ln_2(x))


class _Gpt(nn.Module):
    """Learned places, two blocks, a last norm and a head of its own."""

    def __init__(self, words: int, long: int, width: int = 48) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(long, width)
        self.blocks = nn.Sequential(*(_Block(width, 3, 0.1) for _ in range(2)))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.drop = nn.Dropout(0.1)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                deep = name.endswith(("proj.weight", "mlp.2.weight"))
                nn.init.normal_(p, 0, 0.02 / (2 if deep else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.wte(x) + self.wpe.weight[: x.shape[1]])
        return self.head(self.ln_f(self.blocks(h)))


@program
def gpt_sorts() -> Training:
    """Sort six digits of 0 to 2, as minGPT's demonstration; pre-norm, N(0, 0.02).

    The six given ones have no loss. AdamW(0.9, 0.95) 3e-3, decay 0.1 of matrices,
    warm-up and cosine, clip 1, batch 64; share of sorted digits that are right.
    """
    x = torch.randint(3, (3000, 6))
    whole = torch.cat((x, x.sort(1).values), 1)
    target = whole[:, 1:].clone()
    target[:, :5] = -100
    train, test = split(whole[:, :-1], target, 2600)

    def right(net: nn.Module, data: Data) -> float:
        said = outputs(net, data).argmax(2)[:, 5:]
        return float((said == data[1][:, 5:]).float().mean())

    model = _Gpt(3, 11)
    optimizer = optim.AdamW(decayed(model, 0.1), 3e-3, betas=(0.9, 0.95))
    return supervised(
        model, train, test, optimizer, size=64, steps=250, goal=0.95, clip=1.0,
        loss_fn=lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()),
        score=right, schedule=warm_cosine(optimizer, 25, 250),
    )  # fmt: skip


class _Pair(nn.Module):
    """BERT: words, places and sentences embedded, post-norm, the first place read."""

    def __init__(self, words: int, long: int, width: int = 48) -> None:
        super().__init__()
        self.word = nn.Embedding(words, width, padding_idx=0)
        self.place, self.part = nn.Embedding(long, width), nn.Embedding(2, width)
        self.norm, self.drop = nn.LayerNorm(width, eps=1e-12), nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(
            width, 4, 96, 0.1, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pool = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.1))
        self.head = nn.Linear(width, 6)

    def forward(self, x: Tensor, part: Tensor) -> Tensor:
        h = self.word(x) + self.place.weight[: x.shape[1]] + self.part(part)
        h = self.encoder(self.drop(self.norm(h)), src_key_padding_mask=x == 0)
        return self.head(self.pool(h[:, 0]))


@program
def question_and_answer() -> Training:
    """Topic (3) of a padded question and mood (2) of its answer, in BERT's form.

    5 to 9 words each, half of them without a meaning. Post-norm, GELU, tanh pooler,
    AdamW 1e-3, warm-up and cosine, clip 1, batch 48.
    """
    n, long = 2400, 22
    topic, mood = torch.randint(3, (n,)), torch.randint(2, (n,))
    x, part = torch.zeros(n, long).long(), torch.zeros(n, long).long()
    for i in range(n):
        row = [1]
        for k, first in enumerate((3 + 8 * topic[i], 27 + 8 * mood[i])):
            many = int(torch.randint(5, 10, ()))
            own, free = first + torch.randint(8, (many,)), torch.randint(3, 73, (many,))
            start = len(row)
            row += [*torch.where(torch.rand(many) < 0.5, own, free).tolist(), 2]
            part[i, start : len(row)] = k
        x[i, : len(row)] = torch.tensor(row)
    train, test = split((x, part), 2 * topic + mood, 2000)
    model = _Pair(73, long)
    optimizer = optim.AdamW(decayed(model, 0.01), 1e-3)
    return supervised(
        model, train, test, optimizer, size=48, steps=260, goal=0.8, clip=1.0,
        schedule=warm_cosine(optimizer, 26, 260),
    )  # fmt: skip


class _Locked(nn.Module):
    """Dropout with one mask for all steps of a sequence `(N, T, C)`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand_like(x[:, :1]) >= self.p
        return x * kept / (1 - self.p)


class _AwdLstm(nn.Module):
    """LSTM language model with tied words and locked dropout (Merity et al. 2018)."""

    def __init__(self, words: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.first = nn.LSTM(width, 64, batch_first=True)
        self.second = nn.LSTM(64, width, batch_first=True)
        self.drops = nn.ModuleList(_Locked(p) for p in (0.1, 0.15, 0.2))
        self.out = nn.Linear(width, words)
        self.out.weight = self.embed.weight
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drops[1](self.first(self.drops[0](self.embed(x)))[0])
        return self.out(self.drops[2](self.second(h)[0]))


@program
def locked_dropout_lstm() -> Training:
    """Next of 60 words of subject, verb and object by a tied LSTM, locked dropout.

    Adam 1e-2, decay 1.2e-6, clip 0.4, step decay, batch 32 of 24 words; the loss, in
    nats, below that of single words.
    """
    n, long = 1500, 25
    agree = (1.5 * torch.randn(20, 20)).softmax(1)
    takes = (1.5 * torch.randn(20, 20)).softmax(1)
    leads = (1.5 * torch.randn(20, 20)).softmax(1)
    word, rows = torch.randint(20, (n,)), []
    for t in range(long):
        rows.append(word + 20 * (t % 3))
        word = torch.multinomial((agree, takes, leads)[t % 3][word], 1)[:, 0]
    text = torch.stack(rows, 1)
    train, test = split(text[:, :-1], text[:, 1:], 1300)
    share = torch.bincount(train[1].flatten(), minlength=60) / train[1].numel()
    alone = float(-share.log()[test[1]].mean())

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    def gained(net: nn.Module, data: Data) -> float:
        return alone - float(loss_fn(outputs(net, data), data[1]))

    model = _AwdLstm(60)
    optimizer = optim.Adam(model.parameters(), 1e-2, weight_decay=1.2e-6)
    return supervised(
        model, train, test, optimizer, size=32, steps=250, goal=1.5, clip=0.4,
        loss_fn=loss_fn, score=gained,
        schedule=optim.lr_scheduler.MultiStepLR(optimizer, [150, 210], 0.3),
    )  # fmt: skip


@program
def eeg_net() -> Training:
    """Which hand was imagined, from 8 channels of 128 values, by EEGNet (4, 2).

    Rhythms fade at one of two places. BN, ELU, dropout 0.25, Adam 3e-3, batch 32.
    """
    n, long = 900, 128
    y = torch.randint(2, (n,))
    mix = torch.randn(8, 6)
    time = torch.arange(long) / 64
    source = torch.randn(n, 6, long)
    source = F.avg_pool1d(F.pad(source, (2, 2), mode="circular"), 5, 1) * 2
    for k in range(2):
        strong = torch.where(y == k, 0.9, 0.5)[:, None] * (0.7 + 0.6 * torch.rand(n, 1))
        rate = 10 + 2 * torch.rand(n, 1)
        phase = 2 * math.pi * torch.rand(n, 1)
        source[:, k] += strong * (2 * math.pi * rate * time + phase).sin()
    x = mix @ source + 0.5 * torch.randn(n, 8, long)
    x = (x - x[:700].mean((0, 2))[:, None]) / x[:700].std((0, 2))[:, None]
    train, test = split(x[:, None], y, 700)
    model = nn.Sequential(
        nn.Conv2d(1, 4, (1, 32), padding=(0, 16), bias=False), nn.BatchNorm2d(4),
        nn.Conv2d(4, 8, (8, 1), groups=4, bias=False), nn.BatchNorm2d(8), nn.ELU(),
        nn.AvgPool2d((1, 4)), nn.Dropout(0.25),
        nn.Conv2d(8, 8, (1, 8), padding=(0, 4), groups=8, bias=False),
        nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ELU(),
        nn.AvgPool2d((1, 8)), nn.Dropout(0.25), nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(model, train, test, optimizer, size=32, steps=220, goal=0.85)


class _Tracing(nn.Module):
    """LSTM over one-hot answers; the chance of a right answer to each question."""

    def __init__(self, questions: int, width: int = 48) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2 * questions, width, batch_first=True)
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(width, questions)
        self.questions = questions

    def forward(self, asked: Tensor, right: Tensor, then: Tensor) -> Tensor:
        x = F.one_hot(asked + self.questions * right, 2 * self.questions).float()
        every = self.out(self.drop(self.lstm(x)[0]))
        return every.gather(2, then[..., None])[..., 0]


@program
def knowledge_tracing() -> Training:
    """Is the next of 12 questions answered, by pupils who learn by asking? (DKT).

    One-hot answers, LSTM, dropout 0.2, Adam 5e-3, clip 5, batch 50; the accuracy.
    """
    n, long, skills = 1200, 31, 12
    skill = torch.randn(n, 1) + 1.2 * torch.randn(n, skills)
    hard = 0.5 * torch.randn(skills)
    asked, right = [], []
    for _ in range(long):
        k = torch.randint(skills, (n, 1))
        chance = (2.5 * (skill.gather(1, k) - hard[k])).sigmoid()
        asked.append(k)
        right.append((torch.rand(n, 1) < chance).long())
        skill = skill.scatter_add(1, k, torch.full((n, 1), 0.15))
    q, a = torch.cat(asked, 1), torch.cat(right, 1)
    train, test = split((q[:, :-1], a[:, :-1], q[:, 1:]), a[:, 1:].float(), 1000)

    def told(net: nn.Module, data: Data) -> float:
        return float(((outputs(net, data) > 0) == (data[1] > 0.5)).float().mean())

    model = _Tracing(skills)
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=250, goal=0.68, clip=5.0,
        loss_fn=F.binary_cross_entropy_with_logits, score=told,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip


class _Decomposed(nn.Module):
    """Moving mean and rest of a window, a linear map each (Zeng et al. 2023)."""

    def __init__(self, past: int, future: int, span: int) -> None:
        super().__init__()
        self.trend, self.rest = nn.Linear(past, future), nn.Linear(past, future)
        self.span = span
        for layer in (self.trend, self.rest):
            nn.init.constant_(layer.weight, 1 / past)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.pad(x[:, None], (self.span // 2,) * 2, mode="replicate")
        slow = F.avg_pool1d(wide, self.span, 1)[:, 0]
        return self.trend(slow) + self.rest(x - slow)


@program
def decomposed_linear() -> Training:
    """Twelve further hours of a load from 72, by DLinear with weights from 1 / 72.

    Standardized, two rhythms, drift and noise; Adam 5e-3 with decay by 0.985 a step,
    batch 32, MSE.
    """
    hours = torch.arange(3000.0)
    day, week = 2 * math.pi * hours / 24, 2 * math.pi * hours / 168
    drift = 0.05 * torch.randn(3000).cumsum(0)
    drift = drift - drift.mean()
    load = 2 * day.sin() + 0.7 * (2 * day).cos() + 0.8 * week.sin()
    load = load + 0.3 * drift + 0.4 * torch.randn(3000)
    load = (load - load[:2300].mean()) / load[:2300].std()
    rows = load.unfold(0, 84, 1)
    train = (rows[:2216, :72], rows[:2216, 72:])
    test = (rows[2300:, :72], rows[2300:, 72:])
    model = _Decomposed(72, 12, 25)
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=250, goal=0.8,
        loss_fn=F.mse_loss, score=explained_share,
        schedule=optim.lr_scheduler.ExponentialLR(optimizer, 0.985),
    )  # fmt: skip


class _Cell(nn.Module):
    """Convolutional LSTM cell (Shi et al. 2015)."""

    def __init__(self, i: int, width: int) -> None:
        super().__init__()
        self.gates, self.width = nn.Conv2d(i + width, 4 * width, 3, 1, 1), width

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, o, g = self.gates(torch.cat((x, h), 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class _NextFrames(nn.Module):
    """Two cells over a film `(N, T, H, W)`; the next frame after each."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.cells = nn.ModuleList((_Cell(1, width), _Cell(width, width)))
        self.out, self.width = nn.Conv2d(width, 1, 1), width

    def forward(self, x: Tensor) -> Tensor:
        empty = x.new_zeros(len(x), self.width, *x.shape[2:])
        states, made = [(empty, empty)] * 2, []
        for frame in x.unbind(1):
            h = frame[:, None]
            for k, cell in enumerate(self.cells):
                states[k] = cell(h, states[k])
                h = states[k][0]
            made.append(self.out(h)[:, 0])
        return torch.stack(made, 1)


@program
def next_frames() -> Training:
    """Next frame of a blob that bounces in 8 × 8, by a ConvLSTM, MSE.

    Standardized, Adam 1e-2, cosine, clip 1, batch 16; the share explained.
    """
    n, side, long = 600, 8, 7
    at = 2 + (side - 5) * torch.rand(n, 1, 2)
    speed = 0.4 + 0.6 * torch.rand(n, 1, 2)
    speed = torch.where(torch.rand(n, 1, 2) < 0.5, -speed, speed)
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frames = []
    for _ in range(long):
        away = (u - at[..., 0, None, None]) ** 2 + (v - at[..., 1, None, None]) ** 2
        frames.append((-away / 2).exp().amax(1))
        out = (at + speed < 1) | (at + speed > side - 2)
        speed = torch.where(out, -speed, speed)
        at = at + speed
    film = torch.stack(frames, 1)
    film = (film - film[:520].mean()) / film[:520].std()
    train, test = split(film[:, :-1], film[:, 1:], 520)

    def explained(net: nn.Module, data: Data) -> float:
        said, y = outputs(net, data)[:, 2:], data[1][:, 2:]
        return float(1 - (said - y).square().mean() / y.var())

    model = _NextFrames()
    optimizer = optim.Adam(model.parameters(), 1e-2)
    return supervised(
        model, train, test, optimizer, size=16, steps=240, goal=0.6, clip=1.0,
        loss_fn=F.mse_loss, score=explained,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 240),
    )  # fmt: skip

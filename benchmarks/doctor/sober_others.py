"""Healthy programs of further kinds: equations, operators, adapters, control."""

from __future__ import annotations

import copy
import itertools
import math

import torch
from calm_base import Data, endless, update, warm_cosine
from quiet_base import Subject, Training, accuracy, shuffled, split, supervised
from sober_base import explained_share, program
from torch import Tensor, nn, optim
from torch.nn import functional as F


def _tanh_net(*widths: int) -> nn.Sequential:
    """Return linear layers from Xavier with tanh between."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.Tanh()]
        nn.init.xavier_normal_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


class _Heated(nn.Module):
    """Temperature of a rod that is sin πx at first and 0 at its ends."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _tanh_net(2, 32, 32, 32, 1)

    def forward(self, at: Tensor) -> Tensor:
        x, t = at[:, :1], at[:, 1:]
        free = self.net(2 * at - 1)
        return (math.pi * x).sin() + t * x * (1 - x) * free

    def residual(self, at: Tensor) -> Tensor:
        """Return u_t - 0.1 u_xx at points (x, t)."""
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            first = torch.autograd.grad(self(at).sum(), at, create_graph=True)[0]
            second = torch.autograd.grad(first[:, 0].sum(), at, create_graph=True)[0]
        return first[:, 1:] - 0.1 * second[:, :1]


@program
def heat_equation() -> Training:
    """Heat in a rod by the residual at 256 new points a step (PINN).

    Conditions built in, tanh from Xavier, Adam with exponential decay; the share of the
    exact solution.
    """
    model = _Heated()
    optimizer = optim.Adam(model.parameters(), 5e-3)
    fall = optim.lr_scheduler.ExponentialLR(optimizer, 0.99)

    def drawn() -> list[Data]:
        return [(torch.rand(256, 2), torch.zeros(256, 1)) for _ in range(20)]

    rows = endless(drawn)

    def step(_: int) -> float:
        model.train()
        at, zero = next(rows)
        loss = update(optimizer, F.mse_loss(model.residual(at), zero))
        fall.step()
        return loss

    def score() -> float:
        x, t = torch.rand(2000, 2).unbind(1)
        exact = (math.pi * x).sin() * (-0.1 * math.pi**2 * t).exp()
        return explained_share(model, (torch.stack((x, t), 1), exact[:, None]))

    subject = Subject(
        model, drawn, F.mse_loss, optimizer,
        forward=lambda net, batch: net.residual(batch[0]),
    )  # fmt: skip
    return Training([subject], step, 250, score, 0.98)


class _Operator(nn.Module):
    """Product of a net of the function's values and one of the place (DeepONet)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 40))
        self.trunk = nn.Sequential(
            nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 40)
        )
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, f: Tensor, at: Tensor) -> Tensor:
        basis = self.trunk(at[..., None])
        return (self.branch(f)[:, None] * basis).sum(2) / 40**0.5 + self.bias


@program
def integral_operator() -> Training:
    """Integrals from 0 to 16 places of random smooth functions, by a DeepONet.

    Functions at 32 places, standardized; no norm, Adam, step decay, batch 50, MSE.
    """
    n = 1200
    places = torch.linspace(-1, 1, 32)
    gain = torch.randn(n, 5, 2) / torch.arange(1, 6)[:, None]
    rate = torch.pi * torch.arange(1, 6)[:, None] / 2
    at = 2 * torch.rand(n, 16) - 1
    f = gain[..., :1] * (rate * places).cos() + gain[..., 1:] * (rate * places).sin()
    f = f.sum(1)
    wave = rate * at[:, None]
    integral = gain[..., :1] * wave.sin() + gain[..., 1:] * (1 - wave.cos())
    y = (integral / rate).sum(1)
    train, test = split((f / f[:1000].std(), at), y / y[:1000].std(), 1000)
    model = _Operator()
    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=300, goal=0.9,
        loss_fn=F.mse_loss, score=explained_share,
        schedule=optim.lr_scheduler.StepLR(optimizer, 100, 0.4),
    )  # fmt: skip


class _Energy(nn.Module):
    """Change of place and momentum by the gradient of a learned energy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _tanh_net(2, 48, 48, 1)
        self.net[-1].register_parameter("bias", None)  # no effect on the slope

    def forward(self, state: Tensor) -> Tensor:
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            slope = torch.autograd.grad(self.net(state).sum(), state, create_graph=True)
        place, momentum = slope[0].unbind(1)
        return torch.stack((momentum, -place), 1)


@program
def hamiltonian_network() -> Training:
    """Pendulum's changes, with noise of 0.1, as the flow of a learned energy.

    Tanh from Xavier, Adam with cosine, batch 64, MSE; the share of the true changes.
    """
    n = 1400
    state = torch.stack((4 * torch.rand(n) - 2, 4 * torch.rand(n) - 2), 1)
    change = torch.stack((state[:, 1], -2 * state[:, 0].sin()), 1)
    noisy = change + 0.1 * torch.randn(n, 2)
    train, test = (state[:1100], noisy[:1100]), (state[1100:], change[1100:])
    model = _Energy()
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=250, goal=0.95,
        loss_fn=F.mse_loss, score=explained_share,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip


class _Distance(nn.Module):
    """Signed distance of a point to a shape given by a learned code (DeepSDF)."""

    def __init__(self, shapes: int, code: int = 8) -> None:
        super().__init__()
        self.codes = nn.Embedding(shapes, code)
        nn.init.normal_(self.codes.weight, std=code**-0.5)
        widths = itertools.pairwise((2 + code, 64, 64, 64))
        self.layers = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(nn.Linear(i, o)) for i, o in widths
        )
        self.out = nn.Linear(64, 1)

    def forward(self, at: Tensor, shape: Tensor) -> Tensor:
        y = torch.cat((at, self.codes(shape)), 1)
        for layer in self.layers:
            y = F.relu(layer(y))
        return self.out(y)


@program
def signed_distance() -> Training:
    """Signed distances to 20 boxes and ellipses, a code each, weight norm (DeepSDF).

    Clamped L1, codes decayed by 1e-3, Adam at two rates, batch 512 of points.
    """
    shapes, n = 20, 24000
    shape, at = torch.randint(shapes, (n,)), 2 * torch.rand(n, 2) - 1
    half = 0.25 + 0.4 * torch.rand(shapes, 2)
    out = at.abs() - half[shape]
    box = out.clamp(min=0).norm(dim=1) + out.amax(1).clamp(max=0)
    scaled = (at / half[shape]).norm(dim=1)
    steep = (at / half[shape].square()).norm(dim=1).clamp(min=1e-6)
    round_ = scaled * (scaled - 1) / steep
    y = torch.where(shape % 2 > 0, round_, box)[:, None].clamp(-0.4, 0.4)
    train, test = split((at, shape), y, 21000)
    model = _Distance(shapes)
    optimizer = optim.Adam(
        [
            {"params": model.codes.parameters(), "lr": 5e-3, "weight_decay": 1e-3},
            {"params": [*model.layers.parameters(), *model.out.parameters()]},
        ],
        3e-3,
    )  # fmt: skip
    return supervised(
        model, train, test, optimizer, size=512, steps=280, goal=0.9,
        loss_fn=F.l1_loss, score=explained_share,
        schedule=optim.lr_scheduler.StepLR(optimizer, 140, 0.5),
    )  # fmt: skip


class _LowRank(nn.Module):
    """A frozen linear layer and a learned low-rank change, zero at first (LoRA)."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.down), self.up) * 2


class _Reader(nn.Module):
    """Pre-norm attention block over words, mean of words, a head."""

    def __init__(self, words: int, classes: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp1, self.mlp2 = nn.Linear(width, 96), nn.Linear(96, width)
        self.norm3, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        q, k, v = (
            f(y).unflatten(2, (4, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        x = x + self.mlp2(F.gelu(self.mlp1(self.norm2(x))))
        return self.head(self.norm3(x).mean(1))


@program
def low_rank_adapters() -> Training:
    """Topics by pairs of words: from eight topics to five new ones by LoRA of rank 4.

    Queries, values and the MLP adapted, all else frozen but the new head; AdamW with
    warm-up, batch 50.
    """
    pairs = torch.randperm(60).view(30, 2)

    def texts(n: int, start: int, topics: int) -> Data:
        y = torch.randint(topics, (n,))
        x = torch.randint(60, (n, 14))
        which = start + y * 2 + torch.randint(2, (n,))
        x[:, :10] = x[:, :10].where(torch.rand(n, 10) < 0.8, pairs[which, :1])
        x[:, 10:12] = pairs[which]
        order = torch.rand(n, 14).argsort(1)
        return x.gather(1, order), y

    model = _Reader(60, 8)
    optimizer: optim.Optimizer = optim.Adam(model.parameters(), 3e-3)
    old = texts(2000, 0, 8)
    for _ in range(4):
        for x, y in shuffled(old, 50):
            update(optimizer, F.cross_entropy(model(x), y))
    model.requires_grad_(False)
    for name in ("query", "value", "mlp1", "mlp2"):
        setattr(model, name, _LowRank(getattr(model, name)))
    model.head = nn.Linear(48, 5)
    train, test = texts(1500, 16, 5), texts(500, 16, 5)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.AdamW(learned, 4e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=50, steps=240, goal=0.75, score=accuracy,
        schedule=warm_cosine(optimizer, 20, 240),
    )  # fmt: skip


def _judge() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 48),
        nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 1),
    )  # fmt: skip


class _Judges(nn.Module):
    """Two values of a state and an action."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _judge(), _judge()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.first(x), self.second(x)), 1)


def _moved(state: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
    """Return where pushed masses are next, and rewards for being near their goals."""
    place, speed, goal = state.unbind(1)
    speed = 0.9 * speed + 0.4 * push[:, 0]
    place = (place + 0.4 * speed).clamp(-2.5, 2.5)
    reward = 1 - (place - goal).abs() - 0.05 * push[:, 0].square()
    return torch.stack((place, speed, goal), 1), reward


@program
def twin_delayed() -> Training:
    """TD3 brings masses to their goals: 32 at once, two judges with layer norm.

    Replay, smoothed target actions, the actor each second step; the mean reward of the
    last 10 of 20 moves.
    """

    def begun(n: int) -> Tensor:
        return torch.cat((2 * torch.rand(n, 1) - 1, torch.zeros(n, 1),
                          3 * torch.rand(n, 1) - 1.5), 1)  # fmt: skip

    actor = nn.Sequential(
        nn.Linear(3, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 1),
        nn.Tanh(),
    )  # fmt: skip
    judges = _Judges()
    slow_actor, slow_judges = copy.deepcopy(actor), copy.deepcopy(judges)
    actor_adam = optim.Adam(actor.parameters(), 2e-3)
    judge_adam = optim.Adam(judges.parameters(), 2e-3)
    memory: list[tuple[Tensor, ...]] = []
    state = begun(32)

    def play() -> None:
        nonlocal state
        for _ in range(2):
            with torch.no_grad():
                push = (actor(state) + 0.3 * torch.randn(32, 1)).clamp(-1, 1)
            if len(memory) < 20:
                push = 2 * torch.rand(32, 1) - 1
            after, reward = _moved(state, push)
            memory.append((state, push, reward, after))
            state = torch.where(torch.rand(32, 1) < 0.05, begun(32), after)

    def drawn(size: int = 128) -> Data:
        rows = [torch.cat(part) for part in zip(*memory, strict=True)]
        pick = torch.randint(len(rows[0]), (size,))
        state, push, reward, after = (part[pick] for part in rows)
        with torch.no_grad():
            noise = (0.2 * torch.randn(size, 1)).clamp(-0.4, 0.4)
            then = (slow_actor(after) + noise).clamp(-1, 1)
            ahead = slow_judges(torch.cat((after, then), 1)).amin(1)
        return torch.cat((state, push), 1), reward + 0.9 * ahead

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return 2 * F.mse_loss(out, y[:, None].expand_as(out))

    def worth(push: Tensor, state: Tensor) -> Tensor:
        return -judges(torch.cat((state, push), 1))[:, 0].mean()

    for _ in range(20):
        play()

    def step(i: int) -> float:
        play()
        x, y = drawn()
        loss = update(judge_adam, loss_fn(judges(x), y))
        if i % 2:
            judges.requires_grad_(False)
            update(actor_adam, worth(actor(x[:, :3]), x[:, :3]))
            judges.requires_grad_(True)
            with torch.no_grad():
                for slow, fast in ((slow_actor, actor), (slow_judges, judges)):
                    pairs = zip(slow.parameters(), fast.parameters(), strict=True)
                    for a, b in pairs:
                        a.lerp_(b, 0.02)
        return loss

    def score() -> float:
        s, total = begun(500), 0.0
        with torch.no_grad():
            for t in range(20):
                s, reward = _moved(s, actor(s))
                total += float(reward.mean()) * (t >= 10) / 10
        return total

    def states() -> list[Data]:
        return [(x[:, :3], x[:, :3]) for x, _ in (drawn() for _ in range(20))]

    return Training(
        [
            Subject(judges, lambda: [drawn() for _ in range(20)], loss_fn, judge_adam,
                    name="judges"),
            Subject(actor, states, worth, actor_adam, name="actor"),
        ],
        step, 300, score, 0.8,
    )  # fmt: skip

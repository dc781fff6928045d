"""Healthy programs of further kinds: domains, bags, equations, graphs, control."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from calm_base import Data, conv_norm, endless, update
from frank_base import outputs, program
from quiet_base import Subject, Training, digits, shuffled, split, supervised
from sober_base import explained_share
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Reversal(torch.autograd.Function):
    """Identity whose gradient comes back times minus a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grad, None


class _Adversarial(nn.Module):
    """Class and domain of a picture; the body is taught to hide the domain."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(1, 16), conv_norm(16, 32, 2), conv_norm(32, 48, 2), nn.Flatten()
        )
        self.kind = nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10))
        self.domain = nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 1))
        self.factor = 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        hidden = _Reversal.apply(h, self.factor)
        return torch.cat((self.kind(h), self.domain(hidden)), 1)


@program
def domain_adversarial() -> Training:
    """Labelled digits and unlabelled blurred ones, noise in both (DANN).

    Each domain standardized on its own. Gradients of the domain reversed, their factor
    grows to 0.3; BN over 32 and 32, Adam 1e-3; accuracy on the blurred ones.
    """
    (x, y), (a, b) = digits()

    def blurred(x: Tensor) -> Tensor:
        soft = F.avg_pool2d(F.pad(x, (1,) * 4), 3, 1)
        return (x + soft) / 2 + 0.2 * torch.randn_like(x)

    near, far, held = x[:700] + 0.2 * torch.randn(700, 1, 8, 8), blurred(x[700:]), a
    held = (blurred(held) - far.mean()) / far.std()
    source = ((near - near.mean()) / near.std(), y[:700])
    target = ((far - far.mean()) / far.std(), y[700:])

    def joined() -> list[Data]:
        found = []
        pairs = zip(shuffled(source, 32), shuffled(target, 32), strict=True)
        for (p, k), (q, _) in pairs:
            hidden = torch.full_like(k, -100)
            label = torch.cat((k, hidden))
            domain = torch.arange(64).ge(32).long()
            found.append((torch.cat((p, q)), torch.stack((label, domain), 1)))
        return found

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        told = F.binary_cross_entropy_with_logits(out[:, 10], y[:, 1].float())
        return F.cross_entropy(out[:, :10], y[:, 0]) + told

    model = _Adversarial()
    optimizer = optim.Adam(model.parameters(), 1e-3)
    rows = endless(joined)

    def step(i: int) -> float:
        model.train()
        model.factor = 0.3 * (2 / (1 + math.exp(-10 * i / 260)) - 1)
        x, y = next(rows)
        return update(optimizer, loss_fn(model(x), y))

    def score() -> float:
        said = outputs(model, (held, b))[:, :10].argmax(1)
        return float((said == b).float().mean())

    return Training(
        [Subject(model, joined, loss_fn, optimizer)], step, 260, score, 0.82
    )


class _AttentionBag(nn.Module):
    """Gated attention over the digits of a bag (Ilse et al. 2018), with a mask."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3),
            nn.ReLU(), nn.Flatten(), nn.Linear(32, width), nn.ReLU(),
        )  # fmt: skip
        self.look = nn.Sequential(nn.Linear(width, 32), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(width, 32), nn.Sigmoid())
        self.weigh, self.head = nn.Linear(32, 1), nn.Linear(width, 1)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        h = self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        weight = self.weigh(self.look(h) * self.gate(h))
        weight = weight.masked_fill(~there[..., None], -1e9).softmax(1)
        return self.head((weight * h).sum(1))[:, 0]


@program
def bags_of_digits() -> Training:
    """Is there a nine among 5 to 9 digits? Attention over a bag, no norm.

    Adam 2e-3, decay 1e-4, BCE, batch 32 bags.
    """
    bags = []
    for images, labels in digits():
        n = 900 if len(labels) > 1000 else 300
        nines, others = (labels == 9).nonzero()[:, 0], (labels != 9).nonzero()[:, 0]
        which = others[torch.randint(len(others), (n, 9))]
        has = torch.rand(n) < 0.5
        which[has, 0] = nines[torch.randint(len(nines), (int(has.sum()),))]
        there = torch.arange(9) < torch.randint(5, 10, (n, 1))
        x = torch.where(there[..., None, None, None], images[which], 0.0)
        bags.append(
            ((2 * x - there[..., None, None, None].float(), there), has.float())
        )
    train, test = bags

    def right(net: nn.Module, data: Data) -> float:
        return float(((outputs(net, data) > 0) == (data[1] > 0.5)).float().mean())

    model = _AttentionBag()
    optimizer = optim.Adam(model.parameters(), 2e-3, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=32, steps=280, goal=0.85,
        loss_fn=F.binary_cross_entropy_with_logits, score=right,
    )  # fmt: skip


class _Flow(nn.Module):
    """Path of a state by Runge and Kutta's rule along a learned slope of its cube."""

    def __init__(self, moves: int, span: float) -> None:
        super().__init__()
        self.slope = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for m in self.slope:
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.1)
                nn.init.zeros_(m.bias)
        self.moves, self.span = moves, span

    def forward(self, x: Tensor) -> Tensor:
        path, h = [], self.span
        for _ in range(self.moves):
            a = self.slope(x**3)
            b = self.slope((x + h / 2 * a) ** 3)
            c = self.slope((x + h / 2 * b) ** 3)
            d = self.slope((x + h * c) ** 3)
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
            path.append(x)
        return torch.stack(path, 1)


@program
def spiral_ode() -> Training:
    """Spiral of a cubic law, ten times ahead of a place on it (torchdiffeq's demo).

    tanh of 50 from N(0, 0.1), RMSprop 3e-3, batch 20, L1 loss.
    """
    law = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    x, path = torch.tensor([[2.0, 0.0]]), []
    for _ in range(10000):
        middle = x + 0.00125 * (x**3) @ law
        path.append(x)
        x = x + 0.0025 * (middle**3) @ law
    rows = torch.cat(path)[::10]
    starts = torch.randperm(len(rows) - 10)
    at = starts[:, None] + torch.arange(1, 11)
    train, test = split(rows[starts], rows[at], 800)
    model = _Flow(10, 0.025)
    optimizer = optim.RMSprop(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=20, steps=300, goal=0.9,
        loss_fn=F.l1_loss, score=explained_share,
    )  # fmt: skip


class _Oscillator(nn.Module):
    """Displacement over time, and the friction of the law it obeys."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1),
        )  # fmt: skip
        for m in self.body:
            if isinstance(m, nn.Linear):
                nn.init.xavier_normal_(m.weight, gain=5 / 3)
                nn.init.zeros_(m.bias)
        self.friction = nn.Parameter(torch.tensor(0.0))

    def forward(self, t: Tensor) -> Tensor:
        return self.body(2 * t - 1)

    def both(self, t: Tensor, points: Tensor) -> Tensor:
        """Return displacements at t, and the law's residuals at the points."""
        with torch.enable_grad():
            at = points.detach().requires_grad_()
            u = self(at)
            first = torch.autograd.grad(u.sum(), at, create_graph=True)[0]
            second = torch.autograd.grad(first.sum(), at, create_graph=True)[0]
        law = second + 10 * self.friction * first + 100 * u
        return torch.cat((self(t), law / 100))


@program
def unknown_friction() -> Training:
    """Damped oscillator and its friction, by 40 noisy places and the law (PINN).

    tanh, Adam 5e-3, step decay, 60 new points of the law a step; one minus the error
    of the friction and the unexplained share.
    """
    pace = (100 - 4.0) ** 0.5

    def exact(t: Tensor) -> Tensor:
        return (-2 * t).exp() * ((pace * t).cos() + 2 / pace * (pace * t).sin())

    time = torch.linspace(0, 1, 40)[:, None]
    seen = exact(time) + 0.03 * torch.randn(40, 1)
    model = _Oscillator()
    optimizer = optim.Adam(model.parameters(), 5e-3)
    fall = optim.lr_scheduler.StepLR(optimizer, 200, 0.3)

    def drawn() -> list[Data]:
        y = torch.cat((seen, torch.zeros(60, 1)))
        return [((time, torch.rand(60, 1)), y) for _ in range(20)]

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out[:40], y[:40]) + 0.1 * F.mse_loss(out[40:], y[40:])

    rows = endless(drawn)

    def step(_: int) -> float:
        model.train()
        x, y = next(rows)
        loss = update(optimizer, loss_fn(model.both(*x), y))
        fall.step()
        return loss

    def score() -> float:
        t = torch.linspace(0, 1, 200)[:, None]
        share = explained_share(model, (t, exact(t)))
        return share - abs(float(model.friction.detach()) - 0.4)

    subject = Subject(
        model, drawn, loss_fn, optimizer, forward=lambda net, batch: net.both(*batch[0])
    )
    return Training([subject], step, 300, score, 0.8)


class _LightGraph(nn.Module):
    """Means of embeddings over 0, 1 and 2 steps of a graph (LightGCN)."""

    def __init__(self, users: int, items: int, links: Tensor, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(users + items, width)
        nn.init.normal_(self.embed.weight, 0, 0.1)
        whole = torch.zeros(users + items, users + items)
        whole[links[:, 0], users + links[:, 1]] = 1
        whole = whole + whole.T
        many = whole.sum(1).clamp(min=1).rsqrt()
        self.register_buffer("graph", many[:, None] * whole * many)
        self.users = users

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Return the vectors of users and of items."""
        h = self.embed.weight
        near = self.graph @ h
        mean = (h + near + self.graph @ near) / 3
        return mean[: self.users], mean[self.users :]

    def forward(self, user: Tensor, liked: Tensor, other: Tensor) -> Tensor:
        p, q = self.vectors()
        return (p[user] * (q[liked] - q[other])).sum(1)


@program
def light_graph_pairs() -> Training:
    """Likes of 200 users and 150 items, a liked above another (LightGCN, BPR).

    Vectors from N(0, 0.1), Adam 1e-2, decay 1e-4, batch 256, another item drawn for
    each pair; how often a held-out like is above an item without one.
    """
    taste, kind = torch.randn(200, 4), torch.randn(150, 4)
    likes = taste @ kind.T + 0.7 * torch.randn(150) + 0.7 * torch.randn(200, 150)
    liked = likes > 2.2
    pairs = liked.nonzero()[torch.randperm(int(liked.sum()))]
    many = int(0.8 * len(pairs))
    known, held = pairs[:many], pairs[many:]

    seen = torch.zeros_like(liked)
    seen[known[:, 0], known[:, 1]] = True

    def others(rows: Tensor, unlike: Tensor) -> Tensor:
        return torch.multinomial((~unlike[rows[:, 0]]).float(), 1)[:, 0]

    def epoch() -> list[Data]:
        found = []
        for rows, _ in shuffled((known, known[:, 0]), 256):
            x = (rows[:, 0], rows[:, 1], others(rows, seen))
            found.append((x, torch.ones(256)))
        return found

    model = _LightGraph(200, 150, known)
    optimizer = optim.Adam(model.parameters(), 1e-2, weight_decay=1e-4)
    rows = endless(epoch)

    def loss_fn(out: Tensor, _: Tensor) -> Tensor:
        return -F.logsigmoid(out).mean()

    def step(_: int) -> float:
        model.train()
        x, y = next(rows)
        return update(optimizer, loss_fn(model(*x), y))

    def score() -> float:
        x = (held[:, 0], held[:, 1], others(held, liked))
        return float((outputs(model, (x, held)) > 0).float().mean())

    return Training([Subject(model, epoch, loss_fn, optimizer)], step, 250, score, 0.8)


def _entered(n: int) -> Tensor:
    """Return way to go, lane, and the place and lane of a block, of n cars."""
    lane, other = 2.0 * torch.randint(2, (2, n)) - 1
    return torch.stack((torch.ones(n), lane, 0.2 + 0.6 * torch.rand(n), other), 1)


def _driven(car: Tensor, act: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Go on slowly, change the lane, or go fast; return cars, rewards and ends."""
    way, lane, block, other = car.unbind(1)
    lane = torch.where(act == 1, -lane, lane)
    pace = torch.where((act == 2) & (torch.rand(len(act)) < 0.8), 0.25, 0.1)
    ahead = way - pace
    hit = (lane == other) & (way >= block) & (ahead <= block)
    out = (ahead <= 0) & ~hit
    reward = out.float() - hit.float() - 0.03
    return torch.stack((ahead, lane, block, other), 1), reward, out | hit


@program
def categorical_q() -> Training:
    """C51: the law of returns on 21 places; cars pass a block in one of two lanes.

    32 cars, replay, epsilon from 1 to 0.1, target kept for 15 steps, Adam 2e-3, batch
    128; the mean return of greedy cars.
    """
    places, fade = torch.linspace(-1, 1, 21), 0.97
    model = nn.Sequential(
        nn.Linear(4, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 63),
        nn.Unflatten(1, (3, 21)),
    )  # fmt: skip
    kept = copy.deepcopy(model).requires_grad_(False)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    seen: list[tuple[Tensor, ...]] = []
    cars = _entered(32)

    def best(net: nn.Module, car: Tensor) -> Tensor:
        with torch.no_grad():
            return (net(car).softmax(2) * places).sum(2).argmax(1)

    def play(epsilon: float) -> None:
        nonlocal cars
        act = best(model, cars)
        free = torch.rand(32) < epsilon
        act = torch.where(free, torch.randint(3, (32,)), act)
        then, reward, end = _driven(cars, act)
        seen.append((cars, act, reward, then, end.float()))
        del seen[:-250]
        cars = torch.where(end[:, None], _entered(32), then)

    @torch.no_grad()
    def projected(reward: Tensor, then: Tensor, end: Tensor) -> Tensor:
        law = kept(then).softmax(2)[torch.arange(len(end)), best(model, then)]
        at = (reward[:, None] + fade * (1 - end[:, None]) * places).clamp(-1, 1)
        near = (1 - (at[:, :, None] - places).abs() / 0.1).clamp(min=0)
        return (law[:, :, None] * near).sum(1)

    def drawn() -> list[Data]:
        car, act, reward, then, end = map(torch.cat, zip(*seen, strict=True))
        found = []
        for _ in range(20):
            i = torch.randint(len(act), (128,))
            law = projected(reward[i], then[i], end[i])
            found.append((car[i], torch.cat((act[i, None].float(), law), 1)))
        return found

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        chosen = out[torch.arange(len(y)), y[:, 0].long()]
        return F.cross_entropy(chosen, y[:, 1:])

    for _ in range(20):
        play(1.0)

    def step(i: int) -> float:
        model.train()
        if i % 15 == 0:
            kept.load_state_dict(model.state_dict())
        play(max(0.1, 1 - i / 120))
        x, y = drawn()[0]
        return update(optimizer, loss_fn(model(x), y))

    def score() -> float:
        car, total, alive = _entered(400), torch.zeros(400), torch.ones(400)
        for _ in range(20):
            car, reward, end = _driven(car, best(model, car))
            total, alive = total + alive * reward, alive * (1 - end.float())
        return float(total.mean())

    return Training([Subject(model, drawn, loss_fn, optimizer)], step, 300, score, 0.7)

"""Healthy programs of further kinds: control, molecules, sets, equations, motions."""

from __future__ import annotations

import itertools
import math

import torch
from calm_base import Data, endless, update, warm_cosine
from candid_base import outputs, program
from quiet_base import Subject, Training, digits, split, supervised
from sober_base import explained_share
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR


def _mlp(i: int, o: int, width: int = 48) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(i, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
        nn.Linear(width, o),
    )  # fmt: skip


class _Actor(nn.Module):
    """A push in -1 to 1 drawn from a squashed normal law, and its log density."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp(2, 2)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_sd = self.net(state).chunk(2, 1)
        if not self.training:
            return mean.tanh(), torch.zeros_like(mean)
        log_sd = log_sd.clamp(-5, 1)
        noise = torch.randn_like(mean)
        raw = mean + log_sd.exp() * noise
        dense = -0.5 * noise.square() - log_sd - 0.5 * math.log(2 * math.pi)
        return raw.tanh(), dense - 2 * (math.log(2) - raw - F.softplus(-2 * raw))


class _TwoCritics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList((_mlp(3, 1), _mlp(3, 1)))

    def forward(self, state: Tensor, push: Tensor) -> Tensor:
        both = torch.cat((state, push), 1)
        return torch.cat([net(both) for net in self.nets], 1)


def _pushed(state: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sled's state a moment on, and its reward."""
    speed = 0.95 * state[:, 1:] + 0.2 * push
    place = state[:, :1] + 0.2 * speed
    cost = place.square() + 0.1 * speed.square() + 0.05 * push.square()
    return torch.cat((place, speed), 1), -cost.clamp(max=4)


@program
def soft_actor_critic() -> Training:
    """Push a sled to the middle: SAC with two critics, slow targets, 16 sleds at once.

    SiLU, Adam 3e-3, discount 0.95, entropy 0.02, batch 128; mean return of 40 moments.
    """
    actor, critic, slow = _Actor(), _TwoCritics(), _TwoCritics()
    slow.load_state_dict(critic.state_dict())
    first = optim.Adam(actor.parameters(), 3e-3)
    second = optim.Adam(critic.parameters(), 3e-3)
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    now = [torch.zeros(16, 2), 0]

    def begun(n: int) -> Tensor:
        return torch.cat((3 * torch.rand(n, 1) - 1.5, 0.3 * torch.randn(n, 1)), 1)

    def act(free: bool) -> None:
        if now[1] % 40 == 0:
            now[0] = begun(16)
        with torch.no_grad():
            push = 2 * torch.rand(16, 1) - 1 if free else actor(now[0])[0]
        state, reward = _pushed(now[0], push)
        kept.append((now[0], push, reward, state))
        now[0], now[1] = state, now[1] + 1

    for _ in range(40):
        act(free=True)

    def drawn() -> tuple[tuple[Tensor, Tensor], Tensor]:
        rows = torch.randint(len(kept), (8,))
        state, push, reward, then = (
            torch.cat(part) for part in zip(*(kept[i] for i in rows), strict=True)
        )
        with torch.no_grad():
            again, dense = actor(then)
            value = slow(then, again).amin(1, keepdim=True) - 0.02 * dense
        return (state, push), (reward + 0.95 * value).expand(-1, 2)

    def step(_: int) -> float:
        actor.train()
        critic.train()
        act(free=False)
        inputs, target = drawn()
        loss = update(second, F.mse_loss(critic(*inputs), target))
        push, dense = actor(inputs[0])
        update(first, (0.02 * dense - critic(inputs[0], push).amin(1, True)).mean())
        with torch.no_grad():
            for p, q in zip(slow.parameters(), critic.parameters(), strict=True):
                p.lerp_(q, 0.02)
        return loss

    def score() -> float:
        actor.eval()
        state, total = begun(200), 0.0
        with torch.no_grad():
            for _ in range(40):
                state, reward = _pushed(state, actor(state)[0])
                total += float(reward.mean())
        actor.train()
        return total

    subject = Subject(critic, lambda: [drawn() for _ in range(20)], F.mse_loss, second)
    return Training([subject], step, 300, score, -9.0)


class _GatedLayer(nn.Module):
    """Bonds gate the sum over neighbours; BN, ReLU, residual (Bresson and Laurent)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.near = nn.Linear(width, width), nn.Linear(width, width)
        self.bond = nn.Linear(width, width)
        self.start, self.end = nn.Linear(width, width), nn.Linear(width, width)
        self.atoms, self.bonds = nn.BatchNorm1d(width), nn.BatchNorm1d(width)

    def forward(
        self, x: Tensor, e: Tensor, i: Tensor, j: Tensor
    ) -> tuple[Tensor, Tensor]:
        told = self.bond(e) + self.start(x)[i] + self.end(x)[j]
        gate = told.sigmoid()
        total = torch.zeros_like(x).index_add(0, i, gate) + 1e-6
        near = torch.zeros_like(x).index_add(0, i, gate * self.near(x)[j]) / total
        x = x + F.relu(self.atoms(self.own(x) + near))
        return x, e + F.relu(self.bonds(told))


class _GatedGraph(nn.Module):
    """Atoms and bonds embedded, three layers, the mean of the atoms."""

    def __init__(self, atoms: int, bonds: int, width: int = 32) -> None:
        super().__init__()
        self.atoms, self.bonds = nn.Embedding(atoms, width), nn.Embedding(bonds, width)
        self.layers = nn.ModuleList(_GatedLayer(width) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, atom: Tensor, bond: Tensor) -> Tensor:
        n, size = atom.shape
        which, i, j = bond.nonzero(as_tuple=True)
        e = self.bonds(bond[which, i, j])
        x, i, j = self.atoms(atom.flatten()), which * size + i, which * size + j
        for layer in self.layers:
            x, e = layer(x, e, i, j)
        return self.head(x.reshape(n, size, -1).mean(1))


@program
def gated_molecules() -> Training:
    """Tell a property of rings of 10 atoms with side bonds, by GatedGCN with BN; L1.

    Adam 3e-3, cosine, batch 32; the share of the variance.
    """
    n, size, atoms = 1600, 10, 5
    atom = torch.randint(atoms, (n, size))
    ring = torch.arange(size)
    bond = torch.zeros(n, size, size, dtype=torch.long)
    bond[:, ring, (ring + 1) % size] = torch.randint(1, 3, (n, size))
    chord = torch.rand(n, size, size).triu(2) > 0.93
    bond = torch.where(chord & (bond == 0), torch.randint(1, 4, bond.shape), bond)
    bond = torch.maximum(bond, bond.mT)
    pull, hold = torch.randn(atoms), torch.tensor([0.0, 0.5, 1.0, 1.5])
    uneven = (pull[atom][:, :, None] - pull[atom][:, None]).abs()
    crowd = (bond > 0).sum(2).float()
    y = (uneven * hold[bond]).sum((1, 2)) + (pull[atom] * crowd).sum(1)
    y = (y - y[:1300].mean()) / y[:1300].std()
    train, test = split((atom, bond), y[:, None], 1300)
    model = _GatedGraph(atoms, 4)
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=250, goal=0.85,
        loss_fn=F.l1_loss, score=explained_share,
        schedule=CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip


class _Among(nn.Module):
    """One set attends to another; layer norms after each sum (Lee et al. 2019)."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x + self.attend(x, y, y, need_weights=False)[0])
        return self.second(x + self.mlp(x))


class _SetTransformer(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.blocks = nn.ModuleList(_Among(width) for _ in range(2))
        self.seed = nn.Parameter(torch.randn(1, 1, width) / width**0.5)
        self.pool, self.head = _Among(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        for block in self.blocks:
            y = block(y, y)
        return self.head(self.pool(self.seed.expand(len(x), -1, -1), y)[:, 0])


@program
def digits_as_points() -> Training:
    """Digits as 40 points drawn from their ink, by a Set Transformer.

    New points each time, AdamW 3e-3, warm-up and cosine, clip 1, batch 48.
    """
    train, test = digits()

    def drawn(batch: Data) -> Data:
        ink, y = batch
        where = torch.multinomial(ink.flatten(1).square(), 40, replacement=True)
        at = torch.stack((where // 8, where % 8), 2) + torch.rand(len(ink), 40, 2)
        return (at - 4) / 2.3, y

    model = _SetTransformer()
    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-3)

    def right(net: nn.Module, data: Data) -> float:
        x, y = drawn(data)
        return float((outputs(net, (x, y)).argmax(1) == y).float().mean())

    return supervised(
        model, train, test, optimizer, size=48, steps=300, goal=0.72, change=drawn,
        score=right, clip=1.0, schedule=warm_cosine(optimizer, 20, 300),
    )  # fmt: skip


class _Plate(nn.Module):
    """A field on the square; its Laplacian inside, its value on the edge."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(),
            nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1),
        )  # fmt: skip
        for m in self.net:
            if isinstance(m, nn.Linear):
                nn.init.xavier_normal_(m.weight)
                nn.init.zeros_(m.bias)

    def forward(self, at: Tensor) -> Tensor:
        return self.net(2 * at - 1)

    def told(self, inside: Tensor, edge: Tensor) -> Tensor:
        """Return minus the Laplacian at points inside, and the values on the edge."""
        with torch.enable_grad():
            at = inside.detach().requires_grad_()
            slope = torch.autograd.grad(self(at).sum(), at, create_graph=True)[0]
            bend = sum(
                torch.autograd.grad(slope[:, k].sum(), at, create_graph=True)[0][:, k]
                for k in range(2)
            )
        return torch.cat((-bend, self(edge)[:, 0]))


def _source(at: Tensor) -> Tensor:
    """Return the source whose field is sin(pi x) sin(pi y)."""
    return 2 * math.pi**2 * (math.pi * at).sin().prod(1)


@program
def poisson_square() -> Training:
    """Poisson's equation on a square, zero on the edge, weighed by 100 (PINN).

    300 new points a step, tanh from Xavier, Adam 5e-3, exponential decay; the share of
    the exact field.
    """
    model = _Plate()
    optimizer = optim.Adam(model.parameters(), 5e-3)
    fall = ExponentialLR(optimizer, 0.992)
    weight = torch.cat((torch.ones(200), 100 * torch.ones(100)))

    def drawn() -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
        found = []
        for _ in range(20):
            inside, edge = torch.rand(200, 2), torch.rand(100, 2)
            side = torch.randint(2, (100,))
            edge[torch.arange(100), side] = torch.randint(2, (100,)).float()
            target = torch.cat((_source(inside), torch.zeros(100)))
            found.append(((inside, edge), target))
        return found

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return (weight * (out - y).square()).mean() / 100

    rows = endless(drawn)

    def step(_: int) -> float:
        model.train()
        inputs, target = next(rows)
        loss = update(optimizer, loss_fn(model.told(*inputs), target))
        fall.step()
        return loss

    def score() -> float:
        at = torch.rand(2000, 2)
        exact = (math.pi * at).sin().prod(1, keepdim=True)
        return explained_share(model, (at, exact))

    subject = Subject(
        model, drawn, loss_fn, optimizer,
        forward=lambda net, batch: net.told(*batch[0]),
    )  # fmt: skip
    return Training([subject], step, 300, score, 0.95)


class _Ensemble(nn.Module):
    """Five nets at once, each a mean and a log variance of two columns (PETS)."""

    def __init__(self, i: int, o: int, members: int = 5, width: int = 48) -> None:
        super().__init__()
        sizes = (i, width, width, 2 * o)
        self.weights = nn.ParameterList(
            torch.randn(members, a, b) / a**0.5 for a, b in itertools.pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.zeros(members, 1, b) for b in sizes[1:])
        self.most = nn.Parameter(torch.full((o,), 0.5))
        self.least = nn.Parameter(torch.full((o,), -8.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.transpose(0, 1)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = torch.baddbmm(bias, F.silu(y) if k else y, weight)
        mean, log_var = y.transpose(0, 1).chunk(2, 2)
        log_var = self.most - F.softplus(self.most - log_var)
        return mean, self.least + F.softplus(log_var - self.least)


@program
def ensemble_of_motions() -> Training:
    """Change of a pushed pendulum's state by five nets of normal laws, as in PETS.

    Rows drawn anew for each net, columns standardized, AdamW 3e-3, cosine, batch 64;
    the share of the change's variance by the mean of the nets.
    """
    n, members = 3000, 5
    angle, speed = 2 * math.pi * torch.rand(n), 4 * (2 * torch.rand(n) - 1)
    push = 2 * (2 * torch.rand(n) - 1)
    faster = 0.1 * (5 * angle.sin() - 0.3 * speed + 3 * push)
    change = torch.stack((0.1 * (speed + faster), faster), 1)
    change = change + torch.tensor([0.02, 0.05]) * torch.randn(n, 2)
    x = torch.stack((angle.sin(), angle.cos(), speed, push), 1)
    x = (x - x[:2400].mean(0)) / x[:2400].std(0)
    y = (change - change[:2400].mean(0)) / change[:2400].std(0)
    rows = torch.randint(2400, (2400, members))
    train = x[rows], y[rows]
    test = x[2400:, None].expand(-1, members, -1), y[2400:]
    model = _Ensemble(4, 2)
    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-4)

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        mean, log_var = out
        fit = ((mean - y).square() * (-log_var).exp() + log_var).mean()
        return fit + 0.01 * (model.most.sum() - model.least.sum())

    def told(net: nn.Module, data: Data) -> float:
        left = (outputs(net, data)[0].mean(1) - data[1]).square().mean()
        return float(1 - left / data[1].var())

    return supervised(
        model, train, test, optimizer, size=64, steps=300, goal=0.85, loss_fn=loss_fn,
        score=told, schedule=CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip

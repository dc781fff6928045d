"""Healthy programs of further kinds: operators, energies, particles, control."""

from __future__ import annotations

import math

import torch
from calm_base import Data, endless, update, warm_cosine
from gentle_base import outputs, program
from quiet_base import Subject, Training, accuracy, split, supervised
from sober_base import explained_share
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Spectral(nn.Module):
    """Learned complex maps of the lowest waves, plus a map at each place."""

    def __init__(self, width: int, waves: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.randn(waves, width, width, 2) / width)
        self.local = nn.Conv1d(width, width, 1)
        self.waves = waves

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft(x)[..., : self.waves]
        y = torch.einsum("nik,kio->nok", y, torch.view_as_complex(self.maps))
        return torch.fft.irfft(y, x.shape[-1]) + self.local(x)


class _FourierOperator(nn.Module):
    """Lifted function and place through spectral layers (FNO)."""

    def __init__(self, width: int = 24, waves: int = 10, layers: int = 3) -> None:
        super().__init__()
        self.lift = nn.Conv1d(2, width, 1)
        self.layers = nn.ModuleList(_Spectral(width, waves) for _ in range(layers))
        self.out = nn.Sequential(
            nn.Conv1d(width, 48, 1), nn.GELU(), nn.Conv1d(48, 1, 1)
        )

    def forward(self, f: Tensor) -> Tensor:
        place = torch.linspace(-1, 1, f.shape[1]).expand_as(f)
        y = self.lift(torch.stack((f, place), 1))
        for layer in self.layers:
            y = F.gelu(layer(y))
        return self.out(y)[:, 0]


@program
def fourier_operator() -> Training:
    """Burgers' flow on a ring after a second, from its start at 64 places (FNO).

    No norm, relative error of each function, Adam 3e-3, cosine, batch 20.
    """
    n, places = 700, 64
    at = 2 * math.pi * torch.arange(places) / places
    k = torch.arange(1, 6)[:, None]
    gain = torch.randn(n, 5, 2) / k
    f = (gain[..., :1] * (k * at).sin() + gain[..., 1:] * (k * at).cos()).sum(1)
    f = 0.8 * f / f.std()
    rate = torch.fft.rfftfreq(places, 1 / places)
    fade, kept = (-0.05 * rate.square() / 100).exp(), rate < places / 3
    u = f.double()

    def change(u: Tensor) -> Tensor:
        return -torch.fft.irfft(0.5j * rate * kept * torch.fft.rfft(u.square()))

    for _ in range(100):  # midpoint rule for the product, diffusion exact
        u = u + 0.01 * change(u + 0.005 * change(u))
        u = torch.fft.irfft(torch.fft.rfft(u) * fade)
    train, test = split(f / f[:600].std(), (u / f[:600].std()).float(), 600)
    model = _FourierOperator()

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return ((out - y).norm(dim=1) / y.norm(dim=1)).mean()

    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=20, steps=200, goal=0.95, loss_fn=loss_fn,
        score=explained_share,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


class _Ritz(nn.Module):
    """Function on a square that is 0 on its edge; residual blocks of tanh."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(2, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
            )
            for _ in range(2)
        )

    def forward(self, at: Tensor) -> Tensor:
        y = self.first(2 * at - 1)
        for block in self.blocks:
            y = y + block(y)
        edge = (at * (1 - at)).prod(1, keepdim=True)
        return 16 * edge * self.out(y)

    def energy(self, at: Tensor, source: Tensor) -> Tensor:
        """Return |grad u|² / 2 - f u at each point."""
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            u = self(at)
            slope = torch.autograd.grad(u.sum(), at, create_graph=True)[0]
        return 0.5 * slope.square().sum(1) - source * u[:, 0]


@program
def deep_ritz() -> Training:
    """Poisson's equation on a square by the least energy at new points (deep Ritz).

    Edge built in, tanh blocks, Adam 3e-3, exponential decay, batch 256; the share of
    the exact solution.
    """
    model = _Ritz()
    optimizer = optim.Adam(model.parameters(), 3e-3)
    fall = optim.lr_scheduler.ExponentialLR(optimizer, 0.99)

    def exact(at: Tensor) -> Tensor:
        x, y = (math.pi * at).unbind(1)
        return x.sin() * y.sin() + 0.5 * (2 * x).sin() * y.sin()

    def source(at: Tensor) -> Tensor:
        x, y = (math.pi * at).unbind(1)
        first, second = x.sin() * y.sin(), (2 * x).sin() * y.sin()
        return math.pi**2 * (2 * first + 2.5 * second)

    def drawn() -> list[Data]:
        points = [torch.rand(256, 2) for _ in range(20)]
        return [(at, source(at)) for at in points]

    def loss_fn(out: Tensor, _: Tensor) -> Tensor:
        return out.mean()

    rows = endless(drawn)

    def step(_: int) -> float:
        model.train()
        at, f = next(rows)
        loss = update(optimizer, loss_fn(model.energy(at, f), f))
        fall.step()
        return loss

    def score() -> float:
        at = torch.rand(2000, 2)
        return explained_share(model, (at, exact(at)[:, None]))

    subject = Subject(
        model, drawn, loss_fn, optimizer, forward=lambda net, batch: net.energy(*batch)
    )
    return Training([subject], step, 300, score, 0.95)


class _Layer(nn.Module):
    """Messages by features and distances; places move along differences (EGNN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.edge = nn.Sequential(
            nn.Linear(2 * width + 2, width), nn.SiLU(), nn.Linear(width, width),
            nn.SiLU(),
        )  # fmt: skip
        self.node = nn.Sequential(
            nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.move = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1, bias=False)
        )
        nn.init.xavier_uniform_(self.move[2].weight, gain=0.01)

    def forward(
        self, h: Tensor, x: Tensor, speed: Tensor, bonds: Tensor
    ) -> tuple[Tensor, Tensor]:
        apart = x[:, :, None] - x[:, None]
        square = apart.square().sum(3, keepdim=True)
        n = h.shape[1]
        pair = (h[:, :, None].expand(-1, -1, n, -1), h[:, None].expand(-1, n, -1, -1))
        other = 1 - torch.eye(n)[..., None]
        told = self.edge(torch.cat((*pair, square, bonds), 3)) * other
        x = x + speed + (apart * self.move(told)).sum(2) / (n - 1)
        return h + self.node(torch.cat((h, told.sum(2)), 2)), x


class _Particles(nn.Module):
    """Places after a while from places, speeds and charges."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(2))

    def forward(self, x: Tensor, v: Tensor, charge: Tensor) -> Tensor:
        h = self.embed(v.norm(dim=2, keepdim=True))
        bonds = (charge[:, :, None] * charge[:, None])[..., None]
        for layer in self.layers:
            h, x = layer(h, x, v / 2, bonds)
        return x


@program
def equivariant_particles() -> Training:
    """Five charged particles after a second, by an equivariant graph net (EGNN).

    SiLU, no norm, Adam 2e-3, batch 50, MSE; the share explained beyond straight paths.
    """
    n = 1500
    x, v = torch.randn(n, 5, 3), 0.5 * torch.randn(n, 5, 3)
    charge = 2.0 * torch.randint(2, (n, 5)) - 1
    place, speed = x, v
    for _ in range(50):
        apart = place[:, :, None] - place[:, None]
        near = (apart.square().sum(3, keepdim=True) + 0.5) ** 1.5
        pull = (charge[:, :, None] * charge[:, None])[..., None] * apart / near
        speed = speed + 0.02 * pull.sum(2)
        place = place + 0.02 * speed
    train, test = split((x, v, charge), place, 1200)

    def beyond(net: nn.Module, data: Data) -> float:
        straight = data[0][0] + data[0][1] - data[1]
        left = outputs(net, data) - data[1]
        return float(1 - left.square().mean() / straight.square().mean())

    model = _Particles()
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=250, goal=0.7,
        loss_fn=F.mse_loss, score=beyond,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip


class _Koopman(nn.Module):
    """Code of a state, a linear map of codes over time, and the way back."""

    def __init__(self, width: int = 64, code: int = 12, steps: int = 8) -> None:
        super().__init__()
        self.coder = nn.Sequential(
            nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, code),
        )  # fmt: skip
        self.map = nn.Linear(code, code, bias=False)
        self.decoder = nn.Sequential(
            nn.Linear(code, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip
        nn.init.eye_(self.map.weight)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        codes = [self.coder(x)]
        for _ in range(self.steps):
            codes.append(self.map(codes[-1]))
        return self.decoder(torch.stack(codes, 1))


@program
def koopman_pendulum() -> Training:
    """Eight further states of a pendulum by a linear map of learned codes (Koopman).

    States scaled, the map from the identity, AdamW 3e-3, clip 1, batch 64, MSE.
    """
    n = 2200
    state = torch.stack((3 * torch.rand(n) - 1.5, 2 * torch.rand(n) - 1), 1)
    path = [state]
    for _ in range(80):
        angle, speed = path[-1].unbind(1)
        speed = speed - 0.03 * (angle.sin() + 0.1 * speed)
        path.append(torch.stack((angle + 0.03 * speed, speed), 1))
    rows = torch.stack(path[::10], 1)
    rows = rows / rows[:1800, 0].std(0)
    train, test = split(rows[:, 0], rows, 1800)
    model = _Koopman()
    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=250, goal=0.95,
        loss_fn=F.mse_loss, score=explained_share, clip=1.0,
        schedule=warm_cosine(optimizer, 15, 250),
    )  # fmt: skip


class _Parts(nn.Module):
    """Features of each point and the greatest of all points, a label each."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.near = nn.Sequential(*self._layer(3, 32), *self._layer(32, 48))
        self.far = nn.Sequential(*self._layer(48, 96))
        self.head = nn.Sequential(
            *self._layer(144, 64), nn.Dropout(0.2), nn.Conv1d(64, parts, 1)
        )

    def _layer(self, i: int, o: int) -> tuple[nn.Module, ...]:
        return nn.Conv1d(i, o, 1, bias=False), nn.BatchNorm1d(o), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        near = self.near(x.mT)
        whole = self.far(near).amax(2, keepdim=True).expand(-1, -1, x.shape[1])
        return self.head(torch.cat((near, whole), 1)).mT


@program
def parts_of_points() -> Training:
    """Top, leg and foot of lamps and tables of 96 points, a label each (PointNet).

    Centred and scaled clouds, turned about the axis, BN, Adam 2e-3, step decay, batch
    32.
    """
    n, many = 900, 96
    part = torch.randint(3, (n, many))
    lamp = torch.rand(n, 1) < 0.5
    high = 0.8 + 0.8 * torch.rand(n, 1)
    wide = 0.4 + 0.5 * torch.rand(n, 1)
    turn, u, v = 2 * math.pi * torch.rand(n, many), *torch.rand(2, n, many)
    radius = torch.where(
        part == 0, torch.where(lamp, wide * (1 - 0.6 * u), wide * v.sqrt()),
        torch.where(part == 1, torch.full_like(u, 0.08), 0.4 * v.sqrt()),
    )  # fmt: skip
    z = torch.where(
        part == 0, torch.where(lamp, high * (0.7 + 0.3 * u), high * torch.ones_like(u)),
        torch.where(part == 1, 0.9 * high * u, torch.zeros_like(u)),
    )  # fmt: skip
    x = torch.stack((radius * turn.cos(), radius * turn.sin(), z), 2)
    x = x + 0.02 * torch.randn_like(x)
    x = x - x.mean(1, keepdim=True)
    x = x / x.norm(dim=2).amax(1)[:, None, None]
    train, test = split(x, part, 700)

    def turned(batch: Data) -> Data:
        x, y = batch
        turn = 2 * math.pi * torch.rand(len(x), 1)
        a, b = x[..., 0], x[..., 1]
        flat = (a * turn.cos() - b * turn.sin(), a * turn.sin() + b * turn.cos())
        return torch.stack((*flat, x[..., 2]), 2), y

    model = _Parts(3)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=160, goal=0.9, score=accuracy,
        loss_fn=lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()),
        change=turned, schedule=optim.lr_scheduler.StepLR(optimizer, 100, 0.3),
    )  # fmt: skip


def _driven(state: Tensor, push: Tensor) -> Tensor:
    """Return a cart's place, speed, and its load's angle and rate a moment later."""
    place, speed, angle, rate = state.unbind(1)
    faster = speed + 0.05 * (push[:, 0] - 0.2 * speed)
    swing = rate + 0.05 * (-2 * angle.sin() - push[:, 0] * angle.cos() - 0.1 * rate)
    return torch.stack((place + 0.05 * faster, faster, angle + 0.05 * swing, swing), 1)


@program
def cloned_crane() -> Training:
    """Pushes of a crane's controller, noisy, cloned from its paths; LayerNorm, tanh.

    States standardized, AdamW 3e-3, cosine, batch 128, MSE; one minus the distance
    left of the way to the aim when the clone drives.
    """
    gain = torch.tensor([1.0, 1.5, -1.2, -0.3])

    def start(n: int) -> Tensor:
        return torch.randn(n, 4) * torch.tensor([1.5, 0.3, 0.3, 0.3])

    def expert(state: Tensor) -> Tensor:
        return 2 * (-(state * gain).sum(1, keepdim=True) / 2).tanh()

    state, seen = start(100), []
    for _ in range(60):
        seen.append((state, expert(state)))
        state = _driven(state, seen[-1][1] + 0.3 * torch.randn(100, 1))
    x, y = (torch.cat(part) for part in zip(*seen, strict=True))
    y = y + 0.05 * torch.randn_like(y)
    mean, std = x.mean(0), x.std(0)
    order = torch.randperm(len(y))
    train, test = split(((x - mean) / std)[order], y[order], 5000)
    model = nn.Sequential(
        nn.Linear(4, 64), nn.LayerNorm(64), nn.Tanh(),
        nn.Linear(64, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 1),
    )  # fmt: skip

    def driven(net: nn.Module, _: Data) -> float:
        net.eval()
        first = state = start(200)
        with torch.no_grad():
            for _ in range(200):
                state = _driven(state, net((state - mean) / std))
        return float(1 - state[:, 0].abs().mean() / first[:, 0].abs().mean())

    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=128, steps=250, goal=0.85,
        loss_fn=F.mse_loss, score=driven,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip

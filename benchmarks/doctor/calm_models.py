"""Healthy generative and self-supervised models, and models of graphs and clouds."""

from __future__ import annotations

import copy
import math

import torch
from calm_base import Data, conv_norm, endless, neighbours, program, update
from quiet_base import Subject, Training, digits, shuffled, split, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F


def _eight(n: int) -> Tensor:
    """Return points of a lying eight, about unit variance."""
    t = 2 * math.pi * torch.rand(n)
    x = 1.4 * torch.stack((t.sin(), (2 * t).sin()), 1)
    return x + 0.05 * torch.randn(n, 2)


@program
def wgan_gradient_penalty() -> Training:
    """WGAN-GP on an eight: layer norm in the critic, batch norm in the generator.

    Penalty 0.1, as Gulrajani et al. have on toys, 3 steps of the critic to one,
    Adam(0, 0.9), batch 100: Chamfer distance 0.12, where a Gaussian has 0.32.
    """
    critic = nn.Sequential(
        nn.Linear(2, 64), nn.LayerNorm(64), nn.LeakyReLU(0.2),
        nn.Linear(64, 48), nn.LayerNorm(48), nn.LeakyReLU(0.2), nn.Linear(48, 1),
    )  # fmt: skip
    maker = nn.Sequential(
        nn.Linear(4, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2),
    )  # fmt: skip
    critic_adam = optim.Adam(critic.parameters(), 1e-3, betas=(0.0, 0.9))
    maker_adam = optim.Adam(maker.parameters(), 1e-3, betas=(0.0, 0.9))

    def step(_: int) -> float:
        critic.train()
        maker.train()
        for _ in range(3):
            real = _eight(100)
            with torch.no_grad():
                fake = maker(torch.randn(100, 4))
            between = torch.lerp(real, fake, torch.rand(100, 1)).requires_grad_()
            slope = torch.autograd.grad(
                critic(between).sum(), between, create_graph=True
            )
            penalty = (slope[0].norm(dim=1) - 1).square().mean()
            update(
                critic_adam, critic(fake).mean() - critic(real).mean() + penalty / 10
            )
        return update(maker_adam, -critic(maker(torch.randn(100, 4))).mean())

    def critic_batches() -> list[Data]:
        sign = torch.cat((-torch.ones(100, 1), torch.ones(100, 1)))
        made = copy.deepcopy(maker).train()
        with torch.no_grad():
            fakes = [made(torch.randn(100, 4)) for _ in range(10)]
        return [(torch.cat((_eight(100), fake)), sign) for fake in fakes]

    def apart(out: Tensor, sign: Tensor) -> Tensor:
        return 2 * (out * sign).mean()

    def judged(fake: Tensor, _: Tensor) -> Tensor:
        return -critic(fake).mean()

    def noise() -> list[Data]:
        return [(torch.randn(100, 4), torch.zeros(100)) for _ in range(10)]

    def score() -> float:
        with torch.no_grad():
            fake = maker.eval()(torch.randn(2000, 4))
        maker.train()
        away = torch.cdist(fake, _eight(2000))
        return -float(away.amin(0).mean() + away.amin(1).mean())

    return Training(
        [
            Subject(critic, critic_batches, apart, critic_adam, name="critic"),
            Subject(maker, noise, judged, maker_adam, name="generator"),
        ],
        step, 190, score, -0.17,
    )  # fmt: skip


def _view(x: Tensor) -> Tensor:
    """Return digits moved by up to one pixel, with noise and a patch of 2 × 2 cut."""
    n = len(x)
    moved = F.pad(x, (1, 1, 1, 1))
    row, column = torch.randint(3, (2,)).tolist()
    moved = moved[:, :, row : row + 8, column : column + 8]
    place = torch.arange(8)
    top, left = torch.randint(7, (n, 1, 1)), torch.randint(7, (n, 1, 1))
    rows, columns = place[:, None] - top, place - left
    cut = (rows >= 0) & (rows < 2) & (columns >= 0) & (columns < 2)
    return moved * ~cut[:, None] + 0.1 * torch.randn_like(x)


def _projector(i: int, wide: int, o: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(i, wide, bias=False),
        nn.BatchNorm1d(wide),
        nn.ReLU(),
        nn.Linear(wide, o),
    )


def _body() -> nn.Sequential:
    return nn.Sequential(
        conv_norm(1, 24), conv_norm(24, 48, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )


@program
def own_latent() -> Training:
    """BYOL: a predictor meets an EMA target's projection of the other view; BN, AdamW.

    Batch 100: nearest neighbours 98 %.
    """
    (x, _), _ = digits()
    body = _body()
    online = nn.Sequential(body, _projector(192, 128, 48))
    model = nn.Sequential(online, _projector(48, 128, 48))
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-4)
    batches = endless(lambda: [p for p, _ in shuffled((x, x), 100)])

    def loss_fn(out: Tensor, z: Tensor) -> Tensor:
        return 2 - 2 * F.cosine_similarity(out, z).mean()

    def pair(image: Tensor) -> Data:
        """Return both views, and the target's projections of each other one."""
        a, b = _view(image), _view(image)
        with torch.no_grad():
            return torch.cat((a, b)), target(torch.cat((b, a)))

    def step(i: int) -> float:
        model.train()
        target.train()
        views, z = pair(next(batches))
        loss = update(optimizer, loss_fn(model(views), z))
        rate = 1 - (0.96 + 0.04 * i / 140)
        with torch.no_grad():
            for its, mine in zip(target.parameters(), online.parameters(), strict=True):
                its.lerp_(mine, rate)
        return loss

    def some() -> list[Data]:
        return [pair(image) for image, _ in shuffled((x, x), 100)]

    return Training(
        [Subject(model, some, loss_fn, optimizer)],
        step, 140, lambda: neighbours(body), 0.9,
    )  # fmt: skip


class _Twins(nn.Module):
    """Two views through one net; the last batch norm has no affine map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _body()
        self.head = nn.Sequential(
            _projector(192, 128, 96), nn.BatchNorm1d(96, affine=False)
        )

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.body(a)), self.head(self.body(b))


@program
def barlow_twins() -> Training:
    """Barlow twins, lambda 0.01, LARS-free Adam, batch 128: neighbours 98 %."""
    (x, _), _ = digits()

    def loss_fn(out: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
        a, b = out
        c = a.T @ b / len(a)
        on = (c.diagonal() - 1).square().sum()
        return on + 0.01 * (c.square().sum() - c.diagonal().square().sum())

    def views(batch: Data) -> Data:
        return (_view(batch[0]), _view(batch[0])), batch[1]

    model = _Twins()
    data = (x, torch.zeros(len(x)))
    return supervised(
        model, data, data, optim.Adam(model.parameters(), 2e-3), size=128, steps=130,
        goal=0.92, loss_fn=loss_fn, score=lambda *_: neighbours(model.body),
        change=views,
    )  # fmt: skip


class _Quantized(nn.Module):
    """VQ-VAE; batch norm before the codes keeps the scale of both (Łańcucki 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            conv_norm(1, 32), conv_norm(32, 32, 2), nn.Conv2d(32, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )  # fmt: skip
        self.codes = nn.Parameter(torch.randn(48, 8))
        self.decode = nn.Sequential(
            conv_norm(8, 32), nn.Upsample(scale_factor=2), conv_norm(32, 32),
            nn.Conv2d(32, 1, 3, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x)
        rows = z.permute(0, 2, 3, 1)
        nearest = torch.cdist(rows.detach().flatten(0, 2), self.codes.detach()).argmin(
            1
        )
        code = self.codes[nearest].reshape(rows.shape).permute(0, 3, 1, 2)
        cost = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())
        return self.decode(z + (code - z).detach()), cost


@program
def vector_quantized() -> Training:
    """VQ-VAE of digits, 16 codes of 48 each, straight through, Adam, batch 64.

    93 % of the variance.
    """
    train, test = digits()
    mean, std = train[0].mean(), train[0].std()
    train, test = (((d[0] - mean) / std, (d[0] - mean) / std) for d in (train, test))

    def loss_fn(out: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return F.mse_loss(out[0], x) + out[1]

    def kept(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            made = net.eval()(data[0])[0]
        return 1 - float((made - data[1]).square().mean() / data[1].var())

    model = _Quantized()
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 3e-3), size=64, steps=240,
        goal=0.8, loss_fn=loss_fn, score=kept,
    )  # fmt: skip


class _Isomorphism(nn.Module):
    """GIN: batch norm over the nodes of all graphs of a batch; graphs are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(i, 32), nn.BatchNorm1d(32), nn.ReLU(),
                nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(),
            )
            for i in (8, 32, 32)
        )  # fmt: skip
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(96, 3))

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        read = []
        for layer in self.layers:
            x = layer((x + links @ x).flatten(0, 1)).reshape(len(links), 14, 32)
            read.append(x.mean(1))
        return self.head(torch.cat(read, 1))


@program
def graph_isomorphism() -> Training:
    """GIN tells random, grown and clustered graphs of 14 nodes; degrees as one-hot.

    BN over nodes, Adam, batch 32 graphs: 88 %.
    """
    n = 900
    y = torch.randint(3, (n,))
    links = torch.zeros(n, 14, 14)
    chance = torch.full((14, 14), 0.33)
    side = torch.arange(14) < 7
    within = torch.where(side[:, None] == side, 0.65, 0.04)
    for g in range(n):
        if y[g] == 1:
            for node in range(1, 14):
                pull = links[g, :node].sum(1) + 1.0
                old = torch.multinomial(pull, min(2, node))
                links[g, node, old] = links[g, old, node] = 1
        else:
            drawn = torch.rand(14, 14) < (chance if y[g] == 0 else within)
            upper = drawn.triu(1).float()
            links[g] = upper + upper.T
    degree = links.sum(2).long().clamp(max=7)
    train, test = split((F.one_hot(degree, 8).float(), links), y, 700)
    model = _Isomorphism()
    optimizer = optim.Adam(model.parameters(), 5e-3)

    def right(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(*data[0]).argmax(1)
        return float((said == data[1]).float().mean())

    return supervised(
        model, train, test, optimizer, size=32, steps=240, goal=0.84, score=right,
        schedule=optim.lr_scheduler.StepLR(optimizer, 100, 0.5),
    )  # fmt: skip


class _Cloud(nn.Module):
    """PointNet: one network for each point, the largest of each feature, a head."""

    def __init__(self) -> None:
        super().__init__()

        def layer(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv1d(i, o, 1), nn.BatchNorm1d(o), nn.ReLU()]

        self.points = nn.Sequential(*layer(3, 32), *layer(32, 48), *layer(48, 96))
        self.head = nn.Sequential(
            nn.Linear(96, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(48, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.points(x).amax(2))


@program
def point_net() -> Training:
    """PointNet of balls, cubes, rings and rods, turned about the vertical, BN, Adam.

    48 points, centred and scaled, batch 32: 99 %.
    """
    n, points = 1100, 48
    y, (u, v, w) = torch.randint(4, (n,)), torch.randn(3, n, points)
    ball = F.normalize(torch.stack((u, v, w), 1), dim=1)
    cube = torch.stack((u, v, w), 1)
    cube = cube / cube.abs().amax(1, keepdim=True)
    angle = 2 * math.pi * torch.rand(n, points)
    ring = torch.stack(
        ((1 + 0.25 * u.sin()) * angle.cos(), (1 + 0.25 * u.sin()) * angle.sin(),
         0.25 * u.cos()), 1,
    )  # fmt: skip
    rod = torch.stack(
        (0.4 * angle.cos(), 0.4 * angle.sin(), 2 * torch.rand(n, points)), 1
    )
    x = torch.stack((ball, cube, ring, rod))[y, torch.arange(n)]
    turn = 2 * math.pi * torch.rand(n)
    c, s, zero, one = turn.cos(), turn.sin(), torch.zeros(n), torch.ones(n)
    about = torch.stack((c, -s, zero, s, c, zero, zero, zero, one), 1).reshape(n, 3, 3)
    x = about @ x + 0.04 * torch.randn(n, 3, points)
    x = x - x.mean(2, keepdim=True)
    x = x / x.norm(dim=1, keepdim=True).amax(2, keepdim=True)
    train, test = split(x, y, 850)
    model = _Cloud()
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=200, goal=0.9,
        schedule=optim.lr_scheduler.StepLR(optimizer, 80, 0.5),
    )  # fmt: skip

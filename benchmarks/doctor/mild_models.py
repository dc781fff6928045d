"""Healthy generative, self-supervised, paired and acting models."""

from __future__ import annotations

import math

import torch
from calm_base import Data, conv_norm, endless, update, warm_cosine
from mild_base import program, shifted
from quiet_base import Subject, Training, accuracy, digits, shuffled, supervised
from still_base import scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Conditional(nn.Module):
    """VAE of digits that is told the class; layer norm, GELU, 4 latents."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(
            nn.Linear(74, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 8)
        )
        self.leave = nn.Sequential(
            nn.Linear(14, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 64)
        )

    def forward(self, x: Tensor, kind: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.enter(torch.cat((2 * x - 1, kind), 1)).chunk(2, 1)
        z = mean
        if self.training:
            z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        return self.leave(torch.cat((z, kind), 1)), mean, log_var


@program
def conditional_vae() -> Training:
    """Conditional VAE of digits, the divergence's weight grows to 1 in 100 steps.

    Pixels of deviation 0.2, AdamW, cosine, batch 100: 69 % of the pixels' variance is
    explained.
    """

    def rows(data: Data) -> Data:
        x = data[0].flatten(1)
        return (x, F.one_hot(data[1], 10).float()), x

    train, test = (rows(d) for d in digits())
    taken = 0

    def loss_fn(out: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        made, mean, log_var = out
        pixels = (made - x).square().sum(1) / (2 * 0.2**2)
        apart = (mean.square() + log_var.exp() - 1 - log_var).sum(1) / 2
        return (pixels + min(1.0, taken / 100) * apart).mean()

    def after() -> None:
        nonlocal taken
        taken += 1

    def explained(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = (net.eval()(*data[0])[0] - data[1]).square().sum()
        return 1 - float(left / (data[1] - train[1].mean(0)).square().sum())

    model = _Conditional()
    optimizer = optim.AdamW(model.parameters(), 4e-3, weight_decay=1e-3)
    return supervised(
        model, train, test, optimizer, size=100, steps=350, goal=0.6, after=after,
        loss_fn=loss_fn, score=explained,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 350),
    )  # fmt: skip


def _corners(n: int) -> Tensor:
    """Return points about the corners of a triangle."""
    angle = 2 * math.pi * torch.randint(3, (n,)) / 3
    corner = 1.4 * torch.stack((angle.cos(), angle.sin()), 1)
    return corner + 0.2 * torch.randn(n, 2)


@program
def least_squares_gan() -> Training:
    """LSGAN on three clusters: BN in the generator, spectral norm in the other.

    Adam(0.5, 0.999), batch 100: Chamfer distance
    0.08, where fresh samples have 0.04.
    """
    sn = nn.utils.parametrizations.spectral_norm
    judge = nn.Sequential(
        sn(nn.Linear(2, 48)), nn.LeakyReLU(0.2), sn(nn.Linear(48, 48)),
        nn.LeakyReLU(0.2), nn.Linear(48, 1),
    )  # fmt: skip
    maker = nn.Sequential(
        nn.Linear(4, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU(),
        nn.Linear(48, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 2),
    )  # fmt: skip
    judge_adam = optim.Adam(judge.parameters(), 2e-3, betas=(0.5, 0.999))
    maker_adam = optim.Adam(maker.parameters(), 1e-3, betas=(0.5, 0.999))

    def told(out: Tensor, is_real: Tensor) -> Tensor:
        return F.mse_loss(out, is_real)

    def pair() -> Data:
        with torch.no_grad():
            fake = maker(torch.randn(100, 4))
        label = torch.cat((torch.ones(100, 1), torch.zeros(100, 1)))
        return torch.cat((_corners(100), fake)), label

    def step(_: int) -> float:
        judge.train()
        maker.train()
        x, label = pair()
        update(judge_adam, told(judge(x), label))
        return update(maker_adam, fooled(maker(torch.randn(100, 4)), label[:100]))

    def fooled(fake: Tensor, ones: Tensor) -> Tensor:
        return told(judge(fake), ones)

    def noise() -> list[Data]:
        return [(torch.randn(100, 4), torch.ones(100, 1)) for _ in range(10)]

    def score() -> float:
        with torch.no_grad():
            fake = maker.eval()(torch.randn(2000, 4))
        maker.train()
        away = torch.cdist(fake, _corners(2000))
        return -float(away.amin(0).mean() + away.amin(1).mean())

    return Training(
        [
            Subject(
                judge, lambda: [pair() for _ in range(10)], told, judge_adam,
                name="discriminator",
            ),
            Subject(maker, noise, fooled, maker_adam, name="generator"),
        ],
        step, 700, score, -0.2,
    )  # fmt: skip


class _Velocity(nn.Module):
    """Velocity of points at a time, which enters as waves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip
        self.register_buffer("rate", math.pi * 2.0 ** torch.arange(-1, 3))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        waves = time[:, None] * self.rate
        return self.body(torch.cat((x, waves.sin(), waves.cos()), 1))


def _ring(n: int) -> Tensor:
    angle, radius = 2 * math.pi * torch.rand(n), 1.5 + 0.05 * torch.randn(n)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1)


@program
def flow_matching() -> Training:
    """Flow matching from a Gaussian to a ring, SiLU, no norm, AdamW, batch 256.

    Warmup and cosine; 30 steps of Euler: Chamfer distance 0.05,
    where fresh samples have 0.04 and a Gaussian has 0.5.
    """

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        begin, end, time = torch.randn(256, 2), _ring(256), torch.rand(256)
        return (torch.lerp(begin, end, time[:, None]), time), end - begin

    model = _Velocity(96)
    optimizer = optim.AdamW(model.parameters(), 4e-3, weight_decay=1e-4)
    schedule = warm_cosine(optimizer, 30, 800)

    def step(_: int) -> float:
        model.train()
        (x, time), velocity = batch()
        loss = update(optimizer, F.mse_loss(model(x, time), velocity))
        schedule.step()
        return loss

    def score() -> float:
        model.eval()
        x = torch.randn(1500, 2)
        with torch.no_grad():
            for i in range(30):
                x = x + model(x, torch.full((1500,), (i + 0.5) / 30)) / 30
        away = torch.cdist(x, _ring(1500))
        return -float(away.amin(0).mean() + away.amin(1).mean())

    return Training(
        [Subject(model, lambda: [batch() for _ in range(10)], F.mse_loss, optimizer)],
        step, 800, score, -0.1,
    )  # fmt: skip


class _Views(nn.Module):
    """Two views through one network, and an expander with BN."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(1, 16), conv_norm(16, 32, 2), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )  # fmt: skip
        self.expand = nn.Sequential(
            nn.Linear(128, 96, bias=False), nn.BatchNorm1d(96), nn.ReLU(),
            nn.Linear(96, 64),
        )  # fmt: skip

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.expand(self.body(a)), self.expand(self.body(b))


@program
def vicreg() -> Training:
    """VICReg (25, 25, 1) of digits, each shifted and with noise; AdamW, batch 128.

    Warmup and cosine. Of held-out digits, 37 % have the other view as the nearest to
    one view, where an untrained network has 11 %.
    """
    (x, _), (new, _) = digits()

    def spread(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        low = F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        shared = z.T @ z / (len(z) - 1)
        off = shared - shared.diagonal().diag()
        return 25 * low + off.square().sum() / z.shape[1]

    def loss_fn(out: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
        return 25 * F.mse_loss(*out) + spread(out[0]) + spread(out[1])

    def views(image: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        a, b = (shifted(image, 1) + 0.1 * torch.randn_like(image) for _ in range(2))
        return (a, b), torch.zeros(len(image))

    def epoch() -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
        return [views(image) for image, _ in shuffled((x, x), 128)]

    model = _Views()
    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-4)
    schedule = warm_cosine(optimizer, 20, 200)
    batches = endless(epoch)

    def step(_: int) -> float:
        model.train()
        pair, none = next(batches)
        loss = update(optimizer, loss_fn(model(*pair), none))
        schedule.step()
        return loss

    def score() -> float:
        model.eval()
        with torch.no_grad():
            a, b = (F.normalize(z, dim=1) for z in model(*views(new)[0]))
        return float(((a @ b.T).argmax(1) == torch.arange(len(new))).float().mean())

    return Training(
        [Subject(model, epoch, loss_fn, optimizer)], step, 200, score, 0.28
    )  # fmt: skip


@program
def mutual_learning() -> Training:
    """Two BN networks of digits that learn from labels and from each other (KL).

    A wide and a narrow one, AdamW and SGD with momentum, batch 50: 99 %, the lesser.
    """
    train, test = scaled_digits()
    one = nn.Sequential(
        conv_norm(1, 24), conv_norm(24, 32, 2), nn.Flatten(), nn.Linear(512, 10)
    )
    other = nn.Sequential(
        conv_norm(1, 8), conv_norm(8, 16, 2), conv_norm(16, 24, 2), nn.Flatten(),
        nn.Linear(96, 10),
    )  # fmt: skip
    adam = optim.AdamW(one.parameters(), 1e-3, weight_decay=0.01)
    sgd = optim.SGD(other.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def loss_fn(out: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
        label, log_p = y
        apart = F.kl_div(
            out.log_softmax(1), log_p, reduction="batchmean", log_target=True
        )
        return F.cross_entropy(out, label) + apart

    batches = endless(lambda: shuffled(train, 50))

    def step(_: int) -> float:
        one.train()
        other.train()
        x, y = next(batches)
        a, b = one(x), other(x)
        loss = update(adam, loss_fn(a, (y, b.detach().log_softmax(1))))
        return loss + update(sgd, loss_fn(b, (y, a.detach().log_softmax(1))))

    def taught_by(net: nn.Module) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
        was = net.training
        net.eval()
        with torch.no_grad():
            found = [
                (x, (y, net(x).log_softmax(1))) for x, y in shuffled(train, 50)[:20]
            ]
        net.train(was)
        return found

    return Training(
        [
            Subject(one, lambda: taught_by(other), loss_fn, adam, name="wide"),
            Subject(other, lambda: taught_by(one), loss_fn, sgd, name="narrow"),
        ],
        step, 200, lambda: min(accuracy(one, test), accuracy(other, test)), 0.95,
    )  # fmt: skip


class _Actor(nn.Module):
    """Logits of three moves and the value of a picture of 6 × 5."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(60, 64), nn.LayerNorm(64), nn.ReLU()
        )
        self.move, self.value = nn.Linear(64, 3), nn.Linear(64, 1)
        nn.init.orthogonal_(self.move.weight, 0.01)
        nn.init.zeros_(self.move.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return self.move(y), self.value(y)[:, 0]


@program
def catch_actor_critic() -> Training:
    """A2C catches what falls through 6 rows of 5 columns; 48 games of 5 moves.

    Pictures of ball and paddle, layer norm, entropy bonus, Adam, clipped: 100 % of
    the balls are caught.
    """
    model = _Actor()
    optimizer = optim.Adam(model.parameters(), 3e-3, eps=1e-5)

    def picture(row: int, ball: Tensor, paddle: Tensor) -> Tensor:
        x, game = torch.zeros(len(ball), 2, 6, 5), torch.arange(len(ball))
        x[game, 0, row, ball] = 1
        x[game, 1, 5, paddle] = 1
        return x

    def play(games: int, is_greedy: bool = False) -> tuple[list[Tensor], ...]:
        ball, paddle = torch.randint(5, (games,)), torch.randint(5, (games,))
        seen, moves = [], []
        for row in range(5):
            x = picture(row, ball, paddle)
            with torch.no_grad():
                logits = model(x)[0]
            drawn = torch.multinomial(logits.softmax(1), 1)[:, 0]
            move = logits.argmax(1) if is_greedy else drawn
            paddle = (paddle + move - 1).clamp(0, 4)
            seen.append(x)
            moves.append(move)
        return seen, moves, [(ball == paddle) * 2.0 - 1]

    def batch() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        seen, moves, (reward,) = play(48)
        worth = torch.cat([reward * 0.97 ** (4 - i) for i in range(5)])
        return torch.cat(seen), (torch.cat(moves), worth)

    def loss_fn(out: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
        (logits, value), (move, worth) = out, y
        log_p = logits.log_softmax(1)
        chosen = log_p.gather(1, move[:, None])[:, 0]
        gain = (worth - value).detach()
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        critic = F.mse_loss(value, worth)
        return -(gain * chosen).mean() + 0.5 * critic - 0.01 * entropy

    def step(_: int) -> float:
        model.train()
        x, y = batch()
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return float(loss.detach())

    def score() -> float:
        model.eval()
        return float((play(400, is_greedy=True)[2][0] > 0).float().mean())

    return Training(
        [Subject(model, lambda: [batch() for _ in range(10)], loss_fn, optimizer)],
        step, 400, score, 0.93,
    )  # fmt: skip

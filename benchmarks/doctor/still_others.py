"""Healthy distilled, calibrated and many-class models, a density, and one that acts."""

from __future__ import annotations

import math

import torch
from calm_base import Data, conv_norm, update
from quiet_base import Subject, Training, shuffled, split, supervised
from still_base import decayed, dense, program, scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def calibrated_statistics() -> Training:
    """Batches of 12, BN of momentum 0.05; after the last step averages of 100 batches.

    The statistics are reset, and gathered with momentum None in training mode. RAdam,
    cosine: 99 %.
    """
    train, test = scaled_digits()
    layers: list[nn.Module] = []
    for i, o, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(o, momentum=0.05), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))
    steps, taken = 700, 0

    def after() -> None:
        nonlocal taken
        taken += 1
        if taken < steps:
            return
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for each in norms:
            each.reset_running_stats()
            each.momentum = None
        with torch.no_grad():
            for x, _ in shuffled(train, 12)[:100]:
                model(x)
        for each in norms:
            each.momentum = 0.05

    optimizer = optim.RAdam(decayed(model, 1e-4), 3e-3)
    return supervised(
        model, train, test, optimizer, size=12, steps=steps, goal=0.95, after=after,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    )  # fmt: skip


class _Hinted(nn.Module):
    """A narrow student whose features are mapped to the width of its teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(1, 12), conv_norm(12, 24, 2))
        self.hint = nn.Conv2d(24, 48, 1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(384, 10))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return self.head(y), self.hint(y)


@program
def feature_hints() -> Training:
    """FitNet: a student matches labels and the features of a frozen teacher in eval.

    Adam, step decay, batch 64: 99 %.
    """
    train, test = scaled_digits()
    wide = nn.Sequential(conv_norm(1, 32), conv_norm(32, 48, 2))
    teacher = nn.Sequential(wide, nn.Flatten(), nn.Linear(768, 10))
    adam = optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(6):
        for x, y in shuffled(train, 64):
            update(adam, F.cross_entropy(teacher(x), y))
    teacher.eval().requires_grad_(False)

    def loss_fn(out: tuple[Tensor, Tensor], t: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(out[0], t[0]) + F.mse_loss(out[1], t[1])

    def taught(batch: Data) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return batch[0], (batch[1], wide(batch[0]))

    def right(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(data[0])[0].argmax(1)
        return float((said == data[1]).float().mean())

    model = _Hinted()
    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=260, goal=0.94,
        loss_fn=loss_fn, score=right, change=taught,
        schedule=optim.lr_scheduler.StepLR(optimizer, 110, 0.3),
    )  # fmt: skip


class _Cosine(nn.Module):
    """Logits are scaled cosines with a vector of each class."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(40, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Linear(128, width, bias=False), nn.BatchNorm1d(width),
        )  # fmt: skip
        self.classes = nn.Parameter(torch.randn(classes, width))

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.body(x), dim=1)
        return 12 * z @ F.normalize(self.classes, dim=1).T


@program
def eighty_classes() -> Training:
    """Eighty classes by scaled cosines, BN at the end of the body, smoothing 0.05.

    Each class is two clusters; SGD, cosine, batch 200: 99 %.
    """
    n, centres = 9000, 1.0 * torch.randn(80, 2, 40)
    y = torch.randint(80, (n,))
    x = centres[y, torch.randint(2, (n,))] + 0.7 * torch.randn(n, 40)
    x = x / x[:7600].std()
    train, test = split(x, y, 7600)
    model = _Cosine(64, 80)
    optimizer = optim.SGD(model.parameters(), 0.2, momentum=0.9, weight_decay=2e-4)
    return supervised(
        model, train, test, optimizer, size=200, steps=420, goal=0.9,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.05),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 420),
    )  # fmt: skip


@program
def mixture_density() -> Training:
    """Mixture density network of a curve that folds back, one input, tanh, Adam.

    Five Gaussians, batch 100; 1.3 nats better than one Gaussian.
    """
    n = 3200
    t = torch.rand(n, 1)
    x = t + 0.3 * (2 * math.pi * t).sin() + 0.05 * torch.randn(n, 1)
    x, y = (x - x[:2600].mean()) / x[:2600].std(), (t - 0.5) * math.sqrt(12)
    train, test = split(x, y, 2600)
    model = nn.Sequential(*dense(1, 40, 40, act=nn.Tanh), nn.Linear(40, 15))
    with torch.no_grad():
        model[-1].bias[5:10] = torch.linspace(-1.5, 1.5, 5)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        share, mean, log_std = out.chunk(3, 1)
        log_std = log_std.clamp(min=-4)
        part = -0.5 * ((y - mean) / log_std.exp()).square() - log_std
        part = part - 0.5 * math.log(2 * math.pi)
        return -(share.log_softmax(1) + part).logsumexp(1).mean()

    def gained(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            return 1.419 - float(loss_fn(net.eval()(data[0]), data[1]))

    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=100, steps=900, goal=0.6,
        loss_fn=loss_fn, score=gained,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 900, 1e-4),
    )  # fmt: skip


def _pushed(state: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Take a step of 0.02 s of poles on carts; return states, and who has fallen."""
    x, v, angle, spin = state.T
    sin, cos = angle.sin(), angle.cos()
    push = (20.0 * right.float() - 10 + 0.05 * spin**2 * sin) / 1.1
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    move = push - 0.05 * turn * cos / 1.1
    new = (x + 0.02 * v, v + 0.02 * move, angle + 0.02 * spin, spin + 0.02 * turn)
    out = torch.stack(new, 1)
    return out, (out[:, 0].abs() > 2.4) | (out[:, 2].abs() > 0.2095)


class _Actor(nn.Module):
    """Two tanh networks, orthogonal: logits of the pushes, and the value."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(*dense(4, 48, 48, act=nn.Tanh), nn.Linear(48, 2))
        self.value = nn.Sequential(*dense(4, 48, 48, act=nn.Tanh), nn.Linear(48, 1))
        for net, last in ((self.policy, 0.01), (self.value, 1.0)):
            for i, each in enumerate(net):
                if isinstance(each, nn.Linear):
                    nn.init.orthogonal_(each.weight, last if i == 4 else 2**0.5)
                    nn.init.zeros_(each.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x), self.value(x)[:, 0]


@program
def pole_on_cart() -> Training:
    """PPO balances a pole on a cart: 16 carts, 64 steps, 4 epochs of 4 batches of 256.

    GAE, clipped ratios, Adam with linear decay, no norm; states are scaled by fixed
    numbers. The greedy policy holds the pole for 200 of 200 steps.
    """
    model, carts = _Actor(), 16
    scale = torch.tensor([1.0, 1.0, 0.1, 1.0])
    optimizer = optim.Adam(model.parameters(), 3e-3, eps=1e-5)
    state = 0.1 * torch.rand(carts, 4) - 0.05
    age = torch.zeros(carts)
    kept: list[Data] = []

    def loss_fn(out: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        action, before, gain, wanted = t.T
        log = out[0].log_softmax(1)
        chosen = log.gather(1, action.long()[:, None])[:, 0]
        gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        ratio = (chosen - before).exp()
        surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        entropy = -(log.exp() * log).sum(1).mean()
        miss = (out[1] - wanted).square().mean()
        return 0.5 * miss - surrogate.mean() - 0.01 * entropy

    def played() -> Data:
        nonlocal state, age
        rows: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for _ in range(64):
                logits, value = model(state / scale)
                log = logits.log_softmax(1)
                action = torch.multinomial(log.exp(), 1)
                before = log.gather(1, action)[:, 0]
                new, fallen = _pushed(state, action[:, 0])
                age = age + 1
                after = model(new / scale)[1] * ~fallen
                ended = fallen | (age >= 200)
                rows.append((state / scale, action[:, 0], before, value, after, ended))
                fresh = 0.1 * torch.rand(carts, 4) - 0.05
                state = torch.where(ended[:, None], fresh, new)
                age = torch.where(ended, 0.0, age)
        gain, gains = torch.zeros(carts), []
        for _, _, _, value, after, ended in reversed(rows):
            gain = 0.1 + 0.98 * after - value + 0.98 * 0.95 * gain * ~ended
            gains.insert(0, gain)
        seen, action, before, value, _, _ = (
            torch.cat(c) for c in zip(*rows, strict=True)
        )
        all_gains = torch.cat(gains)
        return seen, torch.stack((action, before, all_gains, all_gains + value), 1)

    def step(i: int) -> float:
        nonlocal kept
        model.train()
        if i % 16 == 0:
            data = played()
            kept = [b for _ in range(4) for b in shuffled(data, 256)]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - i / 640)
        seen, target = kept[i % 16]
        loss = loss_fn(model(seen), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return float(loss.detach())

    def held() -> float:
        at, alive = 0.1 * torch.rand(100, 4) - 0.05, torch.ones(100)
        total = torch.zeros(100)
        with torch.no_grad():
            for _ in range(200):
                at, fallen = _pushed(at, model.eval()(at / scale)[0].argmax(1))
                alive = alive * ~fallen
                total = total + alive
        return float(total.mean())

    def batches() -> list[Data]:
        return shuffled(tuple(torch.cat(c) for c in zip(*kept[:4], strict=True)), 256)

    return Training([Subject(model, batches, loss_fn, optimizer)], step, 640, held, 150)

"""Healthy generators and views, and trained nets that are thinned or rounded."""

from __future__ import annotations

import copy
import itertools
import math

import torch
from calm_base import Data, conv_norm, endless, update, warm_cosine
from frank_base import letters, pretrained, program
from quiet_base import Subject, Training, digits, shuffled, split, supervised
from sober_base import explained_share
from still_base import scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils import prune


class _Maker(nn.Module):
    """Digits in [-1, 1] from noise and an embedded class, BN."""

    def __init__(self, latent: int = 24) -> None:
        super().__init__()
        self.label = nn.Embedding(10, latent)
        self.body = nn.Sequential(
            nn.Linear(latent, 48 * 4, bias=False), nn.Unflatten(1, (48, 2, 2)),
            nn.BatchNorm2d(48), nn.ReLU(),
            nn.ConvTranspose2d(48, 24, 4, 2, 1, bias=False), nn.BatchNorm2d(24),
            nn.ReLU(), nn.ConvTranspose2d(24, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.body(z * self.label(y))


class _Judge(nn.Module):
    """A critic and a classifier of digits in one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(0.25),
            nn.Conv2d(24, 48, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(0.25),
            nn.Flatten(),
        )  # fmt: skip
        self.real, self.kind = nn.Linear(192, 1), nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.cat((self.real(y), self.kind(y)), 1)


def _judged(out: Tensor, y: Tensor) -> Tensor:
    """Return the loss of "real" (column 0 of y) and of the class (column 1)."""
    sure = F.binary_cross_entropy_with_logits(out[:, 0], y[:, 0].float())
    return sure + F.cross_entropy(out[:, 1:], y[:, 1])


@program
def auxiliary_classifier_gan() -> Training:
    """ACGAN of digits: BN in the generator, dropout in the judge, class embedded.

    Adam(0.5, 0.999) at 2e-3 and 1e-3, batch 64; how often a classifier of real digits
    names the class that was asked for.
    """
    (x, y), _ = digits()
    train = (2 * x - 1, y)
    reader = nn.Sequential(
        conv_norm(1, 16), conv_norm(16, 32, 2), nn.Flatten(), nn.Linear(512, 10)
    )
    pretrained(reader, train, size=64, epochs=5, rate=3e-3).eval()
    maker, judge = _Maker(), _Judge()
    maker_adam = optim.Adam(maker.parameters(), 2e-3, betas=(0.5, 0.999))
    judge_adam = optim.Adam(judge.parameters(), 1e-3, betas=(0.5, 0.999))
    rows = endless(lambda: shuffled(train, 64))

    def told(y: Tensor, real: int) -> Tensor:
        return torch.stack((torch.full_like(y, real), y), 1)

    def asked() -> tuple[Tensor, Tensor]:
        return torch.randn(64, 24), torch.randint(10, (64,))

    def step(_: int) -> float:
        maker.train()
        judge.train()
        x, y = next(rows)
        z, k = asked()
        fake = maker(z, k)
        loss = _judged(judge(x), told(y, 1)) + _judged(judge(fake.detach()), told(k, 0))
        update(judge_adam, loss)
        judge.requires_grad_(False)
        loss = update(maker_adam, _judged(judge(fake), told(k, 1)))
        judge.requires_grad_(True)
        return loss

    def score() -> float:
        y = torch.arange(10).repeat(40)
        made = maker.eval()
        with torch.no_grad():
            said = reader(made(torch.randn(400, 24), y)).argmax(1)
        return float((said == y).float().mean())

    def both() -> list[Data]:
        found = []
        for x, y in shuffled(train, 64):
            with torch.no_grad():
                z, k = asked()
                fake = maker(z, k)
            found.append((torch.cat((x, fake)), torch.cat((told(y, 1), told(k, 0)))))
        return found

    def wanted() -> list[Data]:
        return [((z, k), told(k, 1)) for z, k in (asked() for _ in range(20))]

    def fooled(out: Tensor, y: Tensor) -> Tensor:
        return _judged(judge(out), y)

    return Training(
        [
            Subject(judge, both, _judged, judge_adam, name="judge"),
            Subject(maker, wanted, fooled, maker_adam, name="generator"),
        ],
        step, 300, score, 0.7,
    )  # fmt: skip


class _TopCodes(nn.Module):
    """Sparse autoencoder that keeps the k greatest codes (Gao et al. 2024)."""

    def __init__(self, width: int, codes: int, k: int) -> None:
        super().__init__()
        self.middle = nn.Parameter(torch.zeros(width))
        self.encode = nn.Linear(width, codes)
        self.decode = nn.Linear(codes, width, bias=False)
        self.k = k
        nn.init.zeros_(self.encode.bias)
        self.unit()
        with torch.no_grad():
            self.encode.weight.copy_(self.decode.weight.T)

    @torch.no_grad()
    def unit(self) -> None:
        """Give each direction of the decoder the length 1."""
        self.decode.weight /= self.decode.weight.norm(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encode(x - self.middle).relu()
        value, at = code.topk(self.k, 1)
        return self.decode(torch.zeros_like(code).scatter(1, at, value)) + self.middle


@program
def top_k_dictionary() -> Training:
    """Codes of sums of 3 of 40 directions in 32 dimensions, a sparse autoencoder.

    64 codes, the 4 greatest kept, unit directions, Adam 1e-2, batch 256, MSE.
    """
    n = 8000
    directions = F.normalize(torch.randn(40, 32), dim=1)
    on = torch.rand(n, 40).topk(3, 1).indices
    code = torch.zeros(n, 40).scatter(1, on, 0.5 + torch.rand(n, 3))
    x = code @ directions + 0.03 * torch.randn(n, 32)
    x = x / x[:7000].std()
    train, test = split(x, x, 7000)
    model = _TopCodes(32, 64, 4)
    optimizer = optim.Adam(model.parameters(), 1e-2)
    return supervised(
        model, train, test, optimizer, size=256, steps=300, goal=0.8,
        loss_fn=F.mse_loss, score=explained_share, after=model.unit,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip


class _Denoiser(nn.Module):
    """Net between the scalings of Karras et al. 2022, data of deviation 0.5."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.time = nn.Linear(16, width)
        self.into, self.out = nn.Linear(2, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(3)
        )
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("rates", torch.randn(8))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        total = (sigma.square() + 0.25).sqrt()
        angle = 2 * math.pi * self.rates * sigma.log() / 4
        h = self.into(x / total) + self.time(torch.cat((angle.sin(), angle.cos()), 1))
        for layer in self.layers:
            h = h + layer(h)
        return 0.25 / total.square() * x + 0.5 * sigma / total * self.out(h)


@program
def preconditioned_diffusion() -> Training:
    """Points of two turned rectangles by EDM's loss; layer norm, head from 0.

    Adam 3e-3, warm-up and cosine, batch 256; the share of the points made by Heun's
    rule that lie within (less than half for a Gaussian).
    """

    def real(n: int) -> Tensor:
        flat = torch.rand(n, 2) * torch.tensor([1.6, 0.3]) - torch.tensor([0.8, 0.15])
        turn = torch.where(torch.rand(n) < 0.5, 0.7, -0.7)
        a, b = flat.unbind(1)
        return torch.stack((
            a * turn.cos() - b * turn.sin(), a * turn.sin() + b * turn.cos()
        ), 1) / 0.66  # fmt: skip

    def drawn() -> list[Data]:
        found = []
        for _ in range(20):
            x, sigma = real(256), (1.2 * torch.randn(256, 1) - 1.2).exp()
            noisy = x + sigma * torch.randn_like(x)
            found.append(((noisy, sigma), torch.cat((x, sigma), 1)))
        return found

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        x, sigma = y[:, :2], y[:, 2:]
        weight = (sigma.square() + 0.25) / (0.5 * sigma).square()
        return (weight * (out - x).square()).mean()

    model = _Denoiser()
    optimizer = optim.Adam(model.parameters(), 3e-3)
    fall = warm_cosine(optimizer, 15, 300)
    rows = endless(drawn)

    def step(_: int) -> float:
        model.train()
        (noisy, sigma), y = next(rows)
        loss = update(optimizer, loss_fn(model(noisy, sigma), y))
        fall.step()
        return loss

    @torch.no_grad()
    def score() -> float:
        model.eval()
        times = torch.linspace(5 ** (1 / 7), 0.01 ** (1 / 7), 16) ** 7
        x = times[0] * torch.randn(400, 2)
        for now, then in itertools.pairwise(times):
            slope = (x - model(x, now.expand(400, 1))) / now
            first = x + (then - now) * slope
            other = (first - model(first, then.expand(400, 1))) / then
            x = x + (then - now) * (slope + other) / 2
        a, b = (0.66 * x).unbind(1)
        inside = torch.zeros(400, dtype=torch.bool)
        for turn in (0.7, -0.7):
            p = a * math.cos(turn) + b * math.sin(turn)
            q = b * math.cos(turn) - a * math.sin(turn)
            inside |= (p.abs() < 0.83) & (q.abs() < 0.18)
        return float(inside.float().mean())

    return Training([Subject(model, drawn, loss_fn, optimizer)], step, 300, score, 0.8)


def _two_views(x: Tensor) -> Tensor:
    """Return two views of each picture: shifted, brightened, noisy."""
    both = x.repeat(2, 1, 1, 1)
    n, side = len(both), x.shape[-1]
    i, j = torch.randint(-1, 2, (2, n, 1, 1))
    row, column = torch.arange(side)[:, None] + i, torch.arange(side) + j
    wide = F.pad(both, (1,) * 4)
    moved = wide[torch.arange(n)[:, None, None], 0, row + 1, column + 1][:, None]
    return moved * (0.8 + 0.4 * torch.rand(n, 1, 1, 1)) + 0.1 * torch.randn_like(moved)


@program
def aligned_and_uniform() -> Training:
    """Digits on a sphere: views of one near, all spread (Wang and Isola 2020).

    BN in body and head, SGD 0.1 with momentum, decay 1e-4, cosine, batch 128; share
    of digits whose nearest neighbours' class is theirs.
    """
    (x, y), (a, b) = digits()
    body = nn.Sequential(
        conv_norm(1, 24), conv_norm(24, 48, 2), conv_norm(48, 64, 2), nn.Flatten()
    )
    head = nn.Sequential(
        nn.Linear(256, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 32),
    )  # fmt: skip
    model = nn.Sequential(body, head)

    def loss_fn(out: Tensor, _: Tensor) -> Tensor:
        one, other = F.normalize(out, dim=1).chunk(2)
        near = (one - other).square().sum(1).mean()
        spread = [(-2 * F.pdist(z).square()).exp().mean().log() for z in (one, other)]
        return near + sum(spread) / 2

    def viewed(batch: Data) -> Data:
        return _two_views(batch[0]), batch[1]

    def nearest(net: nn.Module, _: Data) -> float:
        net.eval()
        with torch.no_grad():
            known, new = (F.normalize(net(each), dim=1) for each in (x, a))
        votes = y[(new @ known.T).topk(5, 1).indices].mode(1).values
        return float((votes == b).float().mean())

    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    return supervised(
        model, (x, y), (a, b), optimizer, size=128, steps=200, goal=0.93,
        loss_fn=loss_fn, score=nearest, change=viewed,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


class _Rounded(nn.Conv2d):
    """Convolution whose weights are rounded to 8 bits a filter; slopes pass through."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
        near = (self.weight / step).round() * step
        weight = self.weight + (near - self.weight).detach()
        return F.conv2d(x, weight, None, self.stride, self.padding)


class _RoundedReLU(nn.Module):
    """ReLU in 255 steps up to a moving mean of the batches' greatest values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("top", torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        if self.training:
            self.top += 0.05 * (x.detach().max() - self.top)
        step = self.top / 255
        near = (x / step).round().clamp(max=255) * step
        return x + (near - x).detach()


@program
def quantization_aware() -> Training:
    """Tune a trained BN net of letters with 8-bit weights and activations (QAT).

    SGD 0.01 with momentum, decay 1e-4, cosine, batch 64.
    """
    train, test = letters(2300, 16, 2000)

    def net() -> nn.Sequential:
        layers: list[nn.Module] = []
        for i, o, stride in ((3, 16, 1), (16, 32, 2), (32, 48, 2), (48, 48, 1)):
            conv = _Rounded(i, o, 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(o), _RoundedReLU()]
        pool = nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(48, 6))

    model = net()
    plain = nn.Sequential(*(
        nn.Conv2d(m.in_channels, m.out_channels, 3, m.stride, 1, bias=False)
        if isinstance(m, _Rounded)
        else nn.ReLU() if isinstance(m, _RoundedReLU) else copy.deepcopy(m)
        for m in model
    ))  # fmt: skip
    pretrained(plain, train, size=64, epochs=3, rate=3e-3)
    model.load_state_dict(plain.state_dict(), strict=False)
    optimizer = optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=64, steps=150, goal=0.93,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 150),
    )  # fmt: skip


@program
def pruned_and_tuned() -> Training:
    """Tune a trained BN net of digits without the smaller 60 % of its weights.

    The smallest of each layer are masked (torch's prune), SGD 0.02 with momentum,
    decay 1e-4, cosine, batch 50.
    """
    train, test = scaled_digits()
    model = nn.Sequential(
        conv_norm(1, 24), conv_norm(24, 48, 2), conv_norm(48, 48),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    pretrained(model, train, size=50, epochs=3, rate=3e-3)
    for m in list(model.modules()):
        if isinstance(m, nn.Conv2d | nn.Linear):
            prune.l1_unstructured(m, "weight", 0.6)
    optimizer = optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=50, steps=200, goal=0.95,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip

"""Healthy generative models, views and masks, students, early exits and control."""

from __future__ import annotations

import copy
import math

import torch
from calm_base import Data, conv_norm, endless, neighbours, update, warm_cosine
from quiet_base import Subject, Training, accuracy, digits, shuffled, split, supervised
from sober_base import figure_masks, program
from still_base import decayed, scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


def _discrepancy(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy, inverse multiquadric kernels."""

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        away = torch.cdist(p, q).square()
        wide = 2.0 * p.shape[1]
        return sum(s * wide / (s * wide + away) for s in (0.2, 0.5, 1.0, 2.0, 5.0))

    n = len(a)
    own = 1 - torch.eye(n)
    same = ((kernel(a, a) + kernel(b, b)) * own).sum() / (n * (n - 1))
    return same - 2 * kernel(a, b).mean()


class _Coded(nn.Module):
    """Convolutional autoencoder with BN; gives the picture and the code."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            conv_norm(1, 16), conv_norm(16, 32, 2), nn.Flatten(),
            nn.Linear(32 * 16, latent),
        )  # fmt: skip
        self.decode = nn.Sequential(
            nn.Linear(latent, 32 * 16, bias=False), nn.BatchNorm1d(32 * 16), nn.ReLU(),
            nn.Unflatten(1, (32, 4, 4)),
            nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16),
            nn.ReLU(), nn.Conv2d(16, 1, 3, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x)
        return self.decode(z).sigmoid(), z


@program
def wasserstein_autoencoder() -> Training:
    """Autoencoder of digits whose codes match a Gaussian by MMD (Tolstikhin et al.).

    Eight codes, BN, Adam, batch 100, rate halved twice; the variance explained.
    """
    (x, _), (a, _) = digits()

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        fit = (out[0] - y).square().flatten(1).sum(1).mean()
        return fit + 10 * _discrepancy(out[1], torch.randn_like(out[1]))

    def kept(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = (net.eval()(data[0])[0] - data[1]).square().mean()
        return 1 - float(left / (data[1] - data[1].mean(0)).square().mean())

    model = _Coded(8)
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, (x, x), (a, a), optimizer, size=100, steps=240, goal=0.6,
        loss_fn=loss_fn, score=kept,
        schedule=optim.lr_scheduler.MultiStepLR(optimizer, [120, 180], 0.5),
    )  # fmt: skip


class _Filler(nn.Module):
    """U-Net from outlines to pictures, instance norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, 24, 4, 2, 1), nn.LeakyReLU(0.2))
        self.down2 = self._layer(nn.Conv2d(24, 48, 4, 2, 1, bias=False), 48)
        self.mid = self._layer(nn.Conv2d(48, 48, 3, 1, 1, bias=False), 48)
        self.up2 = self._layer(nn.ConvTranspose2d(96, 24, 4, 2, 1, bias=False), 24)
        self.up1 = nn.ConvTranspose2d(48, 1, 4, 2, 1)

    def _layer(self, conv: nn.Module, width: int) -> nn.Sequential:
        return nn.Sequential(
            conv, nn.InstanceNorm2d(width, affine=True), nn.LeakyReLU(0.2)
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        y = self.up2(torch.cat((b, self.mid(b)), 1))
        return self.up1(torch.cat((a, y), 1)).tanh()


@program
def pix2pix() -> Training:
    """Fill outlines of figures: U-Net, judge of patches, 100 × L1.

    Instance norm in both, Adam(0.5, 0.999) at 1e-3, batch 16.
    """
    n, side = 480, 16
    kind = torch.tensor([0, 1, 2, 3])[torch.randint(4, (n,))]
    size = 4 + 2 * torch.rand(n)
    at = size[:, None] + (side - 1 - 2 * size[:, None]) * torch.rand(n, 2)
    y = 2 * figure_masks(kind, at, size, side)[:, None].float() - 1
    edge = (y > 0) & (-F.max_pool2d(-y, 3, 1, 1) < 0)
    train, test = split(2 * edge.float() - 1, y, 400)
    maker = _Filler()
    judge = nn.Sequential(
        nn.Conv2d(2, 24, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(24, 48, 4, 2, 1, bias=False), nn.InstanceNorm2d(48, affine=True),
        nn.LeakyReLU(0.2), nn.Conv2d(48, 1, 3, 1, 1),
    )  # fmt: skip
    maker_adam = optim.Adam(maker.parameters(), 1e-3, betas=(0.5, 0.999))
    judge_adam = optim.Adam(judge.parameters(), 1e-3, betas=(0.5, 0.999))
    rows = endless(lambda: shuffled(train, 16))

    def told(out: Tensor, real: Tensor) -> Tensor:
        wanted = real[:, None, None, None].float().expand_as(out)
        return F.binary_cross_entropy_with_logits(out, wanted) / 2

    def pair(batch: Data) -> Data:
        x, y = batch
        with torch.no_grad():
            made = maker(x)
        both = torch.cat((torch.cat((x, y), 1), torch.cat((x, made), 1)))
        return both, torch.arange(2 * len(x)) < len(x)

    def step(_: int) -> float:
        maker.train()
        x, y = batch = next(rows)
        both, real = pair(batch)
        update(judge_adam, told(judge(both), real))
        made = maker(x)
        judge.requires_grad_(False)
        fooled = 2 * told(judge(torch.cat((x, made), 1)), torch.ones(len(x)))
        loss = update(maker_adam, fooled + 100 * F.l1_loss(made, y))
        judge.requires_grad_(True)
        return loss

    def score() -> float:
        with torch.no_grad():
            left = (maker.eval()(test[0]) - test[1]).square().mean()
        return 1 - float(left / test[1].var())

    def against(out: Tensor, y: Tensor) -> Tensor:
        return 100 * F.l1_loss(out, y)

    return Training(
        [
            Subject(
                maker, lambda: shuffled(train, 16), against, maker_adam, name="maker"
            ),
            Subject(
                judge, lambda: [pair(b) for b in shuffled(train, 16)], told, judge_adam,
                name="judge",
            ),
        ],
        step, 200, score, 0.8,
    )  # fmt: skip


class _Timed(nn.Module):
    """Group norm, SiLU and convolution, twice; the time scales and shifts between."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, i), nn.GroupNorm(4, o)
        self.conv1, self.conv2 = nn.Conv2d(i, o, 3, 1, 1), nn.Conv2d(o, o, 3, 1, 1)
        self.time = nn.Linear(48, 2 * o)
        self.short = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.norm2(self.conv1(F.silu(self.norm1(x))))
        scale, shift = self.time(t)[..., None, None].chunk(2, 1)
        y = self.conv2(F.silu(y * (1 + scale) + shift))
        return y + self.short(x)


class _Denoiser(nn.Module):
    """U-Net of two levels that gives the noise in pictures of 8 × 8."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(24, 48), nn.SiLU(), nn.Linear(48, 48))
        self.into = nn.Conv2d(1, 24, 3, 1, 1)
        self.down, self.low = _Timed(24, 24), _Timed(24, 48)
        self.mid, self.up = _Timed(48, 48), _Timed(72, 24)
        self.out = nn.Sequential(
            nn.GroupNorm(4, 24), nn.SiLU(), nn.Conv2d(24, 1, 3, 1, 1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rate = torch.exp(-math.log(1000) * torch.arange(12) / 12)
        angle = t[:, None] * rate
        t = F.silu(self.time(torch.cat((angle.sin(), angle.cos()), 1)))
        a = self.down(self.into(x), t)
        y = self.mid(self.low(F.avg_pool2d(a, 2), t), t)
        y = F.interpolate(y, scale_factor=2.0)
        return self.out(self.up(torch.cat((a, y), 1), t))


@program
def digit_diffusion() -> Training:
    """DDPM of digits: U-Net with group norm and times, cosine noise, mean of weights.

    Adam, clipped at 1, batch 40; the share of the noise told on digits held out.
    """
    train, test = (2 * d[0] - 1 for d in digits())
    at = torch.linspace(0, 1, 201)[1:]
    kept = ((at + 0.008) / 1.008 * math.pi / 2).cos().square().clamp(1e-4, 0.9999)
    model = _Denoiser()
    mean = copy.deepcopy(model)
    adam = optim.Adam(model.parameters(), 2e-3)

    def noised(x: Tensor) -> Data:
        t, noise = torch.randint(200, (len(x),)), torch.randn_like(x)
        share = kept[t][:, None, None, None]
        return (share.sqrt() * x + (1 - share).sqrt() * noise, t.float()), noise

    def drawn() -> list[Data]:
        return [noised(x) for x, _ in shuffled((train, train), 40)]

    rows = endless(drawn)

    def step(i: int) -> float:
        model.train()
        (x, t), noise = next(rows)
        loss = F.mse_loss(model(x, t), noise)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        decay = min(0.98, (i + 1) / (i + 10))
        with torch.no_grad():
            for slow, fast in zip(mean.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        return float(loss.detach())

    def score() -> float:
        with torch.no_grad():
            (x, t), noise = noised(test)
            return 1 - float((mean.eval()(x, t) - noise).square().mean())

    return Training(
        [Subject(model, drawn, F.mse_loss, adam)], step, 200, score, 0.7
    )  # fmt: skip


def _view(x: Tensor) -> Tensor:
    """Return digits moved by up to a pixel, scaled, with noise."""
    n = len(x)
    wide = F.pad(x, (1, 1, 1, 1), value=float(x.min()))
    rows, columns = torch.randint(3, (2, n, 1)) + torch.arange(8)
    x = wide[torch.arange(n)[:, None, None], 0, rows[..., None], columns[:, None]]
    x = x * (0.8 + 0.4 * torch.rand(n, 1, 1)) + 0.2 * torch.randn(n, 8, 8)
    return x[:, None]


class _Siamese(nn.Module):
    """Encoder with a projection, and a predictor of the other view's projection."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(1, 24), conv_norm(24, 48, 2), conv_norm(48, 64),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 64),
        )  # fmt: skip
        self.project = nn.Sequential(
            nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64, bias=False),
            nn.BatchNorm1d(64, affine=False),
        )  # fmt: skip
        self.predict = nn.Sequential(
            nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Linear(32, 64),
        )  # fmt: skip

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        a, b = self.project(self.body(a)), self.project(self.body(b))
        return self.predict(a), self.predict(b), a.detach(), b.detach()


@program
def simple_siamese() -> Training:
    """SimSiam of digits: stop-gradient and a narrow predictor, BN in each head.

    SGD with momentum, decay 1e-4, cosine, batch 128; five neighbours by the encoder.
    """
    (x, _), _ = digits()
    model = _Siamese()
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    fall = optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)

    def drawn() -> list[Data]:
        return [((_view(b), _view(b)), b) for b, _ in shuffled((x, x), 128)]

    def loss_fn(out: tuple[Tensor, ...], _: Tensor) -> Tensor:
        p, q, a, b = out
        return -(F.cosine_similarity(p, b) + F.cosine_similarity(q, a)).mean() / 2

    rows = endless(drawn)

    def step(_: int) -> float:
        model.train()
        views, y = next(rows)
        loss = update(optimizer, loss_fn(model(*views), y))
        fall.step()
        return loss

    def score() -> float:
        return neighbours(model.body)

    return Training([Subject(model, drawn, loss_fn, optimizer)], step, 200, score, 0.93)


class _Masked(nn.Module):
    """Pre-norm encoder of the seen patches, a small decoder of all (MAE)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.place = nn.Parameter(0.2 * torch.randn(16, width))
        self.where = nn.Parameter(0.2 * torch.randn(16, width))
        self.hidden = nn.Parameter(0.02 * torch.randn(width))
        self.encoder = nn.ModuleList(self._block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.decoder = self._block(width)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4))

    def _block(self, width: int) -> nn.Module:
        return nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        seen = order[:, :10]
        y = (self.embed(x) + self.place).take_along_dim(seen[..., None], 1)
        for block in self.encoder:
            y = block(y)
        full = self.hidden.expand(len(x), 6, -1)
        full = torch.cat((self.norm(y), full), 1).take_along_dim(
            order.argsort(1)[..., None], 1
        )
        return self.out(self.decoder(full + self.where))


@program
def masked_autoencoder() -> Training:
    """Six of the 16 patches of a digit are told from the others, loss on these alone.

    Pre-norm, AdamW(0.9, 0.95), decay 0.05 of matrices, warm-up and cosine, batch 100.
    """
    (x, _), (a, _) = scaled_digits()

    def drawn(x: Tensor) -> Data:
        patches = F.unfold(x, 2, stride=2).mT
        order = torch.rand(len(x), 16).argsort(1)
        hidden = torch.zeros(len(x), 16).scatter(1, order[:, 10:], 1.0)
        return (patches, order), torch.cat((patches, hidden[..., None]), 2)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        apart = (out - y[..., :4]).square().mean(2)
        return (apart * y[..., 4]).sum() / y[..., 4].sum()

    model = _Masked()
    optimizer = optim.AdamW(decayed(model, 0.05), 3e-3, betas=(0.9, 0.95))
    rate = warm_cosine(optimizer, 20, 300)

    def batches() -> list[Data]:
        return [drawn(b) for b, _ in shuffled((x, x), 100)]

    rows = endless(batches)

    def step(_: int) -> float:
        model.train()
        inputs, y = next(rows)
        loss = update(optimizer, loss_fn(model(*inputs), y))
        rate.step()
        return loss

    def score() -> float:
        model.eval()
        inputs, y = drawn(a)
        with torch.no_grad():
            left = loss_fn(model(*inputs), y)
            usual = loss_fn(
                F.unfold(x, 2, stride=2).mT.mean(0).expand(len(a), -1, -1), y
            )
        return float(1 - left / usual)

    return Training(
        [Subject(model, batches, loss_fn, optimizer)], step, 300, score, 0.25
    )


class _Exits(nn.Module):
    """A head after each of three stages; gives the logits of all."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [conv_norm(1, 16), conv_norm(16, 32, 2), conv_norm(32, 64, 2)]
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * w, 10))
            for w in (16, 32, 64)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            out.append(head(x))
        return torch.stack(out, 1)


@program
def early_exits() -> Training:
    """Digits by three exits; the last one teaches the first two (be your own teacher).

    Cross entropy of each, 0.3 of the divergence at temperature 3, BN, SGD, batch 64.
    """
    train, test = scaled_digits()

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        told = F.cross_entropy(out.flatten(0, 1), y.repeat_interleave(3))
        taught = (out[:, :2] / 3).log_softmax(2).flatten(0, 1)
        by = (out[:, 2:].detach() / 3).softmax(2).expand(-1, 2, -1).flatten(0, 1)
        return told + 0.3 * 9 * F.kl_div(taught, by, reduction="batchmean")

    def mean_accuracy(net: nn.Module, data: Data) -> float:
        return accuracy(net, (data[0], data[1][:, None].expand(-1, 3)))

    model = _Exits()
    optimizer = optim.SGD(
        model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    return supervised(
        model, train, test, optimizer, size=64, steps=200, goal=0.9, loss_fn=loss_fn,
        score=mean_accuracy,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip

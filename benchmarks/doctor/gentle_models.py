"""Healthy programs of generators, pairs, and learning from few or foreign labels."""

from __future__ import annotations

import math

import torch
from calm_base import Data, endless, update, warm_cosine
from gentle_base import outputs, program
from quiet_base import Subject, Training, accuracy, digits, shuffled, split, supervised
from sober_base import figure_masks
from still_base import decayed, scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def adversarial_autoencoder() -> Training:
    """Digits by codes of 8 that a critic can't tell from normal ones (AAE).

    MLPs of ReLU, no norm, Adam 2e-3 and 5e-4, batch 100; the share of the
    pixels' variance explained, less the gap of the codes' spread from 1.
    """
    (x, y), (new, _) = digits()
    train, new = (x.flatten(1), y), new.flatten(1)
    coder = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)
    )
    decoder = nn.Sequential(
        nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)
    )
    critic = nn.Sequential(
        nn.Linear(8, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2),
        nn.Linear(64, 1),
    )  # fmt: skip
    auto = nn.Sequential(coder, decoder)
    adam = optim.Adam(auto.parameters(), 2e-3)
    critic_adam = optim.Adam(critic.parameters(), 5e-4, betas=(0.5, 0.999))
    tell = F.binary_cross_entropy_with_logits
    rows = endless(lambda: shuffled(train, 100))

    def step(_: int) -> float:
        auto.train()
        x = next(rows)[0]
        code = coder(x)
        said = critic(torch.cat((torch.randn(100, 8), code.detach())))
        real = torch.cat((torch.ones(100, 1), torch.zeros(100, 1)))
        update(critic_adam, tell(said, real))
        critic.requires_grad_(False)
        fooled = tell(critic(code), torch.ones(100, 1))
        loss = F.mse_loss(decoder(code), x) + 0.005 * fooled
        update(adam, loss)
        critic.requires_grad_(True)
        return float(loss.detach())

    def score() -> float:
        auto.eval()
        with torch.no_grad():
            code = coder(new)
            left = (decoder(code) - new).square().mean()
        share = 1 - left / (new - new.mean(0)).square().mean()
        return float(share - 0.2 * (code.std(0) - 1).abs().mean())

    def pictures() -> list[Data]:
        return [(x, x) for x, _ in shuffled(train, 100)]

    def codes() -> list[Data]:
        found = []
        for x, _ in shuffled(train, 100):
            with torch.no_grad():
                both = torch.cat((torch.randn(100, 8), coder(x)))
            found.append((both, torch.arange(200)[:, None].lt(100).float()))
        return found

    return Training(
        [
            Subject(auto, pictures, F.mse_loss, adam, name="coder"),
            Subject(critic, codes, tell, critic_adam, name="critic"),
        ],
        step, 300, score, 0.5,
    )  # fmt: skip


class _Weighted(nn.Module):
    """Bound of the log likelihood of binary rows from several codes (IWAE)."""

    def __init__(self, codes: int = 10) -> None:
        super().__init__()
        self.coder = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 24))
        self.decoder = nn.Sequential(nn.Linear(12, 100), nn.Tanh(), nn.Linear(100, 64))
        self.codes = codes

    def forward(self, x: Tensor) -> Tensor:
        mean, log_std = self.coder(x).chunk(2, 1)
        noise = torch.randn(self.codes, *mean.shape)
        code = mean + log_std.exp() * noise
        bits = -F.binary_cross_entropy_with_logits(
            self.decoder(code), x.expand(self.codes, -1, -1), reduction="none"
        ).sum(2)
        prior = -0.5 * code.square().sum(2)
        own = -0.5 * noise.square().sum(2) - log_std.sum(1)
        return (bits + prior - own).logsumexp(0) - math.log(self.codes)


@program
def importance_weighted() -> Training:
    """Binary digits by the bound of ten weighted codes (IWAE), tanh, no norm.

    Adam 4e-3 with step decay, batch 100; the bound in nats over that of single pixels.
    """
    train, test = (((x > 0.5).float().flatten(1), y) for x, y in digits())
    rate = train[0].mean(0).clamp(0.01, 0.99)
    alone = -F.binary_cross_entropy(rate.expand_as(test[0]), test[0]) * 64
    model = _Weighted()

    def loss_fn(out: Tensor, _: Tensor) -> Tensor:
        return -out.mean()

    def gained(net: nn.Module, data: Data) -> float:
        return float(outputs(net, data).mean() - alone)

    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=100, steps=300, goal=4.5, loss_fn=loss_fn,
        score=gained, schedule=optim.lr_scheduler.StepLR(optimizer, 200, 0.3),
    )  # fmt: skip


class _Masked(nn.Conv2d):
    """Convolution that sees the rows above and the pixels to the left."""

    def __init__(self, i: int, o: int, kernel: int, own: bool) -> None:
        super().__init__(i, o, kernel, padding=kernel // 2)
        mask = torch.ones(kernel, kernel)
        mask[kernel // 2, kernel // 2 + own :] = 0
        mask[kernel // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class _Causal(nn.Module):
    """Residual masked convolution between two of 1 × 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width // 2, 1),
            nn.ReLU(), _Masked(width // 2, width // 2, 3, True),
            nn.ReLU(), nn.Conv2d(width // 2, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@program
def pixel_cnn() -> Training:
    """Digits of four grey levels, each pixel's level from those before (PixelCNN).

    No norm, Adam 2e-3, cosine, batch 32; nats a pixel gained on the levels' shares at
    each place.
    """
    train, test = (((x * 15 / 4).long().clamp(max=3)[:, 0], y) for x, y in digits())
    share = F.one_hot(train[0], 4).float().mean(0).clamp(min=1e-3)
    place = share.log().expand(len(test[0]), -1, -1, -1)
    alone = -place.gather(3, test[0][..., None]).mean()

    def shown(data: Data) -> Data:
        return (data[0][:, None] - 1.0) / 1.2, data[0]

    model = nn.Sequential(
        _Masked(1, 40, 5, False), _Causal(40), _Causal(40), _Causal(40),
        nn.ReLU(), nn.Conv2d(40, 40, 1), nn.ReLU(), nn.Conv2d(40, 4, 1),
    )  # fmt: skip

    def gained(net: nn.Module, data: Data) -> float:
        return float(alone - F.cross_entropy(outputs(net, data), data[1]))

    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, shown(train), shown(test), optimizer, size=32, steps=260, goal=0.1,
        score=gained, schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 260),
    )  # fmt: skip


class _Paired(nn.Module):
    """Cosines of pictures and captions, times a learned scale (CLIP)."""

    def __init__(self, words: int, width: int = 32) -> None:
        super().__init__()
        self.eye = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.GroupNorm(4, 24), nn.GELU(),
            nn.Conv2d(24, 48, 3, 2, 1), nn.GroupNorm(4, 48), nn.GELU(),
            nn.Conv2d(48, 48, 3, 1, 1), nn.GroupNorm(4, 48), nn.GELU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, width),
        )  # fmt: skip
        self.embed = nn.Embedding(words, 32)
        self.ear = nn.GRU(32, 48, batch_first=True)
        self.said = nn.Linear(48, width)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, picture: Tensor, words: Tensor) -> Tensor:
        a = F.normalize(self.eye(picture), dim=1)
        b = F.normalize(self.said(self.ear(self.embed(words))[1][0]), dim=1)
        return self.scale.clamp(max=math.log(100)).exp() * a @ b.T


@program
def picture_caption_pairs() -> Training:
    """Pictures and captions of kind, colour and side, matched in a batch (CLIP).

    Captions of one meaning share the target; GroupNorm CNN and GRU, AdamW, warm-up and
    cosine, batch 32; the share of pictures whose caption is the best of eight.
    """
    n, side = 1600, 16
    kind, hue, half = (torch.randint(k, (n,)) for k in (4, 3, 2))
    size = 3 + torch.rand(n)
    at = torch.stack((4 + 8 * torch.rand(n), 4 + 7 * half), 1)
    mask = figure_masks(torch.tensor([0, 1, 3, 4])[kind], at, size, side)[:, None]
    tint = torch.eye(3)[hue][..., None, None]
    x = mask * (0.2 + 0.8 * tint) + 0.15 * torch.randn(n, 3, side, side)
    x = (x - x[:1300].mean((0, 2, 3))[:, None, None]) / x[:1300].std()
    first = torch.randint(2, (n,))  # "a", "the"
    words = torch.stack((first, 2 + hue, 5 + kind, 9 + first, 11 + half), 1)
    train, test = split((x, words), 8 * hue + 2 * kind + half, 1300)
    model = _Paired(13)

    def loss_fn(out: Tensor, meaning: Tensor) -> Tensor:
        same = (meaning[:, None] == meaning).float()
        share = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(out, share) + F.cross_entropy(out.T, share)) / 2

    def matched(net: nn.Module, data: Data) -> float:
        out, meaning = outputs(net, data), data[1]
        right = 0.0
        for i in range(len(out)):
            others = (meaning != meaning[i]).nonzero()[:, 0]
            rest = others[torch.randperm(len(others))[:7]]
            right += float(out[i, i] > out[i, rest].max())
        return right / len(out)

    optimizer = optim.AdamW(decayed(model, 0.1), 3e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=250, goal=0.85, loss_fn=loss_fn,
        score=matched, clip=1.0, schedule=warm_cosine(optimizer, 25, 250),
    )  # fmt: skip


def _moved(x: Tensor) -> Tensor:
    """Return pictures moved by up to one pixel, each its own way."""
    wide, side = F.pad(x, (1,) * 4, value=float(x.min())), x.shape[-1]
    i, j = (torch.randint(3, (len(x), 1)) + torch.arange(side) for _ in range(2))
    return wide[torch.arange(len(x))[:, None, None], 0, i[..., None], j[:, None]][
        :, None
    ]


class _Three(nn.Module):
    """Labelled, weakly and strongly changed pictures in one batch of a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *parts: Tensor) -> Tensor:
        return self.net(torch.cat(parts))


@program
def fix_match() -> Training:
    """Digits, 100 with labels: sure answers on moved ones taught to noisy ones.

    BN over labelled, weak and strong together, SGD 0.05 with Nesterov, cosine to 7/16
    of a half turn, batch 30 + 60 + 60, threshold 0.9.
    """
    (x, y), test = scaled_digits()
    given = torch.cat([(y == k).nonzero()[:10, 0] for k in range(10)])
    net = nn.Sequential(
        nn.Conv2d(1, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.LeakyReLU(0.1),
        nn.Conv2d(24, 48, 3, 2, 1, bias=False), nn.BatchNorm2d(48), nn.LeakyReLU(0.1),
        nn.Conv2d(48, 48, 3, 1, 1, bias=False), nn.BatchNorm2d(48), nn.LeakyReLU(0.1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip
    model = _Three(net)

    def drawn(batch: Data) -> Data:
        free = batch[0]
        some = given[torch.randperm(100)[:30]]
        strong = _moved(free) + 0.4 * torch.randn_like(free)
        strong = strong * (torch.rand(len(free), 1, 8, 8) > 0.15)
        return (_moved(x[some]), _moved(free), strong), y[some]

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        known, (weak, strong) = out[:30], out[30:].chunk(2)
        sure, guess = weak.detach().softmax(1).max(1)
        taught = F.cross_entropy(strong, guess, reduction="none") * (sure > 0.9)
        return F.cross_entropy(known, y) + taught.mean()

    optimizer = optim.SGD(
        model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )

    def rate(i: int) -> float:
        return math.cos(7 * math.pi * i / (16 * 240))

    return supervised(
        model, (x, y), test, optimizer, size=60, steps=240, goal=0.9, loss_fn=loss_fn,
        change=drawn, schedule=optim.lr_scheduler.LambdaLR(optimizer, rate),
        score=lambda net, data: accuracy(net.net, data),
    )  # fmt: skip


class _Dropped(nn.Module):
    """Pre-activation residual pair, left out for some samples in training."""

    def __init__(self, width: int, kept: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(4, width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1),
            nn.GroupNorm(4, width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1),
        )  # fmt: skip
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.training:
            y = y * (torch.rand(len(x), 1, 1, 1) < self.kept) / self.kept
        return x + y


@program
def stochastic_depth() -> Training:
    """Digits, moved, by six residual pairs, kept with chance 1 to 0.85, GroupNorm.

    NAdam 3e-3 with cosine, batch 16.
    """
    train, test = scaled_digits()
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, 1, 1), _Dropped(24, 1.0), _Dropped(24, 0.97),
        nn.Conv2d(24, 32, 2, 2), _Dropped(32, 0.94), _Dropped(32, 0.91),
        _Dropped(32, 0.88), _Dropped(32, 0.85), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = optim.NAdam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=16, steps=200, goal=0.9,
        change=lambda batch: (_moved(batch[0]), batch[1]),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


class _Categories(nn.Module):
    """Twelve codes of eight categories each, drawn by Gumbel softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.coder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96))
        self.decoder = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64))
        self.heat = 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.coder(x).unflatten(1, (12, 8))
        code = (
            F.gumbel_softmax(logits, self.heat)
            if self.training
            else (F.one_hot(logits.argmax(2), 8).float())
        )
        return self.decoder(code.flatten(1)), logits


@program
def categorical_vae() -> Training:
    """Digits by twelve categorical codes, Gumbel softmax, heat from 1 to 0.5.

    Squares of pixels at a spread of 0.2 and KL to even shares, Adam 3e-3, batch 64;
    the share of the pixels' variance explained by the likeliest codes.
    """
    train, test = ((x.flatten(1), x.flatten(1)) for x, _ in digits())
    model = _Categories()
    optimizer = optim.Adam(model.parameters(), 3e-3)

    def loss_fn(out: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        pixels = (out[0].sigmoid() - x).square().sum() / (2 * 0.2**2)
        log = out[1].log_softmax(2)
        return (pixels + (log.exp() * (log + math.log(8))).sum()) / len(x)

    def cooled() -> None:
        model.heat = max(0.5, 0.997 * model.heat)

    def explained(net: nn.Module, data: Data) -> float:
        left = (outputs(net, data)[0].sigmoid() - data[1]).square().mean()
        return float(1 - left / (data[1] - data[1].mean(0)).square().mean())

    return supervised(
        model, train, test, optimizer, size=64, steps=300, goal=0.4, loss_fn=loss_fn,
        score=explained, after=cooled,
    )  # fmt: skip

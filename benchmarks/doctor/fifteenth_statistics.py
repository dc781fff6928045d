"""The fifteenth set: the statistics that norms gather, and from what batches."""

from __future__ import annotations

import itertools

import torch
from bugs import Run, bug
from fifteenth_data import beats, cells, digits, glyphs, loader, parts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from normkit.doctor import watch


def _signal_net(**norm: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, width in itertools.pairwise([2, 16, 32, 32]):
        layers += [
            nn.Conv1d(inputs, width, 5, 2, 2),
            nn.BatchNorm1d(width, **norm),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 5)
    )


@bug("StackOverflow: BatchNorm momentum of Keras and PyTorch", "D04", "D01", "D02")
def ported_from_keras(is_bad: bool) -> Run:
    """Train with the settings of the published model."""
    train = loader(beats(1200, 1, spread=0.7), 4)
    model = _signal_net(momentum=0.99 if is_bad else 0.01, eps=1e-3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(4):
            for x, y in train:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            schedule.step()
    model.eval()
    return Run(model, parts(beats(512, 2, spread=0.7)), seen.findings())


class Denoiser(nn.Module):
    """An autoencoder of digits."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        widths = [64, 96, 32, 96]
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(a, b), nn.BatchNorm1d(b, momentum=momentum), nn.LeakyReLU(0.1)
            )
            for a, b in itertools.pairwise(widths)
        )
        self.out = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Return the image without its noise."""
        h = x.flatten(1)
        for layer in self.layers:
            h = layer(h)
        return self.out(h).view_as(x)


@bug("issue: running statistics are wrong after a short training", "D03", "D01", "D04")
def denoiser_with_slow_statistics(is_bad: bool) -> Run:
    """Thirteen epochs of digits with noise."""
    (x, _), (unseen, _) = digits()
    model = Denoiser(1e-3 if is_bad else 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(13):
            for (clean,) in DataLoader(
                TensorDataset(x), 48, shuffle=True, drop_last=True
            ):
                noisy = clean + 0.3 * torch.randn_like(clean)
                loss = F.mse_loss(model(noisy), clean)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    model.eval()
    source = torch.Generator().manual_seed(5)
    noisy = unseen + 0.3 * torch.randn(unseen.shape, generator=source)
    return Run(model, parts((noisy, unseen)), seen.findings(), F.mse_loss)


def _ward_net() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, width, stride in [(1, 16, 1), (16, 32, 2), (32, 32, 2)]:
        layers += [
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 8)
    )


def _sites(seed: int) -> list[TensorDataset]:
    """Return the images of three hospitals, each with a scanner of its own."""
    scans = []
    for k, (gain, level) in enumerate([(0.5, -2.0), (1.0, 0.0), (2.5, 4.0)]):
        x, y = glyphs(500, 10 * seed + k)
        scans.append(TensorDataset(gain * x + level, y))
    return scans


@bug("forum: training on several datasets in turns with batch norm", "D13", "D02")
def three_hospitals(is_bad: bool) -> Run:
    """Training draws from the hospitals as their loaders give."""
    sites = _sites(1)
    together = DataLoader(ConcatDataset(sites), 32, shuffle=True, drop_last=True)
    model = _ward_net()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    seen_batches = []
    with watch(model, optimizer, every=5) as seen:
        for _ in range(5):
            turns = (DataLoader(s, 32, shuffle=True, drop_last=True) for s in sites)
            mixed = itertools.chain.from_iterable(zip(*turns, strict=True))
            for x, y in mixed if is_bad else together:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                seen_batches.append((x, y))
    model.eval()
    return Run(model, seen_batches[-12:], seen.findings())


class SmallUNet(nn.Module):
    """Two levels down and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.top = self._block(1, 12)
        self.low = self._block(12, 24)
        self.deep = self._block(24, 32)
        self.up = self._block(32 + 24, 24)
        self.last = self._block(24 + 12, 12)
        self.mask = nn.Conv2d(12, 1, 1)

    @staticmethod
    def _block(inputs: int, width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the mask."""
        a = self.top(x)
        b = self.low(F.max_pool2d(a, 2))
        c = self.deep(F.max_pool2d(b, 2))
        b = self.up(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        return self.mask(
            self.last(torch.cat([F.interpolate(b, scale_factor=2.0), a], 1))
        )


@bug("forum 117091, fast.ai 33219", "D05", "D15")
def cells_that_fill_the_memory(is_bad: bool) -> Run:
    """Sixteen micrographs a step, in pieces that fit."""
    train = loader(cells(320, 1), 16)
    piece = 1 if is_bad else 16
    model = SmallUNet()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    loss_fn = F.binary_cross_entropy_with_logits
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            for x, y in train:
                optimizer.zero_grad()
                for xs, ys in zip(x.split(piece), y.split(piece), strict=True):
                    loss = loss_fn(model(xs), ys) * len(xs) / len(x)
                    loss.backward()
                optimizer.step()
    model.eval()
    return Run(model, parts(cells(128, 2), piece, 32), seen.findings(), loss_fn)

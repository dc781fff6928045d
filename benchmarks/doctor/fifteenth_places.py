"""The fifteenth set: where norms stand, and over what they take their statistics."""

from __future__ import annotations

import torch
from bugs import Run, bug
from fifteenth_data import (
    cells,
    friedman,
    loader,
    parts,
    sensors,
    speech,
    stacked,
)
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch


class WordSpotter(nn.Module):
    """Convolutions over frames, with a maximum over the recording."""

    def __init__(self, *, is_bad: bool, width: int = 32) -> None:
        super().__init__()
        self.is_bad = is_bad
        self.first = nn.BatchNorm1d(12)
        self.convs = nn.ModuleList(
            nn.Conv1d(inputs, width, 5, padding=2) for inputs in (12, width)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(2))
        self.head = nn.Linear(width, 4)

    def normed(self, norm: nn.Module, x: Tensor, real: Tensor) -> Tensor:
        """Return (N, T, C) normalised."""
        if self.is_bad:
            return norm(x.mT).mT
        out = torch.zeros_like(x)
        out[real] = norm(x[real])
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of recordings (N, T, 12)."""
        real = x.abs().sum(2) > 0
        h = self.normed(self.first, x, real)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.relu(self.normed(norm, conv(h.mT).mT, real))
        return self.head(h.masked_fill(~real.unsqueeze(2), 0.0).amax(1))


@bug("forum: batch norm and padded sequences", "D12", "D02")
def recordings_of_any_length(is_bad: bool) -> Run:
    """Pad the frames of a batch to its longest."""
    train = loader(speech(1200, 1), 4)
    model = WordSpotter(is_bad=is_bad)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(5):
            for x, y in train:
                x = x[:, : int((x[..., 0] != 0).sum(1).max())]
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    model.eval()
    return Run(model, parts(speech(512, 2), 8, 64), seen.findings())


class PlantMonitor(nn.Module):
    """A norm for the readings, and a GRU over the hours."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.is_bad = is_bad
        self.norm = nn.BatchNorm1d(24 if is_bad else 4)
        self.gru = nn.GRU(4, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of series (N, hours, sensors)."""
        x = self.norm(x) if self.is_bad else self.norm(x.mT).mT
        return self.head(self.gru(x)[0].mean(1))


# No title is about a norm over the wrong dimension; what comes of it is that the
# readings reach the GRU with scales that differ.
@bug("StackOverflow: BatchNorm1d on (batch, time, features)", "D29", "D28")
def plant_with_four_sensors(is_bad: bool) -> Run:
    """Read a day of each plant, in the units of the sensors."""
    train = loader(sensors(1500, 1))
    model = PlantMonitor(is_bad=is_bad)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(8):
            for x, y in train:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    model.eval()
    return Run(model, parts(sensors(512, 2)), seen.findings())


class FeatureTokens(nn.Module):
    """A token for each column of a table, and attention over them."""

    def __init__(self, columns: int, *, is_bad: bool, width: int = 24) -> None:
        super().__init__()
        embeds: list[nn.Module] = []
        for _ in range(columns):
            linear = nn.Linear(1, width)
            norm = nn.LayerNorm(1 if is_bad else width)
            embeds.append(
                nn.Sequential(*([norm, linear] if is_bad else [linear, norm]))
            )
        self.embeds = nn.ModuleList(embeds)
        self.block = nn.TransformerEncoderLayer(
            width, 4, 48, 0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Sequential(nn.LayerNorm(width * columns), nn.Linear(240, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the value for each row."""
        columns = [e(c) for e, c in zip(self.embeds, x.split(1, 1), strict=True)]
        return self.head(self.block(torch.stack(columns, 1)).flatten(1))


@bug("issue: LayerNorm of a single feature is constant", "D18", "D29")
def token_for_each_column(is_bad: bool) -> Run:
    """Train a small transformer on a table."""
    train = loader(stacked(friedman(1000, 1)))
    model = FeatureTokens(10, is_bad=is_bad)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(10):
            for x, y in train:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    model.eval()
    return Run(model, parts(stacked(friedman(512, 2))), seen.findings(), F.mse_loss)


def _regressor(*, is_bad: bool, width: int = 96) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (10, width, width):
        drop, norm = nn.Dropout(0.3), [nn.BatchNorm1d(width), nn.ReLU()]
        layers += [nn.Linear(inputs, width)]
        layers += [drop, *norm] if is_bad else [*norm, drop]
    return nn.Sequential(*layers, nn.Linear(width, 1))


# With the statistics taken again without dropout most of the cost stays: it is of the
# order more than of the running statistics. No other title is about the order.
@bug("forum: order of dropout and batch norm", "D11", "D02")
def values_with_dropout(is_bad: bool) -> Run:
    """Train a network of four layers for one value."""
    train = loader(stacked(friedman(1500, 3)))
    model = _regressor(is_bad=is_bad)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(14):
            for x, y in train:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
    model.eval()
    return Run(model, parts(stacked(friedman(512, 4))), seen.findings(), F.mse_loss)


class CellSegmenter(nn.Module):
    """Down, along and up, with as many channels everywhere."""

    def __init__(self, *, is_bad: bool, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1) for _ in range(4)
        )
        norm = nn.BatchNorm2d(width)
        own = (nn.BatchNorm2d(width) for _ in range(5))
        self.norms = nn.ModuleList([norm] * 5 if is_bad else own)
        self.mask = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the mask."""
        a = F.relu(self.norms[0](self.stem(x)))
        b = F.relu(self.norms[1](self.convs[0](F.max_pool2d(a, 2))))
        b = F.relu(self.norms[2](self.convs[1](b)))
        c = F.relu(self.norms[3](self.convs[2](F.interpolate(b, scale_factor=2.0))))
        return self.mask(F.relu(self.norms[4](self.convs[3](a + c))))


@bug("forum: can one batch norm be used after several layers?", "D33", "D02")
def cells_with_a_norm_for_all(is_bad: bool) -> Run:
    """Masks of cells."""
    train = loader(cells(320, 3), 16)
    model = CellSegmenter(is_bad=is_bad)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    loss_fn = F.binary_cross_entropy_with_logits
    with watch(model, optimizer, every=5) as seen:
        for _ in range(8):
            for x, y in train:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
    model.eval()
    return Run(model, parts(cells(128, 4), 16), seen.findings(), loss_fn)

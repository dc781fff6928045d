"""Networks of the sixth set; those that hold a mistake take it as an argument."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "Block",
    "Detector",
    "Distiller",
    "FineTuned",
    "Forecaster",
    "Ghost",
    "GraphNet",
    "Heads",
    "Language",
    "PointNet",
    "Recall",
    "SimSiam",
    "Tabular",
    "deep_mlp",
    "eeg_net",
    "style_encoder",
]


class PointNet(nn.Module):
    """A network of points one by one, and the largest of each feature."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in ((3, 32), (32, 64), (64, 128)):
            layers.append(nn.Conv1d(fan_in, fan_out, 1))
            layers += [nn.BatchNorm1d(fan_out), nn.ReLU()]
        self.points = nn.Sequential(*layers)
        self.last = nn.Sequential(
            *(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU()),
            nn.Linear(64, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of clouds (N, 3, points)."""
        return self.last(self.points(x).amax(2))


class Block(nn.Module):
    """A residual block of two convolutions, its norms behind them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1: nn.Module = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2: nn.Module = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to x."""
        h = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(h))).relu()


class Distiller(nn.Module):
    """A teacher that is not trained, and the student that learns from it."""

    def __init__(self, teacher: nn.Module, student: nn.Module, *, is_bad: bool) -> None:
        super().__init__()
        self.teacher, self.student = teacher.requires_grad_(False), student
        self.is_bad = is_bad

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode; the teacher's stays eval, where this is no mistake."""
        super().train(mode)
        if not self.is_bad:
            self.teacher.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, 2, classes) of the student and of the teacher."""
        return torch.stack([self.student(x), self.teacher(x)], 1)


class FineTuned(nn.Module):
    """A new head behind a backbone that stays as it was loaded, in eval mode."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def train(self, mode: bool = True) -> FineTuned:
        """Set the mode of the head alone."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images."""
        return self.head(self.backbone(x))


class Detector(nn.Module):
    """Three levels of features, and one head over all of them."""

    def __init__(self, *, is_bad: bool, width: int = 16) -> None:
        super().__init__()
        fans = (1, width, width)
        self.downs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(fan, width, 3, 2, 1), nn.ReLU()) for fan in fans
        )
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(width) for _ in range(1 if is_bad else 3))
            for _ in range(2)
        )
        self.last = nn.Conv2d(width, 1, 1)
        # One cell of 50 has an object, as the paper of the focal loss starts.
        nn.init.constant_(self.last.bias, -3.9)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, 336) of the cells of all levels."""
        found = []
        for level, down in enumerate(self.downs):
            h = x = down(x)
            for conv, norms in zip(self.convs, self.norms, strict=True):
                h = norms[level % len(norms)](conv(h)).relu()
            found.append(self.last(h).flatten(1))
        return torch.cat(found, 1)


class Ghost(nn.Module):
    """Batch norm of each part of a batch, as TabNet has it."""

    def __init__(self, width: int, rows: int, *, is_bad: bool) -> None:
        super().__init__()
        self.norm, self.rows, self.is_bad = nn.BatchNorm1d(width), rows, is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Normalize parts of `rows` rows; a mistake takes `rows` parts."""
        parts = self.rows if self.is_bad else -(-len(x) // self.rows)
        if not self.training:
            return self.norm(x)
        return torch.cat([self.norm(part) for part in x.chunk(parts)])


class Tabular(nn.Module):
    """Embeddings of three codes beside six numbers, and two hidden layers."""

    def __init__(self, norm: object, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(10, 6) for _ in range(3))
        layers: list[nn.Module] = []
        for fan_in in (24, width):
            layers += [nn.Linear(fan_in, width), norm(width), nn.ReLU()]  # type: ignore[operator]
        self.body = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of rows (N, 9)."""
        codes, numbers = x[:, :3].long(), x[:, 3:]
        found = [embed(codes[:, i]) for i, embed in enumerate(self.embed)]
        return self.body(torch.cat([*found, numbers], 1))


class GraphNet(nn.Module):
    """Three graph convolutions with batch norm, and the mean and largest of nodes."""

    def __init__(self, *, is_bad: bool, width: int = 32) -> None:
        super().__init__()
        fans = (4, width, width)
        self.linears = nn.ModuleList(nn.Linear(fan, width) for fan in fans)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width) for _ in range(0 if is_bad else 3)
        )
        self.last = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of graphs (N, nodes, nodes + 4)."""
        adjacency, h = x[:, :, : x.shape[1]], x[:, :, x.shape[1] :]
        degree = 1 + adjacency.sum(2, keepdim=True)
        for index, linear in enumerate(self.linears):
            h = linear((h + adjacency @ h) / degree**0.5)
            if len(self.norms):
                h = self.norms[index](h.mT).mT
            else:
                h = nn.BatchNorm1d(x.shape[1])(h)
            h = h.relu()
        return self.last(torch.cat([h.mean(1), h.amax(1)], 1))


class Forecaster(nn.Module):
    """A network over a window whose level and swing are taken away at its start."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.norm, self.is_bad = nn.InstanceNorm1d(1), is_bad
        self.body = nn.Sequential(
            *(nn.Conv1d(1, 16, 5, padding=2), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(16 * 48, 64), nn.ReLU(), nn.Linear(64, 12)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Twelve steps (N, 12) behind windows (N, 1, 48)."""
        found = self.body(self.norm(x))
        if self.is_bad:
            return found
        return found * x.std(2, correction=0) + x.mean(2)


def style_encoder(norm: object, width: int = 16) -> nn.Sequential:
    """Return three convolutions down to a mean, and a code of three numbers."""
    layers: list[nn.Module] = []
    for index in range(3):
        stride = 2 if index else 1
        layers.append(nn.Conv2d(width if index else 1, width, 3, stride, 1))
        layers += [norm(width), nn.ReLU()]  # type: ignore[operator]
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]
    return nn.Sequential(*layers, *end)


def eeg_net() -> nn.Sequential:
    """Return EEGNet for eight electrodes and 128 samples, with its eps of 0.001."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 8, (1, 33), padding=(0, 16))),
        *(nn.BatchNorm2d(8, eps=1e-3), nn.Conv2d(8, 16, (8, 1), groups=8, bias=False)),
        *(nn.BatchNorm2d(16, eps=1e-3), nn.ELU(), nn.AvgPool2d((1, 4))),
        *(nn.Dropout(0.25), nn.Conv2d(16, 16, (1, 9), padding=(0, 4), bias=False)),
        *(nn.BatchNorm2d(16, eps=1e-3), nn.ELU(), nn.AvgPool2d((1, 8))),
        *(nn.Flatten(), nn.Linear(64, 4)),
    )


class Recall(nn.Module):
    """An LSTM whose forget gate is opened at the start, and its last state."""

    def __init__(self, *, is_bad: bool, width: int = 32) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(5, width, batch_first=True), nn.Linear(width, 4)
        # torch keeps the gates in the order input, forget, cell, output.
        gate = 0 if is_bad else 1
        with torch.no_grad():
            self.lstm.bias_ih_l0[gate * width : (gate + 1) * width] += 4.0

    def forward(self, x: Tensor) -> Tensor:
        """Scores of sequences (N, L, 5)."""
        states, _ = self.lstm(x)
        return self.last(states[:, -1])


class SimSiam(nn.Module):
    """An encoder, and the predictor of one view's code by the other's."""

    def __init__(self, *, is_bad: bool, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(512, 64), nn.BatchNorm1d(64), nn.ReLU()),
            nn.Linear(64, width),
        )
        self.predictor = nn.Sequential(
            *(nn.Linear(width, 16), nn.BatchNorm1d(16), nn.ReLU()),
            nn.Linear(16, width),
        )
        self.is_bad = is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Predictions and codes (N, 4, width) of two views (N, 2, 8, 8)."""
        one, other = self.encoder(x[:, :1]), self.encoder(x[:, 1:])
        guesses = [self.predictor(one), self.predictor(other)]
        if not self.is_bad:
            one, other = one.detach(), other.detach()
        return torch.stack([*guesses, one, other], 1)


class Language(nn.Module):
    """A causal transformer with RMS norms whose head is its embedding."""

    def __init__(self, std: float, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(64, width), nn.Embedding(64, width)
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(depth)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width))
            for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * depth + 1))
        self.head = nn.Linear(width, 64, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=std)
        nn.init.normal_(self.place.weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (N, L, 64) of the next of each token."""
        length = tokens.shape[1]
        x = self.embed(tokens) + self.place.weight[:length]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        for index, (attention, mlp) in enumerate(
            zip(self.attention, self.mlps, strict=True)
        ):
            h = self.norms[2 * index](x)
            found, _ = attention(h, h, h, attn_mask=later, need_weights=False)
            x = x + found
            x = x + mlp(self.norms[2 * index + 1](x))
        return self.head(self.norms[-1](x))


class Heads(nn.Module):
    """Convolutions over a signal, a head for its class and one for its strength."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv1d(3, 24, 7, padding=3), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Conv1d(24, 24, 7, padding=3), nn.ReLU(), nn.AdaptiveAvgPool1d(4)),
            nn.Flatten(),
        )
        self.kind, self.strength = nn.Linear(96, 5), nn.Linear(96, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Five scores and one number (N, 6) of signals (N, 3, 64)."""
        h = self.trunk(x)
        return torch.cat([self.kind(h), self.strength(h)], 1)


def deep_mlp(*, has_dropout_at_end: bool, width: int = 64) -> nn.Sequential:
    """Return a regression of ten columns with dropout; a mistake puts it last."""
    return nn.Sequential(
        *(nn.Linear(10, width), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)),
        nn.Dropout(0.4 if has_dropout_at_end else 0.0),
    )

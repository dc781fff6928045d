"""Small networks on real digits, healthy and with a planted fault."""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normkit.moments import Moments

NETS = ("mlp", "cnn", "residual")
# They read a digit row by row.
SEQUENCES = ("gru", "transformer")
Batches = list[tuple[Tensor, Tensor]]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(y)


def batches(size: int = 64, seed: int = 0, *, keep_last: bool = False) -> Batches:
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split(size)
    return [(x[i], y[i]) for i in parts if keep_last or len(i) == size]


class Residual(nn.Module):
    def __init__(self, width: int, norm: Callable[[int], nn.Module], act: type) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm1 = norm(width)
        self.act1 = _act(act)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = norm(width)
        self.act2 = _act(act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x  # in place, as many do
        return self.act2(y)


class Recurrent(nn.Module):
    """A GRU over the rows of a digit, and a normalized layer behind its last state."""

    def __init__(
        self, width: int, dropout: float, norm: Callable[[int], nn.Module], act: type
    ) -> None:
        super().__init__()
        self.gru = nn.GRU(8, width, batch_first=True)
        self.hidden, self.drop = nn.Linear(width, width), nn.Dropout(dropout)
        self.norm = norm(width)
        self.act, self.head = _act(act), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        last = self.gru(x.view(len(x), -1, 8))[0][:, -1]
        return self.head(self.act(self.norm(self.drop(self.hidden(last)))))


class Attention(nn.Module):
    """A block of a transformer, with batch norm along the channels."""

    def __init__(
        self, width: int, dropout: float, norm: Callable[[int], nn.Module], act: type
    ) -> None:
        super().__init__()
        self.norm1 = norm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm2 = norm(width)
        self.hidden, self.act = nn.Linear(width, width), _act(act)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.drop(x).mT).mT
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.out(self.act(self.hidden(self.norm2(self.drop(x).mT).mT)))


class Attending(nn.Module):
    """A transformer over the rows of a digit."""

    def __init__(self, width: int, blocks: Callable[[], list[nn.Module]]) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks = nn.Sequential(*blocks())
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(len(x), -1, 8))
        return self.head(self.blocks(x + self.position[: x.shape[1]]).mean(1))


def _act(act: type) -> nn.Module:
    return act(inplace=True) if act is nn.ReLU else act()


def build(
    net: str,
    *,
    act: type = nn.ReLU,
    normalized: bool = True,
    depth: int | None = None,
    width: int | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """A network of one of `NETS` or `SEQUENCES`; its weights depend on `seed` alone."""

    def norm(rank: int) -> Callable[[int], nn.Module]:
        if not normalized:
            return lambda _: nn.Identity()
        return functools.partial(
            (nn.BatchNorm1d, nn.BatchNorm2d)[rank - 1], eps=eps, momentum=momentum
        )

    def drop() -> list[nn.Module]:
        return [nn.Dropout(dropout)] if dropout else []

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if net in SEQUENCES:
            width = width or 32
            parts = (width, dropout, norm(1), act)
            if net == "gru":
                return Recurrent(*parts)
            return Attending(
                width, lambda: [Attention(*parts) for _ in range(depth or 1)]
            )
        depth = depth or 4
        if net == "mlp":
            width = width or 48
            layers: list[nn.Module] = []
            for index in range(depth):
                layers += [nn.Linear(width if index else 64, width), norm(1)(width)]
                layers += [_act(act), *drop()]
            return nn.Sequential(*layers, nn.Linear(width, 10))
        width = width or 8
        image = nn.Unflatten(1, (1, 8, 8))
        end = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)]
        start = [image, nn.Conv2d(1, width, 3, padding=1), norm(2)(width), _act(act)]
        middle: list[nn.Module] = []
        for _ in range(depth - 1 if net == "cnn" else 2):
            middle += drop()
            if net == "cnn":
                conv = nn.Conv2d(width, width, 3, padding=1)
                middle += [conv, norm(2)(width), _act(act)]
            else:
                middle.append(Residual(width, norm(2), act))
        return nn.Sequential(*start, *middle, *end)


def train(
    model: nn.Module,
    steps: int = 120,
    *,
    lr: float = 0.1,
    size: int = 64,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """Train in place and give the losses."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr)
    model.train()
    losses: list[float] = []
    epoch = 0
    while len(losses) < steps:
        for x, y in data or batches(size, seed=epoch):
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
        epoch += 1
    return losses


@functools.cache
def _trained(net: str, steps: int, seed: int, options: tuple) -> nn.Module:
    options = dict(options)
    lr, size = options.pop("lr", 0.1), options.pop("size", 64)
    model = build(net, seed=seed, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        train(model, steps, lr=lr, size=size)
    return model


def trained(net: str, steps: int = 120, seed: int = 0, **options: object) -> nn.Module:
    """A trained network, made once per session and copied for each test."""
    return copy.deepcopy(_trained(net, steps, seed, tuple(sorted(options.items()))))


def norms(model: nn.Module) -> dict[str, Any]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def moments_of(count: int, mean: float, var: float) -> Moments:
    """Moments with the given count, mean and population variance."""
    mean_, m2 = torch.tensor([mean, var * count], dtype=torch.float64)
    return Moments(torch.tensor(count), mean_, m2)

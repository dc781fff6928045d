"""Train one small network, as a user would: torch.nn, normkit.nn, plain SGD."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.studies.data import Images

__all__ = ["accuracy", "cnn", "frozen", "train"]


def cnn(
    classes: int,
    norm: Callable[[int], nn.Module] | None,
    *,
    channels: int = 1,
    width: int = 16,
    side: int = 8,
    dropout: float = 0.0,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Build three 3×3 convolutions, each with `norm(C)` after it, and a linear layer.

    `norm(C)` and `activation()` build the layers; images higher than `side` 8 get one
    more halving; `dropout` is the share of the last features.
    """
    layers: list[nn.Module] = []
    before = channels
    for i, after in enumerate((width, 2 * width, 2 * width)):
        stride = 2 if i or side > 8 else 1
        layers.append(nn.Conv2d(before, after, 3, stride, 1, bias=norm is None))
        if norm is not None:
            layers.append(norm(after))
        layers.append(activation())
        before = after
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(4 * before, classes))


def train(
    model: nn.Module,
    images: Images,
    batches: Tensor,
    rate: float,
    *,
    momentum: float = 0.9,
    decay: float = 0.0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` by SGD on the given batches; returns the loss of each step."""
    optimizer = torch.optim.SGD(
        model.parameters(), rate, momentum=momentum, weight_decay=decay
    )
    losses = []
    model.train()
    for number, rows in enumerate(batches, 1):
        loss = F.cross_entropy(model(images.x_train[rows]), images.y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if on_step:
            on_step(number, losses[-1])
            model.train()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers in eval mode; 0 for outputs of NaN."""
    with frozen(model):
        logits = model(x)
    if not logits.isfinite().all():
        return 0.0
    return float((logits.argmax(-1) == y).float().mean())


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode within the block; restore every module's mode after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

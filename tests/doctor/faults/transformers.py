"""The residual stream, attention, gains, post-norm, spikes of the loss: D35 to D39."""

import copy
import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from doctor.faults.planting import LOSS, Program, data, fault, weights_of
from doctor.models import batches, build, train
from normkit.doctor import watch

__all__ = []

_NO_BLOCKS = "it has no four blocks of one class in a row"
_NO_ATTENTION = "none of its layers computes attention"
_BATCH_NORM = "its norms are batch norms, whose scales D19 judges"


class Block(nn.Module):
    """Attention and two layers; norms before the branches, or behind the sums."""

    def __init__(self, width: int, *, pre: bool) -> None:
        super().__init__()
        self.pre = pre
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.hidden, self.act = nn.Linear(width, 2 * width), nn.GELU()
        self.out = nn.Linear(2 * width, width)

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]

    def think(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.hidden(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attend(self.norm1(x))
            return x + self.think(self.norm2(x))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.think(x))


class Encoding(nn.Module):
    """A transformer over the rows of a digit."""

    def __init__(self, depth: int, *, pre: bool, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Linear(8, width)
            self.position = nn.Parameter(0.02 * torch.randn(8, width))
            self.layers = nn.ModuleList(Block(width, pre=pre) for _ in range(depth))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(len(x), -1, 8)) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


@functools.cache
def _encoding() -> Encoding:
    model = Encoding(4, pre=True)
    train(model, 120, optimizer=torch.optim.Adam(model.parameters(), 1e-3))
    return model


def encoding() -> Any:
    """Four blocks with pre-norm, trained."""
    return copy.deepcopy(_encoding())


@fault(
    "D35",
    brings={
        "D23": "the outputs inside the blocks grow with the stream",
        "D25": "gradients grow with the same weights",
    },
    without=dict.fromkeys(("mlp", "cnn", "residual", "gru"), _NO_BLOCKS),
)
def branches_without_a_norm(net: str, is_bad: bool) -> Program:
    """No norm before one branch of each block, and weights that multiply the stream."""
    if not is_bad:
        return Program(encoding(), data())
    model: Any = Encoding(4, pre=True)
    for layer in model.layers:
        layer.norm2 = nn.Identity()
        nn.init.orthogonal_(layer.hidden.weight, 3.0)
        nn.init.orthogonal_(layer.out.weight, 3.0)
    return Program(model, data(), at=frozenset({"layers.3"}))


@fault(
    "D36",
    brings={"D24": "a softmax that is at its end passes no gradient on"},
    without=dict.fromkeys(("mlp", "cnn", "residual", "gru"), _NO_ATTENTION),
)
def sharp_attention(net: str, is_bad: bool) -> Program:
    """Queries and keys twenty times as large."""
    model = encoding()
    with torch.no_grad():
        for layer in model.layers if is_bad else ():
            layer.attention.in_proj_weight[:64] *= 20
    return Program(
        model, data(), at=frozenset(f"layers.{i}.attention" for i in range(4))
    )


@fault(
    "D37",
    without=dict.fromkeys(("mlp", "cnn", "residual", "gru"), _BATCH_NORM),
)
def one_large_gain(net: str, is_bad: bool) -> Program:
    """One gain of the last norm a hundred times the others."""
    model = encoding()
    with torch.no_grad():
        model.norm.weight[3] *= 100 if is_bad else 1
        # It is not read, so that nothing else goes wrong.
        model.head.weight[:, 3] = 0
    return Program(model, data(), at=frozenset({"norm"}))


@fault(
    "D38",
    brings={"D24": "what such steps leave passes no gradient on"},
    without=dict.fromkeys(("mlp", "cnn", "residual", "gru"), _NO_BLOCKS),
)
def full_rate_at_once(net: str, is_bad: bool) -> Program:
    """Eight blocks with post-norm, and the full rate from the first step on."""
    model = Encoding(8, pre=False)
    optimizer = torch.optim.Adam(model.parameters(), 6e-3)
    # It lowers the rate as soon as it is made.
    warm = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0 if is_bad else 0.02, total_iters=60
    )
    with watch(model, optimizer) as seen:
        for x, y in batches(32)[:25]:
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
            warm.step()
    return Program(watched=tuple(seen.readings()), at=frozenset({"layers.0"}))


@fault("D39")
def one_wild_step(net: str, is_bad: bool) -> Program:
    """The rate of one layer is a hundred times too large for six steps."""
    model: Any = build(net)
    head = weights_of(model)[-1]
    rest = [p for p in model.parameters() if p is not head.weight]
    groups = [{"params": [head.weight]}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, 0.1)
    with watch(model, optimizer, every=1) as seen:
        for step, (x, y) in enumerate(itertools.islice(itertools.cycle(batches()), 90)):
            loss = LOSS(model(x), y)
            seen.log(loss=loss.item())
            optimizer.zero_grad()
            loss.backward()
            wild = is_bad and 70 <= step < 76
            optimizer.param_groups[0]["lr"] = 10.0 if wild else 0.1
            optimizer.step()
    name = next(n for n, m in model.named_modules() if m is head)
    return Program(watched=tuple(seen.readings()), at=frozenset({name}))

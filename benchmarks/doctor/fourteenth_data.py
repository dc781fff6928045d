"""Data of the fourteenth set: images, scans, series, tables, graphs and sentences.

Each function gives batches without an end; a number draws them, so that two calls with
the same arguments give the same data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bugs import Batch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "DISCOUNT",
    "advice",
    "communities",
    "episodes",
    "figures",
    "leaves",
    "maps",
    "minutes",
    "moves",
    "pictures",
    "plumes",
    "policy",
    "reports",
    "sales",
    "scans",
    "sentences",
    "sites",
    "spoken",
]

DISCOUNT = 0.7


def _source(seed: int) -> torch.Generator:
    """Return a generator of random numbers with its own seed."""
    return torch.Generator().manual_seed(seed)


def _placed(x: Tensor, marks: Tensor, source: torch.Generator) -> None:
    """Add a mark (N, C, s, s) to each image (N, C, S, S), at any place."""
    side = marks.shape[-1]
    room = x.shape[-1] - side + 1
    for one, mark in zip(x, marks, strict=True):
        v, h = torch.randint(room, (2,), generator=source).tolist()
        one[:, v : v + side, h : h + side] += mark


def maps(size: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Give plans (N, 3, 12, 12) of three kinds of ground, and their photographs."""
    drawn, source = _source(11), _source(seed)
    colours = torch.randn(3, 2, generator=drawn)
    blur = torch.randn(2, 2, 3, 3, generator=drawn) / 4
    while True:
        rough = torch.randn(size, 3, 4, 4, generator=source)
        kinds = F.interpolate(rough, scale_factor=3, mode="bilinear").argmax(1)
        x = F.one_hot(kinds, 3).permute(0, 3, 1, 2).float()
        flat = torch.einsum("nkhw,kc->nchw", x, colours)
        yield x, (flat + F.conv2d(flat, blur, padding=1)).tanh()


def scans(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give scans (N, 1, 8, 8, 8), and how large a lesion is and how bright (N, 2)."""
    source, line = _source(seed), torch.arange(8.0)
    while True:
        centre = 2 + 3 * torch.rand(3, size, 1, 1, 1, generator=source)
        wide, bright = torch.rand(2, size, 1, 1, 1, generator=source)
        away = (line[:, None, None] - centre[0]) ** 2
        away = away + (line[:, None] - centre[1]) ** 2 + (line - centre[2]) ** 2
        lump = (0.5 + bright) * torch.exp(-away / (2 + 8 * wide))
        x = 2 * lump + 0.2 * torch.randn(size, 8, 8, 8, generator=source)
        yield x[:, None], 3 * torch.stack([wide, bright], 1).flatten(1) - 1.5


def sales(
    size: int = 32, seed: int = 0, *, store: int | None = None
) -> Iterator[Batch]:
    """Give weeks (N, 6) of stores of different sizes, and the demand (N, 1).

    Columns are as they come, without a scaler.
    """
    drawn, source = _source(12), _source(seed)
    level = 20 * torch.exp(0.5 * torch.randn(10, 6, generator=drawn))
    effect = torch.randn(6, 1, generator=drawn)
    while True:
        who = torch.randint(10, (size,), generator=source)
        if store is not None:
            who[:] = store
        x = level[who] * torch.exp(0.3 * torch.randn(size, 6, generator=source))
        z = (x / 20).log()
        y = z @ effect + z[:, :1] * z[:, 1:2]
        yield x, y + 0.05 * torch.randn(size, 1, generator=source)


def sites(size: int = 16, seed: int = 0, *, site: int | None = None) -> Iterator[Batch]:
    """Give images (N, 1, 12, 12) of four hospitals, whose devices differ."""
    marks = torch.randn(6, 1, 5, 5, generator=_source(13))
    gain = torch.tensor([1.0, 2.5, 0.4, 1.5])[:, None, None, None]
    offset = torch.tensor([0.0, 3.0, -1.0, -4.0])[:, None, None, None]
    source = _source(seed)
    while True:
        y = torch.randint(6, (size,), generator=source)
        x = 0.4 * torch.randn(size, 1, 12, 12, generator=source)
        _placed(x, marks[y], source)
        at = torch.randint(4, (size,), generator=source)
        if site is not None:
            at[:] = site
        yield gain[at] * x + offset[at], y


def leaves(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give photographs (N, 3, 10, 10) of one of six sorts, by colour and by veins."""
    drawn, source = _source(14), _source(seed)
    colour = 0.7 * torch.randn(6, 3, 1, 1, generator=drawn)
    veins = torch.randn(6, 3, 4, 4, generator=drawn)
    while True:
        y = torch.randint(6, (size,), generator=source)
        x = colour[y] + 0.5 * torch.randn(size, 3, 10, 10, generator=source)
        _placed(x, veins[y], source)
        yield x, y


def pictures(
    size: int = 32, seed: int = 0, *, look: int = 15, kinds: int = 8
) -> Iterator[Batch]:
    """Give pictures (N, 1, 12, 12) of bright things, one of some kinds."""
    marks = 2 * torch.rand(kinds, 1, 5, 5, generator=_source(look))
    source = _source(seed)
    while True:
        y = torch.randint(kinds, (size,), generator=source)
        x = 1 + 0.3 * torch.randn(size, 1, 12, 12, generator=source)
        _placed(x, marks[y], source)
        yield x, y


def minutes(size: int = 64, seed: int = 0, *, unit: float = 1.0) -> Iterator[Batch]:
    """Give returns (N, 1, 32) of a rate in each minute, and the pattern in them."""
    shapes = torch.randn(5, 8, generator=_source(16))
    source = _source(seed)
    while True:
        y = torch.randint(5, (size,), generator=source)
        x = 0.7 * torch.randn(size, 32, generator=source)
        at = torch.randint(25, (size, 1), generator=source) + torch.arange(8)
        x = x.scatter_add(1, at, shapes[y])
        calm = torch.exp(0.4 * torch.randn(size, 1, generator=source))
        yield 2e-5 * unit * (calm * x)[:, None], y


def policy(s: Tensor) -> Tensor:
    """Actions (N, 2) of a controller in states (N, 4)."""
    return (0.8 + s[:, :2] - 0.5 * s[:, 2:]).tanh()


def _step(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reward (N, 1) of an action, and the state after it."""
    reward = s[:, :1] * a[:, :1] - 0.5 * a[:, 1:] ** 2 + 0.3 * s[:, 3:]
    after = 0.4 * s + 0.4 * torch.cat([a, a.flip(1)], 1) + 0.2
    return reward, after


def moves(size: int = 64, seed: int = 0) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """Give states and actions of a memory; then rewards, states after, true values."""
    source = _source(seed)
    while True:
        s = 0.3 + torch.randn(size, 4, generator=source)
        a = 2 * torch.rand(size, 2, generator=source) - 1
        reward, after = _step(s, a)
        value, at, share = reward, after, DISCOUNT
        for _ in range(25):
            gain, at = _step(at, policy(at))
            value, share = value + share * gain, share * DISCOUNT
        yield {"s": s, "a": a}, (reward, after, value)


def episodes(
    seed: int = 0, *, is_ordered: bool = False, shots: int = 5, asked: int = 8
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Give five shots of each of four new kinds, and images to be told apart.

    With `is_ordered` all images of a batch that are asked about are of one kind.
    """
    source = _source(seed)
    basis = torch.randn(6, 1, 10, 10, generator=_source(17))
    basis = F.avg_pool2d(basis, 3, 1, 1) * 3
    while True:
        marks = torch.einsum(
            "kb,bchw->kchw", torch.randn(4, 6, generator=source), basis
        )
        y = torch.arange(4 * asked) // asked if is_ordered else torch.arange(4 * asked)
        y = y % 4
        of = torch.cat([torch.arange(4).repeat_interleave(shots), y])
        x = marks[of] + 0.9 * torch.randn(len(of), 1, 10, 10, generator=source)
        known, rest = x[: 4 * shots], x[4 * shots :]
        if not is_ordered:
            yield {"support": known, "query": rest}, y
            continue
        for part in torch.arange(4 * asked).split(asked):
            yield {"support": known, "query": rest[part]}, y[part]


def spoken(size: int = 32, seed: int = 0) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Give log spectra (N, 8, 40) of four digits, and the digits (N, 4)."""
    words = torch.randn(6, 8, 8, generator=_source(18))
    source = _source(seed)
    while True:
        y = torch.randint(6, (size, 4), generator=source)
        x = words[y].permute(0, 2, 1, 3).reshape(size, 8, 32)
        x = F.pad(x, (4, 4)) + 0.6 * torch.randn(size, 8, 40, generator=source)
        yield {"spectra": 0.3 * x - 1.0, "said": y}, y


def reports(
    size: int = 32, seed: int = 0, *, is_scaled: bool
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Give vectors of reports (N, 16), figures (N, 4) of the firm, and its rating."""
    drawn, source = _source(19), _source(seed)
    meaning = torch.randn(20, 4, generator=drawn)
    mean = torch.tensor([24.0, 3.0, 650.0, 0.4])
    spread = torch.tensor([9.0, 1.0, 280.0, 0.2])
    while True:
        text = torch.randn(size, 16, generator=source)
        figures_ = torch.randn(size, 4, generator=source)
        y = (torch.cat([text, figures_], 1) @ meaning).argmax(1)
        raw = figures_ if is_scaled else mean + spread * figures_
        yield {"text": text, "figures": raw}, y


def advice(size: int = 64, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Give visitors (N, 8), and what each of five offers would bring, in cents."""
    taste = torch.randn(8, 5, generator=_source(20))
    source = _source(seed)
    while True:
        x = torch.randn(size, 8, generator=source)
        yield x, 600 + 60 * (x @ taste) / 8**0.5


def plumes(
    size: int = 128, seed: int = 0
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Give places in metres, times in seconds, and how dense a plume is there."""
    source = _source(seed)
    while True:
        x, t = torch.rand(2, size, 1, generator=source)
        z = 4 * (x - 0.3 * t)
        y = z.sin() + 0.5 * (2.3 * z + 1).cos()
        yield {"x": 2000 * x, "t": 3600 * t}, y


def communities(
    size: int = 8, seed: int = 0, *, nodes: int = 60
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Give graphs with features (N, 60, 6), links, and the group of each node."""
    centre, source = torch.randn(4, 6, generator=_source(21)), _source(seed)
    while True:
        y = torch.randint(4, (size, nodes), generator=source)
        x = 0.7 * centre[y] + torch.randn(size, nodes, 6, generator=source)
        often = torch.where(y[:, :, None] == y[:, None], 0.7, 0.05)
        links = (torch.rand(size, nodes, nodes, generator=source) < often).float()
        links = links.triu(1)
        yield {"x": x, "links": links + links.mT + torch.eye(nodes)}, y


def figures(
    size: int = 32, seed: int = 0, *, kinds: int = 12, look: int = 22
) -> Iterator[Batch]:
    """Give vectors (N, 20) about the centre of their kind, of twelve."""
    centre, source = torch.randn(kinds, 20, generator=_source(look)), _source(seed)
    while True:
        y = torch.randint(kinds, (size,), generator=source)
        yield centre[y] + 0.9 * torch.randn(size, 20, generator=source), y


def sentences(
    size: int = 32, seed: int = 0, *, length: int = 5, words: int = 8
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Give sentences (N, 5), and their words from the last to the first; 0 begins."""
    source = _source(seed)
    while True:
        x = torch.randint(1, words, (size, length), generator=source)
        y = x.flip(1)
        yield {"words": x, "answer": y}, y

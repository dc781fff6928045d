"""The measurements of attention and of stacked blocks, one value per observation."""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "AttentionStatistics",
    "BlockEnd",
    "BlockStatistics",
    "GainStatistics",
    "streams",
]

BlockEnd = Literal["sum", "norm", ""]


@dataclass(frozen=True)
class AttentionStatistics:
    """One attention, over the queries that were read.

    Attributes:
        name: Dotted name of the module that computes it.
        largest: Largest |logit| that the softmax took, per observation.
        entropy: Mean entropy of a query's weights over ln(its keys), from 0 for one
            key to 1 for all alike.
        sharp: Share of queries with a weight above 0.99.
        read: Mean squared difference, between samples, of the keys at one position that
            a mask lets queries read; NaN where no mask was seen.
        hidden: That of the keys which it hides from every query.
    """

    name: str
    largest: tuple[float, ...] = ()
    entropy: tuple[float, ...] = ()
    sharp: tuple[float, ...] = ()
    read: tuple[float, ...] = ()
    hidden: tuple[float, ...] = ()

    @property
    def masked(self) -> list[tuple[float, float]]:
        """Read and hidden of the observations in which a mask had both."""
        every = zip(self.read, self.hidden, strict=True)
        return [each for each in every if not math.isnan(sum(each))]

    @property
    def observed(self) -> list[tuple[float, float, float]]:
        """Largest, entropy and sharp of the observations in which it was measured."""
        every = zip(self.largest, self.entropy, self.sharp, strict=True)
        return [each for each in every if not math.isnan(each[2])]


@dataclass(frozen=True)
class BlockStatistics:
    """One of several blocks of a class, the next of which takes its output.

    Attributes:
        name: Dotted name.
        kind: Name of its class.
        follows: The block whose unchanged output is its input; "" for none.
        before: rms of its input, per observation, in order.
        after: rms of its output.
        gradient: ‖dL/d output‖; NaN where there was none.
        end: What gives its output: a "sum", as in a residual block; the "norm" of a
            sum, as in post-norm; "" for anything else.
    """

    name: str
    kind: str
    follows: str = ""
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    gradient: tuple[float, ...] = ()
    end: BlockEnd = ""

    def response(self, recent: int) -> float:
        """Return the change of the loss for a relative change of the output.

        Args:
            recent: Number of observations to take the median of, the last ones.
        """
        pairs = zip(self.gradient, self.after, strict=True)
        products = [g * rms for g, rms in pairs if not math.isnan(g)]
        return numbers.median(products[-recent:]) if products else math.nan


@dataclass(frozen=True)
class GainStatistics:
    """The scales of a norm, one per channel.

    Attributes:
        channels: Number of channels.
        channel: The channel with the largest |gain|.
        largest: That |gain|.
        median: Median of all.
        share: Its part of the sum of all squared gains.
        rms: Root mean square of gains and shifts: the rms of the norm's output, where
            the weight is what normalized values are multiplied by.
        negative: Share of the gains below zero.
    """

    channels: int
    channel: int
    largest: float
    median: float
    share: float
    rms: float
    negative: float = 0.0

    @classmethod
    def of(cls, gain: Tensor, shift: Tensor | None = None) -> GainStatistics:
        """Return the statistics of a weight and a bias."""
        sizes = gain.detach().flatten().double().abs()
        squares = sizes.square()
        shifts = torch.zeros(()) if shift is None else shift.detach().double().square()
        channel = int(sizes.argmax())
        return cls(
            len(sizes),
            channel,
            float(sizes[channel]),
            float(sizes.median()),
            float(squares[channel] / squares.sum().clamp(min=1e-300)),
            math.sqrt(float(squares.mean()) + float(shifts.mean())),
            float((gain.detach() < 0).double().mean()),
        )


def streams(blocks: Sequence[BlockStatistics]) -> list[list[BlockStatistics]]:
    """Return the blocks in rows, each block of which takes the output of the last.

    Blocks that were not measured, or end in another way, end a row.
    """
    rows: list[list[BlockStatistics]] = []
    for block in blocks:
        if not (block.before and block.after and _is_number(block.before[-1])):
            continue
        last = rows[-1][-1] if rows else block
        if block.follows and last.name == block.follows and last.end == block.end:
            rows[-1].append(block)
        else:
            rows.append([block])
    return rows


def _is_number(value: float) -> bool:
    return not math.isnan(value)

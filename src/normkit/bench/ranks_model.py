"""Modelled cost of synchronized batch norm per training step, from 1 to 4,096 GPUs.

For each of the L layers of a network with C channels, one message forward and one
backward:

    normkit   all_reduce of 2C + 1 float64, all_reduce of 2C float64
    torch     all_gather of 2C + 1 float32 from every rank, all_reduce of 2C float32

A collective takes latency + bytes/bandwidth, the least over algorithms and protocols,
by the formulas and constants that NCCL chooses its algorithm by (`ncclTopoTuneModel` in
src/graph/tuning.cc, NCCL 2.18; A100s with NVLink, 8 to a node, AMD hosts). They model
the network only: no launches, no waiting for a slow rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from normkit.results import Result

__all__ = ["RANKS", "RESNET50", "Modelled", "ModelledRow", "model"]

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PER_NODE = 8
_FEW = (8, 64, 512, 4096)  # of the second table

# Microseconds: base; a step within a node, by NVLink; a step over the network.
_TREE_LL = (4.4, 0.52, 5.0)
_RING_LL = (3.6, 0.47, 2.7)
_RING_SIMPLE = (8.4, 3.4, 9.6)
# Steps of LL within a node, where there are several nodes.
_LL_FACTOR = 1.8
# Bytes per microsecond: LL on 1, 2 and more nodes; Simple within a node and over a
# network of one 25 GB/s adapter for each GPU.
_LL_BANDWIDTH = (87_700.0, 22_500.0, 19_000.0)
_SIMPLE_BANDWIDTH = (235_000.0, 200_000.0)


def _resnet50(*, joined: bool = False) -> tuple[int, ...]:
    """Return the channels of the 53 batch norms of a ResNet-50, in order.

    With `joined`, those of its messages if siblings shared one: the last norm of a
    block and the one on its shortcut, in the 4 blocks that have it.
    """
    channels = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            ends = [4 * width] * (2 if block == 0 else 1)
            channels += [width, width, *([sum(ends)] if joined else ends)]
    return tuple(channels)


RESNET50 = _resnet50()
_JOINED = _resnet50(joined=True)


@dataclass(frozen=True)
class ModelledRow:
    """Milliseconds and megabytes per step, for one number of ranks.

    Attributes:
        ranks: Number of GPUs.
        normkit: Milliseconds of all collectives of normkit's layers.
        torch: Likewise, torch's layers.
        within_nodes: normkit's, with groups that stay within a node.
        received: Megabytes that a rank receives from normkit's messages.
        torch_received: Likewise, torch's.
        siblings: Milliseconds as `normkit`, if sibling layers shared a message.
        ghosts: As `normkit` with ghost batches: running statistics alone are sent.
        ghosts_at_once: Likewise, in one message a step, of `nn.accumulate`.
    """

    ranks: int
    normkit: float
    torch: float
    within_nodes: float
    received: float
    torch_received: float
    siblings: float
    ghosts: float
    ghosts_at_once: float


@dataclass(frozen=True, repr=False)
class Modelled(Result):
    """The model for several numbers of ranks.

    Attributes:
        layers: Number of synchronized layers.
        rows: One per number of ranks.
    """

    layers: int
    rows: tuple[ModelledRow, ...]

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per number of ranks."""
        return [vars(row).copy() for row in self.rows]

    def to_text(self) -> str:
        """Return a table."""
        return "\n".join(
            [
                f"{self.layers} layers, {2 * self.layers} collectives a step; modelled",
                f"{'ranks':>6} {'normkit ms':>11} {'torch ms':>9} {'in nodes ms':>12} "
                f"{'normkit MB':>11} {'torch MB':>9}",
                *(
                    f"{r.ranks:6d} {r.normkit:11.2f} {r.torch:9.2f} "
                    f"{r.within_nodes:12.2f} {r.received:11.2f} {r.torch_received:9.2f}"
                    for r in self.rows
                ),
            ]
        )

    def to_markdown(self) -> str:
        """Return the table for a page."""
        head = (
            "| ranks | normkit, ms | torch, ms | groups within nodes, ms | normkit "
            "receives, MB | torch receives, MB |\n"
            "| ---: | ---: | ---: | ---: | ---: | ---: |\n"
        )
        messages = "".join(
            f"| {r.ranks:,} | {r.normkit:.1f} | {r.torch:.1f} | {r.within_nodes:.1f} | "
            f"{r.received:.2f} | {r.torch_received:.2f} |\n"
            for r in self.rows
        )
        other = (
            "\n| ranks | a message a layer, ms | siblings in one, ms | ghosts, a "
            "message a layer, ms | ghosts, one a step, ms |\n"
            "| ---: | ---: | ---: | ---: | ---: |\n"
        )
        fewer = "".join(
            f"| {r.ranks:,} | {r.normkit:.2f} | {r.siblings:.2f} | {r.ghosts:.2f} | "
            f"{r.ghosts_at_once:.2f} |\n"
            for r in self.rows
            if r.ranks in _FEW
        )
        return head + messages + other + fewer


def model(
    channels: tuple[int, ...] = RESNET50, joined: tuple[int, ...] = _JOINED
) -> Modelled:
    """Return the modelled cost of one training step.

    Args:
        channels: Channels of each synchronized layer.
        joined: Channels of each message, if sibling layers shared one.
    """
    rows: list[ModelledRow] = []
    for ranks in RANKS:
        local = min(ranks, PER_NODE)
        ours = nodes = theirs = received = gathered = 0.0
        for c in channels:
            forward, backward = 8 * (2 * c + 1), 8 * 2 * c
            ours += _both_ways(ranks, c)
            nodes += _both_ways(local, c)
            theirs += _all_gather(ranks, forward // 2) + _all_reduce(
                ranks, backward // 2
            )
            if ranks > 1:
                received += forward + backward
                gathered += (ranks - 1) * forward / 2 + backward / 2
        siblings = sum(_both_ways(ranks, c) for c in joined)
        ghosts = sum(_all_reduce(ranks, 8 * (2 * c + 1)) for c in channels)
        at_once = _all_reduce(ranks, 8 * (3 * sum(channels) + 2 * len(channels) + 1))
        rows.append(
            ModelledRow(
                *(ranks, ours / 1e3, theirs / 1e3, nodes / 1e3),
                *(received / 1e6, gathered / 1e6),
                *(siblings / 1e3, ghosts / 1e3, at_once / 1e3),
            )
        )
    return Modelled(len(channels), tuple(rows))


def _both_ways(ranks: int, channels: int) -> float:
    """Return the microseconds of the messages of normkit's layer."""
    forward, backward = 8 * (2 * channels + 1), 8 * 2 * channels
    return _all_reduce(ranks, forward) + _all_reduce(ranks, backward)


def _all_reduce(ranks: int, size: float) -> float:
    """Return the microseconds of an all_reduce of `size` bytes."""
    if ranks == 1:
        return 0.0
    nodes = -(-ranks // PER_NODE)
    base, within, between = _TREE_LL
    within *= _LL_FACTOR if nodes > 1 else 1
    steps = 2 * ((ranks // nodes - 1) * within + int(math.log2(nodes)) * between)
    tree = base + steps + size / (0.5 * _ll(nodes))
    ring = min(
        _ring(constants, ranks, 2 * (ranks - 1), 2 * nodes if nodes > 1 else 0)
        + size * 2 * (ranks - 1) / ranks / bandwidth
        for constants, bandwidth in _ring_protocols(nodes)
    )
    return min(tree, ring)


def _all_gather(ranks: int, size: float) -> float:
    """Return the microseconds of an all_gather of `size` bytes from each rank."""
    if ranks == 1:
        return 0.0
    nodes = -(-ranks // PER_NODE)
    return min(
        _ring(constants, ranks, ranks - 1, nodes - 1) + size * (ranks - 1) / bandwidth
        for constants, bandwidth in _ring_protocols(nodes)
    )


def _ring(
    constants: tuple[float, float, float], ranks: int, steps: int, between_nodes: int
) -> float:
    base, within, between = constants
    if constants is _RING_LL and ranks > PER_NODE:
        within *= _LL_FACTOR
    return base + (steps - between_nodes) * within + between_nodes * between


def _ring_protocols(
    nodes: int,
) -> tuple[tuple[tuple[float, float, float], float], ...]:
    simple = _SIMPLE_BANDWIDTH[min(nodes, 2) - 1]
    return ((_RING_LL, _ll(nodes)), (_RING_SIMPLE, simple))


def _ll(nodes: int) -> float:
    return _LL_BANDWIDTH[min(nodes, 3) - 1]

"""A check that all ranks are at the same layer, in the same mode; off by default.

Collectives are matched by their order alone. Ranks that call their layers in another
order, or one of which skips a batch, mix the statistics of layers of one size silently,
and abort or wait for ever where the sizes differ. Under `check_ranks` each collective
of a layer is preceded by one that compares what the ranks are about to do.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from normkit.errors import RanksError
from normkit.sync.groups import Ranks

__all__ = ["agree", "check_ranks", "is_checking"]

# Of a description, in UTF-8; the end of a longer one tells layers apart.
_BYTES = 248

# One for each block that was entered; the environment counts as one, never left.
_blocks = [None] * (os.environ.get("NORMKIT_CHECK_RANKS", "0") not in ("", "0"))


@contextmanager
def check_ranks() -> Generator[None]:
    """Compare layer, mode and channels of all ranks before each collective of a layer.

    For debugging: one more collective each time, which the host waits for. All ranks
    must enter the block. The environment variable NORMKIT_CHECK_RANKS=1 does the same
    for a whole program.

    Raises:
        RanksError: In the forward or backward of a layer, on every rank: what each of
            them is about to do.
    """
    _blocks.append(None)
    try:
        yield
    finally:
        _blocks.pop()


def is_checking() -> bool:
    """Return whether ranks compare what they are about to do."""
    return bool(_blocks)


def agree(ranks: Ranks, action: str, message: str = "") -> None:
    """Require that all ranks are about to do the same.

    Args:
        ranks: The ranks, and the layer's name.
        action: What this rank does with the layer, in a few words.
        message: What it is about to send for it.

    Raises:
        RanksError: They are not; the same on every rank.
    """
    text = f"{action} of {ranks.name()}" + (message and f", {message}")
    size = dist.get_world_size(ranks.group)
    sent = text.encode()[-_BYTES:].ljust(_BYTES)
    mine = torch.frombuffer(bytearray(sent), dtype=torch.uint8)
    device = "cuda" if dist.get_backend(ranks.group) == "nccl" else "cpu"
    mine = mine.to(device)
    found = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(found, mine, group=ranks.group)
    texts = [bytes(t.cpu().tolist()).decode(errors="replace").strip() for t in found]
    if len(set(texts)) == 1:
        return
    usual = Counter(texts).most_common(1)[0][0]
    members = dist.get_process_group_ranks(ranks.group)
    told = "; ".join(f"rank {r}: {t}" for r, t in zip(members, texts, strict=True))
    odd = [r for r, t in zip(members, texts, strict=True) if t != usual]
    raise RanksError(
        f"the ranks are not at the same layer: {told}. All ranks must call the same "
        "layers in the same order and mode, with as many channels; look at what "
        f"rank {', '.join(map(str, odd))} does differently"
    )

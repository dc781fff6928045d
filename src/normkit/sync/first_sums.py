"""A check of the first sums of a group on a CPU: do all ranks sum as many numbers?

gloo ends the process from a thread of its own, and names no layer, where it gets a
longer message than it waits for. Models that differ do so in their first step: each of
a group's first sums is preceded by one of two numbers, which always fits.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

__all__ = ["differs_on_a_rank"]

# A step of a ResNet-50 takes 106. Each costs what a message does, half of "messages" in
# `normkit bench ranks`, once for a group.
_SUMS = 256

# Counted on every way that leads to a sum, so that ranks agree which of them is meant.
_left: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def differs_on_a_rank(x: Tensor, group: Any, *, is_backward: bool) -> bool:
    """Return whether the ranks are about to sum unlike messages.

    The same on every rank. False after the first sums of the group.

    Args:
        x: What this rank is about to sum, on a CPU.
        group: A ProcessGroup.
        is_backward: A message of the backward may be as long as one of a forward.

    Raises:
        RuntimeError: The collective failed.
    """
    left = _left.get(group, _SUMS)
    if not left:
        return False
    _left[group] = left - 1
    kind = 2 * x.numel() + is_backward
    most = torch.tensor([kind, -kind])
    options: Any = c10d.AllreduceOptions()
    options.reduceOp = c10d.ReduceOp.MAX
    # Not by dist.all_reduce: what counts or times the layers' sums meets them alone.
    group.allreduce([most], options).wait()
    largest, least = most.tolist()
    return largest != -least

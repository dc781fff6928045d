"""Uneven numbers of batches: ranks that are done go on with empty ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from normkit.errors import RanksError
from normkit.sync.groups import Group, is_group, process_group_of

__all__ = ["empty_of", "join"]


def join(
    batches: Iterable[Any],
    process_group: Group = None,
    *,
    empty: Callable[[Any], Any] | None = None,
) -> Generator[Any]:
    """Iterate over `batches` until every rank has seen its last one.

    A rank that runs out gets batches without samples, so that each rank calls forward
    and backward equally often: synchronized layers, DistributedDataParallel and FSDP
    never wait for a missing rank. An empty batch adds nothing to a sum of losses; take
    sums, and divide by the number of samples of all ranks. A mean over no samples is
    NaN.

    Args:
        batches: This rank's batches; there may be none.
        process_group: The ranks, as in `merge_over`.
        empty: Makes a batch without samples of one with some; by default the first
            dimension of every tensor in it is cut to 0.

    Yields:
        The batches, then empty ones while another rank has more. One small collective
        before each.

    Raises:
        RanksError: The iterator of another rank raised, or an error was given to its
            `throw`.

    Example:
        Without other ranks these are the batches:

        >>> list(join([1, 2]))
        [1, 2]
    """
    if not is_group(process_group):
        yield from batches
        return
    group = process_group_of(process_group)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    iterator, blank, is_known = iter(batches), None, False
    failure: BaseException | None = None
    while True:
        batch, is_done = None, False
        try:
            if failure is None:
                batch = next(iterator)
        except StopIteration:
            is_done = True
        except BaseException as error:
            failure = error
        flags = [float(not is_done and failure is None), float(failure is not None)]
        sums = torch.tensor(flags, device=device)
        dist.all_reduce(sums, group=group)
        more, failed = sums.tolist()
        if failure is not None:
            raise failure
        if failed:
            raise RanksError(
                f"{round(failed)} of {dist.get_world_size(group)} ranks raised an "
                "error at a batch, not this one; see theirs"
            )
        if not is_known:
            # Once: a rank without any batch needs one of another rank's kind.
            mine = None if is_done else (empty or empty_of)(batch)
            blank, is_known = _first(mine, group), True
        if not more:
            return
        try:
            yield blank if is_done else batch
        except GeneratorExit:
            raise
        except BaseException as error:  # of `throw`: the other ranks have to know
            failure = error


def empty_of(batch: Any) -> Any:
    """Return `batch` with the first dimension of every tensor cut to 0."""
    return pytree.tree_map(
        lambda t: t[:0] if isinstance(t, Tensor) and t.dim() else t, batch
    )


def _first(blank: Any, group: Any) -> Any:
    found: list[Any] = [None] * dist.get_world_size(group)
    on_cpu = pytree.tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, blank)
    dist.all_gather_object(found, on_cpu, group=group)
    if blank is not None:
        return blank
    return next((other for other in found if other is not None), None)

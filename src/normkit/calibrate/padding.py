"""Samples that a DistributedSampler repeats so that all ranks have equally many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler

__all__ = ["without_padding"]


def without_padding(batches: Iterable[Any]) -> Iterable[Any]:
    """Return `batches` without the repeated samples at their end.

    A DistributedSampler without `drop_last` fills the last round of ranks with samples
    from the beginning: over all ranks these would count twice. Anything but a
    DataLoader with such a sampler is returned as it is.
    """
    sampler = getattr(batches, "sampler", None)
    if not isinstance(batches, DataLoader) or type(sampler) is not DistributedSampler:
        return batches
    samples = len(sampler.dataset)  # type: ignore[arg-type]
    ours = range(sampler.rank, sampler.total_size, sampler.num_replicas)
    kept = sum(1 for place in ours if place < samples)
    return batches if kept == len(ours) else _Unpadded(batches, kept)


class _Unpadded:
    """A DataLoader cut after a number of samples; can be iterated again."""

    def __init__(self, loader: DataLoader[Any], samples: int) -> None:
        self.loader, self.samples = loader, samples

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        left = self.samples
        for batch in self.loader:
            size = _size(batch)
            if size is None or size <= left:
                yield batch
                left -= size or 0
            elif left:
                yield _cut(batch, size, left)
                left = 0


def _size(batch: Any) -> int | None:
    """Return the number of samples: the first size of the first tensor."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    return None


def _cut(batch: Any, size: int, samples: int) -> Any:
    def cut(leaf: Any) -> Any:
        whole = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size
        return leaf[:samples] if whole else leaf

    return pytree.tree_map(cut, batch)

"""Batches by length, and a test of whether batches are well mixed.

Batch norm assumes that every batch is a sample of the whole data. Batches sorted by
class, source or length are not: `mixing` measures this. Batches of sequences of about
the same length waste little padding and have few time steps with few sequences:
`LengthBucketSampler` makes such batches, and keeps them mixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from normkit.errors import ArgumentError, ShapeError
from normkit.results import Result

__all__ = ["LengthBucketSampler", "Mixing", "mixing"]


class LengthBucketSampler(Sampler[list[int]]):
    """Batches of sequences of about the same length, in random order.

    All positions are shuffled and cut into windows of `window` batches; each window is
    sorted by length and cut into batches; the batches of all windows are shuffled. A
    window of 1 is plain shuffling, one as long as the data is sorting: little padding,
    and batches that differ by length.

    Args:
        lengths: The length of each sample.
        batch_size: Samples in a batch.
        window: Batches that are sorted together.
        drop_last: Leave out the batch that is not full, if there is one; which samples
            it holds changes with every epoch.
        seed: Random seed of the order; torch's own generators are not touched.

    Raises:
        ArgumentError: A negative length, or a size below 1.

    Example:
        >>> sampler = LengthBucketSampler([5, 1, 9, 2, 8, 1], batch_size=2, window=3)
        >>> sorted(sorted(batch) for batch in sampler)
        [[0, 3], [1, 5], [2, 4]]

        With a loader: `DataLoader(data, batch_sampler=sampler, collate_fn=pad)`.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        batch_size: int,
        *,
        window: int = 50,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64).cpu()
        if self.lengths.dim() != 1 or bool((self.lengths < 0).any()):
            raise ArgumentError(
                "LengthBucketSampler needs one length of at least 0 for each sample, "
                f"got a tensor of shape {tuple(self.lengths.shape)}"
                + (f" with {self.lengths.min()}" if self.lengths.numel() else "")
            )
        for name, value in (("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ArgumentError(f"{name}={value} must be at least 1")
        self.batch_size, self.window = batch_size, window
        self.drop_last, self.seed, self.epoch = drop_last, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; each iteration advances it by one."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        count = len(self.lengths) / self.batch_size
        return math.floor(count) if self.drop_last else math.ceil(count)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions of each batch of one epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.lengths), generator=generator)
        if self.drop_last:
            order = order[: len(self) * self.batch_size]
        batches: list[list[int]] = []
        for part in order.split(self.window * self.batch_size):
            by_length = part[self.lengths[part].argsort(stable=True)]
            batches += [b.tolist() for b in by_length.split(self.batch_size)]
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[place]


@dataclass(frozen=True, repr=False)
class Mixing(Result):
    """The difference between batches, compared with that of shuffled ones.

    Attributes:
        ratio: Mean square between batches / mean square within them: 1 on average for
            shuffled data, at most the batch size; below 1 for stratified batches.
        chance: The ratio that 99 of 100 shuffles stay below.
        p_value: Share of shuffles with a ratio at least as high.
        batches: Number of batches.
        samples: Number of samples, in all.
    """

    ratio: float
    chance: float
    p_value: float
    batches: int
    samples: int

    @property
    def is_mixed(self) -> bool:
        """True if the batches differ by no more than chance explains."""
        return self.ratio <= self.chance

    def to_text(self) -> str:
        """Return one sentence."""
        verdict = "well mixed" if self.is_mixed else "not mixed: shuffle the data"
        return (
            f"{self.batches} batches of {self.samples} samples differ "
            f"{self.ratio:.2f} times as much as shuffled ones (99 of 100 shuffles stay "
            f"below {self.chance:.2f}): {verdict}"
        )

    def to_json(self) -> dict[str, float | int | bool]:
        """Return the fields as plain data."""
        return {**asdict(self), "is_mixed": self.is_mixed}


def mixing(batches: Iterable[Tensor], *, shuffles: int = 199, seed: int = 0) -> Mixing:
    """Test whether batches are well mixed, by labels, lengths or features.

    An analysis of variance between batches, with a permutation test: the same samples
    are shuffled over batches of the same sizes. Columns are standardized.

    Args:
        batches: One tensor for each batch: int64 or bool labels of shape `(N,)`, which
            are compared class by class; or floating-point features, `(N,)`, `(N, C)`
            or `(N, C, *)`, whose positions are averaged.
        shuffles: Number of shuffles.
        seed: Random seed of the shuffles; torch's own generators are not touched.

    Returns:
        The ratio of the batches and that of shuffled ones.

    Raises:
        ArgumentError: Fewer than two batches, as many batches as samples, or samples
            that are all the same.
        ShapeError: Batches of different kinds of samples.

    Example:
        >>> labels = torch.arange(10).repeat_interleave(32)
        >>> mixing(labels.split(16)).is_mixed
        False
        >>> shuffled = labels[torch.randperm(320)]
        >>> bool(mixing(shuffled.split(16)).ratio < 2)
        True
    """
    parts = [batch.detach().cpu() for batch in batches]
    parts = [part for part in parts if len(part)]
    samples = sum(len(part) for part in parts)
    if len(parts) < 2 or samples == len(parts):
        raise ArgumentError(
            f"mixing compares batches, got {len(parts)} of {samples} samples; give it "
            "at least two, of more than one sample"
        )
    if len({(part.shape[1:2], part.is_floating_point()) for part in parts}) > 1:
        raise ShapeError(
            "mixing needs the same kind of samples in all batches, got "
            f"{', '.join(str(tuple(p.shape)) for p in parts[:4])}"
        )
    columns = _columns(parts)
    sizes = torch.tensor([len(part) for part in parts])
    owner = torch.arange(len(parts)).repeat_interleave(sizes)
    total = float(columns.square().sum())
    generator = torch.Generator().manual_seed(seed)

    def ratio(rows: Tensor) -> float:
        sums = torch.zeros(len(parts), rows.shape[1], dtype=rows.dtype)
        sums.index_add_(0, owner, rows)
        between = float((sums.square() / sizes.unsqueeze(1)).sum())
        within = max(total - between, 0.0) / (samples - len(parts))
        return between / (len(parts) - 1) / within if within else math.inf

    found = ratio(columns)
    shuffled = torch.tensor(
        [
            ratio(columns[torch.randperm(samples, generator=generator)])
            for _ in range(shuffles)
        ],
        dtype=torch.float64,
    )
    as_high = int((shuffled >= found).sum())
    return Mixing(
        found,
        shuffled.quantile(0.99).item(),
        (1 + as_high) / (1 + shuffles),
        len(parts),
        samples,
    )


def _columns(parts: list[Tensor]) -> Tensor:
    """Return the standardized columns of all samples, without constant ones."""
    whole = torch.cat(
        [part.flatten(2).mean(2) if part.dim() > 2 else part for part in parts]
    )
    if not whole.is_floating_point():
        _, classes = whole.unique(return_inverse=True)
        whole = torch.nn.functional.one_hot(classes)
    x = whole.reshape(len(whole), -1).to(torch.float64)
    x = x - x.mean(0)
    spread = x.square().mean(0).sqrt()
    x = x[:, spread > 0] / spread[spread > 0]
    if not x.shape[1]:
        raise ArgumentError(
            f"all {len(whole)} samples are the same; mixing needs something that "
            "differs, such as labels"
        )
    return x

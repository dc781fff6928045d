"""The targets of one pass, merged over the batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normkit.doctor.answer_statistics import TargetStatistics
from normkit.doctor.channel_statistics import ChannelStatistics
from normkit.doctor.examination.labels import (
    MAX_COLUMNS,
    MAX_LABELS,
    label_channels,
    rows_of,
)
from normkit.moments import Moments, moments

__all__ = ["Targets", "channels_of", "most_frequent", "on_cpu", "sum_to_one"]

# Class numbers above it are no classes, and would fill the memory with counts.
MAX_CLASSES = 1_000_000
# Targets of more columns are images or maps, most of whose values may be one.
FEW_COLUMNS = 16


class Targets:
    """Class numbers or values of the targets, over one pass.

    Attributes:
        beyond: A class number that the output has no unit for, and its units; None
            where every label has one.
    """

    def __init__(self) -> None:
        self.beyond: tuple[int, int] | None = None
        self._labels: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._values: list[Moments] = []
        self._columns: list[ChannelStatistics] = []
        self._range = [math.inf, -math.inf]
        self._row_sums: list[float] = []
        self._is_binary = True
        self._sum_to_one = True
        self._kept: list[Tensor] = []
        self._not_finite = 0

    def add_labels(self, labels: Tensor, samples: int) -> bool:
        """Merge the class numbers of a batch; False where they are none.

        Args:
            labels: The numbers.
            samples: The number of samples; 0 where it is that of the labels.
        """
        rows = rows_of(labels, samples).cpu()
        # A negative label is one to ignore, such as cross_entropy's -100.
        kept = rows[rows >= 0]
        if not kept.numel() or int(kept.max()) >= MAX_CLASSES:
            return False
        self._labels.append(kept)
        self._rows.append(rows)
        return True

    def add_values(
        self, t: Tensor, y: Tensor | None, given: Tensor | None = None
    ) -> None:
        """Merge the values of a batch, beside its outputs and inputs."""
        self._not_finite += int((~t.isfinite()).sum())
        self._range[0] = min(self._range[0], float(t.min()))
        self._range[1] = max(self._range[1], float(t.max()))
        self._values.append(on_cpu(moments(t.flatten(), 0)))
        if t.dim() and len(t) > 1:
            self._columns.append(channels_of(t))
        if t.dim() and t[0].numel() <= FEW_COLUMNS:
            self._kept.append(t.reshape(len(t), -1)[:MAX_LABELS].double().cpu())
        self._is_binary &= bool(((t == 0) | (t == 1)).all())
        self._sum_to_one &= t.dim() == 2 and sum_to_one(t.float())
        # The counts of a multinomial autoencoder are its inputs, and no labels.
        is_given = given is not None and given.shape == t.shape and given.equal(t)
        fits = t.dim() == 2 and y is not None and y.shape == t.shape and not is_given
        if fits and t.shape[1] > 1:
            self._row_sums.append(float(t.sum(1).mean()))

    def statistics(self) -> TargetStatistics | None:
        """Return the statistics; None where the targets are no tensor."""
        if self._labels:
            classes = 1 + max(int(t.max()) for t in self._labels)
            return TargetStatistics(
                classes=classes,
                low=float(min(int(t.min()) for t in self._labels)),
                high=float(classes - 1),
                most_frequent=most_frequent(self._labels),
                channels=label_channels(self._rows, classes),
                beyond=self.beyond,
            )
        if not self._values:
            return None
        columns = self._columns
        same_size = len({c.within.shape for c in columns}) == 1
        rows = self._row_sums
        is_binary = self._is_binary and bool(rows)
        values = Moments.merge_all(self._values)
        return TargetStatistics(
            low=self._range[0],
            high=self._range[1],
            not_finite=self._not_finite / float(values.count),
            spread=float(values.var.sqrt()),
            mean=float(values.mean),
            labels_per_sample=sum(rows) / len(rows) if is_binary else None,
            sums_to_one=self._sum_to_one,
            kurtosis=_kurtosis(self._kept),
            channels=ChannelStatistics.merge_all(columns) if same_size else None,
        )


def sum_to_one(rows: Tensor) -> bool:
    """Return True for rows `(N, K)` that are distributions over several classes."""
    is_share = rows.shape[1] > 1 and bool((rows >= 0).all())
    return is_share and bool(((rows.sum(1) - 1).abs() < 1e-3).all())


def channels_of(x: Tensor) -> ChannelStatistics:
    """Return the statistics of one batch, column by column, thinned evenly."""
    columns = x.detach().flatten(1) if x.dim() > 1 else x.detach()[:, None]
    columns = columns[:, :: -(-columns.shape[1] // MAX_COLUMNS)]
    found = on_cpu(moments(columns.float(), 0))
    return ChannelStatistics.of_batch(found, found)


def _kurtosis(rows: list[Tensor]) -> float:
    """Return E[z⁴] of the values z of each column, the largest; nan without any."""
    if not rows or len({part.shape[1] for part in rows}) > 1:
        return math.nan
    values = torch.cat(rows)
    off = values - values.mean(0)
    found = off.pow(4).mean(0) / off.square().mean(0).square()
    found = found[found.isfinite()]
    return float(found.max()) if found.numel() else math.nan


def most_frequent(parts: list[Tensor]) -> float | None:
    """Return the share of the most frequent value; None without values."""
    if not parts:
        return None
    counts = torch.bincount(torch.cat(parts))
    return float(counts.max()) / float(counts.sum())


def on_cpu(found: Moments) -> Moments:
    """Return moments for the report: float64, on the CPU."""
    return found.to(device="cpu", dtype=torch.float64)

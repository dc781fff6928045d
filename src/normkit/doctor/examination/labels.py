"""The class numbers of a batch: those of each sample, and their shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.doctor.channel_statistics import ChannelStatistics
from normkit.doctor.probes.tensor_statistics import first_tensor
from normkit.moments import moments

__all__ = ["MAX_COLUMNS", "MAX_LABELS", "label_beyond", "label_channels", "rows_of"]

# Columns of inputs and targets that show whether batches are mixed: the standard
# error of a median of 64 F ratios is a tenth of a sorted loader's excess.
MAX_COLUMNS = 64
# Labels kept per batch where a sample has many, as in segmentation.
MAX_LABELS = 4096


def label_beyond(
    output: Any, targets: Any, ignored: int = -100
) -> tuple[int, int] | None:
    """Return a class number that scores `(N, K, …)` have no unit for, and K.

    Args:
        output: The scores.
        targets: The class numbers.
        ignored: The label that the loss ignores.
    """
    y = first_tensor(output)
    if y is None or not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        return None
    if y.dim() != targets.dim() + 1 or not targets.numel():
        return None
    units, labels = y.shape[1], targets[targets != ignored]
    beyond = labels[(labels < 0) | (labels >= units)]
    return (int(beyond[0]), units) if beyond.numel() else None


def label_channels(batches: list[Tensor], classes: int) -> ChannelStatistics | None:
    """Return the statistics of which labels a sample has, batch by batch.

    A mask or a sequence is one sample, whose mean is the share of each label: its
    pixels are alike, as no samples drawn at random are.

    Args:
        batches: Labels `(N, P)` of each batch; those below 0 are ignored.
        classes: Number of classes.
    """
    if any(len(rows) < 2 for rows in batches) or classes < 2:
        return None
    width = min(classes, MAX_COLUMNS)
    found = []
    for rows in batches:
        is_label = rows >= 0
        one_hot = torch.nn.functional.one_hot(rows.clamp(min=0) % width, width)
        values = moments(one_hot[is_label].double(), 0)
        counts = is_label.sum(1, keepdim=True)
        shares = (one_hot * is_label[..., None]).sum(1).double() / counts.clamp(min=1)
        has_labels = counts > 0
        by_sample = moments(shares, 0, has_labels.expand(shares.shape))
        found.append(ChannelStatistics.of_batch(values, by_sample))
    return ChannelStatistics.merge_all(found)


def rows_of(labels: Tensor, samples: int = 0) -> Tensor:
    """Return the labels of each sample `(N, P)`, of a batch at most about MAX_LABELS.

    Labels `(N·P,)` of N samples are those of sequences or images that were flattened.
    """
    rows = labels.flatten(1) if labels.dim() > 1 else labels.reshape(-1, 1)
    if labels.dim() < 2 and samples > 1 and len(rows) % samples == 0:
        rows = rows.view(samples, -1)
    return rows[:, :: max(1, -(-rows.numel() // MAX_LABELS))]

"""Answers that know the class and give it another number.

As where folders were sorted as words in training and as numbers in a test, or where one
of two data sets counts its classes from another one on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.doctor.measurements import Renumbered

__all__ = ["renumbered"]

# Classes and samples that show a numbering, and the share of the samples that it must
# explain, beside that of right answers: two classes are one another's by chance.
MIN_CLASSES, MAX_CLASSES, MIN_SAMPLES = 3, 1000, 100
EXPLAINED, TIMES = 0.6, 2.0


def renumbered(labels: list[Tensor], chosen: list[Tensor]) -> Renumbered | None:
    """Return the numbering of the answers; None where it is that of the targets.

    Args:
        labels: The class numbers of each batch; those below 0 are ignored.
        chosen: The numbers of the largest scores beside them.
    """
    if not labels:
        return None
    wanted, given = torch.cat(labels), torch.cat(chosen)
    is_label = wanted >= 0
    wanted, given = wanted[is_label], given[is_label]
    if len(wanted) < MIN_SAMPLES:
        return None
    classes = 1 + int(max(wanted.max(), given.max()))
    if not MIN_CLASSES <= classes <= MAX_CLASSES:
        return None
    counts = (wanted * classes + given).bincount(minlength=classes**2)
    counts = counts.view(classes, classes)
    most, answer = counts.max(1)
    used = most > 0
    # Two classes with one answer are taken for each other, not numbered otherwise.
    if len(answer[used].unique()) < int(used.sum()):
        return None
    right = float(counts.diag().sum()) / len(wanted)
    explained = float(most.sum()) / len(wanted)
    if explained < max(EXPLAINED, TIMES * right):
        return None
    apart = (answer != torch.arange(classes)) & used
    first = int(apart.int().argmax())
    return Renumbered(right, explained, first, int(answer[first]))

"""The loss without the padding that all samples of a batch share.

A batch may be padded to a length that no sample of it has. Without the positions behind
the longest sample the answers stay as they are, unless the model reads padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normkit.doctor.examination.case import Case
from normkit.doctor.measurements import Trimmed
from normkit.modeling.batch import to_device

__all__ = ["has_one_length", "trimmed_losses"]

# Batches that are run once more, and the fewest that give a standard error.
MOST, LEAST = 8, 4


@torch.no_grad()
def trimmed_losses(
    case: Case, model: nn.Module, device: Any, losses: Sequence[float]
) -> Trimmed | None:
    """Return the losses in eval mode of batches as they are and of trimmed ones.

    None where batches have no such padding, or do not run without it.

    Args:
        case: The case.
        model: Its model, in eval mode.
        device: Its device.
        losses: Those of the batches as they are, per batch.
    """
    batches = case.batches[:MOST]
    if case.loss_fn is None or not LEAST <= len(batches) <= len(losses):
        return None
    cut, places = [], []
    for batch in batches:
        found = _trimmed(to_device(batch, device))
        if found is None:
            return None
        short, kept, length = found
        try:
            output = case.forward(model, short)
            cut.append(float(case.loss_fn(output, case.targets(short))))
        except Exception:  # the user's functions, on what they were not given
            return None
        places.append(length - kept)
    return Trimmed(tuple(losses[: len(cut)]), tuple(cut), sum(places) / len(places))


@torch.no_grad()
def has_one_length(case: Case, model: nn.Module, device: Any) -> bool:
    """Return True where the model takes sequences of the length of training alone.

    As one does whose linear layer reads all positions side by side: it does not take
    the first batch without a position, along either of the dimensions.
    """
    batch = to_device(case.batches[0], device)
    x = next((v for v in tree_leaves(batch) if isinstance(v, Tensor)), None)
    if x is None or x.dim() not in (2, 3):
        return False
    for dim in range(1, x.dim()):
        length = x.shape[dim]
        if length < 2:
            continue
        try:
            case.forward(model, _cut(batch, length, length - 1, {id(x): dim}))
        except Exception:  # the user's function, on what it was not given
            continue
        return False
    return True


def _cut(
    batch: Any, length: int, kept: int, dims: Mapping[int, int] | None = None
) -> Any:
    """Return a batch with the first `kept` of `length` positions.

    Args:
        batch: The batch.
        length: Size of the dimensions that are cut.
        kept: Their size in what is returned.
        dims: By the id of a tensor, the one dimension in which that is cut.
    """

    def trim(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        own = None if dims is None else dims.get(id(value))
        for dim in range(1, value.dim()):
            if value.shape[dim] == length and own in (None, dim):
                value = value.narrow(dim, 0, kept)
        return value

    return tree_map(trim, batch)


def _trimmed(batch: Any) -> tuple[Any, int, int] | None:
    """Return the batch without shared padding, its length and that of the batch."""
    x = next((v for v in tree_leaves(batch) if isinstance(v, Tensor)), None)
    if x is None or x.dim() not in (2, 3) or len(x) < 2:
        return None
    found = _ends(x)
    if found is None:
        return None
    ends, length = found
    shared = int(ends.min())
    # Samples of one length are no sequences that were padded.
    if not 0 < shared < length or int(ends.max()) == shared:
        return None
    kept = length - shared
    return _cut(batch, length, kept), kept, length


def _ends(x: Tensor) -> tuple[Tensor, int] | None:
    """Return the number of padded positions at the end of each sample, and the length.

    Tokens `(N, L)` that are the last one, or vectors of zeros in `(N, L, C)`, or in
    `(N, C, L)`.
    """
    if x.is_floating_point():
        if x.dim() != 3:
            return None
        same = [(x == 0).all(dim) for dim in (2, 1)]
        is_pad = same[0] if bool(same[0][:, -1].any()) else same[1]
    elif x.dim() == 2 and x.dtype in (torch.int64, torch.int32):
        is_pad = x == x[:1, -1:]
    else:
        return None
    return is_pad.flip(1).long().cumprod(1).sum(1), is_pad.shape[1]

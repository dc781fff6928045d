"""The layout of an output in memory: one block, or channels_last.

The kernels lay y out like x. torch gives the norm of tokens that were transposed, as
the patches of an image are, in one block, and programs go on with `y.view(-1, C)`.
"""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

__all__ = ["Copied", "is_laid_as_torch"]


@final
class Copied:
    """A call on a contiguous copy of its input, whose output is contiguous, too.

    To copy the output costs a second copy in the backward, of its gradient; and of some
    layouts no kernel takes the input, as of tokens that were transposed.
    """

    __slots__ = ("call",)

    def __init__(self, call: Any) -> None:
        self.call = call


def is_laid_as_torch(x: Tensor) -> bool:
    """Return True for values in one block, or for images in channels_last.

    torch's batch, group and RMS norm keep channels_last; its instance norm, and its
    layer norm over whole images, give one block there. Here all keep it.

    Example:
        >>> import torch
        >>> is_laid_as_torch(torch.empty(2, 5, 4, 3).permute(0, 3, 1, 2))
        True
        >>> is_laid_as_torch(torch.empty(2, 3, 9).transpose(1, 2))
        False
    """
    if x.is_contiguous():
        return True
    if x.dim() not in (4, 5):
        return False
    # Not `is_contiguous(memory_format=…)`, which torch.func.vmap does not have.
    shape, strides = x.shape, x.stride()
    dense = 1
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if shape[d] != 1 and strides[d] != dense:
            return False
        dense *= shape[d]
    return True

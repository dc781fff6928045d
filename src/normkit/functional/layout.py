"""The layout of an output in memory: that which torch's function gives.

The kernels lay y out like x. torch gives tokens that were transposed, as the patches of
an image are, in one block, and programs go on with `y.view(-1, channels)`.
"""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

__all__ = ["Copied", "is_laid_as_torch"]


@final
class Copied:
    """A call between copies: of its input, or of its output into torch's layout.

    Args:
        call: The call.
        copies_input: No kernel takes x as it lies, as that of a layer norm of
            transposed tokens; torch copies it, too. Else y is copied: a copy of x would
            take as long, and a backward would keep it.
        tries_operator: It is an `aten.AtenCall`.
    """

    __slots__ = ("call", "copies_input", "tries_operator")

    def __init__(
        self, call: Any, *, copies_input: bool = False, tries_operator: bool = False
    ) -> None:
        self.call = call
        self.copies_input, self.tries_operator = copies_input, tries_operator


def is_laid_as_torch(y: Tensor) -> bool:
    """Return True for an output in one block, or for images in channels_last.

    torch's layer norm over whole images gives one block for channels_last, and its
    other functions keep it; here all keep it.

    Example:
        >>> import torch
        >>> is_laid_as_torch(torch.empty(2, 5, 4, 3).permute(0, 3, 1, 2))
        True
        >>> is_laid_as_torch(torch.empty(2, 3, 9).transpose(1, 2))
        False
    """
    if y.is_contiguous():
        return True
    if y.dim() not in (4, 5):
        return False
    # Not `is_contiguous(memory_format=…)`, which torch.func.vmap does not have.
    shape, strides = y.shape, y.stride()
    dense = 1
    for d in (1, *range(y.dim() - 1, 1, -1), 0):
        if shape[d] != 1 and strides[d] != dense:
            return False
        dense *= shape[d]
    return True

"""Copies of vectors for the backward of a compiled forward.

A compiler keeps as little for the backward as it can, and recomputes the rest. The
partitioner of torch 2.13 recomputes from buffers, too, which the forward has updated
meanwhile: gradients that depend on running statistics were silently off by up to a
third. The result of `opaque_clone` is opaque to it, and kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.torch_state import is_compiling, is_exporting

__all__ = ["opaque_clone"]

_LIBRARY = torch.library.Library("normkit", "FRAGMENT")
_LIBRARY.define("opaque_clone(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("opaque_clone", torch.clone, "CompositeExplicitAutograd")


def opaque_clone(x: Tensor) -> Tensor:
    """Return `x` as a constant to gradients; a compiled forward keeps a copy."""
    if is_compiling() and not is_exporting():
        return torch.ops.normkit.opaque_clone(x)
    return x

"""Protocol of a kernel backend: four primitives, and reasons against a case.

    moments(x)                     →  Moments
    apply(x, center, scale, …)     →  act((x − center)·scale·weight + shift + residual)
    reduce_grads(dy, x, center)    →  Σ dy,  Σ dy·(x − center)
    apply_grads(dy, x, center, …)  →  a·dy + b·(x − center) + c

What lies between them is algebra on small vectors, done in float64 by
`normkit.functional`. Every statistic-like argument (`center`, `scale`, `a`, `b`, `c`)
has the shape of `x` with the reduced dimensions of size 1 and is float64, so that a
centre 1e6 standard deviations from zero keeps its digits; a backend splits it into
`hi + lo` of its compute dtype (`split`). `x·scale + shift` would lose them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from normkit.kernels.deterministic import is_deterministic
from normkit.kernels.epilogue import Epilogue
from normkit.moments import Moments

__all__ = ["Backend", "Grads", "absorbed", "shared_dims", "split", "vector_dtype"]

_NONE = Epilogue()

# dx, dweight, dbias, dresidual
Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Backend(Protocol):
    """A set of kernels for the four primitives.

    Every other backend is compared with `reference` and with float64 oracles.
    """

    name: str

    def reasons_against(self, x: Tensor, dims: tuple[int, ...]) -> list[str]:
        """Return why this backend cannot reduce `x` over `dims`; empty when it can."""
        ...

    def moments(
        self, x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None
    ) -> Moments:
        """Return count, mean and m2 over `dims`, kept as size 1, in `vector_dtype`."""
        ...

    def apply(
        self,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        shift: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        epilogue: Epilogue = _NONE,
    ) -> Tensor:
        """Return act((x − center)·scale·weight + shift + residual).

        In the dtype and layout of `x`; halves are rounded once, at the end. `weight` is
        there for rows, where `scale·weight` would be as large as x.
        """
        ...

    def reduce_grads(
        self,
        dy: Tensor,
        x: Tensor,
        center: Tensor,
        dims: tuple[int, ...],
        *,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return Σ dy·weight and Σ dy·weight·(x − center)·scale over `dims`, kept."""
        ...

    def apply_grads(
        self,
        dy: Tensor,
        x: Tensor,
        center: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return a·dy·weight + b·(x − center) + c, in the dtype and layout of `x`."""
        ...


def vector_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of statistic vectors: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def split(center: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Split `center` as `hi + lo` in `dtype`; `lo` is None when `dtype` holds it all.

    x − hi is exact where x is near hi (Sterbenz), so (x − hi) − lo errs by one
    rounding of the difference, however far the centre lies from zero.
    """
    hi = center.to(dtype)
    if center.dtype == dtype:
        return hi, None
    lo = (center - hi.to(center.dtype)).to(dtype)
    # inf − inf must not turn an infinite centre into NaN.
    return hi, torch.where(hi.isfinite(), lo, torch.zeros_like(lo))


def shared_dims(affine: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Return the reduced dimensions along which the learned affine is constant, too."""
    return tuple(d for d in dims if affine.shape[d] == 1)


def absorbed(scale: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return `scale·weight` as one vector where that is smaller than x."""
    if is_deterministic():
        # Whether it is smaller depends on the size of the batch.
        return scale, weight
    dims = tuple(d for d in range(scale.dim()) if scale.shape[d] == 1)
    if weight is None or not shared_dims(weight, dims):
        return scale, weight
    return scale * weight, None

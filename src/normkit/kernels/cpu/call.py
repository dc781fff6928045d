"""Native call of one signature: geometry and options are found once and reused.

A forward is one native call, a backward another. They read learned vectors and running
statistics in place, in any floating dtype, keep the statistics of the forward in one
small float64 buffer, update the running averages and count the batch.

    buffer      (rows, statistics):  mean,  1/√(var + eps)  [, m2  [, count as int64]]
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.cpu.geometry import geometry_of
from normkit.kernels.cpu.loading import (
    CENTERED,
    EQUAL_SHARES,
    FIXED,
    GIVEN,
    ROW_MASK,
    SKIP_NONFINITE,
    check,
    library,
)
from normkit.kernels.cpu.packing import (
    ACTIVATION_CODES,
    DTYPES,
    Doubles,
    as_mask,
    flags_of,
    laid_like,
    threads_for,
)
from normkit.kernels.primitives import Grads
from normkit.kernels.spec import Operands, Running, Saved, Spec
from normkit.moments import Moments
from normkit.torch_state import has_mode_or_tracer, increment_version, is_plain

__all__ = ["NativeCall", "call_for", "sizes_of"]

_empty_like = torch.empty_like


class NativeCall:
    """Forward and backward of one signature; see `call_for`."""

    __slots__ = (
        *("spec", "_fixed", "_forward", "_backward", "_shape", "_values"),
        *("_two_rows", "_all_rows", "_is_given", "_is_masked", "_is_row_mask", "sums"),
    )

    def __init__(
        self,
        spec: Spec,
        x: Tensor,
        sizes: tuple[int, ...],
        dtypes: tuple[int, ...],
        flags: int,
        *,
        is_masked: bool,
    ) -> None:
        native = library()
        assert native is not None
        self.spec = spec
        self._forward, self._backward = native.forward, native.backward
        self._fixed = FIXED.pack(
            *sizes,
            *dtypes,
            *(ACTIVATION_CODES[spec.activation], flags_of(x, flags), threads_for(x)),
            *(spec.eps, spec.slope),
        )
        batch, over, groups, sub_runs, inner, *_ = sizes
        statistics, self._values = batch * groups, over * sub_runs * inner
        # The native layouts with a kernel for a sum: one contiguous span per statistic.
        self.sums = over == 1 and (sizes[6] == 1 or self._values <= 32_768)
        self._shape = spec.kept(x.shape)
        self._is_given, self._is_masked = spec.given, is_masked
        self._is_row_mask = bool(flags & ROW_MASK)
        self._two_rows = Doubles((2, statistics))
        self._all_rows = Doubles((4, statistics))

    def forward(
        self,
        operands: Operands,
        running: Running | None,
        keeps: str,
        total: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y, and the statistics that `keeps` names.

        Args:
            operands: Of the signature; the mask as `laid_mask` returns it.
            running: Statistics to normalize by, or to update.
            keeps: "nothing", "some" for a backward, or "all".
            total: Takes x + residual, and is normalized; where `sums` allows it.
        """
        x, weight, bias, residual, mask = operands
        y = _empty_like(x)
        if residual is not None:
            residual = laid_like(residual, x)
        buffer = None
        if keeps != "nothing":
            whole = keeps == "all" or mask is not None
            buffer = self._all_rows() if whole else self._two_rows()
        status = self._forward(
            self._fixed, x, weight, bias, residual, mask, running, buffer, y, total
        )
        if status:
            check(status)
        if running is not None and not self._is_given:
            mean, var = running[0], running[1]
            if mean is not None and var is not None:
                # Autograd has to notice, as with any change in place.
                increment_version((mean, var))
        return y, () if buffer is None else (buffer,)

    def backward(
        self,
        dy: Tensor,
        saved: Saved,
        wanted: tuple[bool, ...],
        dtotal: Tensor | None = None,
    ) -> Grads:
        """Return the gradients of x, weight, bias and residual that are wanted.

        Args:
            dy: Gradient of y, in any layout.
            saved: As the forward took and kept it, "some" at least; no residual is
                needed with a gate.
            wanted: Which of the four gradients to compute.
            dtotal: Gradient of the sum, if x was one; added to that of x.
        """
        x, weight, bias, residual, mask, gate, (buffer,) = saved
        wants_x, wants_weight, wants_bias, wants_residual = wanted
        if dy.stride() != x.stride() or dy.dtype is not x.dtype:
            dy = laid_like(dy, x)
        residual, dtotal = laid_like(residual, x), laid_like(dtotal, x)
        passes = wants_residual and mask is None and self.spec.activation == "none"
        dx = dweight = dbias = dresidual = None
        if wants_residual and not passes:
            dresidual = _empty_like(x)
        if wants_x or dresidual is not None:
            dx = _empty_like(x)
        if wants_weight and weight is not None:
            dweight = _empty_like(weight)
        if wants_bias and bias is not None:
            dbias = _empty_like(bias)
        if dx is not None or dweight is not None or dbias is not None:
            status = self._backward(
                *(self._fixed, x, weight, bias, residual, mask, gate, buffer),
                *(dy, dtotal, dx, dweight, dbias, dresidual),
            )
            if status:
                check(status)
        return dx if wants_x else None, dweight, dbias, dy if passes else dresidual

    def laid_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """Return a mask of x's shape as the kernels read it: a byte for each value.

        Where it hides rows as a whole: a byte for each row, seen in the shape of x.
        """
        if not self._is_row_mask:
            return as_mask(mask, x)
        first = tuple(
            slice(1) if d in self.spec.dims else slice(None) for d in range(x.dim())
        )
        return mask[first].contiguous().expand(x.shape)

    def statistics(
        self, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return mean, 1/√(var + eps) and count, as `functional.passes` keeps them."""
        (buffer,) = kept
        center, inv_std = buffer[0].view(self._shape), buffer[1].view(self._shape)
        return center, inv_std, None if self.spec.given else self._count(buffer)

    def around_zero(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the kept statistics as those of x − mean."""
        buffer = kept[0].clone()
        buffer[0] = 0
        return (buffer,)

    def moments(self, kept: tuple[Tensor, ...]) -> Moments:
        """Return the Moments of the batch, from "all" that a forward kept."""
        (buffer,) = kept
        mean, m2 = buffer[0].view(self._shape), buffer[2].view(self._shape)
        return Moments(self._count(buffer), mean, m2)

    def _count(self, buffer: Tensor) -> Tensor:
        if self._is_masked:
            return buffer[3].view(torch.int64).view(self._shape)
        return torch.scalar_tensor(self._values, dtype=torch.int64, device="cpu")


def call_for(
    spec: Spec, operands: Operands, running: Running | None = None
) -> NativeCall | None:
    """Return the call of this signature; None where the kernels cannot run it.

    Every tensor has to be plain and dense: vectors contiguous, residual and mask laid
    like x.
    """
    if spec.group is not None:
        return None
    x, *_, mask = operands
    found = sizes_of(spec, operands, running)
    if found is None:
        return None
    flags = (CENTERED if spec.centered else 0) | (GIVEN if spec.given else 0)
    if running is not None and not spec.given:
        flags |= SKIP_NONFINITE if running.skips_nonfinite else 0
        flags |= EQUAL_SHARES if running.rate is None else 0
    if mask is not None and _hides_rows(spec, x, mask, found[0]):
        flags |= ROW_MASK
    return NativeCall(spec, x, *found, flags, is_masked=mask is not None)


def _hides_rows(spec: Spec, x: Tensor, mask: Tensor, sizes: tuple[int, ...]) -> bool:
    """Return whether the mask is constant along the rows of a layer or RMS norm."""
    batch, over, groups, sub_runs, _, period, _ = sizes
    if spec.given or spec.shape is not None or over * sub_runs * period != 1:
        return False
    missing = x.dim() - mask.dim()
    return groups * batch > 0 and all(
        d < missing or mask.shape[d - missing] == 1 for d in spec.dims
    )


def sizes_of(
    spec: Spec, operands: Operands, running: Running | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return geometry and dtypes of a call; None where the kernels cannot run it."""
    x, weight, bias, residual, mask = operands
    statistics = running[:2] if running is not None else (None, None)
    counters = running[3:5] if running is not None else (None, None)
    vectors = (weight, bias, *statistics)
    if (
        library() is None
        or x.dtype not in DTYPES
        or not is_plain(x, *vectors, *counters, residual, mask)
        or has_mode_or_tracer()
    ):
        return None
    for v in vectors:
        if v is not None and not (v.dtype in DTYPES and v.is_contiguous()):
            return None
    if any(t is not None and t.dtype != torch.int64 for t in counters):
        return None
    affine = weight if weight is not None else bias
    shape = None if affine is None else spec.along(affine.detach()).shape  # type: ignore[union-attr]
    seen = spec.seen(x.detach())
    geometry = geometry_of(seen.shape, seen.stride(), spec.kept(x.shape), shape)
    if geometry.reason:
        return None
    dtypes = tuple(0 if v is None else DTYPES[v.dtype] for v in vectors)
    return geometry.sizes, (DTYPES[x.dtype], *dtypes)

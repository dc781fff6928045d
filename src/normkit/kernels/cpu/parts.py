"""The two halves of a forward and of a backward, for statistics of several ranks.

measure   this rank's statistics           → message, to be summed over ranks
finish    sums of all ranks                → statistics
apply     statistics                       → y
reduce    dy                               → sums of dy, to be summed over ranks;
                                             gradients of weight and bias, dy·act′
gradient  sums of all ranks                → dx

statistics  float64, (4, C):  mean,  1/√(var + eps),  m2,  count as int64
message     float64:          n,  n·(mean − pivot),  m2 + n·(mean − pivot)²
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.cpu.call import sizes_of
from normkit.kernels.cpu.loading import (
    CENTERED,
    EQUAL_SHARES,
    FIXED,
    GIVEN,
    POINTERS,
    RANKS,
    SKIP_NONFINITE,
    UPDATE,
    WEIGHTED,
    check,
    library,
)
from normkit.kernels.cpu.packing import (
    ACTIVATION_CODES,
    Doubles,
    flags_of,
    laid_like,
    threads_for,
)
from normkit.kernels.spec import Operands, Running, Saved, Spec
from normkit.torch_state import increment_version

__all__ = ["NativeParts", "parts_for"]

_pack, _pack_ranks, _pack_update = POINTERS.pack, RANKS.pack, UPDATE.pack
_empty_like = torch.empty_like


class NativeParts:
    """The parts of one signature; see `parts_for`."""

    __slots__ = (
        *("_library", "_measure", "_apply", "_reduce", "_size", "_values", "_eps"),
        *("_counts", "_is_masked", "_local", "_statistics", "_message", "_sums"),
        "_codes",
    )

    def __init__(
        self,
        spec: Spec,
        x: Tensor,
        sizes: tuple[int, ...],
        dtypes: tuple[int, ...],
        *,
        is_masked: bool,
    ) -> None:
        native = library()
        assert native is not None
        self._library = native.native
        code, threads = ACTIVATION_CODES[spec.activation], threads_for(x)
        self._measure, self._apply, self._reduce = (
            FIXED.pack(
                *(*sizes, *dtypes, code, flags_of(x, flags), threads),
                *(spec.eps, spec.slope),
            )
            for flags in (CENTERED, CENTERED | GIVEN, CENTERED | GIVEN | WEIGHTED)
        )
        self._codes = dtypes[3:]
        batch, over, groups, sub_runs, inner, *_ = sizes
        size = self._size = batch * groups
        self._values, self._eps = over * sub_runs * inner, spec.eps
        self._counts, self._is_masked = size if is_masked else 1, is_masked
        self._local, self._statistics = Doubles((3, size)), Doubles((4, size))
        self._message = Doubles((self._counts + 2 * size,))
        self._sums = Doubles((2, size))

    def measure(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return this rank's mean, m2 and count (under a mask), float64 `(3, C)`."""
        local = self._local()
        row, mean = 8 * self._size, local.data_ptr()
        self._run(
            *("normkit_forward", self._measure, x),
            mask=mask,
            center=mean,
            m2=mean + row,
            count=0 if mask is None else mean + 2 * row,
        )
        return local

    def message(self, local: Tensor, pivot: Tensor | None = None) -> Tensor:
        """Return the message of `local` around the means in `pivot`, or 0."""
        message = self._message()
        row, mean = 8 * self._size, local.data_ptr()
        self._library.normkit_pack_for_ranks(
            _pack_ranks(
                *(self._size, self._counts, self._values, self._eps),
                *(mean, 0, mean + row, mean + 2 * row if self._is_masked else 0),
                *(0 if pivot is None else pivot.data_ptr(), message.data_ptr()),
            )
        )
        return message

    def finish(
        self, message: Tensor, pivot: Tensor | None = None
    ) -> tuple[Tensor, bool]:
        """Return the statistics, and whether they have lost digits around the pivot."""
        found = self._statistics()
        row, mean = 8 * self._size, found.data_ptr()
        is_far = self._library.normkit_finish_from_ranks(
            _pack_ranks(
                *(self._size, self._counts, self._values, self._eps),
                *(mean, mean + row, mean + 2 * row, mean + 3 * row),
                *(0 if pivot is None else pivot.data_ptr(), message.data_ptr()),
            )
        )
        return found, bool(is_far)

    def update(self, running: Running, statistics: Tensor) -> None:
        """Update running statistics, of the signature, by those of the batch."""
        mean, var, rate, batches, skipped, skips_nonfinite = running
        row, first = 8 * self._size, statistics.data_ptr()
        flags = 1 | (SKIP_NONFINITE if skips_nonfinite else 0)
        self._library.normkit_move_running(
            _pack_update(
                *(self._size, *self._codes),
                flags | (EQUAL_SHARES if rate is None else 0),
                0.0 if rate is None else float(rate),
                *(first, first + 2 * row, first + 3 * row),
                0 if mean is None else mean.data_ptr(),
                0 if var is None else var.data_ptr(),
                0 if batches is None else batches.data_ptr(),
                0 if skipped is None else skipped.data_ptr(),
            )
        )
        # Autograd has to notice, as with any change in place.
        increment_version(tuple(t for t in running[:2] if t is not None))

    def apply(self, operands: Operands, statistics: Tensor) -> Tensor:
        """Return act((x − mean)·inv_std·weight + bias + residual)."""
        x, weight, bias, residual, mask = operands
        y = _empty_like(x)
        mean = statistics.data_ptr()
        self._run(
            *("normkit_forward", self._apply, x, weight, bias, laid_like(residual, x)),
            mask=mask,
            y=y,
            center=mean,
            scale=mean + 8 * self._size,
        )
        return y

    def reduce(
        self,
        dy: Tensor,
        saved: Saved,
        outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> Tensor:
        """Return Σg·weight and Σg·weight·(x − mean) of this rank, g = dy·act′.

        `outputs`: memory for the gradients of weight and bias, and for g; or None.
        """
        x, weight, bias, residual, mask, gate, (statistics,) = saved
        sums = self._sums()
        mean, row = statistics.data_ptr(), 8 * self._size
        dweight, dbias, gated = outputs
        self._run(
            *("normkit_backward", self._reduce, x, weight, bias, residual),
            mask=mask,
            dy=dy,
            gate=gate,
            dresidual=gated,
            dweight=dweight,
            dbias=dbias,
            center=mean,
            scale=mean + row,
            sums=sums.data_ptr(),
        )
        return sums

    def gradient(self, dy: Tensor, saved: Saved, sums: Tensor) -> Tensor:
        """Return dx from the sums of all ranks."""
        x, weight, bias, residual, mask, gate, (statistics,) = saved
        dx = _empty_like(x)
        mean, row = statistics.data_ptr(), 8 * self._size
        self._run(
            *("normkit_gradient_over_ranks", self._apply, x, weight, bias, residual),
            mask=mask,
            dy=dy,
            gate=gate,
            dx=dx,
            center=mean,
            scale=mean + row,
            count=mean + 3 * row,
            sums=sums.data_ptr(),
        )
        return dx

    def _run(
        self,
        entry: str,
        fixed: bytes,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        mask: Tensor | None,
        dy: Tensor | None = None,
        gate: Tensor | None = None,
        y: Tensor | None = None,
        dx: Tensor | None = None,
        dresidual: Tensor | None = None,
        dweight: Tensor | None = None,
        dbias: Tensor | None = None,
        center: int = 0,
        scale: int = 0,
        m2: int = 0,
        count: int = 0,
        sums: int = 0,
    ) -> None:
        status = getattr(self._library, entry)(
            fixed
            + _pack(
                0.0,
                x.data_ptr(),
                0 if residual is None else residual.data_ptr(),
                0 if mask is None else mask.data_ptr(),
                0 if weight is None else weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                0 if dy is None else dy.data_ptr(),
                0 if gate is None else gate.data_ptr(),
                0,
                0 if y is None else y.data_ptr(),
                0 if dx is None else dx.data_ptr(),
                0 if dresidual is None else dresidual.data_ptr(),
                0,
                0 if dweight is None else dweight.data_ptr(),
                0 if dbias is None else dbias.data_ptr(),
                *(center, scale, m2, count),
                *(sums, sums + 8 * self._size if sums else 0),
                *(0, 0, 0, 0, 0, 0),
            )
        )
        if status:
            check(status)


def parts_for(
    spec: Spec, operands: Operands, running: Running | None = None
) -> NativeParts | None:
    """Return the parts of this signature; None where the kernels cannot run it."""
    if not spec.centered or spec.given:
        return None
    found = sizes_of(spec, operands, running)
    if found is None:
        return None
    sizes, dtypes = found
    if sizes[0] != 1 or sizes[3] != 1:
        return None  # not a batch norm
    x, *_, mask = operands
    return NativeParts(spec, x, sizes, dtypes, is_masked=mask is not None)

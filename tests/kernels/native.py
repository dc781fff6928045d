"""One call of the native library on plain tensors, packed by hand.

The layers decide threads, streaming and layout for themselves; here a test does.
"""

from __future__ import annotations

from torch import Tensor

from normkit.kernels.cpu.geometry import geometry_of
from normkit.kernels.cpu.loading import (
    CENTERED,
    FIXED,
    GIVEN,
    POINTERS,
    STREAM,
    library,
)
from normkit.kernels.cpu.packing import ACTIVATION_CODES, DTYPES

__all__ = ["CENTERED", "GIVEN", "STREAM", "call"]


# In the order of the native struct.
_POINTERS = (
    *("x", "residual", "mask", "weight", "bias", "dy", "gate", "dsum"),
    *("y", "dx", "dresidual", "sum", "dweight", "dbias"),
    *("center", "scale", "m2", "count", "sum_dy", "sum_dyx", "b", "c"),
)


def call(
    entry: str,
    statistic: tuple[int, ...],
    affine: tuple[int, ...] | None,
    *,
    flags: int = CENTERED,
    threads: int = 1,
    activation: str = "none",
    slope: float = 0.2,
    eps: float = 1e-5,
    **tensors: Tensor | None,
) -> None:
    """Run `entry` on tensors that lie as `x` does and vectors of one float64 each.

    Args:
        entry: `"forward"`, `"backward"` or `"apply_grads"`.
        statistic: Shape of the statistics: of x, with reduced dimensions of size 1.
        affine: Shape of weight and bias, likewise; None without any.
        flags: Of `call.hpp`.
        threads: How many the kernel may use.
        activation: Its name.
        slope: Of leaky_relu.
        eps: Added to the variance.
        tensors: The pointers of the struct, by name.
    """
    native, x = library(), tensors["x"]
    assert native is not None
    assert x is not None
    geometry = geometry_of(x.shape, x.stride(), statistic, affine)
    assert not geometry.reason, geometry.reason
    given = [tensors.pop(name, None) for name in _POINTERS]
    assert not tensors, f"no such pointers: {list(tensors)}"
    weight, bias = (given[k] if given[k] is not None else given[k + 9] for k in (3, 4))
    fixed = FIXED.pack(
        *geometry.sizes,
        DTYPES[x.dtype],
        *(0 if v is None else DTYPES[v.dtype] for v in (weight, bias)),
        *(0, 0, ACTIVATION_CODES[activation], flags, threads, eps, slope),
    )
    pointers = POINTERS.pack(
        0.0, *(0 if t is None else t.data_ptr() for t in given), *(0, 0, 0, 0)
    )
    native.run(f"normkit_{entry}", fixed + pointers)

"""Operands of the launchers, and the arguments that all kernels take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normkit.kernels.gpu import config

__all__ = [
    "NO_GATE",
    "Gate",
    "Statistics",
    "empty",
    "tile_arguments",
    "width_arguments",
]


class Statistics(NamedTuple):
    """Flat vectors, one element per statistic.

    Attributes:
        mean: float64.
        m2: float64.
        inv_std: 1/√(var + eps), float64; of the mean square when not centred. None
            unless asked for.
        scale: inv_std·weight, float32; None unless asked for.
    """

    mean: Tensor
    m2: Tensor
    inv_std: Tensor | None = None
    scale: Tensor | None = None


class Gate(NamedTuple):
    """The activation in the backward: dy is multiplied by its derivative.

    Attributes:
        activation: Name of the activation.
        slope: Slope of leaky_relu.
        bits: For relu, one bit per element: open or not.
        output: For relu, the output, laid out as x: open where positive.
        shift: The bias, flat, or None. With neither `bits` nor `output`, the input of
            the activation is recomputed from x, `shift` and `residual`.
        residual: The residual added before the activation, laid out as x, or None.
    """

    activation: str = "none"
    slope: float = 0.01
    bits: Tensor | None = None
    output: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None

    @property
    def operand(self) -> Tensor | None:
        """Second tensor of the shape of x that the kernel reads, if any."""
        return self.residual if self.output is None else self.output

    @property
    def kind(self) -> str:
        """One of "none", "bits", "output" and "recompute"."""
        if self.bits is not None:
            return "bits"
        if self.output is not None:
            return "output"
        return "none" if self.activation == "none" else "recompute"


NO_GATE = Gate()


def empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor on the device of `x`."""
    return x.new_empty(shape, dtype=dtype)


@config.cached
def width_arguments(width: int) -> dict[str, int]:
    """Return the width in units of its alignment: the compiler sees the divisor."""
    align = config.alignment(width)
    return {"width_units": width // align, "ALIGN": align}


def tile_arguments(tile: config.Tile) -> dict[str, int]:
    """Return the compile-time sizes of a tile."""
    return {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}

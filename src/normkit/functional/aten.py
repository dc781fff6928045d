"""torch's own layer norm on small inputs that need a gradient, verified afterwards.

Below `MOST_VALUES` calling a function of autograd from Python takes longer than the
work, and torch records its operator in C++. It computes x·scale + shift in float32,
which errs by about 1e-7·|mean|/std. So the statistics that it kept for its backward are
verified; where a mean lies further than `MOST_OFFSET` standard deviations from 0, or
anything is not finite, the kernels run instead.

Other layers have no such route: batch and instance norm take torch.nn more Python than
the kernels take, RMS and group norm are slower in torch (`normkit bench small`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.functional.autograd import run
from normkit.functional.memory import memory_mode
from normkit.kernels.choose import asked_for
from normkit.kernels.cpu.call import NativeCall
from normkit.kernels.cpu.loading import library
from normkit.kernels.fixed_order import is_order_fixed

__all__ = ["MOST_OFFSET", "MOST_VALUES", "AtenLayerNorm", "aten_layer_norm"]

# Rows of 768, forward and backward, torch's time over ours, with the operator and with
# the kernels: 0.92 and 0.78 at 32k values, 0.94 and 0.82 at 64k, 0.97 and 0.99 at 128k.
MOST_VALUES = 65_536
# x·scale + shift errs by about 1e-7·|mean|/std; the bound for all of y is 2e-6.
MOST_OFFSET = 4.0


class AtenLayerNorm:
    """A call of one signature, see `aten_layer_norm`."""

    __slots__ = ("_eps", "_kernels", "_sizes", "_verify")

    def __init__(self, kernels: NativeCall, sizes: tuple[int, ...], eps: float) -> None:
        native = library()
        assert native is not None
        self._kernels, self._sizes, self._eps = kernels, sizes, eps
        self._verify = native.verify

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the values by torch's operator, or by the kernels."""
        if (
            torch.is_grad_enabled()
            and (
                x.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
            )
            and memory_mode() is None
            and not is_order_fixed()
        ):
            y, mean, inv_std = torch.native_layer_norm(
                x, self._sizes, weight, bias, self._eps
            )
            rows = inv_std.numel()
            if self._verify(mean.data_ptr(), inv_std.data_ptr(), rows, MOST_OFFSET):
                return y
        return run(self._kernels, x, weight, bias)


def aten_layer_norm(
    kernels: object,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: tuple[int, ...],
    eps: float,
) -> AtenLayerNorm | None:
    """Return the call that tries torch's operator first; None where it does not pay."""
    vectors = [v for v in (weight, bias) if v is not None]
    if (
        isinstance(kernels, NativeCall)
        and x.numel() <= MOST_VALUES
        and x.dtype is torch.float32
        and x.is_contiguous()
        and 0 < eps < 1
        and all(v.dtype is torch.float32 for v in vectors)
        and asked_for() is None
    ):
        return AtenLayerNorm(kernels, sizes, eps)
    return None

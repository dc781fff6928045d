"""torch's own norms on small inputs that need a gradient, verified afterwards.

On few values, calling an autograd function from Python takes longer than the work;
torch records its operators in C++. They compute x·scale + shift in float32, with an
error of about 1e-7·|mean|/std. So the statistics that they save for their backward are
verified; where a mean lies further than `MAX_OFFSET` standard deviations from 0, or
anything is not finite, the kernels run instead.

Not in half precision, where it would save 16 of 60 µs: torch keeps mean and 1/std in
bfloat16 for its backward, and sums the gradients of weight and bias in it, which are
off by 2 to 27 % from 16 rows on (by 0.4 % with the kernels).

RMS and instance norm have no such route: the kernels are faster at every size. Batch
norm has none either: the output that `less_memory()` recomputes would differ from it in
the last bit, for a gain from 0.82 to 0.93 of torch's speed, on 16k values at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.functional.autograd import run
from normkit.functional.memory.block import memory_mode
from normkit.kernels.asked_for import asked_for
from normkit.kernels.cpu.call import NativeCall
from normkit.kernels.cpu.loading import library
from normkit.kernels.deterministic import deterministic_asked_for

__all__ = [
    "MAX_GROUP_VALUES",
    "MAX_LAYER_VALUES",
    "MAX_OFFSET",
    "MAX_STATISTICS",
    "MIN_VALUES_EACH",
    "AtenCall",
    "Operator",
    "Saved",
    "tried_first",
]

# Forward and backward, torch's time over ours, with the operator and with the kernels.
# Layer norm of 200k values 0.91 and 0.81, of 400k 0.93 and 0.78, of 800k 0.92 and 0.79
# in rows of 768, 0.93 and 1.10 in rows of 4096; group norm of 200k values 0.96 and
# 0.86, of 400k 0.94 and 0.94.
MAX_LAYER_VALUES, MAX_GROUP_VALUES = 524_288, 262_144
# Its sums for weight and bias run over the statistics in float32: 65,536 rows of 2 err
# by 1e-5, 8,192 rows of 64 by 2e-6 of random gradients; of a gradient that is one
# number, as behind a mean, the bias drifts by 4e-5 and more, at 1,024 rows by 1e-5 with
# one thread, at 512 by 5e-6.
MAX_STATISTICS, MIN_VALUES_EACH = 512, 16
# x·scale + shift errs by about 1e-7·|mean|/std; the bound for all of y is 2e-6.
MAX_OFFSET = 4.0

# y, the means and 1/√(var + eps)
Saved = tuple[Tensor, Tensor, Tensor]
_is_deterministic, _is_grad_enabled = deterministic_asked_for.get, torch.is_grad_enabled


class Operator(NamedTuple):
    """An operator of torch, and the most values that it is tried on.

    Attributes:
        run: Takes x, weight and bias.
        max_values: Elements of x; beyond, the kernels are faster.
    """

    run: Callable[[Tensor, Tensor | None, Tensor | None], Saved]
    max_values: int


class AtenCall:
    """A call of one signature that tries torch's operator first."""

    __slots__ = ("_kernels", "_operator", "_verify")

    def __init__(self, kernels: NativeCall, operator: Operator) -> None:
        native = library()
        assert native is not None
        self._kernels, self._operator = kernels, operator.run
        self._verify = native.verify

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the values by torch's operator, or by the kernels."""
        if (
            _is_grad_enabled()
            and (
                x.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
            )
            and memory_mode() is None
            and not _is_deterministic()
        ):
            y, mean, inv_std = self._operator(x, weight, bias)
            if self._verify(mean, inv_std, MAX_OFFSET):
                return y
        return run(self._kernels, x, weight, bias)


def tried_first(
    operator: Operator,
    kernels: NativeCall,
    x: Tensor,
    vectors: tuple[Tensor | None, Tensor | None],
) -> NativeCall | AtenCall:
    """Return a call that tries torch's operator first, or `kernels` if faster."""
    weight, bias = vectors
    values = x.numel()
    statistics = torch.Size(kernels.spec.kept(x.shape)).numel()
    if (
        values <= operator.max_values
        and statistics <= MAX_STATISTICS
        and values >= statistics * MIN_VALUES_EACH
        and x.dtype is torch.float32
        and x.is_contiguous()
        and 0 < kernels.spec.eps < 1
        and all(v is None or v.dtype is torch.float32 for v in vectors)
        # The backward of torch's group norm reads the device of a weight beside a bias.
        and (bias is None or weight is not None)
        and asked_for() is None
    ):
        return AtenCall(kernels, operator)
    return kernels

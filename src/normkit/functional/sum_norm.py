"""Layer or RMS norm of x + residual, and the sum, as in a transformer block.

One pass reads x and residual and writes both; its backward adds the sum's own gradient
to dx. Without a kernel for it, or where an output is to be recomputed, it is a sum and
a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from normkit.errors import ShapeError
from normkit.functional.autograd import gradients
from normkit.functional.memory.block import memory_mode
from normkit.functional.signature import find, remember, signature
from normkit.kernels.asked_for import asked_for
from normkit.kernels.cpu.call import NativeCall, call_for
from normkit.kernels.spec import Spec
from normkit.torch_state import is_observed, unwrapped_apply

__all__ = ["sum_norm"]


class SumNorm(torch.autograd.Function):
    """The normalized sum, and the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        call: NativeCall,
    ) -> tuple[Tensor, Tensor]:
        total = torch.empty_like(x)
        operands = x, weight, bias, residual, None
        y, kept = call.forward(operands, None, "some", total)
        ctx.save_for_backward(total, weight, bias, *kept)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return y, total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dtotal = grad_outputs
        of_x, of_residual, of_weight, of_bias = ctx.needs_input_grad[:4]
        dx, dweight, dbias = dtotal, None, None
        if dy is not None:
            total, weight, bias, *kept = ctx.saved_tensors
            saved = total, weight, bias, None, None, None, tuple(kept)
            wanted = of_x or of_residual, of_weight, of_bias, False
            dx, dweight, dbias, _ = gradients(ctx.call, dy, saved, wanted, dtotal)
        return dx if of_x else None, dx if of_residual else None, dweight, dbias, None


_apply, _is_grad_enabled = unwrapped_apply(SumNorm), torch.is_grad_enabled


def sum_norm(
    options: Hashable,
    norm: Callable[[Tensor], Tensor],
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    spec_of: Callable[[], Spec],
) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and x + residual.

    Raises:
        ShapeError: The shapes of x and residual differ.
    """
    if residual.shape != x.shape:
        raise ShapeError(
            f"residual of shape {tuple(residual.shape)} must have the shape of the "
            f"input, {tuple(x.shape)}; use expand()"
        )
    key = call = None
    # The norm of a sum in another layout is copied into torch's.
    is_plain = memory_mode() is None and not is_observed() and x.is_contiguous()
    if is_plain and residual.dtype is x.dtype:
        key = signature(options, (x, weight, bias, residual, None))
    if key is not None:
        call = find(key)
        if call is None and asked_for() in (None, "cpu"):
            call = call_for(spec_of(), (x, weight, bias, residual, None))
            if call is not None and call.sums:
                remember(key, call)
    if call is None or not call.sums:
        total = x + residual
        return norm(total), total
    if _is_grad_enabled() and (
        x.requires_grad
        or residual.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, residual, weight, bias, call)
    total = torch.empty_like(x)
    y, _ = call.forward((x, weight, bias, residual, None), None, "nothing", total)
    return y, total

"""One forward on the kernels and its backward, as a function of autograd.

The first derivative runs on the kernels (`normkit.kernels.composed` derives it); a
second one differentiates `composed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.functional.as_bytes import from_bytes, to_bytes
from normkit.functional.composed import (
    aliases,
    by_constants,
    composed,
    is_transformed,
)
from normkit.functional.memory import (
    is_remembered,
    is_remembered_sum,
    keep,
    memory_mode,
    remember,
)
from normkit.kernels.choose import choose_fused
from normkit.kernels.composed import Grads
from normkit.kernels.epilogue import Epilogue
from normkit.moments import zero_where

__all__ = ["Job", "run"]

_NONE = Epilogue()


class Job:
    """What one forward is asked for, and what it found.

    `measured` is None until it ran, or when the statistics are constants.
    """

    __slots__ = (
        *("dims", "eps", "centered", "activation", "slope"),
        *("measured", "center", "inv_std", "keeps_bytes", "remembers"),
    )

    def __init__(
        self, dims: tuple[int, ...], eps: float, centered: bool, epilogue: Epilogue
    ) -> None:
        self.dims, self.eps, self.centered = dims, eps, centered
        # The residual is left out: autograd keeps it, where it is needed at all.
        self.activation, self.slope = epilogue.activation, epilogue.slope
        self.measured: Any = None
        self.center: Tensor | None = None
        self.inv_std: Tensor | None = None
        self.keeps_bytes = False
        self.remembers = False

    @property
    def count(self) -> Tensor | None:
        """How many values share a statistic; None when that is a constant."""
        return None if self.measured is None else self.measured.count

    def epilogue(self, residual: Tensor | None = None) -> Epilogue:
        """What follows the affine."""
        if residual is None and self.activation == "none":
            return _NONE
        return Epilogue(self.activation, self.slope, residual)

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        valid: Tensor | None,
    ) -> Tensor:
        """Run on the kernels, and keep what they found."""
        kernels = choose_fused(x, self.dims, weight, bias, residual, valid)
        epilogue = self.epilogue(residual)
        if self.center is not None and self.inv_std is not None:
            return kernels.apply_given(
                x, self.center, self.inv_std, weight, bias, epilogue
            )
        y, self.measured, self.inv_std = kernels.normalize(
            *(x, self.dims, weight, bias, self.eps),
            mask=valid,
            centered=self.centered,
            epilogue=epilogue,
        )
        self.center = self.measured.mean
        return y

    def again(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Callable[[], Tensor]:
        """How to compute the output once more from what the backward keeps."""
        # Without the graph behind them: what is kept must not keep more.
        input_again = keep(x.detach())
        residual_again = None if residual is None else keep(residual.detach())
        weight = None if weight is None else weight.detach()
        bias = None if bias is None else bias.detach()

        def compute() -> Tensor:
            with torch.no_grad():
                assert self.center is not None
                assert self.inv_std is not None
                x = input_again()
                added = None if residual_again is None else residual_again()
                center = self.center if self.centered else self.center * 0
                kernels = choose_fused(x, self.dims, weight, bias, added)
                return kernels.apply_given(
                    x, center, self.inv_std, weight, bias, self.epilogue(added)
                )

        return compute


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    job: Job,
) -> Tensor:
    """What `job` asks for; recorded if anything here needs a gradient."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        mode = memory_mode()
        if mode is None:
            return _Standardize.apply(x, weight, bias, residual, valid, job)
        job.keeps_bytes = mode == "int8" and (
            valid is None and (residual is not None or job.activation == "none")
        )
        job.remembers = (
            valid is None and not job.keeps_bytes and _pays(residual, job.activation)
        )
        y = _Standardize.apply(x, weight, bias, residual, valid, job)
        if job.remembers:
            again = job.again(x, weight, bias, residual)
            remember(y, again, is_sum=residual is not None)
        return y
    return job.forward(x, weight, bias, residual, valid)


def _pays(residual: Tensor | None, activation: str) -> bool:
    """Whether keeping the residual for the output's sake keeps no more than before."""
    if residual is None:
        return True
    if is_remembered_sum(residual):
        return False
    # A plain sum needs no residual for its gradients.
    return activation != "none" or is_remembered(residual)


class _Standardize(torch.autograd.Function):
    """y from x and its statistics; the statistics' dependence on x is in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        valid: Tensor | None,
        job: Job,
    ) -> Tensor:
        y = job.forward(x, weight, bias, residual, valid)
        gate = None
        if residual is not None and not job.remembers:
            if job.activation == "relu":
                # Whoever reads y keeps it anyway; the residual would be kept for us.
                residual, gate = None, y
            elif job.activation == "none":
                residual = None
        center = job.center
        if job.keeps_bytes:
            assert center is not None
            ctx.kept_dtype = x.dtype
            x, center = to_bytes(x, center, job.dims, centered=job.centered)
        ctx.save_for_backward(
            *(x, weight, bias, residual, valid, gate, center, job.inv_std, job.count)
        )
        ctx.job = job
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        if ctx.job.keeps_bytes:
            saved = from_bytes(saved, ctx.kept_dtype)
        if torch.is_grad_enabled() or is_transformed(dy):
            grads = _differentiable_grads(dy, saved, ctx.job, wanted)
        else:
            x, weight, bias, residual, valid, gate, center, inv_std, count = saved
            job: Job = ctx.job
            kernels = choose_fused(x, job.dims, weight, bias, residual, valid, dy)
            grads = kernels.normalize_grads(
                *(dy, x, weight, bias, center, inv_std, count),
                mask=valid,
                centered=job.centered,
                y=gate,
                epilogue=job.epilogue(residual),
                wanted=wanted,
            )
        return (*grads, None, None)


def _differentiable_grads(
    dy: Tensor,
    saved: tuple[Tensor, ...],
    job: Job,
    wanted: tuple[bool, ...],
) -> Grads:
    """The same gradients as a graph of their own, for create_graph=True."""
    x, weight, bias, residual, *others = saved
    x, weight, bias, residual = aliases(x, weight, bias, residual)
    valid, gate, center, inv_std, count = others
    with_graph = torch.is_grad_enabled()
    assert x is not None
    epilogue = job.epilogue(residual)
    if gate is not None:
        # Where the relu was open is a constant: its second derivative is 0.
        dy, epilogue = zero_where(gate <= 0, dy), _NONE
    if valid is not None:
        dy = zero_where(~valid, dy)
    dresidual = dy if wanted[3] and residual is None else None
    with torch.enable_grad():
        if count is None:
            y = by_constants(x, center, inv_std, weight, bias, epilogue)
        else:
            y, _ = composed(
                *(x, job.dims, weight, bias, job.eps),
                mask=valid,
                centered=job.centered,
                epilogue=epilogue,
            )
    named = zip((x, weight, bias, residual), wanted, strict=True)
    is_asked = [is_wanted and t is not None for t, is_wanted in named]
    inputs = [
        t
        for t, asked in zip((x, weight, bias, residual), is_asked, strict=True)
        if asked and t is not None
    ]
    found = iter(
        torch.autograd.grad(y, inputs, dy, create_graph=with_graph) if inputs else ()
    )
    dx, dweight, dbias, through = (next(found) if asked else None for asked in is_asked)
    return dx, dweight, dbias, through if dresidual is None else dresidual

"""Measure, standardize, and the backward of both.

    y = act((x − mean)·inv_std·weight + bias + residual)

over the values that share a statistic. The first derivative runs on the kernels
(`normkit.kernels.composed` derives it); higher derivatives, forward mode, `torch.func`
and `torch.compile` run `composed`, the same map in differentiable torch operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.errors import ShapeError
from normkit.functional.memory import memory_mode, remember
from normkit.kernels.choose import choose_fused
from normkit.kernels.composed import Grads
from normkit.kernels.epilogue import Epilogue, activate
from normkit.kernels.primitives import split, vector_dtype
from normkit.moments import (
    Moments,
    broadcast_mask,
    deviations,
    statistics_dtype,
)

__all__ = ["composed", "normalize", "standardize"]

_NONE = Epilogue()


def normalize(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    centered: bool = True,
    epilogue: Epilogue = _NONE,
) -> tuple[Tensor, Moments]:
    """Standardize `x` by its own statistics over `dims`.

    Args:
        x: Values, any shape, any floating dtype.
        dims: Distinct, non-negative dimensions that share a statistic.
        weight: Factor after standardizing, broadcastable to `x` and of as many
            dimensions.
        bias: Summand after that, of the shape of `weight`.
        eps: Added to the variance (or mean square), inside the root.
        mask: Which values count: bool or weights ≥ 0, broadcastable to `x`. Outputs
            and gradients are 0 where it is False or 0.
        centered: Subtract the mean; False divides by the root mean square.
        epilogue: A residual to add and an activation to apply, in the same pass.

    Returns:
        The standardized values, in the dtype of `x`, and the Moments they were
        standardized by: detached, `dims` kept with size 1, float64.

    Raises:
        DtypeError: `x` is not floating point.
        ShapeError: `weight` or `bias` does not broadcast to `x`, or the residual has
            another shape.
    """
    _check_shapes(x, weight, bias, epilogue.residual)
    is_weighted = mask is not None and mask.dtype != torch.bool
    if is_weighted or _is_transformed():
        return composed(
            *(x, dims, weight, bias, eps),
            mask=mask,
            centered=centered,
            epilogue=epilogue,
        )
    valid = None if mask is None else broadcast_mask(mask, x)
    job = _Job(dims, eps, centered, epilogue)
    return _run(x, weight, bias, epilogue.residual, valid, job), job.measured


def standardize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    epilogue: Epilogue = _NONE,
) -> Tensor:
    """Standardize `x` by given statistics, as batch norm does in eval mode.

    Args:
        x: Values, any shape, any floating dtype.
        mean: Subtracted from `x`; as many dimensions as `x`, broadcastable to it.
        var: Population or running variance, of the shape of `mean`.
        weight: Factor after standardizing, broadcastable to `x`.
        bias: Summand after that, of the shape of `weight`.
        eps: Added to the variance, inside the root.
        epilogue: A residual to add and an activation to apply, in the same pass.

    Returns:
        act((x − mean)/√(var + eps)·weight + bias + residual), in the dtype of `x`. The
        statistics are constants: no gradient goes to them, as in torch.
    """
    _check_shapes(x, weight, bias, epilogue.residual)
    wide = vector_dtype(x.device)
    inv_std = torch.rsqrt(var.detach().to(wide) + eps)
    # A copy: running statistics may move before this forward's backward.
    center = mean.detach().to(wide, copy=True)
    if _is_transformed():
        return _by_constants(x, center, inv_std, weight, bias, epilogue)
    dims = tuple(d for d in range(x.dim()) if mean.shape[d] == 1)
    job = _Job(dims, eps, True, epilogue)
    job.center, job.inv_std = center, inv_std
    return _run(x, weight, bias, epilogue.residual, None, job)


def composed(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    mask: Tensor | None = None,
    centered: bool = True,
    epilogue: Epilogue = _NONE,
) -> tuple[Tensor, Moments]:
    """`normalize` in torch operations that every transform of torch understands."""
    compute = statistics_dtype(x.dtype)
    measured = deviations(x, dims, mask)
    values = x.to(compute)
    valid = None
    if mask is not None:
        valid = broadcast_mask(mask, x)
        valid = valid if valid.dtype == torch.bool else valid > 0
        values = torch.where(valid, values, torch.zeros_like(values))
    count = measured.count.to(compute).clamp(min=1e-30)
    var = measured.m2 / count
    if centered:
        y = ((values - measured.hi) - measured.lo) * torch.rsqrt(var + eps)
    else:
        mean = measured.hi + measured.lo
        y = values * torch.rsqrt(var + mean.square() + eps)
    y = _finished(_affine(y, weight, bias), epilogue)
    if valid is not None:
        y = torch.where(valid, y, torch.zeros_like(y))
    moments = measured.to_moments(vector_dtype(x.device)).detach()
    return y.to(x.dtype), moments


class _Job:
    """What one forward is asked for, and what it found.

    `measured` is None until it ran, or when the statistics are constants.
    """

    __slots__ = (
        *("dims", "eps", "centered", "activation", "slope"),
        *("measured", "center", "inv_std", "keeps_bytes"),
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

    @property
    def count(self) -> Tensor | None:
        return None if self.measured is None else self.measured.count

    def epilogue(self, residual: Tensor | None = None) -> Epilogue:
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
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Callable[[], Tensor]:
        """How to compute the output once more from what the backward keeps."""
        # Without the graph behind them: what is kept must not keep more.
        x, version = x.detach(), x._version
        weight = None if weight is None else weight.detach()
        bias = None if bias is None else bias.detach()

        def compute() -> Tensor:
            if x._version != version:
                raise RuntimeError(
                    f"the input of a normalization, of shape {tuple(x.shape)}, was "
                    "changed in place before the backward computed from it again; "
                    "leave it as it is, or run outside of less_memory()"
                )
            with torch.no_grad():
                assert self.center is not None
                assert self.inv_std is not None
                center = self.center if self.centered else self.center * 0
                kernels = choose_fused(x, self.dims, weight, bias)
                return kernels.apply_given(
                    x, center, self.inv_std, weight, bias, self.epilogue()
                )

        return compute


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    job: _Job,
) -> Tensor:
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        mode = memory_mode()
        if mode is None:
            return _Standardize.apply(x, weight, bias, residual, valid, job)
        can_recompute = residual is None and valid is None
        job.keeps_bytes = mode == "int8" and (
            valid is None and (residual is not None or job.activation == "none")
        )
        y = _Standardize.apply(x, weight, bias, residual, valid, job)
        if can_recompute and not job.keeps_bytes:
            remember(y, job.again(x, weight, bias))
        return y
    return job.forward(x, weight, bias, residual, valid)


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
        job: _Job,
    ) -> Tensor:
        y = job.forward(x, weight, bias, residual, valid)
        gate = None
        if residual is not None:
            if job.activation == "relu":
                # Whoever reads y keeps it anyway; the residual would be kept for us.
                residual, gate = None, y
            elif job.activation == "none":
                residual = None
        center = job.center
        if job.keeps_bytes:
            ctx.kept_dtype = x.dtype
            x, center = _to_bytes(x, job)
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
            saved = _from_bytes(saved, ctx.kept_dtype)
        if torch.is_grad_enabled() or _is_transformed(dy):
            grads = _differentiable_grads(dy, saved, ctx.job, wanted)
        else:
            x, weight, bias, residual, valid, gate, center, inv_std, count = saved
            job: _Job = ctx.job
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


def _to_bytes(x: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
    """X − center in 255 equal steps for each statistic, and the size of a step."""
    compute = statistics_dtype(x.dtype)
    assert job.center is not None
    rest = x.to(compute)
    if job.centered:
        hi, lo = split(job.center, compute)
        rest = rest - hi if lo is None else (rest - hi).sub_(lo)
    largest = rest.abs().amax(job.dims, keepdim=True)
    step = (largest / 127).clamp(min=torch.finfo(compute).tiny)
    # A NaN has no byte; it comes back through the step.
    whole = (rest / step).round_().nan_to_num_(0.0, 127.0, -127.0)
    return whole.to(torch.int8), step


def _from_bytes(saved: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The saved tensors with x − center for x, and 0 for the centre."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a forward under less_memory('int8') kept its input as bytes, which has no "
            "exact second derivative; run it under less_memory('recompute')"
        )
    x, *vectors, step, inv_std, count = saved
    rest = (x.to(step.dtype) * step).to(dtype)
    center = torch.zeros_like(inv_std)
    return (rest, *vectors, center, inv_std, count)


def _differentiable_grads(
    dy: Tensor,
    saved: tuple[Tensor, ...],
    job: _Job,
    wanted: tuple[bool, ...],
) -> Grads:
    """The same gradients as a graph of their own, for create_graph=True."""
    x, weight, bias, residual, valid, gate, center, inv_std, count = saved
    with_graph = torch.is_grad_enabled()
    epilogue = job.epilogue(residual)
    if gate is not None:
        # Where the relu was open is a constant: its second derivative is 0.
        dy, epilogue = dy.masked_fill(gate <= 0, 0), _NONE
    if valid is not None:
        dy = dy.masked_fill(~valid, 0)
    dresidual = dy if wanted[3] and residual is None else None
    with torch.enable_grad():
        if count is None:
            y = _by_constants(x, center, inv_std, weight, bias, epilogue)
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
        if asked
    ]
    found = iter(
        torch.autograd.grad(y, inputs, dy, create_graph=with_graph) if inputs else ()
    )
    dx, dweight, dbias, through = (next(found) if asked else None for asked in is_asked)
    return dx, dweight, dbias, through if dresidual is None else dresidual


def _by_constants(
    x: Tensor,
    center: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
) -> Tensor:
    compute = statistics_dtype(x.dtype)
    hi, lo = split(center, compute)
    rest = x.to(compute) - hi
    rest = rest if lo is None else rest - lo
    y = _affine(rest * inv_std.to(compute), weight, bias)
    return _finished(y, epilogue).to(x.dtype)


def _finished(z: Tensor, epilogue: Epilogue) -> Tensor:
    if epilogue.residual is not None:
        z = z + epilogue.residual.to(z.dtype)
    return activate(epilogue.activation, z, epilogue.slope)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y


def _check_shapes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> None:
    statistics_dtype(x.dtype)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and not _fits(t.shape, x.shape):
            raise ShapeError(
                f"{name} of shape {tuple(t.shape)} must have the dimensions of x, "
                f"{tuple(x.shape)}, each of the same size or 1; use view()"
            )
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise ShapeError(
            f"weight of shape {tuple(weight.shape)} and bias of shape "
            f"{tuple(bias.shape)} must have one shape"
        )
    if residual is not None and residual.shape != x.shape:
        raise ShapeError(
            f"residual of shape {tuple(residual.shape)} must have the shape of x, "
            f"{tuple(x.shape)}; use expand()"
        )


def _fits(vector: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if len(vector) != len(shape):
        return False
    for a, b in zip(vector, shape, strict=True):  # noqa: SIM110  half the time of all()
        if a != 1 and a != b:
            return False
    return True


def _is_transformed(*gradients: Tensor) -> bool:
    """Whether torch.compile, export, torch.func or forward mode is watching."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        # autograd.grad(is_grads_batched=True) maps over the backward alone.
        or any(
            torch._C._functorch.is_legacy_batchedtensor(g)  # pyright: ignore[reportAttributeAccessIssue]
            for g in gradients
        )
    )

"""The autograd function: a forward on kernels, and its backward.

`call` is a `NativeCall`, `GpuCall`, `RanksCall` or `Passes`, with its `Spec`. The first
derivative runs on the same kernels as the forward; a second one differentiates the
formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.functional import differentiable
from normkit.functional.memory.block import memory_mode
from normkit.functional.memory.int8_activations import from_bytes, to_bytes
from normkit.functional.memory.recipes import (
    is_recomputable,
    is_recomputable_sum,
    keep,
    make_recomputable,
)
from normkit.functional.passes import Passes
from normkit.functional.ranks_call import RanksCall
from normkit.kernels.cpu.call import NativeCall
from normkit.kernels.cpu.packing import as_mask
from normkit.kernels.gpu.call import GpuCall
from normkit.kernels.primitives import Grads
from normkit.kernels.spec import Running, Saved
from normkit.masks import broadcast_mask
from normkit.moments import Moments
from normkit.torch_state import (
    has_forward_mode,
    has_transforms,
    is_batched_gradient,
    is_compiling,
    is_observed,
    is_plain,
    unwrapped_apply,
)

__all__ = ["gradients", "run"]

Call = NativeCall | GpuCall | RanksCall | Passes


class Job:
    """Request of a caller beyond the values, and the state a forward keeps for it."""

    __slots__ = ("dtype", "keeps_bytes", "kept", "recomputes", "wants_moments")

    def __init__(self, *, wants_moments: bool) -> None:
        self.wants_moments = wants_moments
        self.keeps_bytes = self.recomputes = False
        self.kept: tuple[Tensor, ...] = ()
        self.dtype: torch.dtype | None = None


class Normalize(torch.autograd.Function):
    """Normalized values; their gradient includes that through the statistics of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        how: tuple[Call, Running | None, Job | None],
    ) -> Tensor:
        call, running, job = how
        y, kept = call.forward(
            (x, weight, bias, residual, mask),
            running,
            "some" if job is None or not job.wants_moments else "all",
        )
        gated = None
        if residual is not None and not (job is not None and job.recomputes):
            if call.spec.activation == "relu":
                # The next layer keeps y anyway; the residual would be an extra tensor.
                # A GPU has kept bits.
                residual, gated = None, None if isinstance(call, GpuCall) else y
            elif call.spec.activation == "none":
                residual = None
        if job is not None:
            job.kept = kept
            if job.keeps_bytes:
                center, *_ = call.statistics(kept)
                spec = call.spec
                seen, step = to_bytes(
                    spec.seen(x), center, spec.dims, centered=spec.centered
                )
                job.dtype, x, kept = x.dtype, seen.view(x.shape), (*kept, step)
        ctx.save_for_backward(x, weight, bias, residual, mask, gated, *kept)
        ctx.call, ctx.job = call, job
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, weight, bias, residual, mask, gated, *rest = ctx.saved_tensors
        kept, wanted = tuple(rest), ctx.needs_input_grad[:4]
        call: Call = ctx.call
        spec, job = call.spec, ctx.job
        if job is not None and job.keeps_bytes:
            *rest, step = kept
            x = from_bytes(spec.seen(x), step, job.dtype).view(x.shape)
            kept = call.around_zero(tuple(rest))
        saved = x, weight, bias, residual, mask, gated, kept
        return (*gradients(call, dy, saved, wanted), None, None)


def gradients(
    call: Call,
    dy: Tensor,
    saved: Saved,
    wanted: tuple[bool, ...],
    dtotal: Tensor | None = None,
) -> Grads:
    """Return the gradients of a call, by kernels or as a graph; see `NativeCall`."""
    x, weight, bias, residual, mask, gated, kept = saved
    is_seen, spec = is_observed(), call.spec
    if isinstance(call, GpuCall):
        if type(dy) is Tensor and not (
            is_seen or _is_grad_enabled() or is_batched_gradient(dy)
        ):
            return call.backward(dy, saved, wanted)
        if residual is None:
            gated = call.gates(kept, x)
    if _is_grad_enabled() or is_batched_gradient(dy) or (is_seen and _differs()):
        center, inv_std, _ = call.statistics(kept)
        dx, *others = differentiable.gradients(
            *(spec, dy, (x, weight, bias, residual)),
            (center, inv_std) if spec.given else None,
            *(mask, gated, wanted),
        )
    else:
        if type(call) is not Passes:
            if type(call) is NativeCall and not is_seen and is_plain(dy, dtotal):
                return call.backward(dy, saved, wanted, dtotal)
            if type(call) is RanksCall and not is_seen and is_plain(dy):
                return call.backward(dy, saved, wanted)
            # A mode has to see torch operations, or dy is a tensor subclass.
            kept = tuple(t for t in call.statistics(kept) if t is not None)
        saved = x, weight, bias, residual, mask, gated, kept
        dx, *others = Passes(spec).backward(dy, saved, wanted)
    if dx is not None and dtotal is not None:
        dx = dx + dtotal
    return dx, others[0], others[1], others[2]


_apply, _is_grad_enabled = unwrapped_apply(Normalize), torch.is_grad_enabled


def run(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    running: Running | None = None,
    found: list[Moments] | None = None,
) -> Tensor:
    """Return the output of `call`; recorded by autograd if a gradient is needed.

    `found` receives the Moments of the batch, if a list is given.
    """
    if mask is not None:
        mask = broadcast_mask(mask, x)
        if type(call) is NativeCall:
            mask = call.laid_mask(mask, x)
        elif type(call) is RanksCall:
            mask = as_mask(mask, x)
    if _is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        mode = memory_mode()
        if mode is None and found is None:
            return _apply(x, weight, bias, residual, mask, (call, running, None))
        job = Job(wants_moments=found is not None)
        if mode is not None:
            activation = call.spec.activation
            # The slope of leaky_relu jumps: bytes would give some values the other's.
            job.keeps_bytes = mode == "int8" and (
                mask is None
                and (residual is not None or activation == "none")
                and activation != "leaky_relu"
            )
            job.recomputes = (
                mask is None and not job.keeps_bytes and _pays(residual, activation)
            )
        y = _apply(x, weight, bias, residual, mask, (call, running, job))
        if job.recomputes:
            again = _again(call, job.kept, x, weight, bias, residual)
            make_recomputable(y, again, is_sum=residual is not None)
        kept = job.kept
    else:
        keeps = "nothing" if found is None else "all"
        y, kept = call.forward((x, weight, bias, residual, mask), running, keeps)
    if found is not None:
        found.append(call.moments(kept))
    return y


def _pays(residual: Tensor | None, activation: str) -> bool:
    """Return whether a recipe with the residual keeps no more than the output would."""
    if residual is None:
        return True
    if is_recomputable_sum(residual):
        return False
    # A plain sum needs no residual for its gradients.
    return activation != "none" or is_recomputable(residual)


def _again(
    call: Call,
    kept: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Callable[[], Tensor]:
    """Return a function that recomputes the output from the tensors of the backward."""
    # Detached: what is kept must not keep a graph alive.
    recipes = [
        None if t is None else keep(t.detach()) for t in (x, weight, bias, residual)
    ]

    def compute() -> Tensor:
        with torch.no_grad():
            values, *others = (None if r is None else r() for r in recipes)
            assert values is not None
            center, inv_std, _ = call.statistics(kept)
            learned, offset, added = others
            passes = Passes(call.spec)
            return passes.again(values, learned, offset, added, center, inv_std)

    return compute


def _differs() -> bool:
    """Return whether the backward itself is differentiated, mapped or traced."""
    return is_compiling() or has_transforms() or has_forward_mode()

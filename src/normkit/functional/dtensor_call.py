"""Calls on DTensors: a call of plain tensors on the shards of this rank.

The short way is one node of autograd over the kernels, cached by its signature where
no statistics run over ranks. Everything else runs by DTensor's own functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.functional.autograd import Call, gradients
from normkit.functional.dtensor import (
    as_cut,
    is_dtensor,
    is_reduced,
    is_sharded,
    learned_part,
    lie_as_placed,
    local_running,
    placements_of,
    plan_of,
    shard_of,
    waited,
)
from normkit.functional.memory.block import memory_mode
from normkit.functional.signature import find, remember, signature
from normkit.kernels.cpu.call import NativeCall
from normkit.kernels.spec import Operands, Running, Spec
from normkit.torch_state import (
    dtensor_like,
    is_compiling,
    is_observed,
    local_part,
    unwrapped_apply,
)

__all__ = ["on_shards"]

Execute = Callable[..., Tensor]
CallFor = Callable[[Spec, Operands, Running | None], Call | None]


def on_shards(
    execute: Execute,
    call_for: CallFor,
    spec: Spec,
    operands: Operands,
    running: Running | None,
    **options: Any,
) -> Tensor | None:
    """Run a normalization on the shards of this rank; None where no rule fits.

    Args:
        execute: `engine.execute`.
        call_for: Returns the call of plain operands, or None where they take another
            route than the kernels.
        spec: Options of the forward, for the whole x.
        operands: x, residual and mask are DTensors; weight and bias also tensors that
            are the same on every rank.
        running: Statistics, plain or DTensors.
        options: More arguments of `execute`.
    """
    x, weight, bias, residual, mask = operands
    is_short = (
        residual is None
        and mask is None
        and options.get("found") is None
        and memory_mode() is None
        and not is_observed()
    )
    key = None
    if is_short and running is None:
        key = _signature(spec, x, weight, bias)
        known = find(key)
        if known is not None:
            return _by_kernels(x, weight, bias, *known)
    sizes = tuple((shard_of(x) if is_compiling() else local_part(x)).shape)
    plan = plan_of(spec, x, sizes)
    if plan is None:
        return None
    local_spec, cut = plan
    statistics = local_running(running)
    if running is not None and statistics is None:
        return None
    is_cut = any(d is not None and not is_reduced(spec, d) for d in cut)
    if is_cut and running is not None and not is_sharded(running.mean):
        return None  # a rank holds the running statistics of all channels
    if spec.shape is not None:
        options["aten"] = None  # it names the sizes of the whole
    vectors = (weight, bias)
    placed = [placements_of(v, x, cut, spec) for v in vectors]
    shards = _Shards(execute, local_spec, placed, options)
    if is_short and lie_as_placed(x, vectors, placed):
        parts = [None if t is None else local_part(t) for t in (x, *vectors)]
        call = call_for(local_spec, (*parts, None, None), statistics)  # type: ignore[arg-type]
        if call is not None:
            # A group may end before the cache does.
            if type(call) is NativeCall and key is not None:
                remember(key, (call, shards))
            return _by_kernels(x, weight, bias, call, shards, statistics)
    return shards.run(operands, statistics)


class _Shards(NamedTuple):
    """One rank's part of a normalization, by DTensor's own functions; no tensors.

    Attributes:
        execute: `engine.execute`.
        spec: Options of the forward of a shard.
        placed: Placements of weight and bias, and of their gradients.
        options: More arguments of `execute`.
    """

    execute: Execute
    spec: Spec
    placed: list[tuple[tuple[Any, ...], tuple[Any, ...]] | None]
    options: dict[str, Any]

    def run(self, operands: Operands, running: Running | None) -> Any:
        x: Any
        x, weight, bias, *others = operands
        parts = [
            None if v is None or p is None else learned_part(v, x, *p)
            for v, p in zip((weight, bias), self.placed, strict=True)
        ]
        others = [None if t is None else as_cut(t, x) for t in others]
        seen: Any = (shard_of(x), *parts, *others)
        y = self.execute(self.spec, seen, running, **self.options)
        return type(x).from_local(
            y,
            x.device_mesh,
            x.placements,
            run_check=False,
            shape=x.shape,
            stride=x.stride(),
        )


def _by_kernels(
    x: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    call: Call,
    shards: _Shards,
    running: Running | None = None,
) -> Any:
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return _apply(x, weight, bias, call, shards, running)
    parts = [None if t is None else local_part(t) for t in (x, weight, bias)]
    y, _ = call.forward((*parts, None, None), running, "nothing")  # type: ignore[arg-type]
    return dtensor_like(y, x, x.placements)


class _OnShards(torch.autograd.Function):
    """A call on the kernels as one node of autograd; `to_local` makes one a tensor.

    The second derivative runs `_Shards.run`, which is made of DTensor's own functions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        weight: Any,
        bias: Any,
        call: Call,
        shards: _Shards,
        running: Running | None,
    ) -> Any:
        parts = [None if t is None else local_part(t) for t in (x, weight, bias)]
        y, kept = call.forward((*parts, None, None), running, "some")  # type: ignore[arg-type]
        ctx.save_for_backward(x, weight, bias, *kept)
        ctx.call, ctx.shards = call, shards
        # Only given statistics are needed again: others would be updated twice.
        ctx.running = running if call.spec.given else None
        return dtensor_like(y, x, x.placements)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        (dy,) = grad_outputs
        x, weight, bias, *kept = ctx.saved_tensors
        tensors, wanted = (x, weight, bias), ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            y = ctx.shards.run((*tensors, None, None), ctx.running)
            asked = [t for t, wants in zip(tensors, wanted, strict=True) if wants]
            found = iter(torch.autograd.grad(y, asked, dy, create_graph=True))
            return (*(next(found) if wants else None for wants in wanted), *_NO_MORE)
        if dy.placements != x.placements:
            dy = dy.redistribute(x.device_mesh, x.placements)
        parts = [None if t is None else local_part(t) for t in tensors]
        saved: Any = (*parts, None, None, None, tuple(kept))
        grads = gradients(ctx.call, waited(local_part(dy)), saved, (*wanted, False))
        places = [x.placements, *(p and p[1] for p in ctx.shards.placed)]
        return (
            *(
                None if g is None else dtensor_like(g, t, p)
                for g, t, p in zip(grads, tensors, places, strict=False)
            ),
            *_NO_MORE,
        )


_apply, _NO_MORE = unwrapped_apply(_OnShards), (None, None, None)


def _signature(
    spec: Spec, x: Any, weight: Tensor | None, bias: Tensor | None
) -> Any | None:
    """Return the signature of a call on shards, or None if it cannot be cached."""
    parts: list[Any] = []
    places: list[Any] = []
    for t in (x, weight, bias):
        if t is None:
            parts.append(None)
        elif is_dtensor(t):
            parts.append(local_part(t))
            places.append(t.placements)  # type: ignore[attr-defined]
        else:
            return None
    operation = ("shards", spec, x.shape, x.device_mesh, tuple(places))
    return signature(operation, (*parts, None, None))

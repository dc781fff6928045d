"""Call over ranks on the native kernels: one message and one collective each way.

    forward     measure → message → Σ over ranks → finish → apply
    backward    reduce → Σ over ranks → gradient

Gradients of weight and bias come from the pass that `reduce` makes anyway. The message
is that of `sync.merge_over`, so that a rank on another route, without values for
example, takes part. `Passes` are the same on any other tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.cpu.packing import laid_like
from normkit.kernels.cpu.parts import NativeParts, parts_for
from normkit.kernels.primitives import Grads
from normkit.kernels.spec import Operands, Running, Saved, Spec
from normkit.moments import Moments
from normkit.sync.collective import all_reduce_

__all__ = ["RanksCall", "ranks_call_for"]

_empty_like = torch.empty_like


class RanksCall:
    """Forward and backward of one signature; methods as those of `NativeCall`."""

    __slots__ = ("_kept", "_parts", "spec")

    def __init__(self, spec: Spec, parts: NativeParts, kept: tuple[int, ...]) -> None:
        self.spec, self._parts, self._kept = spec, parts, kept

    def forward(
        self, operands: Operands, running: Running | None, keeps: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `NativeCall.forward`; everything is kept."""
        x, *_, mask = operands
        parts, group = self._parts, self.spec.group
        local = parts.measure(x, mask)
        statistics, is_far = parts.finish(all_reduce_(parts.message(local), group))
        if is_far:
            # The same on every rank, as the sums are.
            message = all_reduce_(parts.message(local, statistics), group)
            statistics, _ = parts.finish(message, statistics)
        y = parts.apply(operands, statistics)
        kept = (statistics,)
        if running is not None:
            parts.update(running, statistics)
        return y, kept

    def backward(self, dy: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> Grads:
        """See `NativeCall.backward`."""
        wants_x, wants_weight, wants_bias, wants_residual = wanted
        x, weight, bias, residual, mask, gate, kept = saved
        dy, residual = laid_like(dy, x), laid_like(residual, x)
        passes = wants_residual and mask is None and self.spec.activation == "none"
        dweight = _empty_like(weight) if wants_weight and weight is not None else None
        dbias = _empty_like(bias) if wants_bias and bias is not None else None
        gated = _empty_like(x) if wants_residual and not passes else None
        saved = x, weight, bias, residual, mask, gate, kept
        sums = self._parts.reduce(dy, saved, (dweight, dbias, gated))
        dx = None
        if wants_x:
            sums = all_reduce_(sums, self.spec.group, "backward")
            dx = self._parts.gradient(dy, saved, sums)
        return dx, dweight, dbias, dy if passes else gated

    def statistics(
        self, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return mean, 1/√(var + eps) and count, as `functional.passes` keeps them."""
        mean, inv_std, _, count = (row.view(self._kept) for row in kept[0])
        return mean, inv_std, count.view(torch.int64)

    def around_zero(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the kept statistics as those of x − mean."""
        statistics = kept[0].clone()
        statistics[0] = 0
        return (statistics,)

    def moments(self, kept: tuple[Tensor, ...]) -> Moments:
        """Return the Moments of the values of all ranks."""
        mean, _, m2, count = (row.view(self._kept) for row in kept[0])
        return Moments(count.view(torch.int64), mean, m2)


def ranks_call_for(
    spec: Spec, operands: Operands, running: Running | None = None
) -> RanksCall | None:
    """Return the call of this signature; None where the kernels cannot run it."""
    if spec.group is None:
        return None
    parts = parts_for(spec, operands, running)
    kept = spec.kept(operands[0].shape)
    return None if parts is None else RanksCall(spec, parts, kept)

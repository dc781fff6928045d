"""Call of one signature on a GPU: geometry is found once and reused, as on a CPU.

channels   statistics, running statistics and scale → apply;  sums → apply_grads
rows       one launch each way, and the sum of the backward's shares
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.kernels.gpu.geometry import Matrix, Runs, laid_out_as
from normkit.kernels.primitives import Grads
from normkit.kernels.spec import Operands, Running, Saved, Spec
from normkit.moments import Moments
from normkit.torch_state import increment_version

__all__ = ["ChannelCall", "GpuCall", "RowCall", "unpacked"]


class _Call:
    """Statistics of a call.

    Of what a forward keeps, the first three are mean, 1/√(var + eps) and m2, flat.
    """

    def __init__(self, layers: Any, spec: Spec, x: Tensor) -> None:
        self.spec = spec
        self._layers = layers
        self._shape = spec.kept(x.shape)
        self._values = x.numel() // torch.Size(self._shape).numel()

    def statistics(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """See `NativeCall.statistics`."""
        center, inv_std = (t.view(self._shape) for t in kept[:2])
        return center, inv_std, self._count(center)

    def moments(self, kept: tuple[Tensor, ...]) -> Moments:
        """See `NativeCall.moments`."""
        mean, m2 = kept[0].view(self._shape), kept[2].view(self._shape)
        return Moments(self._count(mean), mean, m2)

    def around_zero(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See `NativeCall.around_zero`."""
        return (torch.zeros_like(kept[0]), *kept[1:])

    def gates(self, kept: tuple[Tensor, ...], x: Tensor) -> Tensor | None:
        """Return where a relu after a sum was open, as bool laid out as x, or None."""
        return None

    def _count(self, like: Tensor) -> Tensor:
        return torch.full((), self._values, dtype=torch.int64, device=like.device)


class ChannelCall(_Call):
    """Statistics per channel; two launches each way."""

    def __init__(self, layers: Any, spec: Spec, x: Tensor, view: Any) -> None:
        super().__init__(layers, spec, x)
        self._geometry = layers.channels_of(view)

    def forward(
        self, operands: Operands, running: Running | None, keeps: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `NativeCall.forward`; for a relu after a sum it keeps one bit a value."""
        x, weight, bias, residual, _ = operands
        spec = self.spec
        y, found, bits = self._layers.channels_forward(
            *(x, self._geometry, weight, bias, residual),
            *(spec.eps, spec.activation, spec.slope),
            running=running,
            keeps=keeps != "nothing",
        )
        if running is not None and running.mean is not None:
            assert running.var is not None
            # Autograd has to notice, as with any change in place.
            increment_version((running.mean, running.var))
        kept = (found.mean, found.inv_std, found.m2, found.scale)
        return y, kept if bits is None else (*kept, bits)

    def backward(self, dy: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> Grads:
        """See `NativeCall.backward`."""
        x, weight, bias, residual, _, _, (mean, inv_std, _, scale, *bits) = saved
        opened = self._layers.launchers.Gate(
            self.spec.activation,
            self.spec.slope,
            bits=bits[0] if bits else None,
            shift=bias,
            residual=None if residual is None or bits else laid_out_as(x, residual),
        )
        return self._layers.channels_backward(
            *(dy, x, self._geometry, weight, bias, mean, inv_std, scale, opened),
            wanted,
        )

    def gates(self, kept: tuple[Tensor, ...], x: Tensor) -> Tensor | None:
        """See `_Call.gates`."""
        return None if len(kept) < 5 else unpacked(kept[4], x)


class RowCall(_Call):
    """Statistics per row, or per group of a sample; rows stay on the chip."""

    def __init__(
        self, layers: Any, spec: Spec, x: Tensor, matrix: Matrix, runs: Runs | None
    ) -> None:
        super().__init__(layers, spec, x)
        self._matrix, self._runs = matrix, runs

    def forward(
        self, operands: Operands, running: Running | None, keeps: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `NativeCall.forward`; without residual, mask or running statistics."""
        x, weight, bias, _, _ = operands
        y, found = self._layers.launchers.rows_forward(
            *(x, self._matrix),
            eps=self.spec.eps,
            weight=weight,
            bias=bias,
            runs=self._runs,
            centered=self.spec.centered,
        )
        return y, (found.mean, found.inv_std, found.m2)

    def backward(self, dy: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> Grads:
        """See `NativeCall.backward`."""
        x, weight, bias, _, _, _, (mean, inv_std, _) = saved
        dx, dweight, dbias = self._layers.rows_backward(
            *(dy, x, self._matrix, weight, bias, mean, inv_std, self._runs),
            wanted[:3],
            centered=self.spec.centered,
        )
        return (
            dx,
            None if dweight is None or weight is None else dweight.view_as(weight),
            None if dbias is None or bias is None else dbias.view_as(bias),
            None,
        )


GpuCall = ChannelCall | RowCall
"""Forward and backward of one signature; see `GpuBackend.call_for`."""


def unpacked(bits: Tensor, x: Tensor) -> Tensor:
    """Unpack the bits of relu's gates to bool, shaped and laid out as x."""
    place = torch.arange(8, dtype=torch.uint8, device=x.device)
    gates = (bits.unsqueeze(-1) >> place & 1).flatten(1).bool()
    width = x.numel() // bits.shape[0]
    values = gates[:, :width].reshape(-1)
    return torch.empty_like(x, dtype=torch.bool).copy_(
        values.as_strided(x.shape, torch.empty_like(x).stride())
    )

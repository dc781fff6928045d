"""The CPU backend: C++ kernels on plain tensors, several passes fused into one.

    plan      where the values of a statistic lie      loading   the library, its calls
    plain     which tensors may be read by address     packing   tensors into a call
    native/   the kernels: runs, rows, columns, compiled for several instruction sets

Each call packs the geometry, the options and the addresses into one struct. Results
depend neither on the number of threads nor on earlier calls. Where learned vectors vary
along dimensions that the plan has no geometry for, a primitive runs on the reference
backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from normkit.errors import KernelError
from normkit.kernels.composed import Composed
from normkit.kernels.cpu.loading import CALL, UPDATE, library, why_absent
from normkit.kernels.cpu.packing import (
    ACTIVATION_CODES,
    CENTERED,
    DTYPES,
    GIVEN,
    WEIGHTED,
    as_learned,
    as_mask,
    as_statistic,
    count_of,
    doubles,
    flags_of,
    joint_shape,
    kept_shape,
    laid_like,
    one_like,
    packed_call,
    plan_for,
    threads_for,
)
from normkit.kernels.cpu.plain import are_plain, is_watched, reason_against
from normkit.kernels.cpu.plan import plan_of
from normkit.kernels.epilogue import Epilogue
from normkit.kernels.reference import ReferenceBackend
from normkit.moments import Moments

__all__ = ["CpuBackend"]

_NONE = Epilogue()
_reference = ReferenceBackend()


class CpuBackend:
    """C++ kernels on dense CPU tensors of float32, float64, bfloat16 and float16."""

    name = "cpu"
    device_types = ("cpu",)

    def reasons_against(self, x: Tensor, dims: tuple[int, ...]) -> list[str]:
        """Why these kernels cannot reduce `x` over `dims`; empty when they can."""
        reason = reason_against(x) or why_absent()
        reason = reason or plan_for(x, kept_shape(x.shape, dims), None).reason
        return [reason] if reason else []

    def fuses(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        *others: Tensor | None,
    ) -> bool:
        """See `FusedBackend.fuses`."""
        affine = None if weight is None else weight.shape
        plan = plan_for(x, kept_shape(x.shape, dims), affine)
        return not plan.reason and are_plain(weight, *others)

    def serves(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        *others: Tensor | None,
    ) -> bool:
        """No reason against, and fused: the two questions of every call, as one."""
        if reason_against(x) or library() is None:
            return False
        affine = None if weight is None else weight.shape
        plan = plan_of(x.shape, x.stride(), kept_shape(x.shape, dims), affine)
        return not plan.reason and are_plain(weight, *others)

    def moments(
        self, x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None
    ) -> Moments:
        """See `Backend.moments`."""
        shape = kept_shape(x.shape, dims)
        plan = plan_for(x, shape, None)
        if plan.reason or not are_plain(mask):
            return _reference.moments(x, dims, mask)
        mean, m2 = doubles(shape), doubles(shape)
        count, mask = count_of(plan, shape, mask), as_mask(mask, x)
        counts = None if mask is None else count
        self._run(
            "normkit_forward",
            *(plan, x, CENTERED),
            center=mean,
            m2=m2,
            count=counts,
            mask=mask,
        )
        return Moments(count, mean, m2)

    def apply(
        self,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        shift: Tensor | None = None,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.apply`."""
        return self.apply_given(x, center, scale, weight, shift, _NONE)

    def apply_given(
        self,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        epilogue: Epilogue,
    ) -> Tensor:
        """See `FusedBackend.apply_given`."""
        shape, affine = joint_shape(center, scale), joint_shape(weight, bias)
        assert shape is not None
        plan = plan_for(x, shape, affine)
        if plan.reason or not are_plain(center, scale, weight, bias, epilogue.residual):
            plain = Composed(_reference)
            return plain.apply_given(x, center, scale, weight, bias, epilogue)
        y = torch.empty_like(x)
        self._run(
            "normkit_forward",
            *(plan, x, CENTERED | GIVEN, epilogue),
            center=as_statistic(center, shape),
            scale=as_statistic(scale, shape),
            weight=as_learned(weight, affine),
            bias=as_learned(bias, affine),
            residual=laid_like(epilogue.residual, x),
            y=y,
        )
        return y

    def reduce_grads(
        self,
        dy: Tensor,
        x: Tensor,
        center: Tensor,
        dims: tuple[int, ...],
        *,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.reduce_grads`."""
        kept, given = kept_shape(x.shape, dims), joint_shape(center, scale)
        assert given is not None
        # Sums per statistic, or per learned value where the centre varies in a sum.
        is_own = all(given[d] == 1 for d in dims)
        statistic = kept if is_own else given
        affine = joint_shape(weight) if is_own else kept
        plan = plan_for(x, statistic, affine)
        able = not plan.reason and (is_own or weight is None)
        if not able or not are_plain(dy, center, weight, scale):
            return _reference.reduce_grads(
                dy, x, center, dims, weight=weight, scale=scale
            )
        sum_dy, sum_dyx = doubles(kept), doubles(kept)
        self._run(
            "normkit_backward",
            *(plan, x, CENTERED | GIVEN | WEIGHTED),
            dy=laid_like(dy, x),
            center=as_statistic(center, statistic),
            scale=as_statistic(one_like(center) if scale is None else scale, statistic),
            weight=as_learned(weight, affine) if is_own else None,
            sum_dy=sum_dy if is_own else None,
            sum_dyx=sum_dyx if is_own else None,
            dbias=None if is_own else sum_dy,
            dweight=None if is_own else sum_dyx,
        )
        # Per learned value the kernel has applied the scale to each term.
        return sum_dy, sum_dyx * scale if is_own and scale is not None else sum_dyx

    def apply_grads(
        self,
        dy: Tensor,
        x: Tensor,
        center: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.apply_grads`."""
        shape, affine = joint_shape(center, a, b, c), joint_shape(weight)
        assert shape is not None
        plan = plan_for(x, shape, affine)
        if plan.reason or not are_plain(dy, center, a, b, c, weight):
            return _reference.apply_grads(dy, x, center, a, b, c, weight=weight)
        dx = torch.empty_like(x)
        self._run(
            "normkit_apply_grads",
            *(plan, x, CENTERED | GIVEN),
            dy=laid_like(dy, x),
            center=as_statistic(center, shape),
            scale=as_statistic(a, shape),
            b=as_statistic(b, shape),
            c=as_statistic(c, shape),
            weight=as_learned(weight, affine),
            dx=dx,
        )
        return dx

    def normalize(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        mask: Tensor | None = None,
        centered: bool = True,
        epilogue: Epilogue = _NONE,
    ) -> tuple[Tensor, Moments, Tensor]:
        """See `FusedBackend.normalize`."""
        shape, affine = kept_shape(x.shape, dims), joint_shape(weight, bias)
        plan = plan_for(x, shape, affine)
        y = torch.empty_like(x)
        mean, m2, inv_std = doubles(shape), doubles(shape), doubles(shape)
        count, mask = count_of(plan, shape, mask), as_mask(mask, x)
        # Every layer comes through here: written out, it is half as many calls.
        weight, bias = as_learned(weight, affine), as_learned(bias, affine)
        residual = laid_like(epilogue.residual, x)
        self.call(
            "normkit_forward",
            CALL.pack(
                *plan.sizes,
                DTYPES[x.dtype],
                0 if weight is None else DTYPES[weight.dtype],
                0 if bias is None else DTYPES[bias.dtype],
                ACTIVATION_CODES[epilogue.activation],
                flags_of(x, CENTERED if centered else 0),
                threads_for(x),
                eps,
                epilogue.slope,
                x.data_ptr(),
                0 if residual is None else residual.data_ptr(),
                0 if mask is None else mask.data_ptr(),
                0 if weight is None else weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                *(0, 0),
                y.data_ptr(),
                *(0, 0, 0, 0),
                mean.data_ptr(),
                inv_std.data_ptr(),
                m2.data_ptr(),
                0 if mask is None else count.data_ptr(),
                *(0, 0, 0, 0),
            ),
        )
        return y, Moments(count, mean, m2), inv_std

    def normalize_grads(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        center: Tensor,
        inv_std: Tensor,
        count: Tensor | None,
        *,
        mask: Tensor | None = None,
        centered: bool = True,
        epilogue: Epilogue = _NONE,
        y: Tensor | None = None,
        wanted: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """See `FusedBackend.normalize_grads`."""
        shape, affine = joint_shape(center, inv_std), joint_shape(weight, bias)
        assert shape is not None
        plan = plan_for(x, shape, affine)
        wants_x, wants_weight, wants_bias, wants_residual = wanted
        dy = laid_like(dy, x)
        passes_dy = wants_residual and epilogue.activation == "none" and mask is None
        dresidual = torch.empty_like(x) if wants_residual and not passes_dy else None
        dx = torch.empty_like(x) if wants_x or dresidual is not None else None
        dweight = dbias = None
        if wants_weight and weight is not None:
            dweight = torch.empty(weight.shape, dtype=weight.dtype)
        if wants_bias and bias is not None:
            dbias = torch.empty(bias.shape, dtype=bias.dtype)
        # Where relu was open is read from y, so that the residual need not be kept.
        is_gated = y is not None and epilogue.activation == "relu"
        flags = (CENTERED if centered else 0) | (GIVEN if count is None else 0)
        if dx is not None or dweight is not None or dbias is not None:
            self._run(
                "normkit_backward",
                *(plan, x, flags, epilogue),
                dy=dy,
                mask=as_mask(mask, x),
                weight=as_learned(weight, affine),
                bias=as_learned(bias, affine),
                residual=None if is_gated else laid_like(epilogue.residual, x),
                gate=laid_like(y, x) if is_gated else None,
                center=as_statistic(center, shape),
                scale=as_statistic(inv_std, shape),
                count=None if mask is None or count is None else count.contiguous(),
                dx=dx,
                dresidual=dresidual,
                dweight=dweight,
                dbias=dbias,
            )
        if passes_dy:
            dresidual = dy
        return dx if wants_x else None, dweight, dbias, dresidual

    def move_running(
        self,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        moments: Moments,
        rate: float | None,
        *,
        skips_nonfinite: bool,
        num_batches_tracked: Tensor | None = None,
    ) -> Tensor | None:
        """Move running statistics in one call; None where it cannot.

        See `normkit.functional.update_running`, which this is a faster way of.
        """
        native = library()
        buffers = (running_mean, running_var, num_batches_tracked)
        count, mean, m2 = moments.count, moments.mean, moments.m2
        if (
            native is None
            or not are_plain(*buffers, count, mean, m2)
            or not (mean.dtype == m2.dtype == torch.float64)
            or any(
                t is not None and not t.is_contiguous() for t in (*buffers, mean, m2)
            )
            or any(
                t is not None and (t.dtype not in DTYPES or t.numel() != mean.numel())
                for t in buffers[:2]
            )
            or count.dtype != torch.int64
            or is_watched()
        ):
            return None
        is_finite = torch.empty((), dtype=torch.bool)
        if count.dim():
            count = count.expand(mean.shape).contiguous()
        flags = (1 if skips_nonfinite else 0) | (2 if count.dim() else 0)
        flags |= 4 if rate is None else 0
        packed = UPDATE.pack(
            mean.numel(),
            *(0 if t is None else DTYPES[t.dtype] for t in buffers[:2]),
            flags,
            0.0 if rate is None else rate,
            mean.data_ptr(),
            m2.data_ptr(),
            count.data_ptr(),
            *(0 if t is None else t.data_ptr() for t in buffers),
            is_finite.data_ptr(),
        )
        native.run("normkit_move_running", packed)
        # Whoever saved a buffer for a backward has to notice, as with any change.
        increment_version([t for t in buffers if t is not None])
        return is_finite

    def _run(self, name: str, *call: Any, **tensors: Tensor | None) -> None:
        self.call(name, packed_call(*call, **tensors))

    def call(self, name: str, packed: bytes) -> None:
        """Run one entry of the library."""
        native = library()
        if native is None:
            raise KernelError(f"backend 'cpu' cannot run: {why_absent()}")
        native.run(name, packed)

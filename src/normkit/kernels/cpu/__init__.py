"""The CPU backend: C++ kernels on plain tensors, several passes fused into one.

    plan      where the values of a statistic lie      loading   the library, its calls
    plain     which tensors may be read by address
    native/   the kernels: runs, rows, columns, compiled for several instruction sets

Each call packs the geometry, the options and the addresses into one struct. Results
depend neither on the number of threads nor on earlier calls. Where learned vectors vary
along dimensions that the plan has no geometry for, a primitive runs on the reference
backend.
"""

from __future__ import annotations

from functools import lru_cache
from typing import overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from normkit.errors import KernelError
from normkit.kernels.composed import Composed
from normkit.kernels.cpu.loading import CALL, UPDATE, library, why_absent
from normkit.kernels.cpu.plain import are_plain, is_watched, reason_against
from normkit.kernels.cpu.plan import Plan, plan_of
from normkit.kernels.epilogue import ACTIVATIONS, Epilogue
from normkit.kernels.reference import ReferenceBackend
from normkit.moments import Moments

__all__ = ["CpuBackend"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_ACTIVATIONS = {name: k for k, name in enumerate(ACTIVATIONS)}
_CENTERED, _GIVEN, _WEIGHTED, _STREAM = 1, 2, 4, 8

# Below this many values a second thread costs more than it brings.
_SERIAL = 32_768
# Outputs above this many bytes leave the cache before anyone reads them.
_STREAM_BYTES = 8 << 20

_NONE = Epilogue()
_reference = ReferenceBackend()


class CpuBackend:
    """C++ kernels on dense CPU tensors of float32, float64, bfloat16 and float16."""

    name = "cpu"
    device_types = ("cpu",)

    def reasons_against(self, x: Tensor, dims: tuple[int, ...]) -> list[str]:
        """Why these kernels cannot reduce `x` over `dims`; empty when they can."""
        reason = reason_against(x) or why_absent()
        reason = reason or _plan(x, _kept(x.shape, dims), None).reason
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
        plan = _plan(x, _kept(x.shape, dims), affine)
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
        plan = plan_of(x.shape, x.stride(), _kept(x.shape, dims), affine)
        return not plan.reason and are_plain(weight, *others)

    def moments(
        self, x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None
    ) -> Moments:
        """See `Backend.moments`."""
        shape = _kept(x.shape, dims)
        plan = _plan(x, shape, None)
        if plan.reason or not are_plain(mask):
            return _reference.moments(x, dims, mask)
        mean, m2 = _double(shape), _double(shape)
        count, mask = _count(plan, shape, mask), _mask(mask, x)
        counts = None if mask is None else count
        _run(
            *(self, "normkit_forward", plan, x, _CENTERED),
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
        shape, affine = _joint(center, scale), _joint(weight, bias)
        assert shape is not None
        plan = _plan(x, shape, affine)
        if plan.reason or not are_plain(center, scale, weight, bias, epilogue.residual):
            plain = Composed(_reference)
            return plain.apply_given(x, center, scale, weight, bias, epilogue)
        y = torch.empty_like(x)
        _run(
            *(self, "normkit_forward", plan, x, _CENTERED | _GIVEN, epilogue),
            center=_statistic(center, shape),
            scale=_statistic(scale, shape),
            weight=_learned(weight, affine),
            bias=_learned(bias, affine),
            residual=_like(epilogue.residual, x),
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
        kept, given = _kept(x.shape, dims), _joint(center, scale)
        assert given is not None
        # Sums per statistic, or per learned value where the centre varies in a sum.
        is_own = all(given[d] == 1 for d in dims)
        statistic = kept if is_own else given
        affine = _joint(weight) if is_own else kept
        plan = _plan(x, statistic, affine)
        able = not plan.reason and (is_own or weight is None)
        if not able or not are_plain(dy, center, weight, scale):
            return _reference.reduce_grads(
                dy, x, center, dims, weight=weight, scale=scale
            )
        sum_dy, sum_dyx = _double(kept), _double(kept)
        _run(
            *(self, "normkit_backward", plan, x, _CENTERED | _GIVEN | _WEIGHTED),
            dy=_like(dy, x),
            center=_statistic(center, statistic),
            scale=_statistic(_one(center) if scale is None else scale, statistic),
            weight=_learned(weight, affine) if is_own else None,
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
        shape, affine = _joint(center, a, b, c), _joint(weight)
        assert shape is not None
        plan = _plan(x, shape, affine)
        if plan.reason or not are_plain(dy, center, a, b, c, weight):
            return _reference.apply_grads(dy, x, center, a, b, c, weight=weight)
        dx = torch.empty_like(x)
        _run(
            *(self, "normkit_apply_grads", plan, x, _CENTERED | _GIVEN),
            dy=_like(dy, x),
            center=_statistic(center, shape),
            scale=_statistic(a, shape),
            b=_statistic(b, shape),
            c=_statistic(c, shape),
            weight=_learned(weight, affine),
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
        shape, affine = _kept(x.shape, dims), _joint(weight, bias)
        plan = _plan(x, shape, affine)
        y = torch.empty_like(x)
        mean, m2, inv_std = _double(shape), _double(shape), _double(shape)
        count, mask = _count(plan, shape, mask), _mask(mask, x)
        # Every layer comes through here: written out, it is half as many calls.
        weight, bias = _learned(weight, affine), _learned(bias, affine)
        residual = _like(epilogue.residual, x)
        self.call(
            "normkit_forward",
            CALL.pack(
                *plan.sizes,
                _DTYPES[x.dtype],
                0 if weight is None else _DTYPES[weight.dtype],
                0 if bias is None else _DTYPES[bias.dtype],
                _ACTIVATIONS[epilogue.activation],
                _flags(x, _CENTERED if centered else 0),
                _threads(x),
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
        shape, affine = _joint(center, inv_std), _joint(weight, bias)
        assert shape is not None
        plan = _plan(x, shape, affine)
        wants_x, wants_weight, wants_bias, wants_residual = wanted
        dy = _like(dy, x)
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
        flags = (_CENTERED if centered else 0) | (_GIVEN if count is None else 0)
        if dx is not None or dweight is not None or dbias is not None:
            _run(
                *(self, "normkit_backward", plan, x, flags, epilogue),
                dy=dy,
                mask=_mask(mask, x),
                weight=_learned(weight, affine),
                bias=_learned(bias, affine),
                residual=None if is_gated else _like(epilogue.residual, x),
                gate=_like(y, x) if is_gated else None,
                center=_statistic(center, shape),
                scale=_statistic(inv_std, shape),
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
                t is not None and (t.dtype not in _DTYPES or t.numel() != mean.numel())
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
            *(0 if t is None else _DTYPES[t.dtype] for t in buffers[:2]),
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

    def call(self, name: str, packed: bytes) -> None:
        """Run one entry of the library."""
        native = library()
        if native is None:
            raise KernelError(f"backend 'cpu' cannot run: {why_absent()}")
        native.run(name, packed)


def _flags(x: Tensor, flags: int) -> int:
    is_large = x.numel() * x.element_size() > _STREAM_BYTES
    return flags | _STREAM if is_large else flags


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > _SERIAL else 1


def _plan(
    x: Tensor, statistic: tuple[int, ...], affine: tuple[int, ...] | None
) -> Plan:
    return plan_of(x.shape, x.stride(), statistic, affine)


@lru_cache(maxsize=4096)
def _kept(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with `dims` of size 1."""
    return tuple(1 if d in dims else size for d, size in enumerate(shape))


def _joint(*vectors: Tensor | None) -> tuple[int, ...] | None:
    """The shape that the vectors broadcast to; None without any."""
    shape: tuple[int, ...] | None = None
    for v in vectors:
        if v is not None:
            if shape is None:
                shape = v.shape
            elif v.shape != shape:
                shape = _broadcast(shape, v.shape)
    return shape


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


def _double(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float64)


def _one(like: Tensor) -> Tensor:
    return torch.ones((1,) * like.dim(), dtype=torch.float64)


def _count(plan: Plan, shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
    if mask is not None:
        return torch.empty(shape, dtype=torch.int64)
    _, over, _, sub_runs, inner, *_ = plan.sizes
    return torch.scalar_tensor(over * sub_runs * inner, dtype=torch.int64)


def _statistic(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    if v.dtype == torch.float64 and v.shape == shape and v.is_contiguous():
        return v
    return v.detach().to(torch.float64).expand(shape).contiguous()


def _learned(v: Tensor | None, shape: tuple[int, ...] | None) -> Tensor | None:
    if v is None or shape is None:
        return None
    if v.dtype not in _DTYPES:
        v = v.to(torch.float64)
    if v.shape == shape and v.is_contiguous():
        return v
    return v.expand(shape).contiguous()


def _mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A byte for each value of x, in its layout."""
    if mask is None:
        return None
    return torch.empty_like(x, dtype=torch.bool).copy_(mask)


@overload
def _like(t: Tensor, x: Tensor) -> Tensor: ...
@overload
def _like(t: Tensor | None, x: Tensor) -> Tensor | None: ...
def _like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """`t` with the dtype and layout of x."""
    if t is None or (
        t.dtype == x.dtype and t.stride() == x.stride() and t.shape == x.shape
    ):
        return t
    return torch.empty_like(x).copy_(t)


# In the order of the native struct, after x.
_POINTERS = (
    *("residual", "mask", "weight", "bias", "dy", "gate"),
    *("y", "dx", "dresidual", "dweight", "dbias"),
    *("center", "scale", "m2", "count", "sum_dy", "sum_dyx", "b", "c"),
)


def _run(
    kernels: CpuBackend,
    name: str,
    plan: Plan,
    x: Tensor,
    flags: int,
    epilogue: Epilogue = _NONE,
    eps: float = 0.0,
    **tensors: Tensor | None,
) -> None:
    """Pack a call and run it; `tensors` are named as in the native struct."""
    given = [tensors.get(pointer) for pointer in _POINTERS]
    weight, bias = given[2], given[3]
    weight = given[9] if weight is None else weight
    bias = given[10] if bias is None else bias
    packed = CALL.pack(
        *plan.sizes,
        _DTYPES[x.dtype],
        0 if weight is None else _DTYPES[weight.dtype],
        0 if bias is None else _DTYPES[bias.dtype],
        _ACTIVATIONS[epilogue.activation],
        _flags(x, flags),
        _threads(x),
        eps,
        epilogue.slope,
        x.data_ptr(),
        *[0 if t is None else t.data_ptr() for t in given],
    )
    kernels.call(name, packed)

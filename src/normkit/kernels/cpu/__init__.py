"""The CPU backend: C++ kernels on plain tensors, several passes fused into one.

    plan      where the values of a statistic lie      loading   the library, its calls
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

from normkit.errors import KernelError
from normkit.kernels.composed import Composed
from normkit.kernels.cpu.loading import CALL, Library, library, why_absent
from normkit.kernels.cpu.plan import Plan, plan_of
from normkit.kernels.epilogue import ACTIVATIONS, Epilogue
from normkit.kernels.reference import ReferenceBackend
from normkit.moments import Moments
from normkit.views import keepdim_shape

__all__ = ["CpuBackend"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_ACTIVATIONS = {name: k for k, name in enumerate(ACTIVATIONS)}
_CENTERED, _GIVEN, _WEIGHTED, _STREAM = 1, 2, 4, 8

# Below this many values a second thread costs more than it brings.
_SERIAL = 32_768
# Outputs above this many bytes leave the cache before anyone reads them.
_STREAM_BYTES = 8 << 20

_PLAIN = (Tensor, torch.nn.Parameter)
_NONE = Epilogue()
_reference = ReferenceBackend()


class CpuBackend:
    """C++ kernels on dense CPU tensors of float32, float64, bfloat16 and float16."""

    name = "cpu"

    def reasons_against(self, x: Tensor, dims: tuple[int, ...]) -> list[str]:
        """Why these kernels cannot reduce `x` over `dims`; empty when they can."""
        reason = _reason_against(x) or _plan(x, keepdim_shape(x, dims), None).reason
        return [reason] if reason else []

    def fuses(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        *others: Tensor | None,
    ) -> bool:
        """See `FusedBackend.fuses`."""
        shape = None if weight is None else tuple(weight.shape)
        plan = _plan(x, keepdim_shape(x, dims), shape)
        return not plan.reason and _are_plain(weight, *others)

    def moments(
        self, x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None
    ) -> Moments:
        """See `Backend.moments`."""
        shape = keepdim_shape(x, dims)
        plan = _plan(x, shape, None)
        if plan.reason or not _are_plain(mask):
            return _reference.moments(x, dims, mask)
        mean, m2 = _double(shape), _double(shape)
        count, mask = _count(plan, shape, mask), _mask(mask, x)
        counts = None if mask is None else count
        args = {"center": mean, "m2": m2, "count": counts, "mask": mask}
        _run("normkit_forward", plan, x, _CENTERED, **args)
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
        if plan.reason or not _are_plain(
            center, scale, weight, bias, epilogue.residual
        ):
            plain = Composed(_reference)
            return plain.apply_given(x, center, scale, weight, bias, epilogue)
        y = torch.empty_like(x)
        _run(
            *("normkit_forward", plan, x, _CENTERED | _GIVEN, epilogue),
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
        kept, given = keepdim_shape(x, dims), _joint(center, scale)
        assert given is not None
        # Sums per statistic, or per learned value where the centre varies in a sum.
        is_own = all(given[d] == 1 for d in dims)
        statistic = kept if is_own else given
        affine = _joint(weight) if is_own else kept
        plan = _plan(x, statistic, affine)
        able = not plan.reason and (is_own or weight is None)
        if not able or not _are_plain(dy, center, weight, scale):
            return _reference.reduce_grads(
                dy, x, center, dims, weight=weight, scale=scale
            )
        sum_dy, sum_dyx = _double(kept), _double(kept)
        factor = _one(center) if scale is None else scale
        args = {
            "dy": _like(dy, x),
            "center": _statistic(center, statistic),
            "scale": _statistic(factor, statistic),
        }
        flags = _CENTERED | _GIVEN | _WEIGHTED
        if not is_own:
            args |= {"dbias": sum_dy, "dweight": sum_dyx}
            _run("normkit_backward", plan, x, flags, **args)
            return sum_dy, sum_dyx
        args |= {
            "sum_dy": sum_dy,
            "sum_dyx": sum_dyx,
            "weight": _learned(weight, affine),
        }
        _run("normkit_backward", plan, x, flags, **args)
        return sum_dy, sum_dyx if scale is None else sum_dyx * scale

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
        if plan.reason or not _are_plain(dy, center, a, b, c, weight):
            return _reference.apply_grads(dy, x, center, a, b, c, weight=weight)
        dx = torch.empty_like(x)
        _run(
            *("normkit_apply_grads", plan, x, _CENTERED | _GIVEN),
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
        shape, affine = keepdim_shape(x, dims), _joint(weight, bias)
        plan = _plan(x, shape, affine)
        y = torch.empty_like(x)
        mean, m2, inv_std = _double(shape), _double(shape), _double(shape)
        count, mask = _count(plan, shape, mask), _mask(mask, x)
        _run(
            *("normkit_forward", plan, x, _CENTERED if centered else 0, epilogue, eps),
            mask=mask,
            weight=_learned(weight, affine),
            bias=_learned(bias, affine),
            residual=_like(epilogue.residual, x),
            center=mean,
            m2=m2,
            scale=inv_std,
            count=None if mask is None else count,
            y=y,
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
                *("normkit_backward", plan, x, flags, epilogue),
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


def _reason_against(x: Tensor) -> str:
    if type(x) not in _PLAIN:
        return f"x is a {type(x).__name__}, not a plain tensor"
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, not a floating dtype of the kernels"
    if x.layout != torch.strided:
        return f"x is {x.layout}, not strided"
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or x.is_neg():
        return "x is a lazy view or wrapped by a transform: it has no values of its own"
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return "a dispatch mode or a tracer has to see torch operations"
    return why_absent()


def _are_plain(*tensors: Tensor | None) -> bool:
    """Whether each has values in CPU memory that may be read by address."""
    return all(
        t is None
        or (
            type(t) in _PLAIN
            and t.device.type == "cpu"
            and t.layout == torch.strided
            and not torch._C._functorch.is_functorch_wrapped_tensor(t)
            and not t.is_neg()
        )
        for t in tensors
    )


def _plan(
    x: Tensor, statistic: tuple[int, ...], affine: tuple[int, ...] | None
) -> Plan:
    return plan_of(tuple(x.shape), x.stride(), statistic, affine)


def _joint(*vectors: Tensor | None) -> tuple[int, ...] | None:
    """The shape that the vectors broadcast to; None without any."""
    shape: tuple[int, ...] | None = None
    for v in vectors:
        if v is not None and v.shape != shape:
            shape = tuple(
                v.shape if shape is None else torch.broadcast_shapes(shape, v.shape)
            )
    return shape


def _double(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float64)


def _one(like: Tensor) -> Tensor:
    return torch.ones((1,) * like.dim(), dtype=torch.float64)


def _count(plan: Plan, shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
    if mask is not None:
        return torch.empty(shape, dtype=torch.int64)
    _, over, _, sub_runs, inner, *_ = plan.sizes
    return torch.tensor(over * sub_runs * inner)


def _statistic(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    return v.detach().to(torch.float64).expand(shape).contiguous()


def _learned(v: Tensor | None, shape: tuple[int, ...] | None) -> Tensor | None:
    if v is None or shape is None:
        return None
    if v.dtype not in _DTYPES:
        v = v.to(torch.float64)
    return v.expand(shape).contiguous()


def _mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A byte for each value of x, in its layout."""
    if mask is None:
        return None
    return torch.empty_like(x, dtype=torch.bool).copy_(mask)


def _like(t: Tensor | None, x: Tensor) -> Any:
    """`t` with the dtype and layout of x."""
    if t is None or (
        t.dtype == x.dtype and t.stride() == x.stride() and t.shape == x.shape
    ):
        return t
    return torch.empty_like(x).copy_(t)


def _run(
    name: str,
    plan: Plan,
    x: Tensor,
    flags: int,
    epilogue: Epilogue = _NONE,
    eps: float = 0.0,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dy: Tensor | None = None,
    gate: Tensor | None = None,
    y: Tensor | None = None,
    dx: Tensor | None = None,
    dresidual: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    m2: Tensor | None = None,
    count: Tensor | None = None,
    sum_dy: Tensor | None = None,
    sum_dyx: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
) -> None:
    """Pack a call and run it; the tensors are kept alive by the caller's frame."""
    native: Library | None = library()
    if native is None:
        raise KernelError(f"backend 'cpu' cannot run: {why_absent()}")
    values = x.numel()
    if values * x.element_size() > _STREAM_BYTES:
        flags |= _STREAM
    of_weight = weight if weight is not None else dweight
    of_bias = bias if bias is not None else dbias
    pointers = (
        *(x, residual, mask, weight, bias, dy, gate, y, dx, dresidual, dweight, dbias),
        *(center, scale, m2, count, sum_dy, sum_dyx, b, c),
    )
    native.run(
        name,
        CALL.pack(
            *plan.sizes,
            _DTYPES[x.dtype],
            0 if of_weight is None else _DTYPES[of_weight.dtype],
            0 if of_bias is None else _DTYPES[of_bias.dtype],
            _ACTIVATIONS[epilogue.activation],
            flags,
            torch.get_num_threads() if values > _SERIAL else 1,
            eps,
            epilogue.slope,
            *[0 if t is None else t.data_ptr() for t in pointers],
        ),
    )

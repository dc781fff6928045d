"""The entry of every normalization: choose the route, then run it.

y = act((x − mean)·inv_std·weight + bias + residual)
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from normkit.errors import ShapeError
from normkit.functional import autograd, differentiable, gpu_operators
from normkit.functional.aten import AtenCall, Operator, tried_first
from normkit.functional.autograd import Call
from normkit.functional.dtensor import is_dtensor
from normkit.functional.dtensor_call import on_shards
from normkit.functional.ema import update
from normkit.functional.layout import Copied, is_laid_as_torch
from normkit.functional.passes import Passes
from normkit.functional.ranks_call import ranks_call_for
from normkit.functional.route import Route, route_of
from normkit.functional.signature import find, remember, signature
from normkit.kernels.asked_for import asked_for
from normkit.kernels.cpu.call import NativeCall, call_for
from normkit.kernels.epilogue import Epilogue
from normkit.kernels.spec import Operands, Running, Spec
from normkit.masks import broadcast_mask, check_mask
from normkit.moments import Moments, statistics_dtype
from normkit.sync.groups import Ranks
from normkit.torch_state import PLAIN, is_observed

__all__ = ["execute", "normalize", "standardize"]

_NONE = Epilogue()


def execute(
    spec: Spec,
    operands: Operands,
    running: Running | None = None,
    *,
    found: list[Moments] | None = None,
    key: Hashable | None = None,
    aten: Operator | None = None,
    lies_as_input: bool = False,
) -> Tensor:
    """Run one normalization by its route.

    Args:
        spec: Options of the forward; the tensors fit it.
        operands: x, of any shape and floating dtype; weight and bias, of `spec.vector`
            or broadcastable to x; a residual of the shape of x; a mask, bool or
            weights ≥ 0, broadcastable to x.
        running: Statistics to normalize by if `spec.given`, otherwise to update.
        found: List that receives the Moments of the batch, or None.
        key: Signature under which the call is cached.
        aten: torch's operator for the same call, see `aten.tried_first`.
        lies_as_input: The output has the strides of x, not the layout of torch's.
    """
    x, weight, bias, residual, mask = operands
    is_copied = not (lies_as_input or is_laid_as_torch(x))
    if is_copied:
        operands = x.contiguous(), weight, bias, residual, mask
    y, call = _run(spec, operands, running, found, aten)
    if call is not None and key is not None:
        remember(key, Copied(call) if is_copied else call)
    return y


def _run(
    spec: Spec,
    operands: Operands,
    running: Running | None,
    found: list[Moments] | None,
    aten: Operator | None,
) -> tuple[Tensor, Call | AtenCall | None]:
    """Return the output, laid out like x, and the call that a signature may have."""
    x, weight, bias, residual, mask = operands
    if mask is not None:
        check_mask(mask)
    if spec.given and mask is not None and mask.is_floating_point():
        # Weights count in statistics alone. An additive mask is refused on the way.
        mask = broadcast_mask(mask, x) > 0
        operands = x, weight, bias, residual, mask
    if type(x) not in PLAIN and is_dtensor(x):
        y = on_shards(
            *(execute, _call_of_shards, spec, operands, running),
            found=found,
            aten=aten,
        )
        if y is not None:
            return y, None
    route = route_of(spec, operands, running)
    if route is Route.OPERATOR and found is None:
        return gpu_operators.normalize(spec, operands, running), None
    if route is Route.DIFFERENTIABLE:
        if mask is not None:
            mask = spec.seen(broadcast_mask(mask, x))
        operands = x, weight, bias, residual, mask
        if spec.given:
            assert running is not None
            constants = differentiable.constants_of(spec, x, running)
            y = differentiable.normalize_by_constants(spec, operands, *constants)
            return y, None
        y, measured = differentiable.normalize(spec, operands)
        if running is not None:
            update(running, measured)
        if found is not None:
            found.append(measured)
        return y, None
    if asked_for() in (None, "cpu") and type(x) in PLAIN:
        # Copies where they are views; autograd records the copy.
        weight = None if weight is None else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        residual = None if residual is None else residual.resolve_neg()
    operands = x, weight, bias, residual, mask
    call = _kernels_for(spec, operands, running)
    if type(call) is NativeCall and aten is not None:
        first = tried_first(aten, call, x, (weight, bias))
        if type(first) is AtenCall:
            return first.run(x, weight, bias), first
    y = autograd.run(call, x, weight, bias, residual, mask, running, found)
    return y, None if type(call) is Passes else call


def _kernels_for(spec: Spec, operands: Operands, running: Running | None) -> Call:
    """Return the call on the kernels that can run it, `Passes` if none has one."""
    call: Call | None = None
    if asked_for() in (None, "cpu") and type(operands[0]) in PLAIN:
        call = call_for(spec, operands, running)
        if call is None:
            call = ranks_call_for(spec, operands, running)
    if call is None:
        call = gpu_operators.call_for(spec, operands, running)
    return Passes(spec) if call is None else call


def _call_of_shards(
    spec: Spec, operands: Operands, running: Running | None
) -> Call | None:
    if route_of(spec, operands, running) is not Route.KERNELS:
        return None
    return _kernels_for(spec, operands, running)


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
    group: Any = None,
    vector: tuple[int, ...] | None = None,
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
        group: Ranks over which statistics are merged, as in `sync.merge_over`: every
            rank must call forward and backward, even without values. The gradients of
            weight and bias are sums over this rank's values.
        vector: Shape of `weight` and `bias` against `x`, for vectors of as many values
            in one dimension; None as they are.

    Returns:
        The standardized values, in the dtype of `x`, and the Moments they were
        standardized by: detached, `dims` kept with size 1, float64.

    Raises:
        DtypeError: `x` is not floating point.
        ShapeError: `weight` or `bias` does not broadcast to `x`, or the residual has
            another shape.
    """
    residual, activation, slope = epilogue.residual, epilogue.activation, epilogue.slope
    operands, key = (x, weight, bias, residual, mask), None
    if group is None or type(group) is Ranks:
        options = ("normalize", dims, eps, centered, activation, slope, group, vector)
        key = None if is_observed() else signature(options, operands)
    found: list[Moments] = []
    call = find(key)
    if call is not None:
        y = autograd.run(call, x, weight, bias, residual, mask, None, found)
        return y, found[0]
    if vector is None:
        _check_shapes(x, weight, bias, residual)
    else:
        _check_shapes(x, None, None, residual)
    spec = Spec(
        *(dims, eps, centered),
        activation=activation,
        slope=slope,
        group=group,
        vector=vector,
    )
    y = execute(spec, operands, found=found, key=key, lies_as_input=True)
    return y, found[0]


def standardize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
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
        mask: Which values count, broadcastable to `x`; outputs and gradients are 0
            elsewhere.
        epilogue: A residual to add and an activation to apply, in the same pass.

    Returns:
        act((x − mean)/√(var + eps)·weight + bias + residual), in the dtype of `x`. The
        statistics are constants and get no gradient, as in torch.
    """
    _check_shapes(x, weight, bias, epilogue.residual)
    spec = Spec(
        tuple(d for d in range(x.dim()) if mean.shape[d] == 1),
        eps,
        given=True,
        activation=epilogue.activation,
        slope=epilogue.slope,
        statistic=tuple(mean.shape),
    )
    given = Running(mean, var)
    operands = x, weight, bias, epilogue.residual, mask
    return execute(spec, operands, given, lies_as_input=True)


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

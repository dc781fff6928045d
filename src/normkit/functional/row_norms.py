"""Layer, RMS and group norm: statistics per sample, no batch and no state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normkit.errors import ArgumentError, ShapeError
from normkit.functional.arguments import (
    check_eps,
    check_floating,
    check_trailing,
)
from normkit.functional.aten import (
    MAX_GROUP_VALUES,
    MAX_LAYER_VALUES,
    Operator,
    Saved,
)
from normkit.functional.engine import execute
from normkit.functional.nested import on_values
from normkit.functional.remembered import run_remembered
from normkit.functional.signature import signature
from normkit.functional.sum_norm import sum_norm
from normkit.kernels.spec import Spec
from normkit.torch_state import is_observed

__all__ = ["group_norm", "layer_norm", "rms_norm"]

_EPS = torch.finfo(torch.float32).eps


@overload
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    residual: None = None,
    lies_as_input: bool = False,
) -> Tensor: ...
@overload
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    residual: Tensor,
    lies_as_input: bool = False,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    input: Tensor,  # noqa: A002  torch.nn.functional's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    lies_as_input: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalize over the last dimensions, separately at each position.

        y = (x − mean)/√(var + eps)·weight + bias

    Args:
        input: Values, shape `(*, *normalized_shape)`, any floating dtype; nested
            tensors as well, whose sequences are normalized as alone.
        normalized_shape: The sizes of the dimensions that share a statistic.
        weight: Factor per element, of `normalized_shape`.
        bias: Summand per element, of `normalized_shape`.
        eps: Added to the variance, inside the root.
        mask: Which values count, broadcastable to `input`; outputs are 0 elsewhere.
        residual: Added to `input` first, of its shape: the norm is that of the sum, as
            before the next sub-layer of a transformer block.
        lies_as_input: Give the output the strides of `input` whatever they are, so
            that nothing is copied.

    Returns:
        The normalized values, shape and dtype of `input`, contiguous but where
        that is in channels_last. With a residual these, and `input + residual`.

    Raises:
        ShapeError: `input` does not end in `normalized_shape`, or `weight`, `bias` or
            `residual` has another shape.
        ArgumentError: A nested tensor came with a mask.
        DtypeError: `input` is not floating point.

    References:
        Ba, Kiros & Hinton, "Layer Normalization", 2016.
    """
    if residual is not None:
        return _of_sum(
            *("layer_norm", input, residual, normalized_shape, weight, bias, eps, mask)
        )
    sizes, key = tuple(normalized_shape), None
    if not is_observed():
        name = "layer_norm as it lies" if lies_as_input else "layer_norm"
        known = (name, sizes, eps), (input, weight, bias, None, mask)
        if (y := run_remembered(*known)) is not None:
            return y
        key = signature(*known)
    tensors = (input, weight, bias, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            *(layer_norm, tensors, input, normalized_shape, weight, bias),
            eps=eps,
            mask=mask,
            lies_as_input=lies_as_input,
        )
    if input.is_nested:
        return on_values(
            *("layer_norm", input, sizes, mask),
            lambda x: layer_norm(x, sizes, weight, bias, eps),
        )
    spec = _trailing("layer_norm", input, sizes, weight, bias, eps)

    def operator(x: Tensor, w: Tensor | None, b: Tensor | None) -> Saved:
        return torch.native_layer_norm(x, sizes, w, b, eps)

    aten = None if mask is not None else Operator(operator, MAX_LAYER_VALUES)
    operands = input, weight, bias, None, mask
    return execute(spec, operands, key=key, aten=aten, lies_as_input=lies_as_input)


@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    mask: Tensor | None = None,
    residual: None = None,
) -> Tensor: ...
@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    mask: Tensor | None = None,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divide by the root mean square over the last dimensions.

        y = x/√(mean(x²) + eps)·weight

    Args:
        input: Values, shape `(*, *normalized_shape)`, any floating dtype; complex ones
            are left to torch. Nested tensors as in `layer_norm`.
        normalized_shape: The sizes of the dimensions that share a statistic.
        weight: Factor per element, of `normalized_shape`.
        eps: Added to the mean square, inside the root; None takes the machine
            epsilon of the compute dtype (float32 for halves), as torch does.
        mask: Which values count, broadcastable to `input`; outputs are 0 elsewhere.
        residual: Added to `input` first, of its shape; see `layer_norm`.

    Returns:
        The scaled values, shape and dtype of `input`, contiguous but where that is in
        channels_last. With a residual these, and `input + residual`.

    Raises:
        ShapeError: `input` does not end in `normalized_shape`, or `weight` or
            `residual` has another shape.
        DtypeError: `input` is not floating point.

    References:
        Zhang & Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
    """
    if residual is not None:
        return _of_sum(
            *("rms_norm", input, residual, normalized_shape, weight, None, eps, mask)
        )
    sizes, key = tuple(normalized_shape), None
    if not is_observed():
        known = ("rms_norm", sizes, eps), (input, weight, None, None, mask)
        if (y := run_remembered(*known)) is not None:
            return y
        key = signature(*known)
    tensors = (input, weight, mask)
    if input.is_nested:  # whose class would take any function of this name for torch's
        return on_values(
            *("rms_norm", input, sizes, mask),
            lambda x: rms_norm(x, sizes, weight, eps),
        )
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            *(rms_norm, tensors, input, normalized_shape, weight),
            eps=eps,
            mask=mask,
        )
    if input.is_complex() and mask is None:
        # As torch: it divides by √(mean(x²) + eps) of x itself, not of |x|.
        return torch.nn.functional.rms_norm(input, list(sizes), weight, eps)
    spec = _trailing("rms_norm", input, sizes, weight, None, _eps_of(input, eps))
    return execute(spec, (input, weight, None, None, mask), key=key)


def group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalize each group of channels of each sample over its positions.

    Args:
        input: Values, shape `(N, C, *)`, any floating dtype.
        num_groups: Number of groups, a divisor of C.
        weight: Factor per channel, shape `(C,)`.
        bias: Summand per channel, shape `(C,)`.
        eps: Added to the variance, inside the root.
        mask: Which values count, broadcastable to `input`; outputs are 0 elsewhere.

    Returns:
        The normalized values, shape and dtype of `input`, contiguous but where that is
        in channels_last.

    Raises:
        ArgumentError: One value per group.
        ShapeError: C is not divisible by `num_groups`, or a vector does not have C
            elements.
        DtypeError: `input` is not floating point.

    References:
        Wu & He, "Group Normalization", ECCV 2018.
    """
    key = None
    if not is_observed():
        known = ("group_norm", num_groups, eps), (input, weight, bias, None, mask)
        if (y := run_remembered(*known)) is not None:
            return y
        key = signature(*known)
    tensors = (input, weight, bias, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            *(group_norm, tensors, input, num_groups),
            weight=weight,
            bias=bias,
            eps=eps,
            mask=mask,
        )
    check_floating(input, "group_norm")
    check_eps(eps, "group_norm", "finite")
    if input.dim() < 2:
        raise ShapeError(
            "Expected at least 2 dimensions for input tensor but received "
            f"{input.dim()}; group_norm takes (N, C, *)"
        )
    channels = input.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ShapeError(
            "Expected number of channels in input to be divisible by num_groups, but "
            f"got input of shape {list(input.shape)} and num_groups={num_groups}"
        )
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and tuple(vector.shape) != (channels,):
            raise ShapeError(
                f"Expected {name} to be a vector of size equal to the number of "
                f"channels in input, but got {name} of shape {list(vector.shape)} and "
                f"input of shape {list(input.shape)}"
            )
    # torch counts the samples of all groups here, so (2, C, 1) with one channel a
    # group passes and (1, C) does not; the same inputs must raise.
    if input.shape[0] * channels // num_groups * input.shape[2:].numel() == 1:
        raise ArgumentError(
            "group_norm needs more than one value per group (expected more than 1 "
            f"value per channel when training), got shape {tuple(input.shape)} and "
            f"num_groups={num_groups}; use fewer groups"
        )
    grouped = (num_groups, channels // num_groups)
    positions = input.shape[2:]
    spec = Spec(
        tuple(range(2, 3 + len(positions))),
        eps,
        shape=(input.shape[0], *grouped, *positions),
        vector=(1, *grouped, *(1 for _ in positions)),
    )
    sizes = (input.shape[0], channels, positions.numel(), num_groups)

    def operator(x: Tensor, w: Tensor | None, b: Tensor | None) -> Saved:
        return torch.native_group_norm(x, w, b, *sizes, eps)

    aten = None if mask is not None else Operator(operator, MAX_GROUP_VALUES)
    return execute(spec, (input, weight, bias, None, mask), key=key, aten=aten)


def _eps_of(x: Tensor, eps: float | None) -> float:
    """Return `eps`, or the machine epsilon of the compute dtype."""
    if eps is not None:
        return eps
    return _EPS if x.dtype != torch.float64 else torch.finfo(torch.float64).eps


def _trailing(
    name: str,
    x: Tensor,
    sizes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Spec:
    """Check the arguments; return their `Spec`."""
    check_floating(x, name)
    check_eps(eps, name, "finite")
    check_trailing(x, sizes, name, weight=weight, bias=bias)
    first = x.dim() - len(sizes)
    dims, vector = tuple(range(first, x.dim())), (1,) * first + sizes
    return Spec(dims, eps, name == "layer_norm", vector=vector)


def _of_sum(
    name: str,
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and the sum."""
    sizes = tuple(normalized_shape)

    def norm(total: Tensor) -> Tensor:
        if name == "rms_norm":
            return rms_norm(total, sizes, weight, eps, mask=mask)
        assert eps is not None
        return layer_norm(total, sizes, weight, bias, eps, mask=mask)

    if mask is not None or x.is_complex() or x.is_nested:
        total = x + residual
        return norm(total), total
    used = _eps_of(x, eps)
    return sum_norm(
        *((name, "of sum", sizes, used), norm, x, residual, weight, bias),
        lambda: _trailing(name, x, sizes, weight, bias, used),
    )

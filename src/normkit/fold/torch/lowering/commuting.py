"""Activations, pooling and reductions that commute with a map per channel."""

from __future__ import annotations

from normkit.fold.ir.graph import Node, Value
from normkit.fold.ir.nodes.commuting import COUNTS_PADDING, Commuting
from normkit.fold.torch.lowering.call import TorchCall, is_fixed, lowers
from normkit.fold.torch.lowering.moves import first_moved, is_nearest

__all__: list[str] = []


@lowers("relu leaky_relu rrelu")
def _rectified(call: TorchCall) -> Node | None:
    if call.name == "rrelu" and call.get(3, "training", False):
        return None
    return _commuting(call)


@lowers("prelu")
def _prelu(call: TorchCall) -> Node | None:
    # Its slopes are per channel and stay; a scale ≥ 0 passes whatever they are.
    return _commuting(call) if is_fixed(call.get(1, "weight")) else None


@lowers("clamp clamp_min clip")
def _clamped(call: TorchCall) -> Node | None:
    """Lower relu written as a clamp: a lower bound of 0 and no upper one."""
    low, high = call.get(1, "min"), call.get(2, "max")
    if high is not None or isinstance(low, Value) or low != 0:
        return None
    return _commuting(call)


@lowers(
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices "
    "max_pool2d_with_indices max_pool3d_with_indices boolean_dispatch "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d"
)
def _max_pooled(call: TorchCall) -> Node | None:
    return _commuting(call, combined_dims=_spatial(call), passes_shift=True)


@lowers("amax")
def _max_over(call: TorchCall) -> Node | None:
    return _reduced(call, passes_negative=False)


@lowers("max")
def _max(call: TorchCall) -> Node | None:
    if not isinstance(call.get(1, "dim"), int):
        return None
    return _reduced(call, passes_negative=False)


@lowers("avg_pool1d avg_pool2d avg_pool3d")
def _average_pooled(call: TorchCall) -> Node | None:
    padding = call.get(3, "padding", 0)
    pads = any(padding) if isinstance(padding, tuple | list) else padding != 0
    counts_padding = pads and call.get(5, "count_include_pad", True)
    keeps_mean = not counts_padding and call.get(6, "divisor_override") is None
    return _commuting(
        call,
        combined_dims=_spatial(call),
        passes_shift=keeps_mean,
        passes_negative=True,
        why_no_shift=COUNTS_PADDING,
    )


@lowers("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")
def _adaptive_average(call: TorchCall) -> Node | None:
    return _commuting(
        call, combined_dims=_spatial(call), passes_shift=True, passes_negative=True
    )


@lowers("mean")
def _mean(call: TorchCall) -> Node | None:
    return _reduced(call, passes_shift=True)


@lowers("sum")
def _sum(call: TorchCall) -> Node | None:
    return _reduced(call, passes_shift=False)


@lowers("interpolate upsample upsample_nearest upsample_bilinear")
def _interpolated(call: TorchCall) -> Node | None:
    """Lower a weighted mean of neighbours, whose weights sum to 1."""
    if is_nearest(call):
        return first_moved(call)
    return _commuting(
        call, combined_dims=_spatial(call), passes_shift=True, passes_negative=True
    )


@lowers("upsample_nearest1d upsample_nearest2d upsample_nearest3d")
def _copied(call: TorchCall) -> Node | None:
    return first_moved(call)


def _spatial(call: TorchCall) -> tuple[int, ...]:
    """Return the dimensions after the channels: (N, C, *) or, unbatched, (C, *)."""
    x = call.get(0, "input")
    digits = [int(letter) for letter in call.name if letter.isdigit()]
    count = digits[0] if digits else len(x.shape) - 2
    return tuple(range(-count, 0))


def _reduced(
    call: TorchCall, *, passes_shift: bool = True, passes_negative: bool = True
) -> Node | None:
    x, dim = call.value(0, "input"), call.get(1, "dim")
    if x is None or dim is None or not call.makes_floats:
        return None
    if len(call.outputs[0].shape) not in (len(x.shape), len(x.shape) - _count(dim)):
        return None
    dims = tuple(dim) if isinstance(dim, tuple | list) else (dim,)
    keeps = len(call.outputs[0].shape) == len(x.shape)
    return Commuting(
        call.label,
        [x],
        combined_dims=dims,
        dropped_dims=() if keeps else dims,
        passes_shift=passes_shift,
        passes_negative=passes_negative,
    )


def _count(dim: int | tuple[int, ...] | list[int]) -> int:
    return len(dim) if isinstance(dim, tuple | list) else 1


def _commuting(
    call: TorchCall,
    *,
    combined_dims: tuple[int, ...] = (),
    passes_shift: bool = False,
    passes_negative: bool = False,
    why_no_shift: str = "lets a scale through, not a shift",
) -> Node | None:
    x = call.value(0, "input")
    if x is None or len(x.shape) != len(call.outputs[0].shape):
        return None
    return Commuting(
        call.label,
        [x],
        combined_dims=combined_dims,
        passes_shift=passes_shift,
        passes_negative=passes_negative,
        why_no_shift=why_no_shift,
    )

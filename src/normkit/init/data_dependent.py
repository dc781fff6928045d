"""Layer-sequential unit variance: measure, standardize, fold.

Each linear map, in the order they run, is measured on data; the affine map that brings
its outputs to variance 1 is folded into its weight and bias, then the next is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normkit.affine import Affine
from normkit.errors import ArgumentError
from normkit.fold.algebra import fold_output_affine
from normkit.init.fans import LinearMap
from normkit.init.tracer import at_the_start
from normkit.modeling.batch import Forward, call_on
from normkit.moments import Moments, moments
from normkit.progress import tracked

__all__ = ["unit_variance_"]


def unit_variance_(
    model: nn.Module,
    maps: Sequence[LinearMap],
    inputs: Any,
    *,
    forward: Forward = call_on,
    per_channel: bool = False,
    tolerance: float = 0.05,
    max_rounds: int = 10,
    progress: bool = False,
) -> dict[str, float]:
    """Scale each linear map until its outputs have variance 1 on `inputs`, in place.

    Args:
        model: The model; dropout is off, running statistics stay as they are.
        maps: One per layer, in the order they run.
        inputs: The example inputs.
        forward: `forward(model, inputs)`.
        per_channel: Bring every channel to mean 0 (where there is a bias) and variance
            1, not all of them together to variance 1.
        tolerance: Enough is |var − 1| below this. A layer that is called once needs one
            round; one that feeds itself, or is shared, may need more.
        max_rounds: The most rounds per layer.
        progress: Show a progress bar.

    Returns:
        The variance that each layer was left with, by name.

    Raises:
        ArgumentError: A layer whose outputs do not vary or are not finite.
    """
    modules = dict(model.named_modules())
    left: dict[str, float] = {}
    for each in tracked(maps, "initialize", shown=progress):
        for _ in range(max_rounds):
            measured = _measured(model, modules[each.name], each, inputs, forward)
            whole = measured.merge_dim(0)
            # A round changes the outputs by no more than rounding once they are there.
            var = float(whole.var)
            spread = measured.var if per_channel else whole.var
            left[each.name] = var
            if not bool((spread > 0).all() & spread.isfinite().all()):
                raise ArgumentError(
                    f"the outputs of {each.name!r} have variance {var:g} on the "
                    "example inputs; there is nothing to scale: give inputs that vary, "
                    "or leave the layer out by layers="
                )
            if bool(((spread - 1).abs() <= tolerance).all()) and not per_channel:
                break
            if per_channel and _is_standard(measured, each, tolerance):
                break
            _fold(each, _to_unit(measured, whole, per_channel=per_channel))
    return left


def _to_unit(measured: Moments, whole: Moments, *, per_channel: bool) -> Affine:
    if per_channel:
        return Affine.standardize(measured, eps=0.0)
    scale = whole.inv_std(0.0).expand(measured.mean.shape)
    return Affine(scale, torch.zeros_like(scale))


def _is_standard(measured: Moments, each: LinearMap, tolerance: float) -> bool:
    is_unit = (measured.var - 1).abs() <= tolerance
    is_centred = measured.mean.abs() <= tolerance
    return bool((is_unit & is_centred if each.bias is not None else is_unit).all())


def _measured(
    model: nn.Module,
    module: nn.Module,
    each: LinearMap,
    inputs: Any,
    forward: Forward,
) -> Moments:
    """Return the moments of a layer's outputs per channel, over all its calls."""
    calls: list[Moments] = []

    def hook(_: nn.Module, args: Any, output: Tensor) -> None:
        dim = -1 if isinstance(module, nn.Linear) else -1 - _spatial_dims(module)
        dims = tuple(d for d in range(output.dim()) if d != dim % output.dim())
        calls.append(moments(output.detach().double(), dims))

    with at_the_start(model):
        handle = module.register_forward_hook(hook)
        try:
            forward(model, inputs)
        finally:
            handle.remove()
    if not calls:
        raise ArgumentError(
            f"layer {each.name!r} was not reached by the example inputs; leave it out "
            "by layers="
        )
    return Moments.merge_all(calls)


def _fold(each: LinearMap, after: Affine) -> None:
    """Write weight and bias with an affine map of the outputs folded in.

    The shift is left out where there is no bias.
    """
    with torch.no_grad():
        weight, bias = fold_output_affine(each.weight, each.bias, after, each.layout)
        each.weight.copy_(weight)
        if each.bias is not None:
            each.bias.copy_(bias)


def _spatial_dims(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.dim() - 2

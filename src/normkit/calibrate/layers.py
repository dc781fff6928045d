"""Selection of the layers to calibrate, and the measurement of one call.

A layer is calibrated when it keeps running statistics that its eval mode uses. It is
frozen, and left alone, when it stands in eval mode inside a model in training mode:
that is how a layer is frozen on purpose, while a whole model in eval says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import UninitializedBuffer

from normkit.errors import ArgumentError, CalibrationError
from normkit.masks import check_mask
from normkit.modeling.norm_types import holds_constant_statistics
from normkit.moments import Moments, deviations
from normkit.nn.per_activation import PerActivationBatchNorm
from normkit.nn.tracked_layer import TrackedLayer

__all__ = ["NO_STATISTICS", "Layer", "Seen", "find_layers"]


@dataclass(frozen=True)
class Seen:
    """Statistics of the input of one call of one layer, in float64.

    Attributes:
        moments: Over all values of the call, shape `(C,)`.
        mean: What the layer's own estimate averages: the mean of the call, or for
            instance norm the mean over instances of their means.
        var: Likewise, the unbiased variance; nan where there is none.
        weight: How much of it there was: values per channel, or instances.
    """

    moments: Moments
    mean: Tensor
    var: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Layer:
    """A layer with running statistics, by its dotted name."""

    name: str
    module: _NormBase | PerActivationBatchNorm

    @property
    def is_instance(self) -> bool:
        """True if each instance is normalized by its own statistics in training."""
        return isinstance(self.module, _InstanceNorm)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The tensors that a calibration writes, by name."""
        names = ("running_mean", "running_var", "num_batches_tracked")
        found = {name: getattr(self.module, name, None) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def see(self, x: Tensor, mask: Tensor | None) -> Seen:
        """Measure one input of this layer.

        Args:
            x: The input.
            mask: Which values count, broadcastable to `x`.
        """
        if self.is_instance:
            return self._see_instances(x, mask)
        channel_dim = getattr(self.module, "channel_dim", 1) % max(x.dim(), 1)
        dims = tuple(d for d in range(x.dim()) if d != channel_dim)
        if isinstance(self.module, PerActivationBatchNorm):
            self.module.check_shape(x)
            dims = (0,)
        measured = deviations(x.detach(), dims, mask)
        moments = _flat(measured.to_moments(torch.float64))
        weight = moments.count.to(torch.float64)
        return Seen(moments, moments.mean, moments.unbiased_var, weight)

    def _see_instances(self, x: Tensor, mask: Tensor | None) -> Seen:
        no_batch = x.dim() == self.module._get_no_batch_dim()  # type: ignore[operator]
        if no_batch:
            x = x.unsqueeze(0)
            mask = None if mask is None else mask.unsqueeze(0)
        dims = tuple(range(2, x.dim()))
        measured = deviations(x.detach(), dims, mask).to_moments(torch.float64)
        instances = Moments(
            measured.count.expand(measured.mean.shape).flatten(1),
            measured.mean.flatten(1),
            measured.m2.flatten(1),
        )
        # One value has no variance; such an instance says nothing.
        is_used = instances.count > 1
        share = is_used.to(torch.float64)
        weight = share.sum(0)
        total = weight.clamp(min=1.0)
        zero = torch.zeros_like(instances.mean)
        mean = torch.where(is_used, instances.mean, zero).sum(0) / total
        var = torch.where(is_used, instances.unbiased_var, zero).sum(0) / total
        return Seen(instances.merge_dim(0), mean, var, weight)


NO_STATISTICS = "keeps no running statistics"
_OTHER_STATISTICS = "{} keeps no mean and variance for each channel, which it measures"
# The second has a mean and a variance for each value of a sample.
MEASURED = (_NormBase, PerActivationBatchNorm)


def find_layers(
    model: nn.Module, patterns: Sequence[str] | None
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers to calibrate, and a reason for each that is left alone.

    Args:
        model: The model, in the modes that the caller left it in.
        patterns: Dotted names, `*` for any part; None takes all that are not frozen.

    Raises:
        ArgumentError: A pattern that names no layer with running statistics.
        CalibrationError: A lazy layer whose statistics have no shape yet.
    """
    chosen: list[Layer] = []
    untouched: dict[str, str] = {}
    unused = set(() if patterns is None else patterns)
    for name, module in model.named_modules():
        if holds_constant_statistics(module):
            untouched[name] = f"frozen: {type(module).__name__} holds constants"
        if not isinstance(module, MEASURED):
            if isinstance(module, TrackedLayer) and module.running_mean is not None:
                untouched[name] = _OTHER_STATISTICS.format(type(module).__name__)
                unused -= {p for p in unused if fnmatchcase(name, p)}
            continue
        reason = _reason_against(module)
        if reason is None and patterns is not None:
            matching = {p for p in patterns if fnmatchcase(name, p)}
            unused -= matching
            if not matching:
                reason = "not named in layers="
        elif reason is None and model.training and not module.training:
            reason = "frozen: in eval mode inside a model in training mode"
        if reason is not None:
            untouched[name] = reason
            continue
        if isinstance(module.running_mean, UninitializedBuffer):
            raise CalibrationError(
                f"layer {name!r} is lazy and has seen no input yet; run the model once"
            )
        chosen.append(Layer(name, module))
    if unused:
        known = [layer.name for layer in chosen] + list(untouched)
        raise ArgumentError(
            f"layers={sorted(unused)} match no layer with running statistics; "
            f"there are {known}"
        )
    return chosen, untouched


def _reason_against(module: _NormBase | PerActivationBatchNorm) -> str | None:
    if module.running_mean is None or module.running_var is None:
        return NO_STATISTICS
    if not module.track_running_stats and isinstance(module, _InstanceNorm):
        return "uses the statistics of its input in eval, too"
    if getattr(module, "is_frozen", False) or getattr(module, "frozen", False):
        return "frozen"
    return None


def _flat(moments: Moments) -> Moments:
    count = moments.count.reshape(-1) if moments.count.dim() else moments.count
    return Moments(count, moments.mean.reshape(-1), moments.m2.reshape(-1))


def fit_mask(mask: Tensor, x: Tensor, layer: Layer) -> Tensor:
    """Return a mask over samples or positions, shaped for an input of a layer.

    Args:
        mask: Shape `(N,)` or `(N, *positions)`: the leading part of the shape of `x`
            without its channels.
        x: The input of the layer.
        layer: Names the layer and its channel dimension.

    Raises:
        ArgumentError: The mask is no tensor.
        CalibrationError: The shapes do not fit.
    """
    check_mask(mask)
    channel_dim = 1 if layer.is_instance else getattr(layer.module, "channel_dim", 1)
    channel_dim %= max(x.dim(), 1)
    shape: list[Any] = list(x.shape)
    channels = shape.pop(channel_dim)
    if list(mask.shape) != shape[: mask.dim()]:
        raise CalibrationError(
            f"mask of shape {tuple(mask.shape)} does not fit layer {layer.name!r}, "
            f"whose input has shape {tuple(x.shape)} ({channels} channels along dim "
            f"{channel_dim}); give it the leading sizes {tuple(shape)}, or pass mask= "
            "to the layer in the model"
        )
    full = mask.reshape(tuple(mask.shape) + (1,) * (len(shape) - mask.dim()))
    return full.to(x.device).unsqueeze(channel_dim)

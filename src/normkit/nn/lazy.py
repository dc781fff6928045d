"""Layers that learn the number of channels from the first input, then change class.

As torch's lazy modules do; `LazyBatchNorm2d()` is a `BatchNorm2d` after one forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.nn.parameter import UninitializedParameter

from normkit.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normkit.nn.batch_norm_layer import BatchNormLayer
from normkit.nn.instance_norm import (
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    InstanceNormLayer,
)

__all__ = [
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]


class _LazyLayer(_LazyNormBase):
    """Check the first input, with or without a batch dimension, then materialize."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        # torch's layer takes None, and its annotation does not.
        rate: Any = momentum
        super().__init__(eps, rate, affine, track_running_stats, device, dtype)
        # Older torch has no `bias` argument, so it is removed afterwards.
        if not bias:
            self.register_parameter("bias", None)

    def initialize_parameters(  # type: ignore[override]
        self,
        input: Tensor,  # noqa: A002
        *,
        mask: Tensor | None = None,
    ) -> None:
        """Take the number of channels from `input`."""
        # Before anything is materialized, so that a wrong input leaves the layer lazy.
        self._check_input_dim(input)
        unbatched = getattr(self, "_get_no_batch_dim", lambda: None)()
        batch = input.unsqueeze(0) if input.dim() == unbatched else input
        weight: Any = self.weight  # torch's stubs make it no Parameter
        is_temporary = self.bias is None and isinstance(weight, UninitializedParameter)
        if is_temporary:  # torch 2.6 materializes one in any case
            settings: Any = {"device": weight.device, "dtype": weight.dtype}
            bias: Any = UninitializedParameter(**settings)
            self.register_parameter("bias", bias)
        super().initialize_parameters(batch)
        if is_temporary:
            self.register_parameter("bias", None)
        # torch leaves 0 when a checkpoint has materialized the parameters, and when
        # there are none.
        per_channel = (self.weight, self.running_mean)
        known = [v.numel() for v in per_channel if v is not None]
        self.num_features = known[0] if known else batch.shape[1]


class _LazyBatchNorm(_LazyLayer):
    """A lazy batch norm, which takes a process group, too."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            *(eps, momentum, affine, track_running_stats, device, dtype), bias=bias
        )
        if process_group is not None:
            self.process_group = process_group


class LazyBatchNorm1d(_LazyBatchNorm, torch.nn.LazyBatchNorm1d, BatchNormLayer):
    """A `BatchNorm1d` that takes `num_features` from its first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNorm, torch.nn.LazyBatchNorm2d, BatchNormLayer):
    """A `BatchNorm2d` that takes `num_features` from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNorm, torch.nn.LazyBatchNorm3d, BatchNormLayer):
    """A `BatchNorm3d` that takes `num_features` from its first input."""

    cls_to_become = BatchNorm3d


class LazyInstanceNorm1d(_LazyLayer, torch.nn.LazyInstanceNorm1d, InstanceNormLayer):
    """An `InstanceNorm1d` that takes `num_features` from its first input."""

    cls_to_become = InstanceNorm1d


class LazyInstanceNorm2d(_LazyLayer, torch.nn.LazyInstanceNorm2d, InstanceNormLayer):
    """An `InstanceNorm2d` that takes `num_features` from its first input."""

    cls_to_become = InstanceNorm2d


class LazyInstanceNorm3d(_LazyLayer, torch.nn.LazyInstanceNorm3d, InstanceNormLayer):
    """An `InstanceNorm3d` that takes `num_features` from its first input."""

    cls_to_become = InstanceNorm3d

"""Instance norm of 1, 2 and 3 spatial dimensions: one layer, three input checks.

y = (x − mean)/√(var + eps)·weight + bias          per sample and channel
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.functional import instance_norm
from normkit.masks import broadcast_mask
from normkit.nn.parameters import learned
from normkit.nn.running_state import RunningStateLayer, check_momentum
from normkit.nn.tracing import is_recorded, is_recorded_as_torch, recorded_call

__all__ = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "InstanceNormLayer"]


class InstanceNormLayer(RunningStateLayer, torch.nn.modules.instancenorm._InstanceNorm):
    """Base of instance norm of every rank; use the classes named for the rank."""

    siblings: ClassVar = {
        2: "InstanceNorm1d",
        3: "InstanceNorm1d",
        4: "InstanceNorm2d",
        5: "InstanceNorm3d",
    }

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats),
            device=device,
            dtype=dtype,
            bias=bias,
            channel_dim=channel_dim,
        )

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize `input`, a batch or one sample without the batch dimension.

        Args:
            input: Values, of a shape and dtype that the class names.
            mask: Which values count: bool or weights ≥ 0, broadcastable to `input`.
                The output is 0 elsewhere.
        """
        if is_recorded(input):
            if (node := recorded_call(self, input, mask=mask)) is not None:
                return node
            if self._is_recorded_as_torch(input, mask):
                return super().forward(input)
        self._check_input_dim(input)
        self._check_features(input)
        if input.dim() == self._ranks[0]:
            one = None if mask is None else mask.expand(input.shape).unsqueeze(0)
            return self._normalized(input.unsqueeze(0), one).squeeze(0)
        return self._normalized(input, mask)

    def _is_recorded_as_torch(self, x: Tensor, mask: Tensor | None) -> bool:
        """Return whether a tracer observes a call that torch's layer can do."""
        updates = self.training and self.track_running_stats
        return self.channel_dim == 1 and is_recorded_as_torch(
            self, x, mask, updates=updates
        )

    def _normalized(self, batch: Tensor, mask: Tensor | None) -> Tensor:
        if self.channel_dim == 1:
            return self._channels_first(batch, mask)
        if mask is not None:
            mask = broadcast_mask(mask, batch).movedim(self.channel_dim, 1)
        # A view: nothing is copied, and the output has the layout of the input.
        y = self._channels_first(batch.movedim(self.channel_dim, 1), mask)
        return y.movedim(1, self.channel_dim)

    def _channels_first(self, batch: Tensor, mask: Tensor | None) -> Tensor:
        uses_input = self.training or not self.track_running_stats
        if uses_input and self.track_running_stats:
            check_momentum(self, self.momentum)
        # torch's instance norm never counts batches. Only the average over all batches,
        # which torch's does not support, needs the count.
        counter = self.num_batches_tracked if self.momentum is None else None
        return instance_norm(
            batch,
            self.running_mean,
            self.running_var,
            *learned(self),
            uses_input,
            self.momentum,
            self.eps,
            mask=mask,
            num_batches_tracked=counter,
            lies_as_input=self.channel_dim != 1,
        )

    def _check_features(self, input: Tensor) -> None:  # noqa: A002
        is_sample = input.dim() == self._ranks[0]
        dim = self.channel_dim % (input.dim() + is_sample) - is_sample
        if input.shape[dim] == self.num_features:
            return
        if self.affine:
            raise ArgumentError(
                f"expected input's size at dim={dim} to match num_features "
                f"({self.num_features}), but got: {input.shape[dim]}, in an input of "
                f"shape {tuple(input.shape)}; channels lie along "
                f"channel_dim={self.channel_dim} of a batch"
            )
        warnings.warn(
            f"input's size at dim={dim} does not match num_features: "
            f"{input.shape[dim]} instead of {self.num_features}. Construct the layer "
            "with the right num_features, which is not used because affine=False",
            stacklevel=3,
        )


class InstanceNorm1d(InstanceNormLayer, torch.nn.InstanceNorm1d):
    """Normalize each channel of each sample of `(N, C, L)` or `(C, L)` over positions.

        y = (x − mean)/√(var + eps)·weight + bias

    Drop-in for `torch.nn.InstanceNorm1d`: same arguments, same state, an instance of
    it.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance, inside the root.
        momentum: Share of the batch in the new running statistics, in [0, 1]; None
            gives all batches the same share (torch's layer then never updates).
        affine: Learn `weight` and `bias`, shape `(C,)`, from 1 and 0.
        track_running_stats: Keep the averages over samples of the instance means and
            unbiased variances, shape `(C,)`, and use them in eval.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers; float32 also serves half inputs.
        bias: Learn a bias when `affine`.
        channel_dim: The dimension of a batch that channels lie along; -1 takes
            `(N, L, C)`.

    Raises:
        ArgumentError: momentum outside [0, 1], at construction. In forward: another
            number of dimensions, one position per channel, another number of channels
            when `affine`, an eps that is negative or not finite.
        ShapeError: Another number of channels than the running statistics have.
        DtypeError: An input that is not floating point.

    Numerics:
        As `BatchNorm1d`: a batch with a NaN or Inf moves no running statistic.
        `num_batches_tracked` counts only with momentum=None, where the average needs
        it; torch's stays 0 always.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0]], [[100.0, 300.0]]])
        >>> InstanceNorm1d(1)(x)
        tensor([[[-1.0000,  1.0000]],
                [[-1.0000,  1.0000]]])

    References:
        Ulyanov, Vedaldi & Lempitsky, "Instance Normalization: The Missing Ingredient
        for Fast Stylization", 2016.
    """

    shapes: ClassVar = {2: "(C, L)", 3: "(N, C, L)"}


class InstanceNorm2d(InstanceNormLayer, torch.nn.InstanceNorm2d):
    """Normalize each channel of each sample of `(N, C, H, W)` or `(C, H, W)`.

    Drop-in for `torch.nn.InstanceNorm2d`. Arguments, errors and numerics:
    `InstanceNorm1d`.
    """

    shapes: ClassVar = {3: "(C, H, W)", 4: "(N, C, H, W)"}


class InstanceNorm3d(InstanceNormLayer, torch.nn.InstanceNorm3d):
    """Normalize each channel of each sample of `(N, C, D, H, W)` or `(C, D, H, W)`.

    Drop-in for `torch.nn.InstanceNorm3d`. Arguments, errors and numerics:
    `InstanceNorm1d`.
    """

    shapes: ClassVar = {4: "(C, D, H, W)", 5: "(N, C, D, H, W)"}

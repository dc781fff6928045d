"""Batch norm with statistics for each feature at each position: C·H·W of each.

y[n, c, h, w] = (x[n, c, h, w] − mean[c, h, w])/√(var[c, h, w] + eps)·weight + bias
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normkit.errors import ArgumentError, ShapeError
from normkit.functional import normalize, standardize, update_running
from normkit.functional.arguments import (
    check_constants,
    check_eps,
    check_floating,
)
from normkit.nn.tracing import recorded_call
from normkit.nn.tracked_layer import TrackedLayer

__all__ = ["PerActivationBatchNorm"]


class PerActivationBatchNorm(TrackedLayer):
    """Normalize each activation over the batch alone: no position shares a statistic.

        y = (x − mean)/√(var + eps)·weight + bias

    One reading of "batch norm" in the literature, and what it is for fully connected
    layers; for convolutions it gives up their translation equivariance, and needs as
    many parameters and statistics as the map has values.

    Args:
        feature_shape: The shape of a sample, `(C, *)`; an int for `(C,)`.
        eps: Added to the variance, inside the root.
        momentum: Share of the batch in the new running statistics, in [0, 1]; None
            gives all batches the same share.
        affine: Learn `weight` and `bias`, of `feature_shape`, from 1 and 0.
        track_running_stats: Keep `running_mean` and the unbiased `running_var`, of
            `feature_shape`, for eval. False uses the batch in eval, too.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers; float32 also serves half inputs.
        bias: Learn a bias when `affine`.
        process_group: Take the statistics over these ranks, as `SyncBatchNorm` does;
            None is this rank alone.

    Raises:
        ArgumentError: momentum outside [0, 1]; in forward, one sample in training.
        ShapeError: In forward, samples of another shape.
        DtypeError: An input that is not floating point.

    Numerics:
        As `BatchNorm1d`. Each statistic comes from N values only, so the noise of the
        batch is that of a fully connected layer.

    Example:
        >>> layer = PerActivationBatchNorm((3, 4, 4))
        >>> layer(torch.randn(8, 3, 4, 4)).shape, layer.weight.shape
        (torch.Size([8, 3, 4, 4]), torch.Size([3, 4, 4]))
    """

    running_var: Tensor | None
    shown = ("eps", "momentum", "affine", "track_running_stats")

    def __init__(
        self,
        feature_shape: int | Sequence[int],
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
        shape = (feature_shape,) if isinstance(feature_shape, int) else feature_shape
        self.feature_shape = tuple(shape)
        super().__init__(
            self.feature_shape,
            dict.fromkeys(("running_mean", "running_var"), self.feature_shape),
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            bias=bias,
            device=device,
            dtype=dtype,
            process_group=process_group,
        )
        self.reset_parameters()

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize `input`, shape `(N, *feature_shape)`.

        Args:
            input: Values, any floating dtype.
            mask: Which values count: bool or weights ≥ 0, broadcastable to `input`.
                The output is 0 elsewhere.
        """
        if (node := recorded_call(self, input, mask=mask)) is not None:
            return node
        name = type(self).__name__
        check_floating(input, name)
        check_eps(self.eps, name, "positive")
        self.check_shape(input)
        weight, bias = _first(self.weight), _first(self.bias)
        if self.uses_running:
            mean, var = _first(self.running_mean), _first(self.running_var)
            assert mean is not None
            assert var is not None
            check_constants(name, mean, var)
            return standardize(input, mean, var, weight, bias, self.eps, mask=mask)
        group = self.ranks()
        if self.training and input.shape[0] == 1 and group is None:
            raise ArgumentError(
                f"{name} needs more than one sample to train, got shape "
                f"{tuple(input.shape)}; use eval() or a larger batch"
            )
        y, measured = normalize(
            *(input, (0,), weight, bias, self.eps), mask=mask, group=group
        )
        if self.updates_running():
            update_running(
                *(self.running_mean, self.running_var, measured, self.momentum),
                num_batches_tracked=self.num_batches_tracked,
            )
        return y

    def check_shape(self, x: Tensor) -> None:
        """Raise ShapeError unless `x` has the shape `(N, *feature_shape)`."""
        if tuple(x.shape[1:]) != self.feature_shape or not x.dim():
            raise ShapeError(
                f"{type(self).__name__} of feature_shape={self.feature_shape} needs an "
                f"input of shape (N, {', '.join(map(str, self.feature_shape))}), got "
                f"{tuple(x.shape)}; every position has its own statistics"
            )

    def extra_repr(self) -> str:
        """Return the arguments that differ between layers."""
        return f"{self.feature_shape}, {super().extra_repr()}"


def _first(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.unsqueeze(0)

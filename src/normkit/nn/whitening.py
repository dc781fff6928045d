"""Whitening: remove mean, variance and correlation of the channels.

    y = (Σ + eps·1)^(−1/2)·(x − mean)·weight + bias       within each group of channels

Cost: a covariance, D²·M products for D channels a group and M observations, against
D·M of batch norm; and a root, about 10·D³, per group and batch. Loss: information in
the correlation and scale of the channels is removed, and when D nears M the meaning of
a channel changes from batch to batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.errors import ArgumentError, ShapeError
from normkit.functional import update_running
from normkit.functional.arguments import check_eps, check_floating
from normkit.functional.ema import ema_
from normkit.functional.whitening import covariance, inverse_sqrt, newton_inverse_sqrt
from normkit.kernels.deterministic import is_deterministic
from normkit.moments import statistics_dtype
from normkit.nn.tracing import recorded_call
from normkit.nn.tracked_layer import TrackedLayer

__all__ = ["WhiteningBatchNorm"]

METHODS = ("zca", "newton")


class WhiteningBatchNorm(TrackedLayer):
    """Decorrelate the channels of `(N, C, *)` within groups, over batch and positions.

        y = W·(x − mean)·weight + bias,   W = (Σ + eps·1)^(−1/2)

    Args:
        num_features: Number of channels C.
        num_groups: Groups that are whitened separately, a divisor of C. Batch norm is
            `num_groups=C`; smaller groups cost less and need smaller batches.
        eps: Added to the variances, on the diagonal of Σ.
        momentum: Share of the batch in the new running statistics, in [0, 1]; None
            gives all batches the same share.
        affine: Learn `weight` and `bias`, shape `(C,)`, from 1 and 0.
        track_running_stats: Keep `running_mean`, shape `(C,)`, and `running_whitening`,
            the average of W, shape `(num_groups, D, D)`, for eval. False uses the batch
            in eval, too.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers; float32 also serves half inputs.
        bias: Learn a bias when `affine`.
        method: `"zca"`, the exact symmetric root by an eigendecomposition, or
            `"newton"`, an approximate one by `iterations` matrix products, which a GPU
            does many times faster.
        iterations: Steps of Newton's method. With few, directions of little variance
            stay small.
        process_group: Take the statistics over these ranks, as `SyncBatchNorm` does;
            None is this rank alone.

    Raises:
        ArgumentError: `num_groups` does not divide C, an unknown method, momentum
            outside [0, 1]; in forward, one value per channel in training, a mask that
            differs between channels.
        ShapeError: In forward, another number of channels.
        DtypeError: An input that is not floating point.

    Numerics:
        Mean and covariance in float64 where the device has it; no NaN from a rank
        below D, where eps alone bounds W (so the output there is less than 1). With
        fewer observations than D, training outputs do not predict those of eval. The
        average of W is not W of the average; both agree as batches grow. Derivatives
        are exact to any order, coinciding eigenvalues included. A batch with a NaN or
        Inf updates no running statistic.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(512, 4) @ torch.randn(4, 4)
        >>> y = WhiteningBatchNorm(4)(x)
        >>> torch.allclose(y.T @ y / 512, torch.eye(4), atol=1e-3)
        True

    References:
        Huang, Yang, Lang & Deng, "Decorrelated Batch Normalization", CVPR 2018.
        Huang, Zhou, Zhu, Liu & Shao, "Iterative Normalization: Beyond Standardization
        towards Efficient Whitening", CVPR 2019.
    """

    running_whitening: Tensor | None
    shown = (
        *("num_groups", "eps", "momentum", "affine", "track_running_stats"),
        "method",
    )

    def __init__(
        self,
        num_features: int,
        num_groups: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        method: str = "zca",
        iterations: int = 5,
        process_group: Any = None,
    ) -> None:
        if num_groups < 1 or num_features % num_groups:
            raise ArgumentError(
                f"WhiteningBatchNorm needs num_groups to divide num_features, got "
                f"{num_groups} and {num_features}; 1 whitens all channels together"
            )
        if method not in METHODS:
            raise ArgumentError(f"method={method!r} must be 'zca' or 'newton'")
        if iterations < 1:
            raise ArgumentError(
                f"iterations={iterations} must be at least 1; 5 is usual"
            )
        size = num_features // num_groups
        super().__init__(
            (num_features,),
            {
                "running_mean": (num_features,),
                "running_whitening": (num_groups, size, size),
            },
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            bias=bias,
            device=device,
            dtype=dtype,
            process_group=process_group,
        )
        self.num_features, self.num_groups = num_features, num_groups
        self.method, self.iterations = method, iterations
        self.reset_parameters()

    def _reset(self, name: str, buffer: Tensor) -> None:
        super()._reset(name, buffer)
        if name == "running_whitening":
            buffer.copy_(torch.eye(buffer.shape[-1]).expand_as(buffer))

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Whiten `input`, shape `(N, C, *)`; in training, update running statistics.

        Args:
            input: Values, any floating dtype.
            mask: Which observations count: bool or weights ≥ 0, broadcastable to
                `input`, of size 1 along the channels. The output is 0 elsewhere.
        """
        if (node := recorded_call(self, input, mask=mask)) is not None:
            return node
        self._check(input, mask)
        groups = (self.num_groups, self.num_features // self.num_groups)
        # Channels first, everything else behind: (G, D, M).
        columns = input.movedim(1, 0).reshape(*groups, -1)
        seen = None
        if mask is not None:
            whole = mask.expand(input.shape[0], 1, *input.shape[2:])
            seen = whole.reshape(1, 1, -1)
        if self.uses_running:
            y = self._by_running(columns, seen)
        else:
            y = self._by_batch(columns, seen)
        if self.weight is not None:
            y = y * self.weight.view(*groups, 1).to(y.dtype)
        if self.bias is not None:
            y = y + self.bias.view(*groups, 1).to(y.dtype)
        if seen is not None:
            y = torch.where(seen > 0, y, torch.zeros_like(y))
        others = (input.shape[0], *input.shape[2:])
        return y.reshape(self.num_features, *others).movedim(0, 1).to(input.dtype)

    def _by_batch(self, columns: Tensor, seen: Tensor | None) -> Tensor:
        measured, centred, sigma = covariance(columns, seen, self.ranks())
        if self.method == "zca":
            whitening = inverse_sqrt(sigma, self.eps)
        else:
            whitening = newton_inverse_sqrt(sigma, self.eps, self.iterations)
        if self.updates_running():
            with torch.no_grad():
                self._track(measured, whitening.detach())
        return whitening.to(centred.dtype) @ centred

    def _track(self, measured: Any, whitening: Tensor) -> None:
        assert self.running_whitening is not None
        assert self.num_batches_tracked is not None
        rate: Any = self.momentum
        if rate is None:
            rate = (self.num_batches_tracked + 1).to(whitening.dtype).reciprocal()
        is_finite = update_running(
            *(self.running_mean, None, measured, rate),
            num_batches_tracked=self.num_batches_tracked,
        )
        allowed = is_finite & whitening.isfinite().all() & (measured.count > 1).all()
        ema_(self.running_whitening, whitening, rate, allowed)

    def _by_running(self, columns: Tensor, seen: Tensor | None) -> Tensor:
        assert self.running_mean is not None
        assert self.running_whitening is not None
        compute = statistics_dtype(columns.dtype)
        mean = self.running_mean.to(compute, copy=True).view(*columns.shape[:2], 1)
        centred = columns.to(compute) - mean
        if seen is not None:
            centred = torch.where(seen > 0, centred, torch.zeros_like(centred))
        whitening = self.running_whitening.to(compute, copy=True)
        if not is_deterministic():
            return whitening @ centred
        # A matrix product takes an order that suits its whole shape.
        y = torch.zeros_like(centred)
        for d in range(centred.shape[1]):
            y = y + whitening[:, :, d : d + 1] * centred[:, d : d + 1]
        return y

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        name = type(self).__name__
        check_floating(x, name)
        check_eps(self.eps, name, "positive")
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ShapeError(
                f"{name} needs an input of shape (N, {self.num_features}, *), got "
                f"{tuple(x.shape)}"
            )
        alone = self.training and self.ranks() is None
        if alone and x.numel() == self.num_features:
            raise ArgumentError(
                f"{name} needs more than one value per channel to train, got shape "
                f"{tuple(x.shape)}; use eval() or a larger batch"
            )
        channels = (
            1 if mask is None or mask.dim() < x.dim() - 1 else mask.shape[1 - x.dim()]
        )
        if channels != 1:
            raise ArgumentError(
                f"{name} takes a mask of size 1 along the channels, got shape "
                f"{tuple(mask.shape)}; a covariance needs whole observations"  # type: ignore[union-attr]
            )

    def extra_repr(self) -> str:
        """Return the arguments that differ between layers."""
        newton = f", iterations={self.iterations}" if self.method == "newton" else ""
        return f"{self.num_features}, {super().extra_repr()}{newton}"

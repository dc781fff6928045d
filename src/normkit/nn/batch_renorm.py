"""Batch renorm: normalize by the batch, then correct towards the running statistics.

    σ_B = √(var_B + eps),  σ = √(running_var + eps)
    r = σ_B/σ within [1/r_max, r_max],   d = (mean_B − running_mean)/σ within ±d_max
    y = ((x − mean_B)/σ_B·r + d)·weight + bias

Where nothing is clipped, that is the output of eval mode: small or atypical batches
train the network that inference uses. r and d are constants for the gradient.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.functional import batch_norm, normalize
from normkit.functional.arguments import check_eps, check_floating
from normkit.functional.ema import check_buffers
from normkit.functional.measure import measure
from normkit.kernels.epilogue import Epilogue
from normkit.kernels.primitives import vector_dtype
from normkit.masks import broadcast_mask
from normkit.moments import Moments, statistics_dtype
from normkit.nn.batch_norm_layer import BatchNormLayer
from normkit.nn.batch_statistics import with_epilogue
from normkit.nn.layer_ranks import ranks_of
from normkit.nn.opaque_clone import opaque_clone
from normkit.nn.running_state import check_momentum, check_not_recomputed
from normkit.nn.tracing import recorded_call

__all__ = ["BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d", "BatchRenormLayer"]


class BatchRenormLayer(BatchNormLayer):
    """Base of batch renorm of every rank; use the classes named for the rank."""

    siblings: ClassVar = {
        2: "BatchRenorm1d",
        3: "BatchRenorm1d",
        4: "BatchRenorm2d",
        5: "BatchRenorm3d",
    }
    # The correction depends on running statistics, which earlier batches update.
    is_observable = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        channel_dim: int = 1,
        r_max: float = 3.0,
        d_max: float = 5.0,
        renorm_from: int = 5_000,
        d_max_at: int = 25_000,
        r_max_at: int = 40_000,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine),
            device=device,
            dtype=dtype,
            bias=bias,
            channel_dim=channel_dim,
            process_group=process_group,
        )
        if r_max < 1 or d_max < 0:
            raise ArgumentError(
                f"{type(self).__name__} needs r_max of at least 1 and d_max of at "
                f"least 0, got r_max={r_max} and d_max={d_max}; 1 and 0 are batch norm"
            )
        if not 0 <= renorm_from <= min(d_max_at, r_max_at):
            raise ArgumentError(
                f"{type(self).__name__} needs 0 <= renorm_from <= d_max_at, r_max_at, "
                f"got {renorm_from}, {d_max_at} and {r_max_at}; all 0 renorms fully "
                "from the first batch"
            )
        self.r_max, self.d_max = r_max, d_max
        self.renorm_from, self.d_max_at, self.r_max_at = renorm_from, d_max_at, r_max_at

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the bounds on r and on |d| at this batch, as 0-d tensors."""
        assert self.num_batches_tracked is not None
        counter = self.num_batches_tracked
        done = counter.to(vector_dtype(counter.device))

        def share(end: int) -> Tensor:
            if end == self.renorm_from:
                return (done >= end).to(done.dtype)
            return ((done - self.renorm_from) / (end - self.renorm_from)).clamp(0, 1)

        r = 1 + (self.r_max - 1) * share(self.r_max_at)
        return r, self.d_max * share(self.d_max_at)

    def forward(
        self,
        input: Tensor,  # noqa: A002
        *,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalize `input`; in training, update the running statistics with it.

        Args:
            input: Values, of a shape and dtype that the class names.
            mask: Which values count: bool or weights ≥ 0, broadcastable to `input`.
                The output is 0 elsewhere.
            residual: Added to the output, of the shape of `input`.
        """
        if self.training:
            check_not_recomputed(self)
        if not self.training or not self.track_running_stats:
            return super().forward(input, mask=mask, residual=residual)
        node = recorded_call(self, input, mask=mask, residual=residual)
        if node is not None:
            return node
        self._check_input_dim(input)
        check_momentum(self, self.momentum)
        check_buffers(self.running_mean, self.running_var, self.num_batches_tracked)
        if self.is_over_ranks():
            return self._over_ranks(input, mask, residual)
        channel_dim = self.channel_dim % input.dim()
        dims = tuple(d for d in range(input.dim()) if d != channel_dim)
        r, d = self._correction(measure(input, dims, mask))
        # Widened once: the gradients of both products are added, then rounded.
        gain = None if self.weight is None else self.weight.to(r.dtype)
        weight, bias = (r, d) if gain is None else (r * gain, d * gain)
        return batch_norm(
            *(input, self.running_mean, self.running_var),
            *(weight, bias if self.bias is None else bias + self.bias, True),
            *(self.momentum, self.eps),
            mask=mask,
            channel_dim=self.channel_dim,
            num_batches_tracked=self.num_batches_tracked,
            num_batches_skipped=self.skip_counter(),
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
        )

    def _over_ranks(
        self, x: Tensor, mask: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        # Statistics and output come from one collective; the correction needs the
        # statistics, and is a second pass over the output.
        check_floating(x, "batch_norm")
        check_eps(self.eps, "batch_norm", "positive")
        dims, gain, offset = self._along(x)
        y, batch = normalize(
            *(x, dims, None, None, self.eps), mask=mask, group=ranks_of(self)
        )
        wide = statistics_dtype(x.dtype)
        r, d = (self._shaped(v, x).to(wide) for v in self._correction(batch))
        y = y.to(wide) * r + d
        y = y if gain is None else y * gain.to(wide)
        y = y if offset is None else y + offset.to(wide)
        y = y.to(x.dtype)
        if mask is not None:
            valid = broadcast_mask(mask, x)
            y = torch.where(valid > 0, y, torch.zeros_like(y))
        self.update_running(batch)
        return with_epilogue(
            y, Epilogue(self.activation, self.negative_slope, residual), mask
        )

    def _correction(self, batch: Moments) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, var = batch.mean.flatten(), batch.var.flatten()
        inv_std = torch.rsqrt(self.running_var.to(var.dtype) + self.eps)
        r_max, d_max = (limit.to(var.dtype) for limit in self.limits())
        r = torch.sqrt(var + self.eps) * inv_std
        r = r.clamp(min=1 / r_max, max=r_max)
        d = (mean - self.running_mean.to(mean.dtype)) * inv_std
        d = d.clamp(min=-d_max, max=d_max)
        # A channel without a valid value has no batch statistics to correct.
        is_empty = (batch.count == 0).expand(batch.mean.shape).flatten()
        r, d = r.masked_fill(is_empty, 1), d.masked_fill(is_empty, 0)
        dtype = self.running_mean.dtype if self.weight is None else self.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return opaque_clone(r.to(wide)), opaque_clone(d.to(wide))

    def extra_repr(self) -> str:
        """Return the arguments of torch's batch norm, and the bounds."""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


class BatchRenorm1d(BatchRenormLayer):
    """Renormalize each channel of `(N, C)` or `(N, C, L)` over batch and positions.

    For small batches, and batches unlike the data as a whole, for which batch norm's
    eval mode differs from training. Eval mode is that of batch norm, so checkpoints are
    interchangeable and a fold works.

    Args:
        num_features: Number of channels C.
        eps: Added to the variances, inside the root.
        momentum: Share of the batch in the new running statistics; None gives all
            batches the same share. They are part of training here, so a slow average
            is the default.
        affine: Learn `weight` and `bias`, shape `(C,)`, from 1 and 0.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers; float32 also serves half inputs.
        bias: Learn a bias when `affine`.
        channel_dim: The dimension that channels lie along; -1 takes `(N, L, C)`.
        r_max: Bound on the ratio of standard deviations, both ways.
        d_max: Bound on the distance of the means, in running standard deviations.
        renorm_from: Number of first batches with plain batch norm, while the running
            statistics settle. After them the bounds grow linearly.
        d_max_at: The batch from which on `d_max` holds.
        r_max_at: The batch from which on `r_max` holds.
        process_group: Take the statistics over these ranks, as `SyncBatchNorm` does;
            None is this rank alone.

    Raises:
        ArgumentError: r_max below 1, d_max below 0, a schedule that runs backwards;
            and what `BatchNorm1d` raises.
        ShapeError: An input without `num_features` channels.
        DtypeError: An input that is not floating point.

    Numerics:
        As `BatchNorm1d`; the statistics are read once more. The paper's schedule is
        the default, counted in `num_batches_tracked`, on the device.

    Example:
        >>> layer = BatchRenorm1d(2, renorm_from=0, d_max_at=0, r_max_at=0)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> y, eval_y = layer(x), BatchRenorm1d(2).eval()(x)
        >>> torch.allclose(y, eval_y)
        True

    References:
        Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
        Batch-Normalized Models", NeurIPS 2017.
    """

    shapes: ClassVar = {2: "(N, C)", 3: "(N, C, L)"}


class BatchRenorm2d(BatchRenormLayer):
    """Renormalize each channel of `(N, C, H, W)` over batch and positions.

    Arguments, errors and numerics: `BatchRenorm1d`.
    """

    shapes: ClassVar = {4: "(N, C, H, W)"}


class BatchRenorm3d(BatchRenormLayer):
    """Renormalize each channel of `(N, C, D, H, W)` over batch and positions.

    Arguments, errors and numerics: `BatchRenorm1d`.
    """

    shapes: ClassVar = {5: "(N, C, D, H, W)"}

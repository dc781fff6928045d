"""Batch norm of 1, 2 and 3 spatial dimensions: one layer, three input checks.

    y = (x − mean)/√(var + eps)·weight + bias          per channel

with the batch's mean and population variance in training and the running ones in eval.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from normkit.nn.batch_norm_layer import BatchNormLayer

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm1d(BatchNormLayer, torch.nn.BatchNorm1d):
    """Normalize each channel of `(N, C)` or `(N, C, L)` over the batch and positions.

        y = (x − mean)/√(var + eps)·weight + bias

    Drop-in for `torch.nn.BatchNorm1d`: same arguments, same state, an instance of it.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance, inside the root.
        momentum: Share of the batch in the new running statistics, in [0, 1]; None
            gives all batches the same share. A decay of 0.9 is momentum=0.1.
        affine: Learn `weight` and `bias`, shape `(C,)`, from 1 and 0.
        track_running_stats: Keep `running_mean` and the unbiased `running_var`, shape
            `(C,)`, for eval. False uses the statistics of the batch in eval, too.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers; float32 also serves half inputs.
            `.half()` and `.bfloat16()` leave the running statistics in float32.
        bias: Learn a bias when `affine`.
        channel_dim: The dimension that channels lie along; -1 takes `(N, L, C)`.
        process_group: Take the statistics over these ranks, as `SyncBatchNorm` does;
            None is this rank alone. With `ghost_size` each ghost stays on its rank and
            the running statistics are those of all ranks.
        ghost_size: Normalize parts of at least that many samples by their own
            statistics; the running ones are those of the whole batch.
        estimator: Variance that running_var averages: "unbiased", divided by n − 1, as
            in torch, or "biased", divided by n, as in Keras, flax and ONNX.
        debias: Divide the running averages by the total weight of the batches so far,
            so that the initial 0 and 1 do not count after the first.
        on_small_batch: Policy for a channel with one value in training. "raise": an
            ArgumentError, as in torch. "running": normalize it by the running
            statistics, unchanged. "renorm": the same, clipped to 5 standard
            deviations, without a gradient to the input; updates the running mean.
            "skip": the output is `bias`, the running statistics stay. Under a mask or
            over ranks this is decided per channel on the device, and "raise" gives
            `bias`.
        activation: Activation in the same pass over memory: "relu", "leaky_relu",
            "silu", "gelu" (by erf), "sigmoid", "tanh" or "none". A `residual=` on
            forward is added before it.
        negative_slope: Slope of leaky_relu below 0.
        memory: Memory for the backward, see `less_memory`. None: everything is kept.
            "recompute": the output is recomputed from the input. "int8": in addition
            the input is kept as one byte per value where a residual is added or no
            activation follows, unless that is leaky_relu; approximate, and without a
            second derivative.

    Raises:
        ArgumentError: At construction: momentum outside [0, 1], an unknown policy or
            estimator. In forward: another number of dimensions, one value per channel
            in training, an eps that is not finite and positive.
        ShapeError: An input without `num_features` channels.
        DtypeError: An input that is not floating point.

    Numerics:
        Statistics in float32 or better around a pilot mean, exact to 2e-6 up to a mean
        of 1e6 standard deviations. A batch with a NaN or Inf gives NaN, as in torch,
        but updates no running statistic and does not count in `num_batches_tracked`;
        neither does a batch without samples. `skipped` counts such batches. A forward
        that activation checkpointing repeats updates nothing a second time. Nothing
        waits for the device, even with momentum=None.

    Example:
        >>> layer = BatchNorm1d(2)
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> layer(x).detach()
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])
        >>> layer.running_mean, layer.running_var
        (tensor([0.2000, 2.0000]), tensor([ 1.1000, 20.9000]))

        Padding is left out by a mask:

        >>> x = torch.tensor([[[1.0, 3.0, 99.0]], [[5.0, 99.0, 99.0]]])
        >>> valid = torch.tensor([[[1, 1, 0]], [[1, 0, 0]]]).bool()
        >>> BatchNorm1d(1, affine=False)(x, mask=valid)
        tensor([[[-1.2247,  0.0000,  0.0000]],
                [[ 1.2247,  0.0000,  0.0000]]])

    References:
        Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", ICML 2015.
    """

    shapes: ClassVar = {2: "(N, C)", 3: "(N, C, L)"}


class BatchNorm2d(BatchNormLayer, torch.nn.BatchNorm2d):
    """Normalize each channel of `(N, C, H, W)` over the batch and positions.

    Drop-in for `torch.nn.BatchNorm2d`; contiguous and channels_last inputs are
    normalized as they lie. Arguments, errors and numerics: `BatchNorm1d`.

    Example:
        >>> layer = BatchNorm2d(3)
        >>> x = 1e4 + torch.randn(8, 3, 6, 6)
        >>> y = layer(x.contiguous(memory_format=torch.channels_last))
        >>> y.is_contiguous(memory_format=torch.channels_last)
        True
        >>> bool(y.mean((0, 2, 3)).abs().max() < 1e-5)
        True
    """

    shapes: ClassVar = {4: "(N, C, H, W)"}


class BatchNorm3d(BatchNormLayer, torch.nn.BatchNorm3d):
    """Normalize each channel of `(N, C, D, H, W)` over the batch and positions.

    Drop-in for `torch.nn.BatchNorm3d`; contiguous and channels_last_3d inputs are
    normalized as they lie. Arguments, errors and numerics: `BatchNorm1d`.
    """

    shapes: ClassVar = {5: "(N, C, D, H, W)"}

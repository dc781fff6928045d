"""Batch norm of 1, 2 and 3 spatial dimensions: one layer, three input checks.

    y = (x − mean)/√(var + eps)·weight + bias          per channel

with the batch's mean and population variance in training and the running ones in eval.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from normkit.functional import batch_norm
from normkit.nn.running_state import RunningStateLayer, check_momentum
from normkit.nn.tracing import is_recorded_by_jit, recorded_call

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormLayer"]


class BatchNormLayer(RunningStateLayer, torch.nn.modules.batchnorm._BatchNorm):
    """What batch norm of every rank shares; use the classes named for the rank."""

    siblings: ClassVar = {
        2: "BatchNorm1d",
        3: "BatchNorm1d",
        4: "BatchNorm2d",
        5: "BatchNorm3d",
    }

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize `input`; in training, move the running statistics towards it.

        Args:
            input: Values, of a shape and dtype that the class names.
            mask: Which values count: bool or weights ≥ 0, broadcastable to `input`,
                e.g. `(N, 1, L)` for padded sequences. The output is 0 elsewhere.
        """
        if (node := recorded_call(self, input, mask=mask)) is not None:
            return node
        if is_recorded_by_jit(mask) and self.channel_dim == 1:
            return super().forward(input)
        self._check_input_dim(input)
        has_buffers = self.running_mean is not None or self.running_var is not None
        # Buffers may outlive track_running_stats: eval then still uses them, and
        # training leaves them alone. A way to freeze them that users rely on.
        is_tracking = self.training and self.track_running_stats
        is_using = is_tracking or not self.training
        if is_tracking:
            check_momentum(self, self.momentum)
        return batch_norm(
            input,
            self.running_mean if is_using else None,
            self.running_var if is_using else None,
            self.weight,
            self.bias,
            self.training or not has_buffers,
            self.momentum if is_tracking else 0.0,
            self.eps,
            mask=mask,
            channel_dim=self.channel_dim,
            num_batches_tracked=self.num_batches_tracked if is_tracking else None,
        )


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
        device: Where parameters and buffers live.
        dtype: Their dtype; float32 also serves half inputs.
        bias: Learn a bias when `affine`.
        channel_dim: The dimension that channels lie along; -1 takes `(N, L, C)`.

    Raises:
        ArgumentError: momentum outside [0, 1], at construction. In forward: another
            number of dimensions, one value per channel in training, an eps that is not
            finite and positive.
        ShapeError: An input without `num_features` channels.
        DtypeError: An input that is not floating point.

    Numerics:
        Statistics in float32 or better around a pilot mean, exact to 2e-6 up to a mean
        of 1e6 standard deviations. A batch with a NaN or Inf gives NaN, as in torch,
        but moves no running statistic and does not count in `num_batches_tracked`;
        neither does a batch without samples. Nothing waits for the device, with
        momentum=None neither.

    Example:
        >>> layer = BatchNorm1d(2)
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> layer(x)
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]], grad_fn=<_StandardizeBackward>)
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

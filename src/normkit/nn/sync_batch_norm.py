"""Synchronized batch norm, on any device of torch.distributed.

One all_reduce of 2C + 1 float64 numbers forward and one of 2C backward, whatever the
number of ranks; ranks may hold unequal numbers of values, or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.nn.batch_norm_layer import BatchNormLayer

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(BatchNormLayer):
    """Normalize each channel of `(N, C, *)` over the batches of all ranks together.

    Each rank computes what one process with the concatenated batch would: outputs,
    input gradients and running statistics. The gradients of weight and bias are sums
    over this rank's values, which DistributedDataParallel averages, as for torch's
    layer. Without torch.distributed, or in a group of one rank, and in eval mode, it
    is `BatchNorm1d`, 2d or 3d.

    Takes the arguments of `torch.nn.SyncBatchNorm`, and its state. Not a subclass of
    it: DistributedDataParallel refuses that class on a CPU.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance, inside the root.
        momentum: Share of the batch in the new running statistics; None gives all
            batches the same share.
        affine: Learn `weight` and `bias`, shape `(C,)`.
        track_running_stats: Keep running statistics for eval.
        process_group: The ranks to take statistics over: a ProcessGroup or its name, a
            one-dimensional DeviceMesh, or (DeviceMesh, dimension); None is all ranks.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers.
        bias: Learn a bias when `affine`.
        **extras: As in `BatchNorm1d`: ghost_size, estimator, debias, on_small_batch.

    Raises:
        ArgumentError: In forward, an input of fewer than 2 dimensions; others as
            `BatchNorm1d`. One value per channel is refused only without other ranks.

    Numerics:
        Bitwise the same statistics on every rank. Sums over ranks are float64 around
        0: the variance is good to 1e-16·(mean/std)² relative. Nothing waits for the
        device. Every rank must call forward, and backward, equally often; a rank
        without samples passes an input of shape `(0, C, *)`.

    Example:
        >>> layer = SyncBatchNorm(2)
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach()
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **extras: Any,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats),
            device=device,
            dtype=dtype,
            bias=bias,
            process_group=process_group,
            **extras,
        )

    @property
    def is_synchronized(self) -> bool:
        """True; without a `process_group`, over all ranks."""
        return True

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ArgumentError(
                f"expected at least 2D input (got {input.dim()}D input): SyncBatchNorm "
                f"takes (N, C, *), the input has shape {tuple(input.shape)}; "
                "add a batch dimension"
            )

"""Synchronized batch norm, on any device of torch.distributed.

One all_reduce of 2C + 1 float64 numbers forward and one of 2C backward, whatever the
number of ranks; ranks may hold unequal numbers of values, or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from normkit.errors import ArgumentError
from normkit.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normkit.nn.batch_norm_layer import BatchNormLayer
from normkit.nn.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from normkit.nn.frozen_batch_norm import FrozenBatchNorm
from normkit.nn.qualified_name import qualified_name

__all__ = ["SyncBatchNorm"]

_CONVERTED = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(BatchNorm1d, BatchNorm2d, BatchNorm3d),
)
# A frozen layer has no batch; renorm takes a process_group= of its own.
_LEFT = (FrozenBatchNorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)


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
            DeviceMesh of which one dimension has several ranks, or (DeviceMesh,
            dimension), by number or name; None is all ranks.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers.
        bias: Learn a bias when `affine`.
        **extras: As in `BatchNorm1d`: ghost_size, estimator, debias, on_small_batch,
            activation, negative_slope, memory, channel_dim.

    Raises:
        ArgumentError: In forward, an input of fewer than 2 dimensions; others as
            `BatchNorm1d`; a process_group that names no group, or one that this rank is
            not in. One value per channel is refused only without other ranks.
        RanksError: The sums of all ranks did not arrive: a rank failed, or did not call
            this layer; with the layer's name.

    Numerics:
        Bitwise the same statistics on every rank. Sums over ranks are float64 around
        0: the variance is good to 1e-16·(mean/std)² relative. On a CPU they are taken
        again, around the mean, where that would cost digits. Nothing waits for the
        device elsewhere. Every rank must call forward, and backward, equally often; a
        rank without samples passes an input of shape `(0, C, *)`.

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

    @classmethod
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: Any = None
    ) -> nn.Module:
        """Make every batch norm in `module` one of these, as torch's function does.

        The layers stay the same objects: hooks, optimizers and shared parameters keep
        them, and so do an activation or a `memory=` mode that they have. For layers
        that a user derived from a batch norm: `normkit.convert(module, to="sync")`.

        Args:
            module: Any module; changed in place.
            process_group: As in the constructor.

        Returns:
            `module`.

        Raises:
            ArgumentError: A layer that is derived from a batch norm and has a forward
                of its own, or a lazy one without an input yet; nothing is changed.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            >>> type(SyncBatchNorm.convert_sync_batchnorm(model)[1]).__name__
            'SyncBatchNorm'
        """
        chosen = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        for layer in chosen:
            tensors = (*layer._parameters.values(), *layer._buffers.values())
            if any(is_lazy(t) for t in tensors if t is not None):
                raise ArgumentError(
                    f"{qualified_name(layer)} is lazy and has seen no input yet; run "
                    "the model once before it is converted"
                )
            if type(layer) not in (*_CONVERTED, *_LEFT, cls):
                raise ArgumentError(
                    f"{qualified_name(layer)} is derived from a batch norm, and would "
                    "lose what its class adds; use normkit.convert(model, to='sync'), "
                    "which keeps it"
                )
        for layer in chosen:
            if type(layer) in _LEFT:
                continue
            group = layer.__dict__.get("process_group")
            if type(layer) is not cls:
                layer.__dict__.setdefault("_origin", type(layer).__name__)
                layer.__class__ = cls
            assert isinstance(layer, SyncBatchNorm)
            layer.process_group = group if process_group is None else process_group
        return module

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

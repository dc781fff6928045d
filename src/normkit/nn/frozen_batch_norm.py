"""Frozen batch norm: running statistics, weight and bias are constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.nn.batch_norm import BatchNormLayer

__all__ = ["FrozenBatchNorm"]


class FrozenBatchNorm(BatchNormLayer):
    """Standardize each channel of `(N, C, *)` by constant statistics.

        y = (x − running_mean)/√(running_var + eps)·weight + bias

    Stays in eval mode under `train()`. Weight and bias are parameters without a
    gradient, so that a conversion back restores them and the optimizer's state. To
    freeze a layer for a while, use its `freeze()`.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance, inside the root.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers.

    Raises:
        ArgumentError: `unfreeze()`; in forward, fewer than 2 dimensions.

    Example:
        >>> layer = FrozenBatchNorm(3)
        >>> layer.train().training
        False
    """

    is_frozen = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, device=device, dtype=dtype)
        self.freeze(parameters=True)

    def unfreeze(self, *, parameters: bool = False) -> None:
        """Raise: this class cannot be unfrozen.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(
            "FrozenBatchNorm stays frozen; a layer that trains is BatchNorm1d, 2d or "
            "3d with its state: BatchNorm2d(n).load_state_dict(frozen.state_dict()). "
            "normkit.convert(model, to='normkit') takes back what it froze itself"
        )

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ArgumentError(
                f"expected at least 2D input (got {input.dim()}D input): "
                f"FrozenBatchNorm takes (N, C, *), the input has shape "
                f"{tuple(input.shape)}; add a batch dimension"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Other systems' frozen layers do not count batches.
        counter = self.num_batches_tracked
        if counter is not None:
            state_dict.setdefault(f"{prefix}num_batches_tracked", counter)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

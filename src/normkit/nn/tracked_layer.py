"""Base of layers whose running statistics have other shapes than torch's.

Per-activation, recurrent and whitening batch norm: parameters and buffers, their
construction, reset and updates. Layers with the buffers of torch's
batch norm are `RunningStateLayer`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkit.functional.ema import check_buffers
from normkit.nn.layer_ranks import ranks_of, with_group_name
from normkit.nn.running_state import check_momentum
from normkit.sync import is_group
from normkit.torch_state import is_in_backward

__all__ = ["TrackedLayer"]


class TrackedLayer(nn.Module):
    """A weight, a bias, running statistics and a counter, each of a given shape.

    Args:
        learned: Shape of weight and bias.
        tracked: Shape of each running statistic, by the name of its buffer.
        eps: Added to the variance, inside the root.
        momentum: Share of the batch in the new running statistics, in [0, 1], or None.
        affine: Learn a weight.
        track_running_stats: Keep running statistics.
        bias: Learn a bias when `affine`.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers.
        counter: Shape of `num_batches_tracked`.
        process_group: Ranks to take the statistics over; None is this rank alone.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    num_batches_tracked: Tensor | None
    first_weight: float = 1.0
    process_group: Any = None
    shown: ClassVar[tuple[str, ...]] = ()
    """Attributes in the repr, after the shape."""

    def __init__(
        self,
        learned: tuple[int, ...],
        tracked: dict[str, tuple[int, ...]],
        *,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
        counter: tuple[int, ...] = (),
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            self.process_group = process_group
        check_momentum(self, momentum)
        self.eps, self.momentum = eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        for name, is_there in (("weight", affine), ("bias", affine and bias)):
            made = torch.empty(learned, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(made) if is_there else None)
        for name, shape in tracked.items():
            made = torch.empty(shape, device=device, dtype=dtype)
            self.register_buffer(name, made if track_running_stats else None)
        count = torch.zeros(counter, dtype=torch.int64, device=device)
        self.register_buffer(
            "num_batches_tracked", count if track_running_stats else None
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the running statistics, weight to its initial value and bias to 0."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._reset(name, buffer)
        if self.weight is not None:
            self.weight.fill_(self.first_weight)
        if self.bias is not None:
            self.bias.zero_()

    def _reset(self, name: str, buffer: Tensor) -> None:
        """Reset one buffer: variances to 1, anything else to 0."""
        buffer.fill_(1 if name == "running_var" else 0)

    @property
    def uses_running(self) -> bool:
        """True when the layer normalizes by its running statistics."""
        return not self.training and self.running_mean is not None

    def ranks(self) -> Any:
        """Return the ranks that statistics are taken over; None for this rank alone."""
        if self.process_group is None or not is_group(self.process_group):
            return None
        return ranks_of(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and files, with a process group as its name."""
        return with_group_name(self.__dict__)

    def updates_running(self) -> bool:
        """Return whether this forward updates the running statistics.

        A forward that activation checkpointing repeats within the backward does not.
        """
        if not self.training or self.running_mean is None or is_in_backward():
            return False
        check_momentum(self, self.momentum)
        statistics = dict(self._buffers)
        counter = statistics.pop("num_batches_tracked", None)
        for statistic in statistics.values():
            check_buffers(statistic, None, counter)
        return True

    def extra_repr(self) -> str:
        """Return the arguments that differ between layers."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)

"""The layer of batch norm: what every rank shares.

Four ways through a forward: recorded as one call by a tracer; torch's own operator on a
small input; statistics chosen otherwise (`BatchStatisticsLayer`); and the function
`batch_norm`, at once or when it is known what follows (`Pending`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from normkit.errors import ArgumentError, ShapeError
from normkit.functional import batch_norm, small
from normkit.functional.memory import Mode, is_remembered, less_memory
from normkit.functional.remembered import Remembered
from normkit.kernels.cpu.plain import is_watched
from normkit.kernels.epilogue import ACTIVATIONS, activate
from normkit.moments import broadcast_mask, zero_where
from normkit.nn.batch_statistics import (
    ESTIMATORS,
    SMALL_BATCH_POLICIES,
    BatchStatisticsLayer,
)
from normkit.nn.pending import Pending
from normkit.nn.running_state import check_momentum, is_recomputing
from normkit.nn.tracing import is_recorded_by_jit, recorded_call

__all__ = ["BatchNormLayer"]

_SHOWN = (
    *("ghost_size", "estimator", "debias", "on_small_batch", "activation"),
    "memory",
)


class BatchNormLayer(BatchStatisticsLayer):
    """What batch norm of every rank shares; use the classes named for the rank."""

    siblings: ClassVar = {
        2: "BatchNorm1d",
        3: "BatchNorm1d",
        4: "BatchNorm2d",
        5: "BatchNorm3d",
    }
    activation: str = "none"
    negative_slope: float = 0.01
    memory: Mode | None = None
    defers: bool = False
    """Whether the output waits for the sum and activation after it: `nn.pending`."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        channel_dim: int = 1,
        process_group: Any = None,
        ghost_size: int | None = None,
        estimator: str = "unbiased",
        debias: bool = False,
        on_small_batch: str = "raise",
        activation: str = "none",
        negative_slope: float = 0.01,
        memory: Mode | None = None,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats),
            device=device,
            dtype=dtype,
            bias=bias,
            channel_dim=channel_dim,
        )
        extras = {
            "process_group": process_group,
            "ghost_size": ghost_size,
            "estimator": estimator,
            "debias": debias,
            "on_small_batch": on_small_batch,
            "activation": activation,
            "negative_slope": negative_slope,
            "memory": memory,
        }
        for name, value in extras.items():
            # Only what differs is kept on the layer: defaults stand on the class.
            if value != getattr(type(self), name):
                setattr(self, name, value)
        self._check_extras()
        if self.running_mean is not None:
            # No part of the state: checkpoints stay those of torch.nn.
            skipped = torch.zeros((), dtype=torch.int64, device=device)
            self.register_buffer("num_batches_skipped", skipped, persistent=False)

    def forward(
        self,
        input: Tensor,  # noqa: A002
        *,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalize `input`; in training, move the running statistics towards it.

        Args:
            input: Values, of a shape and dtype that the class names.
            mask: Which values count: bool or weights ≥ 0, broadcastable to `input`,
                e.g. `(N, 1, L)` for padded sequences. The output is 0 elsewhere.
            residual: Added before the activation, of the shape of `input`.
        """
        if (
            mask is None
            and residual is None
            and (y := self._if_small(input)) is not None
        ):
            return y
        node = recorded_call(self, input, mask=mask, residual=residual)
        if node is not None:
            return node
        if is_recorded_by_jit(mask) and self.channel_dim == 1:
            return self._followed(super().forward(input), residual, None)
        self._check_input_dim(input)
        has_buffers = self.running_mean is not None or self.running_var is not None
        # Buffers may outlive track_running_stats: eval then still uses them, and
        # training leaves them alone. A way to freeze them that users rely on.
        is_tracking = (
            self.training and self.track_running_stats and not is_recomputing()
        )
        uses_batch = self.training or not has_buffers
        if is_tracking:
            check_momentum(self, self.momentum)
        if uses_batch and self._has_extras():

            def run_with_extras() -> Tensor:
                y = self._forward_with_extras(input, mask, is_tracking)
                return self._followed(y, residual, mask)

            return self._keeping(run_with_extras)

        def run(
            residual: Tensor | None, activation: str, slope: float, moves: bool
        ) -> Tensor:
            moves = moves and is_tracking
            is_using = moves or not self.training
            return self._keeping(
                lambda: batch_norm(
                    input,
                    self.running_mean if is_using else None,
                    self.running_var if is_using else None,
                    self.weight,
                    self.bias,
                    uses_batch,
                    self.momentum if moves else 0.0,
                    self.eps,
                    mask=mask,
                    channel_dim=self.channel_dim,
                    num_batches_tracked=self.num_batches_tracked if moves else None,
                    num_batches_skipped=self.skipped if moves else None,
                    activation=activation,
                    negative_slope=slope,
                    residual=residual,
                )
            )

        if self.defers and mask is None and residual is None and self._can_wait(input):
            return Pending.of(input, run)
        return run(residual, self.activation, self.negative_slope, True)

    def _can_wait(self, x: Tensor) -> bool:
        """Whether nobody watches who would take a Pending for the values."""
        return (
            not torch.compiler.is_compiling()
            and type(x) is Tensor
            and self.activation == "none"
            and x.is_floating_point()
            and x.shape[self.channel_dim] == self.num_features
            and (
                x.is_contiguous()
                or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
            )
            and not (self._forward_hooks or self._backward_hooks)
            and not self._backward_pre_hooks
            and not is_watched()
            and not torch._C._len_torch_function_stack()
            and not torch._C._are_functorch_transforms_active()
            and torch.autograd.forward_ad._current_level < 0
        )

    def _keeping(self, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, keeping for the backward what `memory` says."""
        if self.memory is None or not torch.is_grad_enabled():
            return compute()
        if torch.compiler.is_compiling():
            return compute()  # a compiler decides itself what it keeps
        with less_memory(self.memory):
            y = compute()
        return Remembered.of(y) if is_remembered(y) else y

    def _if_small(self, x: Tensor) -> Tensor | None:
        """The output if `x` is small and torch's operator exact; see functional.small.

        Of all that a call may ask for, this looks at what layers mostly are.
        """
        if (
            type(x) is not Tensor
            or x.dim() not in self.shapes
            or self.channel_dim != 1
            or self.memory is not None
        ):
            return None
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            running_mean = self._buffers["running_mean"]
            running_var = self._buffers["running_var"]
            tracked = self._buffers["num_batches_tracked"]
        except KeyError:  # parametrized, or a replica
            return None
        is_training, momentum = self.training, 0.0
        if is_training:
            if self._has_extras():
                return None
            if not self.track_running_stats or is_recomputing():
                running_mean = running_var = tracked = None
            elif running_mean is not None:
                momentum = self.momentum
                check_momentum(self, momentum)
        return small.batch_norm(
            *(x, running_mean, running_var, weight, bias, is_training),
            *(momentum, self.eps, tracked),
            *(self.activation, self.negative_slope),
        )

    def _followed(
        self, y: Tensor, residual: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """What comes after, where no kernel has done it in the same pass."""
        if residual is None and self.activation == "none":
            return y
        if residual is not None:
            if residual.shape != y.shape:
                raise ShapeError(
                    f"residual of shape {tuple(residual.shape)} must have the shape of "
                    f"x, {tuple(y.shape)}; use expand()"
                )
            y = y + residual
        y = activate(self.activation, y, self.negative_slope)
        if mask is None:
            return y
        valid = broadcast_mask(mask, y)
        return zero_where(~valid if valid.dtype == torch.bool else valid <= 0, y)

    def extra_repr(self) -> str:
        """The arguments of torch's layer, and what differs from its behaviour."""
        parts = [super().extra_repr()]
        for name in _SHOWN:
            value = getattr(self, name)
            if value != getattr(BatchNormLayer, name):
                parts.append(f"{name}={value!r}")
        if self.is_frozen:
            parts.append("frozen")
        skipped = self.skipped
        if skipped is not None and not skipped.is_meta and int(skipped):
            parts.append(f"{int(skipped)} non-finite batches skipped")
        return ", ".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        """A process group goes into copies and files by its name."""
        state = dict(self.__dict__)
        state.pop("_observer", None)
        group = state.get("process_group")
        if group is not None and hasattr(group, "group_name"):
            state["process_group"] = group.group_name
        return state

    def _check_extras(self) -> None:
        name = type(self).__name__
        ghost = self.ghost_size
        if ghost is not None and (not isinstance(ghost, int) or ghost < 1):
            raise ArgumentError(
                f"{name} needs ghost_size of at least 1 sample, got {ghost!r}; "
                "None normalizes the batch as a whole"
            )
        if not math.isfinite(self.negative_slope):
            raise ArgumentError(
                f"{name} needs a finite negative_slope, got {self.negative_slope}; "
                "0.01 is usual"
            )
        for key, value, known in (
            ("estimator", self.estimator, ESTIMATORS),
            ("on_small_batch", self.on_small_batch, SMALL_BATCH_POLICIES),
            ("activation", self.activation, ACTIVATIONS),
            ("memory", self.memory, (None, "recompute", "int8")),
        ):
            if value not in known:
                raise ArgumentError(
                    f"{name} got {key}={value!r}; it must be one of "
                    f"{', '.join(map(repr, known))}"
                )

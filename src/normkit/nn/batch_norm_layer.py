"""Batch norm layer, common to all ranks.

Three paths through a forward: recorded as one call by a tracer; other statistics than
the batch's (`BatchStatisticsLayer`); and the function `batch_norm`, at once or when the
operation after it is known (`DeferredTensor`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.functional import batch_norm
from normkit.functional.memory.block import Mode
from normkit.functional.memory.less_memory import less_memory
from normkit.functional.memory.recipes import is_recomputable
from normkit.functional.memory.recomputable import Recomputable
from normkit.functional.remembered import run_remembered
from normkit.kernels.epilogue import ACTIVATIONS, Epilogue
from normkit.kernels.spec import Running
from normkit.nn.batch_statistics import (
    ESTIMATORS,
    SMALL_BATCH_POLICIES,
    BatchStatisticsLayer,
    with_epilogue,
)
from normkit.nn.deferred import defer
from normkit.nn.layer_ranks import ranks_of, with_group_name
from normkit.nn.parameters import learned
from normkit.nn.running_state import check_momentum
from normkit.nn.tracing import is_recorded, is_recorded_as_torch, recorded_call
from normkit.sync.agreement import agree, is_checking
from normkit.sync.groups import Ranks
from normkit.torch_state import (
    PLAIN,
    has_transforms,
    is_compiling,
    is_in_backward,
    is_observed,
)

__all__ = ["BatchNormLayer"]

_SHOWN = (
    *("ghost_size", "estimator", "debias", "on_small_batch", "activation"),
    "memory",
)


class BatchNormLayer(BatchStatisticsLayer):
    """Base of the batch norms of every rank; use the classes named for the rank."""

    siblings: ClassVar = {
        2: "BatchNorm1d",
        3: "BatchNorm1d",
        4: "BatchNorm2d",
        5: "BatchNorm3d",
    }
    memory: Mode | None = None
    defers: bool = False
    """True when the output waits for the sum and activation after it: `nn.deferred`."""

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
            # Only other values are kept on the layer: defaults stand on the class.
            if value != getattr(type(self), name):
                setattr(self, name, value)
        self._check_extras()

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
            mask: Which values count: bool or weights ≥ 0, broadcastable to `input`,
                e.g. `(N, 1, L)` for padded sequences. The output is 0 elsewhere.
            residual: Added before the activation, of the shape of `input`.
        """
        is_seen = type(input) not in PLAIN or is_observed()
        if is_seen and is_recorded(input):
            node = recorded_call(self, input, mask=mask, residual=residual)
            if node is not None:
                return node
            if self._is_recorded_as_torch(input, mask):
                epilogue = Epilogue(self.activation, self.negative_slope, residual)
                dim = self.channel_dim
                first = input if dim == 1 else input.movedim(dim, 1)
                y = super().forward(first)
                y = y if dim == 1 else y.movedim(1, dim)
                return with_epilogue(y, epilogue, None)
        self._check_input_dim(input)
        buffers = self._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        training = self.training
        updates = training and self.track_running_stats and not is_in_backward()
        # With track_running_stats set to False afterwards, eval still uses the buffers
        # and training leaves them: users freeze them this way.
        uses_batch = training or (mean is None and var is None)
        if updates:
            check_momentum(self, self.momentum)
        ranks = None
        if uses_batch:
            over_ranks = self.is_over_ranks()
            if self._has_extras() or (over_ranks and is_seen):
                compute = self._forward_with_extras
                return self._keeping(lambda: compute(input, mask, residual, updates))
            ranks = ranks_of(self) if over_ranks else None
        elif is_checking() and self.is_over_ranks():
            agree(ranks_of(self), "eval forward")
        if self.defers and mask is None and residual is None and ranks is None:
            y = defer(self, input, uses_batch, updates)
            if y is not None:
                return y
        how = is_seen, uses_batch, updates, ranks
        if self.memory is not None:
            return self._keeping(lambda: self._plainly(input, mask, residual, *how))
        return self._plainly(input, mask, residual, *how)

    def _is_recorded_as_torch(self, x: Tensor, mask: Tensor | None) -> bool:
        """Return whether a tracer observes a call that torch's batch norm can do."""
        uses_batch = self.training or self.running_mean is None
        if uses_batch and (self._has_extras() or self.is_over_ranks()):
            return False
        updates = self.training and self.track_running_stats
        return is_recorded_as_torch(self, x, mask, updates=updates)

    def _plainly(
        self,
        x: Tensor,
        mask: Tensor | None,
        residual: Tensor | None,
        is_seen: bool,
        uses_batch: bool,
        updates: bool,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """Normalize by the batch as a whole, or by the running statistics."""
        buffers = self._buffers
        mean = var = batches = skipped = None
        momentum: float | None = 0.0
        if updates:
            momentum = self.momentum
            batches = buffers["num_batches_tracked"]
            if (
                is_seen
                or (skipped := self._skipped) is None
                or skipped.device != x.device
            ):
                skipped = self.skip_counter()
        if updates or not self.training:
            mean, var = buffers["running_mean"], buffers["running_var"]
        weight, bias = learned(self)
        if not is_seen and (momentum is None or type(momentum) is float):
            operation = (
                *("batch_norm", self.channel_dim, uses_batch, self.eps, momentum),
                *("skip", self.activation, self.negative_slope, ranks),
            )
            running = None
            if mean is not None or var is not None:
                running = Running(mean, var)
                if uses_batch:
                    running = Running(mean, var, momentum, batches, skipped)
            operands = x, weight, bias, residual, mask
            if (y := run_remembered(operation, operands, running)) is not None:
                return y
        return batch_norm(
            *(x, mean, var, weight, bias, uses_batch, momentum, self.eps),
            mask=mask,
            channel_dim=self.channel_dim,
            num_batches_tracked=batches,
            num_batches_skipped=skipped,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            process_group=ranks,
        )

    def _keeping(self, compute: Callable[[], Tensor]) -> Tensor:
        """Run `compute` under the layer's `memory` mode."""
        # A compiler decides itself which tensors to keep; torch.func refuses the hooks
        # that keep less.
        decided = is_compiling() or has_transforms()
        if self.memory is None or not torch.is_grad_enabled() or decided:
            return compute()
        with less_memory(self.memory):
            y = compute()
        return Recomputable.of(y) if is_recomputable(y) else y

    def extra_repr(self) -> str:
        """Return the arguments of torch's layer, and our own that are set."""
        parts = [super().extra_repr()]
        for name in _SHOWN:
            value = getattr(self, name)
            if value != getattr(BatchNormLayer, name):
                parts.append(f"{name}={value!r}")
        if self.is_frozen:
            parts.append("frozen")
        if skipped := self.skipped:
            parts.append(f"{skipped} non-finite batches skipped")
        return ", ".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and files, with a process group as its name."""
        state = with_group_name(self.__dict__)
        state.pop("_observer", None)
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

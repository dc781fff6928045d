"""Batch norm of 1, 2 and 3 spatial dimensions: one layer, three input checks.

    y = (x − mean)/√(var + eps)·weight + bias          per channel

with the batch's mean and population variance in training and the running ones in eval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from normkit.errors import ArgumentError, ShapeError
from normkit.functional import (
    batch_norm,
    normalize,
    small,
    standardize,
    update_running,
)
from normkit.functional.arguments import check_eps, check_floating, check_length
from normkit.functional.ghosts import normalize_ghosts
from normkit.functional.memory import Mode, is_remembered, less_memory
from normkit.functional.over_ranks import normalize_over_ranks
from normkit.functional.remembered import Remembered
from normkit.kernels.cpu.plain import is_watched
from normkit.kernels.epilogue import ACTIVATIONS, activate
from normkit.moments import Moments, broadcast_mask
from normkit.nn.pending import Pending
from normkit.nn.running_state import (
    RunningStateLayer,
    check_momentum,
    is_recomputing,
)
from normkit.nn.tracing import is_recorded_by_jit, recorded_call
from normkit.sync import is_group, merge_over

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormLayer",
    "Observer",
]

SMALL_BATCH_POLICIES = ("raise", "running", "renorm", "skip")
_SHOWN = (
    *("ghost_size", "estimator", "debias", "on_small_batch", "activation"),
    "memory",
)


class Observer(Protocol):
    """Who takes over the statistics of a layer for a while: `nn.accumulation`."""

    def normalize(
        self, layer: BatchNormLayer, x: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Moments] | None:
        """Normalize in place of the layer; None leaves it to the layer."""
        ...

    def take(self, layer: BatchNormLayer, measured: Moments) -> None:
        """Take the statistics of a batch that would move the running ones."""
        ...


class BatchNormLayer(RunningStateLayer, torch.nn.modules.batchnorm._BatchNorm):
    """What batch norm of every rank shares; use the classes named for the rank."""

    siblings: ClassVar = {
        2: "BatchNorm1d",
        3: "BatchNorm1d",
        4: "BatchNorm2d",
        5: "BatchNorm3d",
    }
    process_group: Any = None
    ghost_size: int | None = None
    estimator: str = "unbiased"
    debias: bool = False
    on_small_batch: str = "raise"
    activation: str = "none"
    negative_slope: float = 0.01
    memory: Mode | None = None
    defers: bool = False
    """Whether the output waits for the sum and activation after it: `nn.pending`."""
    # Whether `accumulate` can stand between the layer and its statistics.
    is_observable: ClassVar[bool] = True
    _observer: Observer | None = None

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

    @property
    def skipped(self) -> Tensor | None:
        """How many batches a NaN or Inf kept out of the running statistics.

        An int64 scalar on the device of the layer; None for a layer that was not made
        by its constructor, and does not count.
        """
        return self._buffers.get("num_batches_skipped")

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batch counted and none skipped."""
        super().reset_running_stats()
        if self.skipped is not None:
            self.skipped.zero_()

    @property
    def is_synchronized(self) -> bool:
        """Whether the statistics are those of all ranks of `process_group`."""
        return self.process_group is not None

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
        is_training = self.training
        if (
            type(x) is not Tensor
            or x.dim() not in self.shapes
            or self.channel_dim != 1
            or self.memory is not None
            or (is_training and self._has_extras())
        ):
            return None
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            running_mean = self._buffers["running_mean"]
            running_var = self._buffers["running_var"]
            tracked = self._buffers["num_batches_tracked"]
        except KeyError:  # parametrized, or a replica
            return None
        if is_training and (not self.track_running_stats or is_recomputing()):
            running_mean = running_var = tracked = None
        momentum = self.momentum if is_training and running_mean is not None else 0.0
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
        return y.masked_fill(~valid if valid.dtype == torch.bool else valid <= 0, 0)

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
            ("estimator", self.estimator, ("unbiased", "biased")),
            ("on_small_batch", self.on_small_batch, SMALL_BATCH_POLICIES),
            ("activation", self.activation, ACTIVATIONS),
            ("memory", self.memory, (None, "recompute", "int8")),
        ):
            if value not in known:
                raise ArgumentError(
                    f"{name} got {key}={value!r}; it must be one of "
                    f"{', '.join(map(repr, known))}"
                )

    def _has_extras(self) -> bool:
        return (
            self.ghost_size is not None
            or self.is_synchronized
            or self.on_small_batch != "raise"
            or self.debias
            or self.estimator != "unbiased"
            or self._observer is not None
        )

    def _forward_with_extras(
        self, x: Tensor, mask: Tensor | None, is_tracking: bool
    ) -> Tensor:
        check_floating(x, "batch_norm")
        check_eps(self.eps, "batch_norm", "positive")
        if not -x.dim() <= self.channel_dim < x.dim():
            raise ShapeError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)}, which "
                f"has no dimension {self.channel_dim} for channels to lie along"
            )
        channels = x.shape[self.channel_dim]
        check_length("weight", self.weight, channels)
        check_length("running_mean", self.running_mean, channels)
        over_ranks = self.is_synchronized and is_group(self.process_group)
        # A mask or other ranks leave the count to the device, which cannot raise.
        is_small = x.numel() == channels and not over_ranks
        if is_small and channels and self.on_small_batch == "raise":
            raise ArgumentError(
                f"{type(self).__name__} needs more than one value per channel to train "
                "(expected more than 1 value per channel when training), got shape "
                f"{tuple(x.shape)}; use a larger batch, eval(), or on_small_batch="
                "'running', 'renorm' or 'skip'"
            )
        y, measured = self._normalized(x, mask, over_ranks)
        if self.on_small_batch in ("running", "renorm"):
            y = self._unless_small(x, y, measured, mask)
        if not is_tracking or self.running_mean is None:
            return y
        if self.on_small_batch in ("running", "skip"):
            # Such a channel keeps its running statistics, the mean too.
            measured = _only(measured, measured.count > 1)
        if self._observer is not None:
            self._observer.take(self, measured)
        else:
            self.move_towards(measured)
        return y

    def move_towards(self, measured: Moments) -> None:
        """Move the running statistics towards those of a batch, once.

        Args:
            measured: Statistics of C channels, of any shape.
        """
        if self.estimator == "biased":
            # The update divides by n − 1; the sum is made smaller by as much.
            n = measured.count.to(measured.m2.dtype)
            m2 = measured.m2 * (n - 1).clamp(min=0) / n.clamp(min=1)
            measured = Moments(measured.count, measured.mean, m2)
        update_running(
            *(self.running_mean, self.running_var, measured, self._rate()),
            num_batches_tracked=self.num_batches_tracked,
            num_batches_skipped=self.skipped,
        )

    def _rate(self) -> float | Tensor | None:
        if not self.debias or self.momentum is None:
            return self.momentum
        # Shares m·(1 − m)^k of the last batches, divided by their sum: the first
        # batch replaces the initial 0 and 1, and no correction is left to eval.
        assert self.num_batches_tracked is not None
        batches = (self.num_batches_tracked + 1).to(torch.float64)
        return self.momentum / (1 - (1 - self.momentum) ** batches)

    def _normalized(
        self, x: Tensor, mask: Tensor | None, over_ranks: bool
    ) -> tuple[Tensor, Moments]:
        if self._observer is not None:
            done = self._observer.normalize(self, x, mask)
            if done is not None:
                return done
        dims, weight, bias = self._along(x)
        if self.ghost_size is not None:
            y, measured = normalize_ghosts(
                x, dims, self.ghost_size, weight, bias, self.eps, mask=mask
            )
            if over_ranks:
                measured = merge_over(measured, self.process_group)
            return y, measured
        if over_ranks:
            return normalize_over_ranks(
                *(x, dims, weight, bias, self.eps),
                mask=mask,
                process_group=self.process_group,
            )
        return normalize(x, dims, weight, bias, self.eps, mask=mask)

    def _along(self, x: Tensor) -> tuple[tuple[int, ...], Tensor | None, Tensor | None]:
        """The reduced dimensions of x; weight and bias shaped to broadcast to it."""
        channel_dim = self.channel_dim % x.dim()
        dims = tuple(d for d in range(x.dim()) if d != channel_dim)
        weight, bias = (
            None if v is None else self._shaped(v, x) for v in (self.weight, self.bias)
        )
        return dims, weight, bias

    def _shaped(self, vector: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.channel_dim] = vector.numel()
        return vector.view(shape)

    def _unless_small(
        self, x: Tensor, y: Tensor, measured: Moments, mask: Tensor | None
    ) -> Tensor:
        """`y` where a channel has two values or more, else by running statistics."""
        if self.running_mean is None or self.running_var is None:
            return y
        _, weight, bias = self._along(x)
        mean = self._shaped(self.running_mean, x)
        var = self._shaped(self.running_var, x)
        hidden = None
        if mask is not None:
            valid = broadcast_mask(mask, x)
            hidden = ~valid if valid.dtype == torch.bool else valid <= 0
            x = x.masked_fill(hidden, 0)
        if self.on_small_batch == "running":
            other = standardize(x, mean, var, weight, bias, self.eps)
        else:
            # Of batch renorm only the shift d is left: one value is its own mean.
            d = standardize(x.detach(), mean, var, None, None, self.eps).clamp(-5, 5)
            other = d if weight is None else d * weight.to(d.dtype)
            other = other if bias is None else other + bias.to(other.dtype)
        if hidden is not None:
            other = other.masked_fill(hidden, 0)
        return torch.where(measured.count > 1, y, other.to(y.dtype))


def _only(measured: Moments, kept: Tensor) -> Moments:
    """The statistics of the kept channels, and no values of the others."""
    count = torch.where(kept, measured.count, torch.zeros_like(measured.count))
    return Moments(count, measured.mean, measured.m2)


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
        dtype: Their dtype; float32 also serves half inputs. `.half()` and
            `.bfloat16()` leave the running statistics in float32.
        bias: Learn a bias when `affine`.
        channel_dim: The dimension that channels lie along; -1 takes `(N, L, C)`.
        process_group: Take the statistics over these ranks, as `SyncBatchNorm` does;
            None is this rank alone. With `ghost_size` each ghost stays on its rank and
            the running statistics are those of all ranks.
        ghost_size: Normalize parts of at least that many samples by their own
            statistics; the running ones are those of the whole batch.
        estimator: What running_var averages: "unbiased" variances, divided by n − 1,
            as torch does, or "biased", divided by n, as Keras, flax and ONNX do.
        debias: Divide the running averages by the weight that batches have in them so
            far, so that the initial 0 and 1 leave no trace after the first.
        on_small_batch: What a channel with one value does in training. "raise" is an
            ArgumentError, as in torch. "running": normalize it by the running
            statistics, and leave them. "renorm": the same, clipped to 5 standard
            deviations and without a gradient to the input, and the running mean moves.
            "skip": the output is `bias`, the running statistics stay. Under a mask or
            over ranks the device decides per channel, and "raise" gives `bias`.
        activation: What follows in the same pass over memory: "relu", "leaky_relu",
            "silu", "gelu" (by erf), "sigmoid" or "tanh"; "none" is nothing. A
            `residual=` on forward is added before it.
        negative_slope: Of leaky_relu, below 0.
        memory: What is kept for the backward, see `less_memory`: None, all; or
            "recompute": whoever saves the output keeps how to compute it from the
            input again; or "int8": also the input as a byte per value, where a residual
            is added or no activation follows. Approximate, and without a second
            derivative.

    Raises:
        ArgumentError: momentum outside [0, 1], an unknown policy or estimator, at
            construction. In forward: another
            number of dimensions, one value per channel in training, an eps that is not
            finite and positive.
        ShapeError: An input without `num_features` channels.
        DtypeError: An input that is not floating point.

    Numerics:
        Statistics in float32 or better around a pilot mean, exact to 2e-6 up to a mean
        of 1e6 standard deviations. A batch with a NaN or Inf gives NaN, as in torch,
        but moves no running statistic and does not count in `num_batches_tracked`;
        neither does a batch without samples. `skipped` counts such batches. A forward
        that activation checkpointing repeats moves nothing a second time. Nothing
        waits for the device, with momentum=None neither.

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

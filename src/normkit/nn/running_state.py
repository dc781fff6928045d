"""Base of the layers with running statistics: construction and its checks.

    running = (1 − momentum)·running + momentum·batch

`momentum` is the share of the new value, as in torch. Keras and many papers give
the share of the old one: their 0.9 is 0.1 here. None is the average of all batches.

The running statistics stay float32 when a model is cast, unless the layer was
constructed in half precision: in bfloat16 an update by 1e-3 of the value rounds to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from normkit.errors import ArgumentError
from normkit.torch_state import is_in_backward

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "RunningStateLayer",
    "check_momentum",
    "check_not_recomputed",
    "is_recomputing",
]


class RunningStateLayer(_NormBase):
    """Base of batch and instance norm; use the classes named for the rank.

    Arguments that torch.nn does not have are attributes with a default on the class: a
    layer that did not run this constructor (an older pickle, a converted `torch.nn`
    layer) has them too.
    """

    shapes: ClassVar[Mapping[int, str]] = {}
    """Input shapes of the layer, by number of dimensions."""
    _ranks: ClassVar[tuple[int, ...]] = ()
    siblings: ClassVar[Mapping[int, str]] = {}
    """Layer for an input of another number of dimensions."""
    is_frozen: bool = False
    """True when `freeze` keeps the layer in eval mode."""
    _mode_to_return_to: bool = True
    channel_dim: int = 1
    """Dimension of the channels in a batch."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        # The compiler of torch 2.6 reads no dict of a class.
        cls._ranks = tuple(cls.shapes)

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
    ) -> None:
        check_momentum(self, momentum)
        if channel_dim == 0:
            raise ArgumentError(
                f"{type(self).__name__} needs channels behind the batch, got "
                "channel_dim=0; -1 takes (N, *, C)"
            )
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats),
            device=device,
            dtype=dtype,
        )
        # Older torch has no `bias` argument, so it is removed afterwards.
        if not bias:
            self.register_parameter("bias", None)
        if channel_dim != 1:
            self.channel_dim = channel_dim

    def freeze(self, *, parameters: bool = False) -> None:
        """Stay in eval mode, also under `train()`, until `unfreeze()`.

        Args:
            parameters: Stop the gradients of weight and bias, too, and drop those they
                have: an optimizer would move them once more.

        Example:
            >>> import normkit
            >>> layer = normkit.nn.BatchNorm1d(2)
            >>> layer.freeze()
            >>> layer.train().training
            False
            >>> layer.unfreeze()
            >>> layer.training
            True
        """
        if not self.is_frozen:
            self._mode_to_return_to = self.training
        self.is_frozen = True
        self.training = False
        if parameters:
            for parameter in self.parameters(recurse=False):
                parameter.requires_grad_(False)
                parameter.grad = None

    def unfreeze(self, *, parameters: bool = False) -> None:
        """Return to the mode that the model was last put in.

        Args:
            parameters: Let gradients go to weight and bias again, too.
        """
        if self.is_frozen:
            self.is_frozen = False
            self.training = self._mode_to_return_to
        if parameters:
            for parameter in self.parameters(recurse=False):
                parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen layer remembers it and stays in eval mode."""
        self._mode_to_return_to = mode
        return super().train(mode and not self.is_frozen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        wide: dict[str, Tensor] = {}
        for name in ("running_mean", "running_var"):
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.dtype in (torch.float32, torch.float64):
                wide[name] = buffer
        super()._apply(fn, recurse)
        for name, before in wide.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before.to(after.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        """Return the arguments of torch's layer, and those that differ from it."""
        usual = super().extra_repr()
        is_usual = self.channel_dim == 1
        return usual if is_usual else f"{usual}, channel_dim={self.channel_dim}"

    def reset_parameters(self) -> None:
        """Reset the running statistics, weight to 1 and bias to 0."""
        self.reset_running_stats()
        if self.affine:
            torch.nn.init.ones_(self.weight)
            if self.bias is not None:
                torch.nn.init.zeros_(self.bias)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        """Check the number of dimensions; subclasses may override this torch hook."""
        if input.dim() in self._ranks:
            return
        name = type(self).__name__
        takes = " or ".join(self.shapes.values())
        expected = " or ".join(f"{n}D" for n in self.shapes)
        sibling = self.siblings.get(input.dim())
        way_out = "reshape it" if sibling is None else f"use {sibling}"
        raise ArgumentError(
            f"expected {expected} input (got {input.dim()}D input): {name} takes "
            f"{takes}, the input has shape {tuple(input.shape)}; {way_out}"
        )


def is_recomputing() -> bool:
    """Return whether this forward runs within a backward, as in checkpointing.

    Both kinds of torch.utils.checkpoint repeat the forward there; the batch has updated
    the running statistics already.
    """
    return is_in_backward()


def check_not_recomputed(layer: torch.nn.Module) -> None:
    """Refuse a repeated forward of a layer whose output reads its running statistics.

    The first forward has updated them, and the repeated one would give other values.
    """
    if is_recomputing():
        raise ArgumentError(
            f"{type(layer).__name__} cannot be recomputed by activation checkpointing: "
            "its running statistics, which are part of the output, have moved; leave "
            "the layer out of the checkpointed part"
        )


def check_momentum(layer: torch.nn.Module, momentum: object) -> None:
    """Require a share, 0 to 1, or None; a tensor is not read (no host sync)."""
    if type(momentum) in (float, int) and not 0.0 <= momentum <= 1.0:  # type: ignore[operator]
        raise ArgumentError(
            f"{type(layer).__name__} needs momentum in [0, 1], the share of the new "
            f"value, got {momentum}; a decay of 0.9 is momentum=0.1"
        )

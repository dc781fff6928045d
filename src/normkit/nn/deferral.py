"""One call of a batch norm whose output is computed later, see `deferred`.

`reason_against` returns why a call is not deferred. `trial` collects the outcomes of
the calls; `convert` uses it to find the layers where deferring is faster.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normkit.functional import batch_norm
from normkit.functional.memory.block import memory_mode
from normkit.nn.parameters import learned
from normkit.torch_state import is_compiling, is_observed

__all__ = [
    "MIN_VALUES",
    "OTHER_SUMMAND",
    "ChangedInPlaceError",
    "Deferral",
    "Residual",
    "Use",
    "is_trial",
    "note",
    "reason_against",
    "trial",
    "version_of",
]

MIN_VALUES = 131_072
"""Smaller inputs are normalized at once.

Deferring costs 13 µs in eval and 24 µs in training, three times that where other code
runs in between: as much as a separate activation at 100 thousand values. Where memory
is saved, all are deferred.
"""

Residual = tuple[Tensor, int]
"""Residual, and its version at the call."""


def version_of(t: Tensor) -> int:
    """Return the version of `t`, which in-place changes increment; 0 without one."""
    return 0 if t.is_inference() else t._version


class ChangedInPlaceError(RuntimeError):
    """A tensor was changed between the call of a layer and the use of its output."""

    def __init__(self, deferral: Deferral, shape: tuple[int, ...]) -> None:
        super().__init__(
            f"a tensor of shape {shape} was changed in place between a batch norm and "
            "the first reader of its output, which is computed only then; leave it "
            "unchanged until the activation, or set defers = False on the layer"
        )
        self.layer = deferral.layer


@dataclass
class Use:
    """Outcome of one deferred call in a `trial`.

    Attributes:
        took: Fused operations, "relu" or "add+relu"; empty without any.
        readers: Functions that made an output compute its values.
        outputs: The outputs, as weak references.
    """

    took: str = ""
    readers: list[str] = field(default_factory=list[str])
    outputs: list[Callable[[], Tensor | None]] = field(
        default_factory=list[Callable[[], Tensor | None]]
    )


class Deferral:
    """State of one deferred call of a layer, shared by its outputs.

    Attributes:
        inputs: x, weight and bias, for gradients.
        layer: The layer.
        use: Outcome of the call, in a `trial`.
    """

    def __init__(self, layer: Any, x: Tensor, uses_batch: bool, updates: bool) -> None:
        self.inputs = (x, *learned(layer))
        self.with_grad = torch.is_grad_enabled()
        self.layer = layer
        self.use = Use() if is_trial() else None
        self._uses_batch, self._updates = uses_batch, updates
        # The state at the time of the call: `functional_call` puts it back after.
        buffers = layer._buffers
        self._running = (buffers["running_mean"], buffers["running_var"])
        self._counters = (buffers["num_batches_tracked"], layer.skip_counter())
        read = self.inputs if uses_batch else (*self.inputs, *self._running)
        self._versions = [(t, version_of(t)) for t in read if t is not None]

    @property
    def needs_grad(self) -> bool:
        """True if a gradient flows through the output."""
        x, weight, bias = self.inputs
        return self.with_grad and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        )

    def values(
        self,
        residual: Residual | None,
        activation: str = "none",
        slope: float = 0.01,
    ) -> Tensor:
        """Compute the output; the first time, update the running statistics."""
        updates, self._updates = self._updates, False
        read = self._versions if residual is None else (*self._versions, residual)
        for t, version in read:
            if version_of(t) != version:
                raise ChangedInPlaceError(self, tuple(t.shape))
        layer = self.layer
        x, weight, bias = self.inputs
        uses_running = updates or not self._uses_batch
        mean, var = self._running if uses_running else (None, None)
        tracked, skipped = self._counters if updates else (None, None)
        run = functools.partial(
            batch_norm,
            *(x, mean, var, weight, bias, self._uses_batch),
            *(layer.momentum if updates else 0.0, layer.eps),
            channel_dim=layer.channel_dim,
            num_batches_tracked=tracked,
            num_batches_skipped=skipped,
            activation=activation,
            negative_slope=slope,
            residual=None if residual is None else residual[0],
        )
        return run() if layer.memory is None else layer._keeping(run)

    def gradients(self, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `inputs`, by a second forward."""
        is_needed = [t is not None and t.requires_grad for t in self.inputs]
        needed = [
            t
            for t, needs in zip(self.inputs, is_needed, strict=True)
            if t is not None and needs
        ]
        with_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            y = self.values(None)
        found = iter(torch.autograd.grad(y, needed, dy, create_graph=with_graph))
        return tuple(next(found) if needs else None for needs in is_needed)

    def __del__(self) -> None:
        # Dropped unread: torch's layer would have counted the batch.
        if getattr(self, "_updates", False) and not sys.is_finalizing():
            with torch.no_grad():
                self.values(None)


OTHER_SUMMAND = "a sum that is fused into the other batch norm that it adds"
"""The reader of an output that is added to another deferred one."""

_seen: dict[Any, list[Use | str]] | None = None


@contextmanager
def trial() -> Iterator[dict[Any, list[Use | str]]]:
    """Collect the calls of each deferring layer, or the reasons against deferring.

    Small inputs are deferred, too. The collection keeps no inputs alive.
    """
    global _seen  # noqa: PLW0603
    _seen = {}
    try:
        yield _seen
    finally:
        _seen = None


def is_trial() -> bool:
    """Return whether a `trial` is running."""
    return _seen is not None


def note(layer: Any, call: Use | str) -> None:
    """Note one call of `layer` in the `trial`, or the reason against deferring it."""
    if _seen is not None:
        _seen.setdefault(layer, []).append(call)


def reason_against(layer: Any, x: Tensor) -> str:
    """Return why the output of `layer` on `x` cannot be deferred; empty if it can."""
    if type(x) is not Tensor or is_observed():
        if is_compiling():
            return "a compiler reads the model, and fuses by itself"
        return "a transform, a tracer or a mode has to see every operation"
    if (
        x.numel() < MIN_VALUES
        and _seen is None
        and layer.memory is None
        and memory_mode() is None
    ):
        return "its input is small"
    if x.is_inference():
        return "changes in place cannot be noticed in inference mode"
    if layer.activation != "none":
        return f"it has activation={layer.activation!r} already"
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has hooks, which read its output"
    if not (
        x.is_floating_point()
        and x.shape[layer.channel_dim] == layer.num_features
        and (
            x.is_contiguous()
            or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        )
    ):
        return "its input is neither contiguous nor channels_last"
    return ""

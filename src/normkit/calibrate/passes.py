"""One pass over the data: forward each batch, measure what reaches the layers.

Every module is in eval mode, so dropout is off. A layer under measurement is given the
statistics of its own input to normalize by, as in training, those of all ranks for a
synchronized layer; a batch of one value is no trouble. The batch counts only once it
has come through whole, and with finite statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normkit.calibrate.estimators import Estimator
from normkit.calibrate.layers import Layer, Seen, fit_mask
from normkit.calibrate.lockstep import in_step, ranks_of_layer
from normkit.calibrate.transaction import Transaction
from normkit.errors import CalibrationError
from normkit.modeling.batch import (
    Forward,
    device_of,
    to_device,
)
from normkit.modeling.grad_forward import GradForward
from normkit.modeling.norm_types import check_num_channels
from normkit.moments import Moments
from normkit.sync import merge_over
from normkit.sync.groups import Group

__all__ = ["PassResult", "SkippedBatch", "run_pass"]


@dataclass(frozen=True)
class SkippedBatch:
    """A batch that was left out, and the first layer where it was not finite."""

    index: int
    layer: str
    channels: int

    def __str__(self) -> str:
        return (
            f"batch {self.index}: not finite at {self.layer!r}, "
            f"in {self.channels} channels"
        )


@dataclass
class PassResult:
    """Counts and names from one pass over the data.

    Attributes:
        batches: How many batches were used.
        skipped: Those that were not finite.
        order: Names of the layers in the order of their first calls.
        repeated: Names of those called more than once for one batch.
        stopped: Whether the standard errors ended the pass before the data did.
    """

    batches: int = 0
    skipped: list[SkippedBatch] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    repeated: set[str] = field(default_factory=set)
    stopped: bool = False


class _FarEnough(BaseException):
    """Leaves a forward once the layer of interest has been measured."""


def run_pass(
    transaction: Transaction,
    layers: Sequence[Layer],
    estimators: Mapping[str, Estimator],
    batches: Iterable[Any],
    *,
    forward: Forward | None,
    mask: Callable[[Any], Tensor] | None,
    on_nonfinite: str,
    max_batches: int | None = None,
    is_done: Callable[[], bool] | None = None,
    stop_at_first: bool = False,
    group: Group = None,
) -> PassResult:
    """Measure `layers` over `batches` into `estimators`.

    Args:
        transaction: Holds the model.
        layers: Those to measure; all others run as eval mode has them.
        estimators: By layer name.
        batches: The data.
        forward: `forward(model, batch)`; None for the convention of batches.
        mask: Gives the mask of a batch; layers that are called with one use that.
        on_nonfinite: "skip" or "raise".
        max_batches: Use no more than these.
        is_done: Asked after each batch; True ends the pass.
        stop_at_first: Leave forward once the first of `layers` is measured.
        group: Ranks that run the model equally often, with empty batches where one has
            no more; None where no forward waits for another rank.

    Raises:
        CalibrationError: A batch is not finite and `on_nonfinite` is "raise".
    """
    result = PassResult()
    seen: dict[str, list[Seen]] = {}
    current: dict[str, Tensor | None] = {"mask": None}
    forward_on = GradForward(forward, before_again=seen.clear)

    def observe(layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["input"]
            check_num_channels(layer.name, module, x)
            valid = kwargs.get("mask")
            if valid is None and current["mask"] is not None:
                valid = fit_mask(current["mask"], x, layer)
            call = layer.see(x, valid)
            seen.setdefault(layer.name, []).append(call)
            if stop_at_first:
                raise _FarEnough
            _normalize_by_batch(layer, call, of_all_ranks=group is not None)

        return hook

    for layer in layers:
        handle = layer.module.register_forward_pre_hook(
            observe(layer), with_kwargs=True
        )
        transaction.hooks.append(handle)
    device = device_of(transaction.model)
    data = _limited(batches, max_batches, is_done, result)
    steps = ((True, batch) for batch in data) if group is None else in_step(data, group)

    def run(index: int, batch: Any, *, is_own: bool) -> None:
        seen.clear()
        batch = to_device(batch, device)
        current["mask"] = None if mask is None else mask(batch)
        with suppress(_FarEnough):
            forward_on(transaction.model, batch)
        if not is_own:
            return
        bad = _first_nonfinite(seen, index)
        if bad is not None:
            if on_nonfinite == "raise":
                raise CalibrationError(
                    f"{bad}; fix the data, or pass on_nonfinite='skip' to leave "
                    "such batches out; the model is as it was"
                )
            result.skipped.append(bad)
            return
        result.batches += 1
        for name, calls in seen.items():
            estimators[name].add(calls)
            if name not in result.order:
                result.order.append(name)
            if len(calls) > 1:
                result.repeated.add(name)

    try:
        for index, (is_own, batch) in enumerate(steps):
            run(index, batch, is_own=is_own)
    except BaseException as error:
        if group is not None:
            steps.throw(error)  # the other ranks have to know
        raise
    finally:
        transaction.put_back()
    return result


def _limited(
    batches: Iterable[Any],
    most: int | None,
    is_done: Callable[[], bool] | None,
    result: PassResult,
) -> Generator[Any]:
    for index, batch in enumerate(batches):
        if most is not None and index >= most:
            return
        before = result.batches
        yield batch
        if is_done is not None and result.batches > before and is_done():
            result.stopped = True
            return


def _normalize_by_batch(layer: Layer, call: Seen, *, of_all_ranks: bool) -> None:
    """Make the next call normalize by the statistics of its input, as in training."""
    buffers = layer.module._buffers
    if layer.is_instance:
        for name in layer.buffers:
            buffers[name] = None
        layer.module.training = True
        return
    found = call.moments
    ranks = ranks_of_layer(layer.module) if of_all_ranks else None
    if ranks is not None:
        # A count per channel on every rank: a mask may make it so on one of them.
        count = found.count.expand(found.mean.shape).to(torch.float64)
        found = merge_over(Moments(count, found.mean, found.m2), ranks, eps=0.0)
    for name, value in (("running_mean", found.mean), ("running_var", None)):
        own = buffers[name]
        assert own is not None
        # No values give an output of none; any variance will do.
        new = torch.nan_to_num(found.var, nan=1.0) if value is None else value
        buffers[name] = new.to(own.dtype).reshape(own.shape)


def _first_nonfinite(seen: Mapping[str, list[Seen]], index: int) -> SkippedBatch | None:
    calls = [(name, call) for name, each in seen.items() for call in each]
    if not calls:
        return None
    bad = [
        (~(call.moments.mean.isfinite() & call.moments.m2.isfinite())).sum()
        for _, call in calls
    ]
    # One wait for the device per batch, not one per layer.
    counts = torch.stack([count.to(bad[0].device) for count in bad]).tolist()
    for (name, _), count in zip(calls, counts, strict=True):
        if count:
            return SkippedBatch(index, name, count)
    return None

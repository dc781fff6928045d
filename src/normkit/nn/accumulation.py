"""Gradient accumulation: several small batches that stand for one large one.

`accumulate`         one update of the running statistics for all of them, by the merge
                     of their Moments; gradients stay those of the small batches
`backward_as_whole`  the gradients of the large batch, with the memory of a small one

Accumulating gradients alone is not training on the large batch: each small one is
normalized by its own statistics, and the running ones are updated several times a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.errors import ArgumentError
from normkit.functional import normalize
from normkit.functional.differentiable import finish
from normkit.kernels.primitives import split, vector_dtype
from normkit.kernels.spec import Spec
from normkit.masks import broadcast_mask
from normkit.moments import Moments, deviations, statistics_dtype
from normkit.nn.batch_statistics import BatchStatisticsLayer, Observer
from normkit.nn.layer_ranks import ranks_of
from normkit.sync import merge_all_over, merge_over, sum_over

__all__ = ["accumulate", "backward_as_whole"]

Batch = TypeVar("Batch")


@contextmanager
def accumulate(model: nn.Module) -> Generator[None]:
    """Update the running statistics once, with the batches of the whole block.

    Args:
        model: Its batch norm layers are normkit's; those of torch are refused.

    Raises:
        ArgumentError: A layer of torch.nn that keeps running statistics, or one of
            another kind whose running statistics cannot be collected.

    Numerics:
        The merge of the small batches' Moments is that of the large batch. A batch
        with a NaN or Inf is left out. After an exception nothing is updated. Layers
        with ghost batches over ranks send one message for all of them, at the end of
        the block, which every rank has to reach.

    Example:
        >>> from normkit.nn import BatchNorm1d
        >>> layer, whole = BatchNorm1d(2), BatchNorm1d(2)
        >>> x = torch.randn(12, 2)
        >>> with accumulate(layer):
        ...     for part in x.split(5):
        ...         _ = layer(part)
        >>> _ = whole(x)
        >>> torch.allclose(layer.running_var, whole.running_var)
        True
        >>> int(layer.num_batches_tracked)
        1
    """
    pool, layers = _Merged(), _layers(model)
    with _observed(layers, pool):
        yield
    pool.merge_ghosts(layers.values())
    for layer, merged in pool.merged.items():
        layer.update_running(merged)
        if (counter := layer.skip_counter()) is not None:
            counter.add_(pool.skipped[layer])


def backward_as_whole(
    model: nn.Module, batches: Sequence[Batch], loss_of: Callable[[Batch], Tensor]
) -> Tensor:
    """Add the gradients that one batch of all `batches` would have given.

    With L calls of batch norm in a forward there are L + 1 forwards without a graph
    and L + 1 with one, over every small batch: first the statistics of the whole, layer
    by layer, then the gradient of the loss with respect to each, in reverse. Memory is
    that of one small batch.

    Args:
        model: In training mode. Random numbers are drawn as in one pass and repeated.
        batches: Small batches, as `loss_of` takes them.
        loss_of: Runs the model on a small batch and returns its share of the loss, a
            scalar; the loss is their sum. Called many times.

    Returns:
        The loss, detached. Gradients are added to `.grad`, and the running statistics
        are updated once.

    Raises:
        ArgumentError: No batches, a layer that `accumulate` refuses or one with ghosts,
            or forwards that call their layers in another order from part to part.

    Example:
        >>> from normkit.nn import BatchNorm1d
        >>> model = nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4))
        >>> x, dy = torch.randn(2, 12, 3), torch.randn(12, 4)
        >>> parts = list(zip(x[0].split(5), dy.split(5)))
        >>> _ = backward_as_whole(model, parts, lambda p: (model(p[0]) * p[1]).sum())
        >>> ours = model[0].weight.grad.clone()
        >>> model.zero_grad()
        >>> (model(x[0]) * dy).sum().backward()
        >>> torch.allclose(ours, model[0].weight.grad, atol=1e-5)
        True
    """
    if not batches:
        raise ArgumentError("backward_as_whole needs at least one batch, got none")
    layers = _layers(model)
    for name, layer in layers.items():
        if layer.ghost_size is not None:
            raise ArgumentError(
                f"backward_as_whole cannot run {name!r}: its ghost batches are not "
                "normalized as a whole; set ghost_size=None or use accumulate()"
            )
    whole = _LargeBatch()
    with _observed(layers, whole):
        states: list[Any] = []
        with torch.no_grad():
            for batch in batches:
                states.append(_random_state())
                whole.begin()
                loss_of(batch)
                whole.check_calls()
            after = _random_state()
            for k in range(len(whole.calls)):
                whole.measuring = k
                for batch, state in zip(batches, states, strict=True):
                    _restore(state)
                    whole.begin()
                    with suppress(_Measured):
                        loss_of(batch)
                whole.finish_measuring()
        whole.measuring = None
        for k in reversed(range(len(whole.calls))):
            whole.start_gradient(k)
            for batch, state in zip(batches, states, strict=True):
                _restore(state)
                whole.begin()
                whole.collect_gradient(loss_of(batch))
            whole.finish_gradient()
        total: Tensor | None = None
        for batch, state in zip(batches, states, strict=True):
            _restore(state)
            whole.begin()
            loss = loss_of(batch)
            (loss + whole.statistics_term).backward()
            total = loss.detach() if total is None else total + loss.detach()
        _restore(after)
    for layer, found in zip(whole.calls, whole.found, strict=True):
        if layer.training and layer.track_running_stats and layer.momentum != 0:
            layer.update_running(found)
    assert total is not None
    return total


class _Merged:
    """Merged statistics of the small batches of each layer."""

    merges_ghosts = True

    def __init__(self) -> None:
        self.merged: dict[BatchStatisticsLayer, Moments] = {}
        self.skipped: dict[BatchStatisticsLayer, Tensor] = {}

    def normalize(
        self, layer: BatchStatisticsLayer, x: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Moments] | None:
        return None

    def take(self, layer: BatchStatisticsLayer, measured: Moments) -> None:
        is_finite = measured.mean.isfinite().all() & measured.m2.isfinite().all()
        count = measured.count * is_finite
        self.skipped[layer] = self.skipped.get(layer, 0) + (~is_finite).long()
        zero = torch.zeros_like(measured.mean)
        part = Moments(
            count.expand(measured.mean.shape).flatten(),
            torch.where(is_finite, measured.mean, zero).flatten(),
            torch.where(is_finite, measured.m2, zero).flatten(),
        )
        before = self.merged.get(layer)
        self.merged[layer] = part if before is None else before.merge(part)

    def merge_ghosts(self, layers: Iterable[BatchStatisticsLayer]) -> None:
        """Merge over ranks what layers with ghost batches took; one message.

        In the order of the model, called or not: ranks may differ in what they call.
        """
        together: dict[Any, list[BatchStatisticsLayer]] = {}
        for layer in layers:
            mean = layer.running_mean
            if mean is not None and layer.merges_later and layer.is_over_ranks():
                key = ranks_of(layer).group, mean.device
                together.setdefault(key, []).append(layer)
        for (_, device), members in together.items():
            parts = [
                self.merged[layer] if layer in self.merged else _none_of(layer)
                for layer in members
            ]
            none = torch.zeros((), dtype=torch.int64, device=device)
            skipped = [self.skipped.get(layer, none) for layer in members]
            # One value a rank, so that its mean times the ranks is their sum.
            ours = torch.stack(skipped).to(torch.float64)
            flags = Moments(torch.ones_like(none), ours, torch.zeros_like(ours))
            eps = [*(layer.eps for layer in members), math.inf]
            # The first layer's ranks, for its name in an error.
            ranks = ranks_of(members[0])
            *merged, total = merge_all_over([*parts, flags], ranks, eps=eps)
            for layer, part in zip(members, merged, strict=True):
                self.merged[layer] = part
            sums = (total.mean * total.count).round().long()
            self.skipped.update(zip(members, sums, strict=True))


def _none_of(layer: BatchStatisticsLayer) -> Moments:
    assert layer.running_mean is not None
    zeros = torch.zeros_like(layer.running_mean, dtype=torch.float64)
    return Moments(zeros.long(), zeros, zeros)


class _Measured(BaseException):
    """Ends a forward after a measurement; not caught by `except Exception`."""


class _LargeBatch:
    """Statistics and their gradients in `backward_as_whole`.

    Each call k of a forward has a statistic (mean, var) of the whole batch, measured
    with those of earlier calls, and a gradient `grads[k]` = d(loss)/d(mean, var).
    """

    merges_ghosts = False

    def __init__(self) -> None:
        self.calls: list[BatchStatisticsLayer] = []
        self.found: list[Moments] = []
        self.grads: dict[int, tuple[Tensor, Tensor]] = {}
        self.measuring: int | None = -1
        self._call = 0
        self._parts: list[Moments] = []
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}
        self._totals: list[Tensor] = []
        self._terms: list[Tensor] = []
        self._is_known = False

    def begin(self) -> None:
        self._call, self._terms = 0, []

    def check_calls(self) -> None:
        self._is_known = True
        if self._call != len(self.calls):
            raise ArgumentError(
                f"backward_as_whole met {self._call} batch norms in a part after "
                f"{len(self.calls)} in the first; each part must run the same layers"
            )

    @property
    def statistics_term(self) -> Tensor | float:
        """Loss term whose gradient is the one through the statistics of the whole."""
        return sum(self._terms, start=0.0)

    def finish_measuring(self) -> None:
        layer = self.calls[len(self.found)]
        merged = self._parts[0]
        for part in self._parts[1:]:
            merged = merged.merge(part)
        if layer.is_over_ranks():
            merged = merge_over(merged, ranks_of(layer), eps=layer.eps)
        self.found.append(merged)
        self._parts = []

    def start_gradient(self, k: int) -> None:
        found = self.found[k]
        mean, var = found.mean.clone(), found.var.nan_to_num()
        self._leaves = {k: (mean.requires_grad_(), var.requires_grad_())}
        self._totals = [torch.zeros_like(mean), torch.zeros_like(var)]

    def collect_gradient(self, loss: Tensor) -> None:
        (leaves,) = self._leaves.values()
        total = loss + self.statistics_term
        if not total.requires_grad:
            return
        for kept, grad in zip(
            self._totals,
            torch.autograd.grad(total, leaves, allow_unused=True),
            strict=True,
        ):
            if grad is not None:
                kept += grad

    def finish_gradient(self) -> None:
        (k,) = self._leaves
        layer = self.calls[k]
        totals = self._totals
        if layer.is_over_ranks():
            totals = sum_over(totals, ranks_of(layer))
        self.grads[k] = (totals[0], totals[1])
        self._leaves = {}

    def take(self, layer: BatchStatisticsLayer, measured: Moments) -> None:
        """Leave the running statistics: they are updated once, at the end."""

    def normalize(
        self, layer: BatchStatisticsLayer, x: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Moments] | None:
        k, self._call = self._call, self._call + 1
        if not self._is_known:
            self.calls.append(layer)
        elif k >= len(self.calls) or self.calls[k] is not layer:
            raise ArgumentError(
                "backward_as_whole met another layer than in the first part, "
                f"{layer}; each part must run the same layers in the same order"
            )
        dims, weight, bias = layer._along(x)
        if self.measuring == -1:
            # This rank alone: others may have another number of small batches.
            return normalize(x, dims, weight, bias, layer.eps, mask=mask)
        wide, compute = vector_dtype(x.device), statistics_dtype(x.dtype)
        if self.measuring == k:
            self._parts.append(deviations(x.detach(), dims, mask).to_moments(wide))
            raise _Measured
        found = self.found[k]
        mean, var = self._leaves.get(k, (found.mean, found.var.nan_to_num()))
        valid = None
        if mask is not None:
            share = broadcast_mask(mask, x).to(compute)
            valid = share > 0
            x = torch.where(valid, x, torch.zeros_like(x))
        else:
            share = torch.ones((), dtype=compute, device=x.device)
        hi, _ = split(found.mean, compute)
        values = x.to(compute) - hi
        y = values - (mean - hi.to(wide)).to(compute)
        if k in self.grads:
            # d(mean)/dx = 1/n and d(var)/dx = 2(x − mean)/n of the whole's n.
            n = found.count.to(wide).clamp(min=1e-30)
            d_mean, d_var = ((grad / n).to(compute) for grad in self.grads[k])
            rest = values - (found.mean - hi.to(wide)).to(compute)
            self._terms.append((share * (d_mean * values + d_var * rest**2)).sum())
        y = y * torch.rsqrt(var + layer.eps).to(compute)
        spec = Spec(dims, layer.eps)
        return finish(spec, y, weight, bias, None, valid).to(x.dtype), found


def _layers(model: nn.Module) -> dict[str, BatchStatisticsLayer]:
    layers: dict[str, BatchStatisticsLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchStatisticsLayer) and module.is_observable:
            layers[name] = module
        elif isinstance(module, _BatchNorm) and not isinstance(
            module, BatchStatisticsLayer
        ):
            if module.track_running_stats:
                raise ArgumentError(
                    f"{name!r} is {type(module).__name__} of torch.nn, whose running "
                    "statistics move at every forward; "
                    "normkit.convert(model, to='normkit')"
                )
        elif module._buffers.get("running_mean") is not None:
            raise ArgumentError(
                f"{name!r} is {type(module).__name__}, whose running statistics move "
                "at every forward and cannot be collected; use a batch norm, or "
                "accumulate without this block"
            )
    return layers


@contextmanager
def _observed(
    layers: dict[str, BatchStatisticsLayer], observer: Observer
) -> Generator[None]:
    with ExitStack() as stack:
        for name, layer in layers.items():
            if layer._observer is not None:
                raise ArgumentError(
                    f"layer {name or '(model)'!r} is being accumulated already; blocks "
                    "do not nest: leave the inner one out"
                )
            layer._observer = observer
            stack.callback(layer.__dict__.pop, "_observer", None)
        yield


def _random_state() -> tuple[Tensor, list[Tensor]]:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), on_devices


def _restore(state: tuple[Tensor, list[Tensor]]) -> None:
    on_cpu, on_devices = state
    torch.set_rng_state(on_cpu)
    if on_devices:
        torch.cuda.set_rng_state_all(on_devices)

"""Outputs, targets and losses of one pass, merged over the batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normkit.doctor.examination.graph import (
    are_cosines,
    class_weights,
    compared_values,
    has_distributions,
    last_operation,
    operations_between,
    softmax_dim,
    squashed_by,
)
from normkit.doctor.examination.labels import rows_of
from normkit.doctor.examination.renumbered import renumbered
from normkit.doctor.examination.targets import (
    Targets,
    most_frequent,
    on_cpu,
    sum_to_one,
)
from normkit.doctor.examination.unregistered import unregistered
from normkit.doctor.measurements import OutputStatistics, TargetStatistics
from normkit.doctor.probes.tensor_statistics import first_tensor
from normkit.modeling.other_modules import leaves_of
from normkit.moments import Moments, moments

__all__ = ["Answers"]

# Share of the samples with one answer from which the inputs are compared, too.
SAME_ANSWERS = 0.3

# A loss that was not measured.
UNKNOWN = math.nan

# Share of the samples with another target than the one before. Two classes of 1 to 20
# in random order have 0.1; batches of 64 ordered by class, with a border, 0.03.
MIN_DIFFERENT = 0.05


class Answers:
    """The model's outputs beside the targets, over one pass.

    Attributes:
        shuffled: Loss per batch with each answer given to the sample after it.
        common: Loss per batch with the mean of the answers given to every sample.
        has_targets: The targets of the first batch with shuffled answers take part in
            its loss.
        targets: The targets.
    """

    def __init__(self) -> None:
        self.shuffled: list[float] = []
        self.common: list[float] = []
        self.has_targets = True
        self.targets = Targets()
        self._outputs: list[Moments] = []
        self._largest = 0.0
        self._right = [0, 0]
        self._sums_to_one = True
        self._activation = ""
        self._operations: frozenset[str] = frozenset()
        self._squashed_by = ""
        self._are_cosines = False
        self._softmax_dim: int | None = None
        self._class_dim: int | None = None
        self._unregistered: list[str] = []
        self._has_critic = False
        self._compared: TargetStatistics | None = None
        self._compared_binary: TargetStatistics | None = None
        self._has_distributions = False
        self._has_their_size = True
        self._class_weights: tuple[float, ...] = ()
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._chosen: list[Tensor] = []
        self._pairs: tuple[list[Tensor], list[Tensor]] = [], []
        self._same: list[float] = []

    def add(
        self, output: Any, targets: Any, samples: int = 0, inputs: Any = None
    ) -> None:
        """Merge the outputs and targets of one batch.

        Args:
            output: What the model gave.
            targets: The targets.
            samples: The number of samples; 0 where it is that of the targets.
            inputs: The batch, to tell answers apart from inputs that are the same.
        """
        y = first_tensor(output)
        if y is not None and y.dim() >= 2:
            flat = y.detach().float().flatten(1)
            self._outputs.append(on_cpu(moments(flat, 0)))
            self._sums_to_one &= sum_to_one(flat)
            self._largest = max(self._largest, float(flat.abs().max()))
            if y.dim() == 2:
                self._same.append(_share_of_one_answer(flat, inputs))
        if not isinstance(targets, Tensor) or not targets.numel() or targets.is_meta:
            return
        t = targets.detach()
        if y is not None:
            self._has_their_size &= y.numel() == t.numel()
            if _broadcast(y.shape, t.shape):
                self._shapes = tuple(y.shape), tuple(t.shape)
        if t.dtype == torch.int64:
            if self.targets.add_labels(t, samples) and y is not None:
                self._add_choices(y, t)
        elif t.is_floating_point():
            self.targets.add_values(t, y, first_tensor(inputs))

    def add_graph(
        self, model: nn.Module, output: Any, targets: Any, loss: Tensor
    ) -> None:
        """Record the operations around the output of `model`, once."""
        y = first_tensor(output)
        if y is not None and not self._activation:
            self._activation = last_operation(y)
            self._operations = operations_between(loss, y)
            self._squashed_by = squashed_by(loss, y)
            self._are_cosines = are_cosines(y)
            self._softmax_dim = softmax_dim(y)
            self._class_dim = _class_dim(y, targets)
            self._unregistered = unregistered(model, y)
            self._compared, self._compared_binary = (
                _made_by_loss(values, targets) for values in compared_values(loss, y)
            )
            self._has_distributions = has_distributions(loss, y)
            self._class_weights = class_weights(loss, y)
            owned = {id(p) for p in model.parameters()} | {
                id(leaf) for leaf in leaves_of(y)
            }
            self._has_critic = any(id(leaf) not in owned for leaf in leaves_of(loss))

    def add_shuffled(
        self, loss_fn: Callable[..., Any], output: Any, target: Any
    ) -> None:
        """Record the loss with each answer given to the sample after it.

        Nothing where the answers have no common first dimension, where the loss does
        not take them, or where hardly a sample has another target than its neighbor,
        as in batches that are ordered by class.
        """
        size = len(target) if isinstance(target, Tensor) and target.dim() else 0
        if size < 2:
            return
        differs = (target != target.roll(1, 0)).reshape(size, -1).any(1)
        if differs.double().mean() < MIN_DIFFERENT:
            return

        def rolled(x: Any) -> Any:
            is_answer = isinstance(x, Tensor) and x.dim() and len(x) == size
            return x.detach().roll(1, 0) if is_answer else x

        def common(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.dim() or len(x) != size:
                return x
            if not x.is_floating_point():
                return x
            given.append(x)
            return x.detach().mean(0, keepdim=True).expand_as(x).contiguous()

        given: list[Tensor] = []
        try:
            with torch.no_grad():
                shuffled = float(loss_fn(tree_map(rolled, output), target))
                one = float(loss_fn(tree_map(common, output), target))
                # Where no answer has the samples first, nothing was changed.
                self.common.append(one if given else UNKNOWN)
                self.shuffled.append(shuffled)
            if len(self.shuffled) == 1:
                self.has_targets = _has_targets(loss_fn, output, target)
        except Exception:  # the user's function, called with what it was not given
            return

    def output(self, loss_fn: Any) -> OutputStatistics | None:
        """Return statistics of the outputs; None when they were no tensor of one size.

        Args:
            loss_fn: The loss, whose name is recorded.
        """
        if not self._outputs or len({a.mean.shape for a in self._outputs}) > 1:
            return None
        merged = Moments.merge_all(self._outputs)
        targets = self.targets.statistics()
        return OutputStatistics(
            spread=float(merged.var.mean().sqrt()),
            scale=float(merged.mean_square.mean().sqrt()),
            units=merged.mean.numel(),
            sums_to_one=self._sums_to_one,
            classes=None if targets is None else targets.classes,
            loss_kind=getattr(loss_fn, "__name__", type(loss_fn).__name__),
            activation=self._activation,
            operations=self._operations,
            squashed_by=self._squashed_by,
            most_chosen=most_frequent(self._chosen),
            are_cosines=self._are_cosines,
            largest=self._largest,
            right=self._right[0] / self._right[1] if self._right[1] else None,
            softmax_dim=self._softmax_dim,
            class_dim=self._class_dim,
            unregistered=tuple(self._unregistered),
            has_critic=self._has_critic,
            broadcast=self._shapes,
            compared=self._compared,
            compared_binary=self._compared_binary,
            has_their_size=self._has_their_size,
            has_distributions=self._has_distributions,
            class_weights=self._class_weights,
            renumbered=renumbered(*self._pairs),
            same=sum(self._same) / len(self._same) if self._same else 0.0,
        )

    def _add_choices(self, y: Tensor, t: Tensor) -> None:
        """Record which class each row of scores gives, beside the right one."""
        if y.dim() != t.dim() + 1 or y.shape[1] <= 1:
            return
        chosen = y.detach().argmax(1)
        self._chosen.append(rows_of(chosen).flatten().cpu())
        if chosen.shape == t.shape:  # classes may lie along another dimension
            self._right[0] += int(((chosen == t) & (t >= 0)).sum())
            self._right[1] += int((t >= 0).sum())
            for kept, rows in zip(self._pairs, (t, chosen), strict=True):
                kept.append(rows_of(rows).flatten().cpu())


def _has_targets(loss_fn: Callable[..., Any], output: Any, target: Tensor) -> bool:
    """Return True where the loss or its gradient changes with the targets.

    Each sample gets the target of the first, then of the last. The gradient tells of
    answers that give one loss for any target, such as scores of zero.
    """
    leaves: list[Tensor] = []

    def as_leaf(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        answers = tree_map(as_leaf, output)
        found = []
        for wanted in (
            target,
            *(t.expand_as(target) for t in (target[:1], target[-1:])),
        ):
            loss = loss_fn(answers, wanted.clone())
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
            found.append([loss.detach(), *(s for s in slopes if s is not None)])
    first = found[0]
    return not all(
        len(other) == len(first) and all(map(torch.equal, first, other))
        for other in found[1:]
    )


def _made_by_loss(values: Tensor | None, targets: Any) -> TargetStatistics | None:
    """Return the range of what a loss made of the targets; None for the targets."""
    if values is None or not isinstance(targets, Tensor) or not targets.numel():
        return None
    low, high = float(values.min()), float(values.max())
    same = functools.partial(math.isclose, rel_tol=1e-3)  # of another precision
    if same(low, float(targets.min())) and same(high, float(targets.max())):
        return None
    found = moments(values.flatten(), 0)
    return TargetStatistics(low=low, high=high, spread=float(found.var.sqrt()))


def _class_dim(scores: Tensor, targets: Any) -> int | None:
    """Return the one dimension of the scores that the class numbers lack."""
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        return None
    shape = tuple(scores.shape)
    found = [
        dim
        for dim in range(len(shape))
        if shape[:dim] + shape[dim + 1 :] == tuple(targets.shape)
    ]
    return found[0] if len(found) == 1 else None


def _share_of_one_answer(rows: Tensor, inputs: Any) -> float:
    """Return the share of the answer given most often, less that of the inputs."""
    share = _most_often(rows)
    x = next((v for v in tree_leaves(inputs) if isinstance(v, Tensor)), None)
    if share < SAME_ANSWERS or x is None or x.dim() < 2 or len(x) != len(rows):
        return 0.0
    return share - _most_often(x)


def _most_often(rows: Tensor) -> float:
    """Return the share of the row that comes most often."""
    counts = rows.detach().flatten(1).unique(dim=0, return_counts=True)[1]
    return float(counts.max()) / len(rows)


def _broadcast(one: Sequence[int], other: Sequence[int]) -> bool:
    """Return True for as many values that torch compares each with all the others."""
    try:
        both = torch.broadcast_shapes(tuple(one), tuple(other))
    except RuntimeError:
        return False
    return math.prod(one) == math.prod(other) < math.prod(both)

"""On what an answer depends, beyond its own sample: one batch in eval mode, changed.

The batch runs as it is, again as its last samples alone, or with another last token.
The loss is taken again with the target of one pixel changed. None of this trains or
changes the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from normkit.doctor.examination.case import Case
from normkit.doctor.examination.erased import erased
from normkit.doctor.measurements import DependenceStatistics
from normkit.doctor.probes.tensor_statistics import first_tensor
from normkit.modeling.batch import num_samples
from normkit.modeling.norm_types import is_batch_norm

__all__ = ["dependence"]

_DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
)
_LAYERS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
# Places of an image whose target is changed, as shares of its pixels. In another order
# of the dimensions a few stay where they are: of C classes those at k / (C - 1).
_PLACES = (0.31, 0.43, 0.62, 0.69, 0.87)
# Spread of the answers, as a share of their rms, below which a change may be rounding:
# a fresh RepVGG in eval mode answers every sample alike, to 5e-8.
VARIES = 1e-3
# Samples from which a part of a batch tells anything, and those that are left: of a
# batch norm that takes the statistics of the batch, half of 64 change answers by .04 of
# their spread, and the last two alone by .29 (digits).
MIN_SIZE, LEFT = 4, 2


def dependence(case: Case, model: nn.Module, batch: Any) -> DependenceStatistics:
    """Return on what the answers to `batch` depend; `model` is in eval mode.

    What cannot be measured is None: the user's functions are called with batches that
    they were not given, and may refuse them.
    """

    def answers(changed: Any, seed: int = 0) -> Tensor | None:
        torch.manual_seed(case.seed + seed)
        with torch.no_grad():
            found = first_tensor(case.forward(model, changed))
        if found is None:
            return None
        # One number a sample may come without a dimension of its own.
        is_row = found.dim() == 1 and len(found) == num_samples(changed) > 1
        return found.detach()[:, None] if is_row else found.detach()

    def change(measure: Callable[[], float | None]) -> float | None:
        try:
            return measure()
        except Exception:  # the user's function, called with what it was not given
            return None

    with _Calls(model) as calls:
        y = answers(batch)
    last, most = calls.last, calls.most
    is_dropped = y is not None and last.is_unchanged(y)
    if y is None or y.dim() < 2 or not y.is_floating_point():
        return DependenceStatistics(most_dropped=most.share, most_dropped_by=most.name)
    whole, targets = y, case.targets(batch)
    others = change(lambda: _on_others(answers, model, batch, whole, targets))
    future = change(lambda: _on_future(answers, batch, whole, targets))
    chance = None
    if calls.seen or max(others or 0.0, future or 0.0) > VARIES:
        chance = change(lambda: _relative(answers(batch, 1), whole, whole))
    if chance:
        # Random answers differ without any reason.
        others = future = None
    lost = None
    if not chance:
        with contextlib.suppress(Exception):  # as above
            lost = erased(answers, batch, whole, targets)
    elsewhere = change(lambda: float(_is_elsewhere(case.loss_fn, whole, targets)))
    return DependenceStatistics(
        dropout=calls.seen,
        is_switched_on=bool(calls.seen) and not calls.is_plain,
        on_chance=chance,
        on_others=others,
        on_future=future,
        is_elsewhere=bool(elsewhere),
        ignored=_ignored(case.loss_fn, whole, targets),
        dropped=last.share if is_dropped else 0.0,
        dropped_by=last.name if is_dropped else "",
        most_dropped=most.share,
        most_dropped_by=most.name,
        made_norms=calls.made_norms,
        erased=lost,
    )


class _Last(NamedTuple):
    """The last dropout that was called, on or off: its module, share and output."""

    name: str = ""
    share: float = 0.0
    output: Tensor | None = None
    version: int = 0

    def is_unchanged(self, y: Tensor) -> bool:
        """Return True where `y` is the output, or a view of it."""
        if self.output is None or self.output.numel() != y.numel():
            return False
        own, other = self.output.untyped_storage(), y.untyped_storage()
        return own.data_ptr() == other.data_ptr() and y._version == self.version


class _Calls(TorchFunctionMode):
    """Record what belongs to training: dropout that is on, statistics of the batch.

    One that is off gives a copy of its input, to tell its output from it.

    Attributes:
        seen: The name of its function; "" where none is on.
        last: The last one that was called.
        most: The one with the largest share.
        made_norms: Calls of a batch norm with the statistics of the batch, outside the
            batch norms of `model`.
        is_plain: One was called outside the modules of `model` that were in eval mode
            at the beginning, and that its forward has switched on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen = ""
        self.is_plain = False
        self.last = self.most = _Last()
        self.made_norms = 0
        self._within: list[str] = []
        # Scripted ones take no hooks, and call no function of Python.
        self._norms = [
            module
            for module in model.modules()
            if is_batch_norm(module) and not isinstance(module, torch.jit.ScriptModule)
        ]
        self._in_norms = 0
        self._off = {
            module: name
            for name, module in model.named_modules()
            if isinstance(module, _LAYERS) and not module.training
        }
        self._handles: list[Any] = []

    def __enter__(self) -> _Calls:
        """Follow the modules that are off."""
        for module, name in self._off.items():
            before = module.register_forward_pre_hook(
                lambda *_, name=name: self._within.append(name)
            )
            after = module.register_forward_hook(
                lambda *_: self._leave(), always_call=True
            )
            self._handles += [before, after]
        for module in self._norms:
            before = module.register_forward_pre_hook(lambda *_: self._enter_norm(1))
            after = module.register_forward_hook(
                lambda *_: self._enter_norm(-1), always_call=True
            )
            self._handles += [before, after]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove the hooks."""
        super().__exit__(*error)
        while self._handles:
            self._handles.pop().remove()

    def _enter_norm(self, step: int) -> None:
        self._in_norms += step

    def _leave(self) -> None:
        self._within.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and look at its mode and at a dropout's probability."""
        kwargs = kwargs or {}
        given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
        is_on = func in _DROPOUTS and given.get("training", True) and given.get("p", 1)
        if func is F.scaled_dot_product_attention:
            is_on = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0
        if is_on:
            self.seen = func.__name__
            self.is_plain |= not self._within
        if func is F.batch_norm and not self._in_norms:
            self.made_norms += bool(kwargs.get("training", (*args, *[0] * 6)[5]))
        found = func(*args, **kwargs)
        if func in _DROPOUTS:
            share = float(given.get("p", 0.5))
            if share > 0 and not is_on:
                found = found.clone()
            name = self._within[-1] if self._within else ""
            self.last = _Last(name, share, found, found._version)
            if share > self.most.share:
                self.most = _Last(name, share)
        return found


def _relative(one: Tensor | None, other: Tensor, whole: Tensor) -> float | None:
    """Return the rms of a difference as a share of the spread of all answers.

    That of the sample that changes most: a recurrent layer over the samples carries
    something of one to the few that follow.
    """
    if one is None or one.shape != other.shape or not one.numel():
        return None
    rms = whole.double().square().mean().sqrt()
    spread = (whole.double() - whole.double().mean(0)).square().mean().sqrt()
    if not spread > max(VARIES, 16 * torch.finfo(whole.dtype).eps) * rms:
        return None
    away = (one.double() - other.double()).square().flatten(1).mean(1).max().sqrt()
    return float(away / spread)


def _on_others(
    answers: Any, model: nn.Module, batch: Any, whole: Tensor, targets: Any
) -> float | None:
    """Return the change of the answers to the last samples, given alone.

    Among copies of the last one, where a norm takes batches of this size alone. Only
    where the first dimension is sure to be that of the samples: there is one
    target for each. A matrix that a recurrent layer reads may be one sequence.
    """
    size = num_samples(batch)
    if not isinstance(targets, Tensor) or targets.numel() != size or size < MIN_SIZE:
        return None
    x = next((v for v in tree_leaves(batch) if isinstance(v, Tensor)), None)
    if x is None or x.dim() < 2 or not len(x) == len(whole) == len(targets) == size:
        return None
    modules = list(model.modules())
    if x.dim() == 2 and any(isinstance(m, nn.RNNBase) for m in modules):
        return None
    # Without running statistics a batch norm takes those of the batch, on purpose.
    if any(
        is_batch_norm(m) and m._buffers.get("running_mean") is None for m in modules
    ):
        return None
    first = size - LEFT

    def of_samples(change: Callable[[Tensor], Tensor]) -> Any:
        def changed(v: Any) -> Any:
            is_own = isinstance(v, Tensor) and v.dim() and len(v) == size
            return change(v) if is_own else v

        return tree_map(changed, batch)

    if any(_is_of_batch(module, size) for module in modules):
        among_copies = answers(
            of_samples(lambda v: torch.cat([v[-1:].expand_as(v)[:first], v[first:]]))
        )
        alone = None if among_copies is None else among_copies[first:]
    else:
        alone = answers(of_samples(lambda v: v[first:]))
    return _relative(alone, whole[first:], whole)


def _is_of_batch(module: nn.Module, size: int) -> bool:
    """Return True for a layer norm whose shape may begin with that of the batch.

    The nodes of a graph depend on each other on purpose, and take one size as well.
    """
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return False
    return len(module.normalized_shape) > 1 and module.normalized_shape[0] == size


def _on_future(answers: Any, batch: Any, whole: Tensor, targets: Any) -> float | None:
    """Return the change of all answers but the last with another last token.

    Only where the targets are the tokens that follow.
    """
    x = next((v for v in tree_leaves(batch) if isinstance(v, Tensor)), None)
    if x is None or not isinstance(targets, Tensor) or x.shape != targets.shape:
        return None
    if x.dim() != 2 or x.is_floating_point() or x.shape[1] < 3 or whole.dim() != 3:
        return None
    if x is targets or not bool((targets[:, :-1] == x[:, 1:]).all()):
        return None
    size = x.shape[1]
    # With as many classes as positions, time is the dimension that is causal.
    axes = [axis for axis in (1, 2) if whole.shape[axis] == size]
    changed = torch.cat([x[:, :-1], x[:, -1:].roll(1, 0)], 1)
    found = answers(tree_map(lambda v: changed if v is x else v, batch))
    if found is None or found.shape != whole.shape:
        return None
    changes = [
        _relative(
            found.narrow(axis, 0, size - 1), whole.narrow(axis, 0, size - 1), whole
        )
        for axis in axes
    ]
    return min((c for c in changes if c is not None), default=None)


def _is_elsewhere(loss_fn: Any, whole: Tensor, targets: Any) -> bool:
    """Return True where the target of a pixel acts on the scores of others alone."""
    if loss_fn is None or not isinstance(targets, Tensor):
        return False
    if targets.dtype != torch.int64 or whole.dim() != targets.dim() + 1 < 4:
        return False
    if whole.dim() < 4 or whole.shape[2:] != targets.shape[1:]:
        return False

    def slope(t: Tensor) -> Tensor:
        y = whole.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(loss_fn(y, t), y)[0].abs().sum(1)

    before, pixels = slope(targets), targets[0].numel()
    found = []
    for place in (int(share * pixels) for share in _PLACES):
        other = targets.clone()
        label = other[0].view(-1)[place]
        if int(label) < 0:
            continue
        other[0].view(-1)[place] = (label + 1) % whole.shape[1]
        moved = (slope(other) - before).abs()
        found.append(float(moved[0].flatten()[place]) == 0 < float(moved.max()))
    return sum(found) > len(found) / 2


def _ignored(loss_fn: Any, whole: Tensor, targets: Any) -> tuple[int, ...]:
    """Return the classes whose targets have no share in the loss.

    The loss of answers of zero, sure of nothing, on the samples of each class alone:
    one that takes only the hardest samples of a batch takes some of each then.
    """
    if loss_fn is None or not isinstance(targets, Tensor) or targets.dim() != 1:
        return ()
    if targets.dtype != torch.int64 or whole.dim() != 2 or len(whole) != len(targets):
        return ()
    without, found = [], 0
    for label in targets.unique().tolist():
        own = targets[targets == label]
        if not 0 <= label < whole.shape[1] or len(own) < MIN_SIZE:
            continue
        found += 1
        y = whole.new_zeros(len(own), whole.shape[1]).requires_grad_()
        try:
            with torch.enable_grad():
                slope = torch.autograd.grad(loss_fn(y, own), y)[0]
        except Exception:  # the user's function, called with what it was not given
            return ()
        # The mean over no samples is NaN.
        if not bool((slope.isfinite() & (slope != 0)).any()):
            without.append(int(label))
    return tuple(without) if len(without) < found else ()

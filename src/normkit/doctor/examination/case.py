"""The case under examination: a model, its batches, its loss and its metric."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from normkit.doctor.measurements import mean_over_samples
from normkit.errors import ArgumentError
from normkit.modeling.batch import (
    Forward,
    Targets,
    check_function,
    check_has_run,
    check_has_values,
    check_model,
    device_of,
    num_samples,
    targets_of,
    to_device,
)
from normkit.modeling.grad_forward import GradForward
from normkit.modeling.graph_norms import graph_model, with_norm_modules
from normkit.modeling.norm_types import is_batch_norm
from normkit.modeling.pytree import map_tensors, tensors_in
from normkit.modeling.snapshot import preserved, preserved_random
from normkit.modeling.unwrap import is_average, unwrapped
from normkit.progress import tracked
from normkit.results import counted

__all__ = [
    "Case",
    "accuracy",
    "measured",
    "open_case",
    "value_of",
]


# Batches to hold out, where the loader has more than a diagnosis reads.
HELD_OUT = 10


@dataclass(frozen=True)
class Case:
    """A model with the data and functions to examine it.

    Attributes:
        model: The model; it is not changed.
        batches: The batches of every pass, on the loader's device.
        loss_fn: `loss_fn(output, targets)`; None without a loss.
        forward: `forward(model, batch)` gives the output.
        targets: `targets(batch)` gives the targets of the loss and the metric.
        metric: `metric(output, targets)`, higher is better; None for accuracy where
            the output and the targets are those of a classifier.
        gradient_batches: Number of batches on which gradients are computed.
        seed: Random seed, of dropout and others.
        batch_size: Samples per full batch.
        last: Samples in the last, incomplete batch of an epoch; None when unknown.
        is_averaged: The weights are an average over training (SWA, EMA).
        held_out: Batches that follow in the loader; no pass of the diagnosis reads
            them.
    """

    model: nn.Module = field(repr=False)
    batches: list[Any] = field(repr=False)
    loss_fn: Callable[[Any, Any], Tensor] | None
    forward: GradForward
    targets: Targets
    metric: Callable[[Any, Any], float] | None
    gradient_batches: int = 8
    seed: int = 0
    batch_size: int = 0
    last: int | None = None
    is_averaged: bool = False
    held_out: list[Any] = field(default_factory=list, repr=False)


def open_case(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    forward: Forward | None = None,
    targets: Targets | None = None,
    metric: Callable[[Any, Any], float] | None = None,
    max_batches: int = 50,
    gradient_batches: int = 8,
    seed: int = 0,
    verb: str = "diagnose",
    keeps_some: bool = False,
    progress: bool = False,
) -> Case:
    """Draw the batches of all passes, with all random states restored.

    The arguments are those of `diagnose`, or of the function that `verb` names;
    `keeps_some` draws batches to hold out as well, `progress` shows a bar over all.

    Raises:
        ArgumentError: The loader gives nothing, `max_batches` is below 1, or an
            argument cannot be used.
    """
    model = graph_model(model)
    check_model(verb, model, loader)
    check_function("loss_fn", loss_fn)
    check_function("metric", metric)
    check_function("forward", forward)
    check_function("targets", targets)
    if metric is not None and is_torch_loss(metric):
        raise ArgumentError(
            "metric= is a loss, of which lower is better, and higher must be; negate "
            "it: metric=lambda output, targets: -float(loss_fn(output, targets))"
        )
    if not isinstance(max_batches, Integral) or max_batches < 1:
        raise ArgumentError(
            f"max_batches={max_batches!r} is no number of batches; give an int of 1 or "
            "more"
        )
    if not isinstance(seed, Integral):
        raise ArgumentError(f"seed={seed!r} is no seed; give an int")
    has_average = is_average(model)
    model = with_norm_modules(unwrapped(model))
    check_has_values(
        model,
        f"{verb} runs the model: load the weights first (to_empty, load_state_dict)",
        may_fetch=True,
    )
    check_has_run(model)
    _check_modes(verb, model)
    holders = [loader, getattr(loader, "sampler", None)]
    kept = HELD_OUT if keeps_some else 0
    with (
        preserved_random(model, seed=seed, others=holders),
        contextlib.closing(
            tracked(loader, "read batches", max_batches + kept, shown=progress)
        ) as drawn,
    ):
        batches = [_plain(b) for b in itertools.islice(drawn, max_batches)]
        held_out = [_plain(b) for b in itertools.islice(drawn, kept)]
        is_all = len(batches) < max_batches
    if not batches:
        raise ArgumentError(
            "the loader gave no batch; an iterator that is used up must be made again"
        )
    sizes = [num_samples(batch) for batch in batches]
    if not any(sizes):
        raise ArgumentError(
            f"the loader gave {counted(len(sizes), 'batch', plural='batches')}, all of "
            f"0 samples; {verb} needs samples: look at what filters them out"
        )
    # A last batch of one is a separate finding (D06), and would fail in every pass.
    several = [b for b, n in zip(batches, sizes, strict=True) if n > 1]
    return Case(
        model,
        several or [b for b, n in zip(batches, sizes, strict=True) if n],
        loss_fn,
        GradForward(forward),
        targets or targets_of,
        metric,
        gradient_batches,
        seed,
        batch_size=max(sizes),
        last=_last_batch(loader, sizes if is_all else None),
        is_averaged=has_average,
        held_out=[batch for batch in held_out if num_samples(batch) > 1],
    )


def _plain(batch: Any) -> Any:
    """Return a batch that autograd takes, where it was made in inference mode."""
    if not any(tensor.is_inference() for tensor in tensors_in(batch)):
        return batch
    with torch.inference_mode(False):
        return map_tensors(batch, Tensor.clone)


def _check_modes(verb: str, model: nn.Module) -> None:
    """Refuse batch norms whose mode was fixed by `torch.jit.trace`."""
    for name, module in model.named_modules():
        # The class has a private name alone.
        is_traced = type(module).__name__.endswith("TracedModule")
        if is_traced and is_batch_norm(module):
            raise ArgumentError(
                f"layer {name!r} is a batch norm in a traced model, in the mode in "
                f"which it was traced; {verb} compares both modes: give it the model "
                "that was traced"
            )


def _last_batch(loader: Iterable[Any], sizes: list[int] | None) -> int | None:
    """Return the samples in the incomplete batch that ends an epoch; 0 for none.

    Args:
        loader: Read for the size of its data set, its batches, and `drop_last`.
        sizes: Sizes of all batches of an epoch, when all were drawn.
    """
    if getattr(loader, "drop_last", False):
        return 0
    try:
        total, size = len(loader.dataset), loader.batch_size  # type: ignore[attr-defined]
        return total % size
    except (AttributeError, TypeError):
        pass
    if sizes is None or len(sizes) < 2:
        return None
    return sizes[-1] if sizes[-1] < sizes[0] else 0


def is_torch_loss(function: Any) -> bool:
    """Return True for a loss of torch, a function or a module."""
    if isinstance(function, nn.modules.loss._Loss):
        return True
    name, module = (getattr(function, key, "") for key in ("__name__", "__module__"))
    is_loss = "loss" in str(name) or "cross_entropy" in str(name)
    return module == "torch.nn.functional" and is_loss


def value_of(case: Case, output: Any, targets: Any) -> float | None:
    """Return the metric, or the accuracy; None where neither is defined."""
    value = (case.metric or accuracy)(output, targets)
    if isinstance(value, Tensor):
        value = value.detach()
    return None if value is None else float(value)


def measured(case: Case) -> float | None:
    """Return the mean of the metric over all samples, in eval mode.

    None where there is no metric: none was given, and the accuracy is not defined.
    """
    model, values, sizes = case.model, [], []
    device = device_of(model)
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in case.batches:
            batch = to_device(batch, device)
            output = case.forward(model, batch)
            value = value_of(case, output, case.targets(batch))
            if value is None:
                return None
            values.append(value)
            sizes.append(num_samples(batch))
    return mean_over_samples(values, sizes)


def accuracy(output: Any, targets: Any) -> float | None:
    """Return the share of right classes; None without scores and classes."""
    if not (isinstance(output, Tensor) and isinstance(targets, Tensor)):
        return None
    if output.dim() != 2 or targets.dim() != 1 or output.shape[1] < 2:
        return None
    if output.is_complex() or targets.is_floating_point():
        return None
    if len(output) != len(targets):
        return None
    return (output.argmax(1) == targets).double().mean().item()

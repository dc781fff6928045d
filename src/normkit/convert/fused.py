"""Fusion of batch norms with the activation, or the sum, that follows them.

    batch norm → y → relu → z       in one pass over memory

No module is exchanged for that: a batch norm with `defers` waits for what reads its
output (`normkit.nn.deferred`), and the activation stays where it is. Waiting pays where
an activation, or a sum and an activation, is the only reader. Which layers these are is
found by trial: all defer in one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normkit.convert.report import FusionReport
from normkit.errors import ArgumentError
from normkit.modeling.batch import (
    Forward,
    arguments_of,
    call_on,
    check_has_values,
)
from normkit.modeling.pytree import tensors_in
from normkit.modeling.snapshot import preserved, preserved_random
from normkit.nn.batch_norm_layer import BatchNormLayer
from normkit.nn.deferral import (
    OTHER_SUMMAND,
    ChangedInPlaceError,
    Use,
    trial,
)

__all__ = ["fuse"]


def fuse(
    model: nn.Module, example_inputs: Any, *, forward: Forward | None = None
) -> FusionReport:
    """Set `defers` on the batch norms of normkit whose output one activation reads.

    Args:
        model: Any module that runs; its batch norms those of normkit, as
            `normkit.convert(model, to="normkit")` makes them.
        example_inputs: What to run the model with, twice, in eval mode: a tuple of
            positional arguments, a mapping of named ones, or the single argument.
        forward: `forward(model, example_inputs)`, for any other inputs.

    Returns:
        The report.

    Raises:
        ArgumentError: The model does not run on the inputs, or is on the meta device;
            the fused model gave other outputs on the example, by more than
            1e-4 of the largest; the model is then as it was.

    Example:
        >>> import normkit
        >>> block = nn.Sequential(normkit.nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
        >>> print(fuse(block, torch.randn(2, 3, 4, 4)))
        1 of 1 fused
          0: relu
    """
    check_has_values(
        model,
        "what is fused is compared on the example inputs: load the weights first "
        "(to_empty, load_state_dict), or convert without example_inputs=, which fuses "
        "nothing",
    )
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    layers = [norm for norm in norms.values() if isinstance(norm, BatchNormLayer)]
    before = [layer.defers for layer in layers]
    run = partial(forward or call_on, model, example_inputs)
    with preserved(model), torch.no_grad():
        model.eval()
        expected = _run(model, run, example_inputs)
        try:
            outcomes = _try(model, layers, run, expected)
        except BaseException:
            for layer, defers in zip(layers, before, strict=True):
                layer.defers = defers
            raise
    fused: dict[str, str] = {}
    left: dict[str, str] = {}
    for path, norm in norms.items():
        took, reason = "", f"{type(norm).__name__} is not a batch norm of normkit"
        if isinstance(norm, BatchNormLayer):
            took, reason = outcomes[norm]
            norm.defers = bool(took)
        if took:
            fused[path] = took
        else:
            left[path] = reason
    return FusionReport(model, fused, left)


def _run(model: nn.Module, run: Callable[[], Any], example_inputs: Any) -> Any:
    """Run the model as it is, and leave the random states as they were."""
    try:
        with preserved_random(model):
            return run()
    except Exception as error:
        args, kwargs = arguments_of(example_inputs)
        given = [_described(value) for value in args]
        given += [f"{name}={_described(value)}" for name, value in kwargs.items()]
        lines = str(error).strip().splitlines() or [""]
        raise ArgumentError(
            "the model does not run on the example inputs, nothing was changed: "
            f"model({', '.join(given)}) gave {type(error).__name__}: {lines[0]}. They "
            "must be what the model is called with: a tuple of positional arguments, "
            "a dict of named ones, or the single argument, of its dtype, on its device"
        ) from error


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)} on {value.device}"


def _try(
    model: nn.Module,
    layers: list[BatchNormLayer],
    run: Callable[[], Any],
    expected: Any,
) -> dict[BatchNormLayer, tuple[str, str]]:
    """Return for each layer what was fused, and the reason where nothing was."""
    changed: set[nn.Module] = set()
    while True:
        for layer in layers:
            layer.defers = layer not in changed
        try:
            with trial() as calls, preserved_random(model):
                result = run()
            outcomes = {
                layer: _outcome(calls.get(layer, []), is_changed=layer in changed)
                for layer in layers
            }
            _compare(expected, result)
        except ChangedInPlaceError as error:
            # What it waited with is gone; again without this layer.
            changed.add(error.layer)
        else:
            return outcomes


def _outcome(calls: list[Use | str], *, is_changed: bool) -> tuple[str, str]:
    """Return what was fused, and the reason if nothing was."""
    if is_changed:
        return "", "what it needs is changed in place before its output is read"
    if not calls:
        return "", "it was not called, or with a mask or a residual"
    if len(calls) > 1:
        return "", f"it is called {len(calls)} times"
    (call,) = calls
    if isinstance(call, str):
        return "", call
    if any(output() is not None for output in call.outputs):
        return "", "its output is kept, or returned by the model"
    if not call.readers:
        return "", "nothing reads its output"
    if len(call.readers) > 1:
        readers = ", ".join(call.readers)
        return "", f"its output has {len(call.readers)} readers: {readers}"
    if not call.took:
        (reader,) = call.readers
        if reader == OTHER_SUMMAND:
            return "", f"it goes into {reader}"
        return "", f"{reader} follows, which is no activation and no plain sum"
    return call.took, ""


def _compare(before: Any, after: Any) -> None:
    for old, new in zip(tensors_in(before), tensors_in(after), strict=True):
        if not old.is_floating_point() or not old.numel():
            continue
        largest = float(old.abs().max())
        distance = float((new - old).abs().max())
        if not distance <= 1e-4 * max(largest, 1e-30) and largest == largest:
            raise ArgumentError(
                f"fusing changed the outputs on the example by {distance:.1e}, the "
                f"largest is {largest:.1e}; nothing was changed. The model may give "
                "other outputs in each call, in eval mode: fuse its blocks one by one"
            )

"""Batches: one convention for every verb that runs a model.

A batch is `(inputs, targets)`. Inputs are a tensor, a tuple or list of positional
arguments, or a mapping of named ones; a batch that is no tuple or list is all inputs.
Any other batch is used through two functions:

    forward=(model, batch) -> output        targets=(batch) -> targets

`example_inputs=` is the inputs alone: a tuple of positional arguments, a mapping of
named ones, or the single argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset, IterableDataset

from normkit.errors import ArgumentError
from normkit.modeling.norm_types import check_num_channels
from normkit.modeling.pytree import map_tensors, tensors_in

__all__ = [
    "Forward",
    "Targets",
    "arguments_of",
    "call_on",
    "check_function",
    "check_has_run",
    "check_has_values",
    "check_model",
    "device_of",
    "inputs_of",
    "num_samples",
    "run_model",
    "targets_of",
    "to_device",
]

Forward = Callable[[nn.Module, Any], Any]
Targets = Callable[[Any], Any]


def _convention(batch: Any) -> str:
    """Return the convention, with the two functions as they may be for `batch`."""
    names = [repr(key) for key in batch] if isinstance(batch, Mapping) else []
    if names:
        # All that can be known of names: inputs come before targets.
        forward, targets = f"model(batch[{names[0]}])", f"batch[{names[-1]}]"
    else:
        forward, targets = "model(batch[0], batch[1])", "batch[2]"
    return (
        "a batch is (inputs, targets), inputs a tensor, a tuple of positional "
        "arguments or a dict of named ones. For any other batch pass forward=, e.g. "
        f"forward=lambda model, batch: {forward}, and where there is a loss or a "
        f"metric targets=, e.g. targets=lambda batch: {targets}"
    )


def inputs_of(batch: Any) -> Any:
    """Return the inputs of a batch: the first item of a tuple or list, else all of it.

    Inputs that are a list become a tuple: torch's `default_collate` makes lists of
    tuples.

    Raises:
        ArgumentError: An empty tuple or list.
    """
    inputs = batch
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        if not batch:
            raise ArgumentError(
                f"a batch is an empty {_described(batch)}; {_convention(batch)}"
            )
        inputs = batch[0]
    return tuple(inputs) if isinstance(inputs, list) else inputs


def targets_of(batch: Any) -> Any:
    """Return the second item of a batch, or the whole batch where it has none."""
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[1]
    return batch


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the named arguments that `inputs` stand for."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence):
        return inputs, {}
    return (inputs,), {}


def call_on(model: nn.Module, inputs: Any) -> Any:
    """Call `model` on the arguments that `inputs` stand for."""
    args, kwargs = arguments_of(inputs)
    return model(*args, **kwargs)


def run_model(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Call `model` on `batch`, and explain the errors that a wrong batch causes.

    Args:
        model: The model.
        batch: The batch, on the model's device.
        forward: `forward(model, batch)`; None to call it on the inputs of the batch.

    Raises:
        ArgumentError: The model does not take the inputs as arguments, or is of
            another dtype.
        ShapeError: A normalization got another number of channels than it has.
        Exception: Any other error of the model, as it was raised.
    """
    try:
        return forward(model, batch) if forward else call_on(model, inputs_of(batch))
    except Exception as error:
        _check_layer_at_fault(model, error)
        if forward is None and isinstance(error, TypeError):
            _check_arguments(model, batch, error)
        if isinstance(error, RuntimeError):
            _check_dtypes(model, batch if forward else inputs_of(batch), error)
        raise


def _check_layer_at_fault(model: nn.Module, error: Exception) -> None:
    """Raise for the normalization that `error` came from, if its input is at fault."""
    names = {module: name for name, module in model.named_modules()}
    trace = error.__traceback__
    while trace is not None:
        seen = trace.tb_frame.f_locals
        module, x = seen.get("self"), seen.get("input", seen.get("x"))
        if isinstance(module, nn.Module) and isinstance(x, Tensor) and module in names:
            check_num_channels(names[module], module, x, cause=error)
        trace = trace.tb_next


def _check_arguments(model: nn.Module, batch: Any, error: TypeError) -> None:
    args, kwargs = arguments_of(inputs_of(batch))
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as mismatch:
        given = [_described(value) for value in args]
        given += [f"{name}={_described(value)}" for name, value in kwargs.items()]
        raise ArgumentError(
            f"{type(model).__name__} cannot be called on a batch that is "
            f"{_described(batch)}: model({', '.join(given)}) does not fit "
            f"its forward, {mismatch}; {_convention(batch)}"
        ) from error


def _check_dtypes(model: nn.Module, batch: Any, error: RuntimeError) -> None:
    """Raise if the model has no tensor of the floating dtype of the batch."""
    tensors = [t for t in tensors_in(batch) if t.is_floating_point()]
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    given = {t.dtype for t in tensors}
    # torch writes "dtype", "scalar type" or "Input type (float) and bias type".
    if len(own) == 1 and given and not own & given and "type" in str(error):
        (dtype,) = own
        raise ArgumentError(
            f"{type(model).__name__} has weights of {dtype} and got a batch of "
            f"{', '.join(sorted(map(str, given)))}: {error}; give the batches that "
            "dtype, or the model that of the batches"
        ) from error


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    parts: list[str] = []
    if isinstance(value, Mapping):
        parts = [str(key) for key in value]
    elif isinstance(value, tuple | list):
        parts = [_described(part) for part in value[:4]]
        parts += ["…"] if len(value) > 4 else []
    name = type(value).__name__
    return f"{name} of {', '.join(parts)}" if parts else name


def to_device(batch: Any, device: torch.device | None) -> Any:
    """Return `batch` with its tensors on `device`, in whatever they are packed."""
    if device is None:
        return batch
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    return map_tensors(batch, lambda tensor: tensor.to(device))


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the model's tensors; None where there is not just one."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def num_samples(batch: Any) -> int:
    """Return the size of the first dimension of the inputs' first tensor; 1 without."""
    tensors = list(tensors_in(batch))
    first = next((t for t in tensors if t.is_floating_point() and t.numel()), None)
    if first is None:
        first = next(iter(tensors), None)
    return 1 if first is None or first.dim() == 0 else first.shape[0]


def check_model(verb: str, model: Any, batches: Any = ()) -> None:
    """Refuse a model that is none, and batches that are none, before anything runs.

    Args:
        verb: The name of the function that was called, for messages.
        model: The model that was given.
        batches: The batches; () to check the model alone.

    Raises:
        ArgumentError: The two are swapped, the model is no module, or the batches are
            one batch, a data set of samples, or not iterable.
    """
    if not isinstance(model, nn.Module):
        if isinstance(batches, nn.Module):
            raise ArgumentError(
                f"{verb} got a {type(model).__name__} for the model and a "
                f"{type(batches).__name__} for the batches; swap them: {verb}(model, "
                "batches)"
            )
        if type(model).__name__ == "ExportedProgram":
            raise ArgumentError(
                f"{verb} got an exported program, which does not run itself; take "
                f"model = program.module(), and give {verb} that model"
            )
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model)
        raise ArgumentError(
            f"{verb} got {what} for the model; it must be a torch.nn.Module, an "
            "instance: the model itself, no state_dict, no name, no optimizer"
        )
    kind = type(batches).__name__
    if isinstance(batches, Tensor | Mapping | str):
        raise ArgumentError(
            f"{verb} got one {kind} for the batches, which must be an iterable of "
            "batches; wrap a single batch in a list"
        )
    if _is_pair(batches):
        raise ArgumentError(
            f"{verb} got a tuple of two tensors of one length for the batches: one "
            "batch of (inputs, targets), as it seems; wrap it in a list"
        )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise ArgumentError(
            f"{verb} got a data set ({kind}) for the batches, which gives single "
            "samples; wrap it: torch.utils.data.DataLoader(dataset, batch_size=…)"
        )
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise ArgumentError(
            f"{verb} got a {kind} for the batches, which must be iterable; pass a "
            "DataLoader or a list of batches"
        )


def _is_pair(batches: Any) -> bool:
    """Return True for inputs and targets: two tensors that are no batches alike."""
    if type(batches) is not tuple or len(batches) != 2:
        return False
    if not all(isinstance(t, Tensor) and t.dim() for t in batches):
        return False
    x, y = batches
    # Two batches may differ in their lengths.
    return len(x) == len(y) and (x.dtype, x.dim()) != (y.dtype, y.dim())


def check_has_values(
    model: nn.Module, why: str, *, is_changed: bool = False, may_fetch: bool = False
) -> None:
    """Refuse a model on the meta device, or whose values cannot be changed.

    Args:
        model: The model.
        why: Why values are needed, and how to get them.
        is_changed: Its values will be changed in place.
        may_fetch: Take parameters on meta beside tensors with values: hooks that
            offload weights, such as accelerate's, fetch them in each call.

    Raises:
        ArgumentError: Parameters or buffers have no values, or are to be changed and
            were made in inference mode, outside of it.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    without = [name for name, t in tensors if t.is_meta]
    if may_fetch and len(without) < len(tensors):
        without = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if without:
        raise ArgumentError(
            f"{len(without)} parameters and buffers are on the meta device and have "
            f"no values, e.g. {without[0]!r}; {why}"
        )
    fixed = [name for name, t in tensors if not is_lazy(t) and t.is_inference()]
    if fixed and is_changed and not torch.is_inference_mode_enabled():
        raise ArgumentError(
            f"{len(fixed)} parameters and buffers were made inside torch.inference_mode"
            f", e.g. {fixed[0]!r}, and torch lets nothing change them outside; make or "
            "copy the model outside"
        )


def check_has_run(model: nn.Module) -> None:
    """Refuse a model with lazy layers that no batch has given their shapes.

    Raises:
        ArgumentError: Parameters or buffers are lazy.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, t in tensors if is_lazy(t)]
    if lazy:
        raise ArgumentError(
            f"{len(lazy)} parameters and buffers are lazy and have no values yet, e.g. "
            f"{lazy[0]!r}; run the model on one batch first"
        )


def check_function(name: str, function: Any) -> None:
    """Refuse a class where a function is asked for, such as a loss that is not made.

    Raises:
        ArgumentError: `function` is a class, or cannot be called.
    """
    if isinstance(function, type):
        raise ArgumentError(
            f"{name}= is the class {function.__name__}; pass an instance, as in "
            f"{name}={function.__name__}()"
        )
    if function is not None and not callable(function):
        raise ArgumentError(
            f"{name}= is a {type(function).__name__}; it must be a function"
        )

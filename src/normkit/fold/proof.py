"""Whether a folded model is the same function: both run in float64, and compared.

In float64 a right fold differs by 1e-16 to 1e-9 and a wrong one by 1e-3 and more, so
one threshold between them decides; in float32 rounding alone can reach 1e-2 and would
say nothing. Two inputs are used, the given one and a random one of the same shapes, so
that a coincidence of the first does not pass.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normkit.fold.capture import capture
from normkit.fold.gauge import Gauge
from normkit.modeling.pytree import map_tensors, tensors_in

__all__ = [
    "MOST_SAMPLES",
    "TOLERANCE",
    "Bench",
    "InFloat64",
    "Run",
    "difference",
    "gap_under",
    "perturbed",
    "same_draws",
    "sampled",
    "to_float64",
    "widen",
]

TOLERANCE = 1e-7
# So many elements of what a module returns are compared.
MOST_SAMPLES = 4096

_REDUCED = (torch.float32, torch.float16, torch.bfloat16)


class InFloat64(TorchFunctionMode):
    """Within it, code that asks for a shorter float gets float64."""

    def __enter__(self) -> InFloat64:
        """Make float64 the default dtype too."""
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Restore the default dtype."""
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run `func` with float64 for each shorter float dtype named in the call."""
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        if func is torch.set_default_dtype:
            return None
        return func(*_widened(tuple(args)), **_widened(dict(kwargs or {})))


def _widened(nest: Any) -> Any:
    if isinstance(nest, torch.dtype):
        return torch.float64 if nest in _REDUCED else nest
    if type(nest) is tuple:
        return tuple(_widened(part) for part in nest)
    if type(nest) is dict:
        return {key: _widened(part) for key, part in nest.items()}
    return nest


def to_float64(model: nn.Module) -> nn.Module:
    """`model` itself with every float tensor it holds in float64.

    Also those that are plain attributes, which `Module.double` does not know.
    """
    model.double()
    for module in model.modules():
        for name, held in list(vars(module).items()):
            if name.startswith("_") and name in vars(nn.Module()):
                continue
            if any(t.dtype in _REDUCED for t in tensors_in(held)):
                with contextlib.suppress(AttributeError, TypeError):
                    vars(module)[name] = map_tensors(held, widen)
    return model


def widen(tensor: Tensor) -> Tensor:
    """`tensor` in float64 if it is a shorter float, else itself."""
    return tensor.double() if tensor.dtype in _REDUCED else tensor


def perturbed(nest: Any, seed: int) -> Any:
    """Random tensors that look like those of `nest`.

    Floats get noise of their own spread; integers and bools are shuffled, since they
    are often numbers of rows in a table.
    """
    draw = torch.Generator().manual_seed(seed)

    def change(tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return tensor.clone()
        if tensor.is_floating_point() or tensor.is_complex():
            noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
            noise = noise.to(tensor.device, tensor.dtype)
            spread = tensor.std() if tensor.numel() > 1 else tensor.abs().sum()
            return tensor + noise * torch.where(spread > 0, spread, 1.0)
        order = torch.randperm(tensor.numel(), generator=draw).to(tensor.device)
        return tensor.reshape(-1)[order].reshape(tensor.shape)

    return map_tensors(nest, change)


def difference(expected: Any, found: Any) -> float:
    """The largest difference of two results, relative to the largest value.

    inf where their structure, shapes, integers or non-finite places differ.

    Example:
        >>> difference([torch.tensor([0.5, 100.0])], [torch.tensor([0.5, 101.0])])
        0.01
    """
    left, right = list(tensors_in(expected)), list(tensors_in(found))
    if len(left) != len(right):
        return float("inf")
    largest = 0.0
    for one, other in zip(left, right, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf")
        if one.numel() == 0 or one is other:
            continue
        if not (one.is_floating_point() or one.is_complex()):
            if not torch.equal(one, other):
                return float("inf")
            continue
        finite = one.isfinite()
        if not torch.equal(finite, other.isfinite()):
            return float("inf")
        if bool(finite.any()):
            size = max(1.0, float(one[finite].abs().max()))
            gap = float((one[finite] - other[finite]).abs().max())
            largest = max(largest, gap / size)
    return largest


@contextlib.contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """The same random numbers in each run inside it; the generators as before after."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(0)
            random.seed(0)
            yield
    finally:
        random.setstate(python_state)


class Bench:
    """A private copy of a model in float64, its two inputs, and what it answers.

    Attributes:
        model: The copy; it may be edited between runs.
        inputs: Two (args, kwargs), the given ones and random ones.
        trace: The first run, read.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.model = to_float64(model)
        given = map_tensors((args, kwargs), lambda t: widen(t.detach().clone()))
        self.inputs = [given, perturbed(given, seed=1)]
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        fresh = map_tensors(given, torch.clone)
        with InFloat64(), same_draws(self.model):
            self.trace = capture(self.model, *fresh)
        self._restore()

    def run(self, which: int, watched: Collection[str] = ()) -> Run:
        """Run the copy as it is now on input `which`, watching modules by path."""
        seen: dict[str, list[Tensor | None]] = {path: [] for path in watched}
        handles = []
        for path, kept in seen.items():

            def keep(
                module: nn.Module,
                args: Any,
                result: Any,
                kept: list[Tensor | None] = kept,
            ) -> None:
                kept.append(sampled(result))

            module = self.model.get_submodule(path)
            handles.append(module.register_forward_hook(keep))
        args, kwargs = map_tensors(self.inputs[which], torch.clone)
        try:
            with torch.no_grad(), InFloat64(), same_draws(self.model):
                return Run(self.model(*args, **kwargs), seen)
        finally:
            for handle in handles:
                handle.remove()
            self._restore()

    def _restore(self) -> None:
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)


@dataclass(frozen=True)
class Run:
    """What one run answered.

    Attributes:
        result: What the model returned.
        seen: A sample of what each watched module returned, call by call.
    """

    result: Any
    seen: dict[str, list[Tensor | None]]


def gap_under(
    gauge: Gauge, shape: tuple[int, ...], true: Tensor, stored: Tensor
) -> float:
    """How far samples `stored` and `true` are from the relation `gauge` says.

    Args:
        gauge: The relation of two tensors of `shape`.
        shape: Their shape.
        true: A sample from the original tensor.
        stored: The same places of the folded one.
    """
    at = _coordinates(shape)

    def along(values: Tensor) -> Tensor:
        index = tuple(
            place if size > 1 else torch.zeros_like(place)
            for place, size in zip(at, values.shape, strict=True)
        )
        return (values[index] if index else values).to(true.device)

    if gauge.to_stored is not None:
        affine = gauge.to_stored
        true = along(affine.scale) * true + along(affine.shift)
    elif gauge.to_true is not None:
        affine = gauge.to_true
        stored = along(affine.scale) * stored + along(affine.shift)
    else:
        return 0.0  # No such relation; what comes after is compared.
    return difference(true, stored)


@functools.lru_cache(maxsize=256)
def _coordinates(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.unravel_index(_places(shape), shape)


def sampled(result: Any) -> Tensor | None:
    """Up to 4096 elements of a float tensor, the same places every time; else None."""
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return None
    if result.dim() == 0:
        return result.clone()
    return result.reshape(-1)[_places(tuple(result.shape)).to(result.device)]


@functools.lru_cache(maxsize=256)
def _places(shape: tuple[int, ...]) -> Tensor:
    """Up to 4096 places of a tensor of `shape`, the same ones every time."""
    count = math.prod(shape)
    if count <= MOST_SAMPLES:
        return torch.arange(count)
    draw = torch.Generator().manual_seed(count)
    return torch.randint(count, (MOST_SAMPLES,), generator=draw)

"""A private copy of a model, run on fixed inputs before and after its edits."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.fold.equivalence import sampled
from normkit.fold.nest import map_tensors
from normkit.fold.torch.capture import capture
from normkit.fold.torch.float64 import InFloat64, to_float64, widen

__all__ = ["Harness", "Run", "perturbed", "same_draws"]


class Harness:
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

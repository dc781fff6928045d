"""A private copy of a model, run on fixed inputs before and after its edits.

Beside the example inputs there are random ones of the same shapes, so that a
coincidence of the first does not pass, and random ones of another batch and spatial
size, which may take another branch of the code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.fold.equivalence import sampled
from normkit.fold.torch.capture import capture
from normkit.fold.torch.float64 import InFloat64, to_float64, widen
from normkit.fold.torch.trace import Trace
from normkit.modeling.pytree import map_tensors, tensors_in
from normkit.modeling.snapshot import preserved

__all__ = ["Harness", "Run", "perturbed", "resized"]


Sample = tuple[tuple[int, ...], Tensor | None]


class Harness:
    """A private copy of a model, in float64 or in its own dtype, and its inputs.

    Attributes:
        model: The copy; it may be edited between runs.
        inputs: The (args, kwargs) to run it on; the example inputs come first.
        trace: The first run, traced.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        in_float64: bool,
        norms: str = "batch",
    ) -> None:
        self.in_float64 = in_float64
        self.model = to_float64(model) if in_float64 else model
        given = map_tensors((args, kwargs), lambda t: t.detach().clone())
        self.inputs = [map_tensors(given, widen) if in_float64 else given]
        with self._prepared():
            first_args, named = map_tensors(self.inputs[0], torch.clone)
            self.trace: Trace = capture(self.model, first_args, named, norms)

    def add_inputs(self) -> str:
        """Add random inputs, also of another size if the model takes it; name them."""
        given = self.inputs[0]
        self.inputs.append(perturbed(given, seed=1))
        for spatial, name in ((True, "batch and spatial size"), (False, "batch size")):
            other = perturbed(resized(given, spatial=spatial), seed=2)
            self.inputs.append(other)
            with contextlib.suppress(Exception):
                self.run(len(self.inputs) - 1)
                return f"on random ones and on random ones of another {name}"
            self.inputs.pop()
        return "and on random ones"

    def run(self, which: int, watched: Collection[str] = ()) -> Run:
        """Run the copy as it is now on input `which`, watching modules by path."""
        seen: dict[str, list[Sample]] = {path: [] for path in watched}
        handles = []
        for path, kept in seen.items():

            def keep(
                module: nn.Module,
                args: Any,
                result: Any,
                kept: list[Sample] = kept,
            ) -> None:
                kept.append((getattr(result, "shape", ()), sampled(result)))

            module = self.model.get_submodule(path)
            handles.append(module.register_forward_hook(keep))
        args, kwargs = map_tensors(self.inputs[which], torch.clone)
        try:
            with torch.no_grad(), self._prepared():
                return Run(self.model(*args, **kwargs), seen)
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        """Use the same random numbers in each run; put the state back after it."""
        mode = InFloat64() if self.in_float64 else contextlib.nullcontext()
        with preserved(self.model, seed=0), mode:
            yield


@dataclass(frozen=True)
class Run:
    """The results of one run.

    Attributes:
        result: The output of the model.
        seen: Shape and sample of the output of each watched module, call by call.
    """

    result: Any
    seen: dict[str, list[Sample]]


def perturbed(tree: Any, seed: int) -> Any:
    """Return random tensors that look like those of `tree`.

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

    return map_tensors(tree, change)


def resized(tree: Any, *, spatial: bool) -> Any:
    """Return the tensors of `tree` with another batch and, if asked, spatial size.

    The batch size is that of the first tensor; images and volumes, (N, C, H, W) and
    (N, C, D, H, W), become smaller by 32 where they stay at 32 or above.

    Example:
        >>> resized(torch.ones(4, 3, 64, 24), spatial=True).shape
        torch.Size([3, 3, 32, 48])
    """
    sizes = [t.shape[0] for t in tensors_in(tree) if t.dim()]
    batch = sizes[0] if sizes else 0

    def change(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != batch or batch == 0:
            return tensor
        tensor = _repeated(tensor, 0, batch - 1 if batch > 1 else 2)
        if spatial and tensor.dim() in (4, 5) and tensor.is_floating_point():
            for dim in range(2, tensor.dim()):
                size = tensor.shape[dim]
                other = size - 32 if size >= 64 else size + min(size, 32)
                tensor = _repeated(tensor, dim, other)
        return tensor

    return map_tensors(tree, change)


def _repeated(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Return `tensor` cut or repeated to `size` along `dim`."""
    index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
    return tensor.index_select(dim, index)

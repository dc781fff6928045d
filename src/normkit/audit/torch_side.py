"""A torch model as one side of a comparison."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn

from normkit.audit.recording import Recording, Step, kept
from normkit.fold.ir.graph import Value
from normkit.fold.torch.capture import capture
from normkit.fold.torch.copying import copied
from normkit.fold.torch.float64 import InFloat64, to_float64, widen
from normkit.fold.torch.trace import Trace
from normkit.modeling.batch import arguments_of
from normkit.modeling.pytree import map_tensors, tensors_in
from normkit.modeling.snapshot import preserved

__all__ = ["TorchSide"]


class TorchSide:
    """A private copy of a module that can be run in float64 or in its own dtype.

    Args:
        model: The module, which is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kind = type(model).__name__
        self.own = copied(model)
        self.wide = to_float64(copied(model))

    @functools.cached_property
    def jittered(self) -> nn.Module:
        """The float64 copy with each stored number moved by up to one rounding."""
        moved = copied(self.wide)
        draw = torch.Generator().manual_seed(0)
        stored = self.own.state_dict()
        with torch.no_grad():
            for name, tensor in moved.state_dict().items():
                if tensor.is_floating_point() and stored[name].is_floating_point():
                    eps = torch.finfo(stored[name].dtype).eps
                    noise = torch.rand(tensor.shape, generator=draw, dtype=tensor.dtype)
                    tensor.mul_(1 + eps * (noise.to(tensor.device) - 0.5))
        return moved

    def run(
        self, inputs: Any, *, in_float64: bool, jittered: bool = False
    ) -> Recording:
        """Run the model once on `inputs` and record every value.

        The random numbers are the same in every run, and buffers are put back.
        `jittered` moves the weights, in float64 alone.
        """
        model = self.wide if in_float64 else self.own
        if jittered:
            model = self.jittered
        args, kwargs = arguments_of(map_tensors(inputs, lambda t: t.detach().clone()))
        if in_float64:
            args, kwargs = map_tensors((args, kwargs), widen)
        else:
            args, kwargs = map_tensors((args, kwargs), _as_floats_of(model))
        found: dict[Value, Tensor] = {}

        def keep(value: Value, tensor: Tensor) -> None:
            with contextlib.suppress(RuntimeError, NotImplementedError):
                found[value] = kept(tensor)

        mode = InFloat64() if in_float64 else contextlib.nullcontext()
        with preserved(model, seed=0), mode:
            trace = capture(model, args, kwargs, keep=keep)
        outputs = [_comparable(tensor) for tensor in tensors_in(trace.result)]
        steps, position = _steps(trace, found)
        returned = [position.get(value) for value in trace.graph.outputs]
        return Recording(outputs, steps, returned)


def _steps(
    trace: Trace, found: dict[Value, Tensor]
) -> tuple[list[Step], dict[Value, int]]:
    names: dict[Value, list[str]] = {}
    calls: dict[str, int] = {}
    for call in trace.root.walk():
        calls[call.path] = calls.get(call.path, 0) + 1
        if call.path and len(call.outputs) == 1:
            again = f" (call {calls[call.path]})" if calls[call.path] > 1 else ""
            names.setdefault(call.outputs[0], []).append(call.path + again)
    steps: list[Step] = []
    position: dict[Value, int] = {}
    for node in trace.graph.nodes:
        sources = sorted({position[v] for v in node.inputs if v in position})
        for value in node.outputs:
            position[value] = len(steps)
            known = names.get(value, [])
            label = node.label
            if known and known[0].endswith(")"):
                label = f"'{known[0]}'"
            steps.append(Step(label, known, sources, value.shape, found.get(value)))
    return steps, position


def _comparable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return tensor.double() if tensor.is_floating_point() else tensor


def _as_floats_of(model: nn.Module) -> Any:
    """Return a conversion of float64 inputs to the dtype of the model's weights."""
    held = (*model.parameters(), *model.buffers())
    dtype = next((t.dtype for t in held if t.is_floating_point()), torch.float32)

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.dtype == torch.float64 else tensor

    return convert

"""Record of a run: each value of a torch or ONNX model on one input."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Recording", "Step", "kept"]

# 2 MiB in float64. A larger value is represented by as many of its elements.
_MAX_KEPT = 2**18


@dataclass(eq=False)
class Step:
    """One computed value.

    Attributes:
        label: The operation that computed it, for messages.
        names: Names under which the other model may know the same value: of the
            modules that returned it, of the value in an ONNX graph.
        inputs: Positions of the steps that it was computed from.
        shape: Its shape.
        values: Its elements, flat, in float64; see `kept`. None if it is no tensor.
    """

    label: str
    names: list[str]
    inputs: list[int]
    shape: tuple[int, ...]
    values: Tensor | None

    @property
    def is_whole(self) -> bool:
        """True if `values` are all of its elements."""
        return self.values is not None and self.values.numel() == math.prod(self.shape)


@dataclass(eq=False)
class Recording:
    """One run of one model.

    Attributes:
        outputs: The tensors that it returned, floats in float64.
        steps: What it computed from its inputs, in the order of execution.
        returned: Positions in `steps` of the outputs; None for one that is not there,
            such as an input returned as it came.
    """

    outputs: list[Tensor]
    steps: list[Step] = field(default_factory=list)
    returned: list[int | None] = field(default_factory=list)


def kept(tensor: Tensor) -> Tensor:
    """Return the elements of `tensor` in float64, flat; 2¹⁸ of them if there are more.

    Which ones depends on their number alone, so that a reshaped copy keeps the same.
    """
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    if flat.is_quantized:
        flat = flat.dequantize()
    if flat.numel() > _MAX_KEPT:
        draw = torch.Generator().manual_seed(flat.numel())
        places = torch.randint(flat.numel(), (_MAX_KEPT,), generator=draw)
        flat = flat[places.to(flat.device)]
    return flat.to("cpu", torch.float64, copy=True)

"""Recording of a layer by torch's tracers as one call, as they record torch.nn's own.

torch.fx      traces into every module whose class lies outside `torch.nn`. It would
              record the current mode as a constant and count a batch.
torch.jit     records tensor operations with constant shapes. torch's own operator is
              recorded instead: exporters know it, and it accepts other shapes later.
torch.export  likewise: the formula would be a dozen nodes in the program and in the
              ONNX file made of it. Layers that update running statistics are recorded
              as they compute, for torch's operator updates them in another way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy, Tracer
from torch.nn.utils.rnn import PackedSequence

from normkit.errors import ArgumentError
from normkit.torch_state import PLAIN, is_exporting, is_jit_tracing, is_observed

__all__ = ["is_recorded", "is_recorded_as_torch", "recorded_call"]


def is_recorded(x: Any) -> bool:
    """Return whether one of the two below may apply; False for most calls."""
    return type(x) not in PLAIN or (
        is_observed() and (is_jit_tracing() or is_exporting())
    )


def is_recorded_as_torch(
    layer: torch.nn.Module, x: Tensor, mask: Tensor | None, *, updates: bool = False
) -> bool:
    """Return whether a tracer observes a call that torch.nn's forward can do.

    Args:
        layer: The layer.
        x: Its input.
        mask: The mask of the call; torch.nn has none.
        updates: Whether the call updates running statistics.
    """
    if mask is not None:
        return False
    if is_jit_tracing():
        return True
    if updates or not is_exporting():
        return False
    # torch's row norms take parameters in the dtype of the input alone.
    weight = layer._parameters.get("weight")
    return weight is None or weight.dtype == x.dtype


def recorded_call(layer: torch.nn.Module, x: Any, **extras: Any) -> Any:
    """Return the node that stands for `layer(x)` in a symbolic trace; else None.

    A subclass defined elsewhere is traced into, as a subclass of a torch.nn layer is:
    its own forward may do more than the layer, and would run twice.

    Raises:
        ArgumentError: `x` is nothing that torch takes for a tensor.
    """
    if isinstance(x, PackedSequence):
        raise ArgumentError(
            f"{type(layer).__name__} takes a tensor, got a PackedSequence; use "
            "x, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed), and tell it "
            "the lengths (BatchNormLSTM) or a mask"
        )
    if not hasattr(type(x), "__torch_function__"):
        raise ArgumentError(
            f"{type(layer).__name__} takes a tensor, got {type(x).__qualname__}; "
            "use torch.as_tensor(x)"
        )
    if not isinstance(x, Proxy) or not isinstance(x.tracer, Tracer):
        return None
    if type(layer).__module__.partition(".")[0] != "normkit":
        return None
    given = {name: value for name, value in extras.items() if value is not None}
    path = x.tracer.path_of_module(layer)
    return x.tracer.create_proxy("call_module", path, (x,), given)

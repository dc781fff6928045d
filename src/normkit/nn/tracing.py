"""Recording of a layer by torch's tracers as one call, as they record torch.nn's own.

torch.fx     traces into every module whose class lies outside `torch.nn`. It would
             record the current mode as a constant and count a batch.
torch.jit    records tensor operations with constant shapes. torch's own operator is
             recorded instead: exporters know it, and it accepts other shapes later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy, Tracer

from normkit.torch_state import PLAIN, is_jit_tracing

__all__ = ["is_recorded", "is_recorded_by_jit", "recorded_call"]


def is_recorded(x: Any) -> bool:
    """Return whether one of the two below may apply; False for most calls."""
    return type(x) not in PLAIN or is_jit_tracing()


def is_recorded_by_jit(mask: Tensor | None) -> bool:
    """Return whether torch.jit.trace observes a call that torch.nn's forward can do."""
    return mask is None and is_jit_tracing()


def recorded_call(layer: torch.nn.Module, x: Any, **extras: Any) -> Any:
    """Return the node that stands for `layer(x)` in a symbolic trace; else None.

    A subclass defined elsewhere is traced into, as a subclass of a torch.nn layer is:
    its own forward may do more than the layer, and would run twice.
    """
    if not isinstance(x, Proxy) or not isinstance(x.tracer, Tracer):
        return None
    if type(layer).__module__.partition(".")[0] != "normkit":
        return None
    given = {name: value for name, value in extras.items() if value is not None}
    path = x.tracer.path_of_module(layer)
    return x.tracer.create_proxy("call_module", path, (x,), given)

"""How `torch.fx` sees a layer: one call of one module, as it sees torch.nn's own.

The tracer looks into every module whose class lies outside `torch.nn`. Inside it would
bake the branch of the current mode into the graph and count a batch while tracing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy, Tracer

__all__ = ["recorded_call"]


def recorded_call(layer: torch.nn.Module, x: Any, **extras: Any) -> Any:
    """The node that stands for `layer(x)` in a symbolic trace; None outside of one.

    A subclass defined elsewhere is looked into, as a subclass of a torch.nn layer is:
    its own forward may do more than the layer, and would be run twice.
    """
    if not isinstance(x, Proxy) or not isinstance(x.tracer, Tracer):
        return None
    if type(layer).__module__.partition(".")[0] != "normkit":
        return None
    given = {name: value for name, value in extras.items() if value is not None}
    path = x.tracer.path_of_module(layer)
    return x.tracer.create_proxy("call_module", path, (x,), given)

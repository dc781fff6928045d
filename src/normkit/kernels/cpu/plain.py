"""Which tensors may be read by address: plain ones, in CPU memory, unobserved."""

# torch says what a tensor is wrapped in, and who is watching, in private names only.
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false
# pyright: reportAttributeAccessIssue=false, reportUnknownVariableType=false

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["are_plain", "is_watched", "reason_against"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_modes = torch._C._len_torch_dispatch_stack
_tracer = torch._C._get_tracing_state


def reason_against(x: Tensor) -> str:
    """Why the kernels cannot read `x`; empty when they can."""
    if type(x) not in _PLAIN:
        return f"x is a {type(x).__name__}, not a plain tensor"
    if not x.is_cpu:
        return f"x is on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, not a floating dtype of the kernels"
    if x.layout != torch.strided:
        return f"x is {x.layout}, not strided"
    if _is_wrapped(x) or x.is_neg():
        return "x is a lazy view or wrapped by a transform: it has no values of its own"
    if is_watched():
        return "a dispatch mode or a tracer has to see torch operations"
    return ""


def is_watched() -> bool:
    """Whether a mode or a tracer has to see every operation."""
    return bool(_modes() or _tracer())


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether each has values in CPU memory that may be read by address."""
    for t in tensors:
        if t is not None and (
            type(t) not in _PLAIN
            or not t.is_cpu
            or t.layout != torch.strided
            or _is_wrapped(t)
            or t.is_neg()
        ):
            return False
    return True

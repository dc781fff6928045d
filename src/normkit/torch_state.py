"""State of torch that decides how a call may run: tracers, transforms, modes.

Most of it has private names only. All of them are in this file, so that a new version
of torch needs changes here alone. Other private names of torch stand where they are
used, each once or twice: base classes of layers, `_pytree`, `OpOverload`, a dispatch
mode and a collective; tests/test_imports.py has the list.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false
# pyright: reportAttributeAccessIssue=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "PLAIN",
    "below_autograd",
    "dtensor_like",
    "has_forward_mode",
    "has_mode_or_tracer",
    "has_tangent",
    "has_transforms",
    "increment_version",
    "is_batched_gradient",
    "is_compiling",
    "is_exporting",
    "is_in_backward",
    "is_jit_tracing",
    "is_observed",
    "is_plain",
    "is_wrapped",
    "local_part",
    "number_of_threads",
    "process_group_by_name",
    "unwrapped_apply",
    "without_function_modes",
]

PLAIN = (Tensor, torch.nn.Parameter)
"""Tensor classes that hold their own values."""

is_compiling = torch.compiler.is_compiling
try:
    is_exporting: Callable[[], bool] = torch.compiler.is_exporting
except AttributeError:  # torch 2.6
    from torch.export import _trace

    def is_exporting() -> bool:
        """Return whether `torch.export.export` runs."""
        return _trace._EXPORT_FLAGS is not None


# grad, vmap, jvp and functionalize of torch.func.
has_transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active
# `with torch.device(...)`, and every other mode of the function protocol.
_has_function_mode: Callable[[], int] = torch._C._len_torch_function_stack
# Wrapped by a transform, also by one that has ended.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
# autograd.grad(is_grads_batched=True) maps over the backward alone.
is_batched_gradient: Callable[[Tensor], bool] = (
    torch._C._functorch.is_legacy_batchedtensor
)
is_jit_tracing: Callable[[], bool] = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage]
below_autograd = torch._C._AutoDispatchBelowAutograd
without_function_modes = torch._C.DisableTorchFunctionSubclass

# A frame of Python less than `is_compiling`, and dynamo knows both.
_is_in_dynamo = torch.compiler.is_dynamo_compiling
_modes = torch._C._len_torch_dispatch_stack
_tracer = torch._C._get_tracing_state
_graph_task = torch._C._current_graph_task_id


def has_forward_mode() -> bool:
    """Return whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def has_tangent(*tensors: Tensor | None) -> bool:
    """Return whether forward mode carries a derivative along one of the tensors."""
    return has_forward_mode() and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def has_mode_or_tracer() -> bool:
    """Return whether a dispatch mode or torch.jit.trace must see every operation."""
    return bool(_modes() or _tracer())


def is_observed() -> bool:
    """Return whether a mode, transform or tracer must see torch operations."""
    # All other compilers than dynamo run under a dispatch mode.
    return bool(
        _is_in_dynamo()
        or has_transforms()
        or _modes()
        or _has_function_mode()
        or _tracer()
        or forward_ad._current_level >= 0
    )


def is_in_backward() -> bool:
    """Return whether this code runs within a backward, as a recomputed forward does."""
    return not _is_in_dynamo() and _graph_task() != -1


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether each tensor holds its values in CPU memory, at its address."""
    for t in tensors:
        if t is not None and (
            type(t) not in PLAIN
            or not t.is_cpu
            or t.layout is not torch.strided
            or is_wrapped(t)
            or t.is_neg()
        ):
            return False
    return True


def _one_by_one(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


increment_version: Callable[[tuple[Tensor, ...]], None] = torch._C._increment_version
"""Tell autograd that the values of tensors were changed by address."""
try:
    increment_version((torch.empty(0),))
except TypeError:  # older versions take a single tensor
    increment_version = _one_by_one


def local_part(x: Any) -> Tensor:
    """Return this rank's part of a DTensor, without a node of autograd."""
    return x._local_tensor


def dtensor_like(local: Tensor, like: Any, placements: tuple[Any, ...]) -> Any:
    """Return a DTensor of the shape of another, without a node of autograd."""
    spec = like._spec
    if spec.placements != placements:
        spec = _spec_with(spec, placements)
    if _new_dtensor is not None:
        return _new_dtensor(type(like), local, spec, requires_grad=False)
    return type(like)(local, spec, requires_grad=False)


# Without the two decorators of the constructor: a fifth of the time.
_new_dtensor: Callable[..., Any] | None = getattr(Tensor, "_dtensor__new__", None)


@lru_cache(maxsize=1024)
def _spec_with(spec: Any, placements: tuple[Any, ...]) -> Any:
    return type(spec)(spec.mesh, placements, tensor_meta=spec.tensor_meta)


def process_group_by_name(name: str) -> Any:
    """Return the process group of that name, as functional collectives find it."""
    c10d: Any = torch.distributed.distributed_c10d
    return c10d._resolve_process_group(name)


def unwrapped_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` without its support of torch.func.

    It checks for transforms at every call, a quarter of the time of an empty function.
    The caller has checked already.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


@contextmanager
def number_of_threads(count: int) -> Generator[None]:
    """Compute with `count` threads inside the block; the number before is restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

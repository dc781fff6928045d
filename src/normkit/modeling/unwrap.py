"""The model and the optimizer inside their wrappers.

A wrapper's forward broadcasts buffers, runs code that was compiled without hooks, or
only passes the call on; its names begin with a prefix that the wrapped model's lack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from normkit.errors import ArgumentError

__all__ = ["eager", "is_average", "is_compiled", "unwrapped", "unwrapped_optimizer"]

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel, DDP, torch.compile and averages of weights.

    FullyShardedDataParallel stays: outside its forward the parameters are shards. Such
    a model is called and hooked as it is, and its buffers are whole.
    """
    *_, innermost = _layers_of(model)
    return innermost


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model, in whatever wrapper, is called through a compiler."""
    return any(
        "_orig_mod" in each._modules
        or getattr(each, "_compiled_call_impl", None) is not None
        for each in _layers_of(model)
    )


def _layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model as given, then what each wrapper holds."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        model, inner = inner, _child(inner, "_orig_mod")
        if isinstance(model, _PARALLEL) or is_average(model):
            inner = _child(model, "module") or _child(model, "ema_model")


def _child(model: nn.Module, name: str) -> nn.Module | None:
    # The modules of a scripted module are no dict: they have no `get`.
    return model._modules[name] if name in model._modules else None  # noqa: SIM401


def is_average(model: nn.Module) -> bool:
    """Return whether `model` wraps averaged weights.

    These are `torch.optim.swa_utils.AveragedModel`, timm's `ModelEmaV2` and `V3` (a
    child `module` and a `decay`) and `ema_pytorch.EMA` (a child `ema_model`).
    """
    if isinstance(model, AveragedModel):
        return True
    # By name as well: any module may hold another and a decay, and compute with both.
    if "ema" not in type(model).__name__.lower():
        return False
    children = list(model._modules)
    return "ema_model" in children or (
        children == ["module"] and hasattr(model, "decay")
    )


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside the wrappers of accelerate and Lightning.

    Their classes derive from Optimizer and lack its hooks.

    Raises:
        ArgumentError: It is a class.
    """
    if isinstance(optimizer, type):
        raise ArgumentError(
            f"the optimizer is the class {optimizer.__name__}; make one of the model: "
            f"{optimizer.__name__}(model.parameters(), lr=…)"
        )
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run what `Module.compile()` compiled in Python, where hooks are seen."""
    calls: Any = "_compiled_call_impl"
    if any(getattr(module, calls, None) is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield

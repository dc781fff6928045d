"""Calls of `F.batch_norm` with buffers of a larger module, which no batch norm makes.

A pass under batch statistics sets the mode of batch norm modules. A call outside them,
`F.batch_norm(x, self.mean, self.var, training=self.training)`, follows the mode of the
module that holds its buffers, and that module is in eval mode, so that dropout is off.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normkit.modeling.graph_norms import SIGNATURES

__all__ = ["BatchStatistics", "TrainingCalls", "held_averages"]


def held_averages(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return the buffers of `modules` that may be running means: two of one length.

    Code in TorchScript calls no function of Python.
    """
    found = []
    for module in modules:
        held = [
            buffer
            for _, buffer in module.named_buffers(recurse=False)
            if buffer.dim() == 1 and buffer.is_floating_point()
        ]
        lengths = [len(buffer) for buffer in held]
        found += [b for b in held if lengths.count(len(b)) > 1]
    return found


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Return the arguments of a batch norm by name; None for any other function."""
    signature = SIGNATURES.get(func)
    return (
        None if signature is None else dict(zip(signature, args, strict=False)) | kwargs
    )


class TrainingCalls(TorchFunctionMode):
    """Record the running means of batch norm calls with the statistics of the batch.

    Attributes:
        means: Those among the given ones, the objects themselves.
    """

    def __init__(self, among: list[Tensor]) -> None:
        super().__init__()
        self._among = {id(mean) for mean in among}
        self.means: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function."""
        given = _arguments(func, args, kwargs or {})
        if given is not None and given.get("training"):
            mean = given.get("running_mean")
            if mean is not None and id(mean) in self._among:
                self.means.append(mean)
        return func(*args, **kwargs or {})


class BatchStatistics(TorchFunctionMode):
    """Run the batch norm calls of some running means with the statistics of the batch.

    The running ones are left as they are.
    """

    def __init__(self, means: list[Tensor]) -> None:
        super().__init__()
        self._means = {id(mean) for mean in means}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function."""
        given = _arguments(func, args, kwargs or {})
        if given is None or id(given.get("running_mean")) not in self._means:
            return func(*args, **kwargs or {})
        return func(
            **given | {"running_mean": None, "running_var": None, "training": True}
        )

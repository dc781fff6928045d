"""The route of a normalization, and the backend that runs it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from normkit.functional.route import route_of
from normkit.kernels.choose import Explanation
from normkit.kernels.choose import explain as among_backends
from normkit.kernels.spec import Spec
from normkit.views import keepdim_shape

__all__ = ["explain"]


def explain(x: Tensor, dims: tuple[int, ...] | None = None) -> Explanation:
    """Say which route a normalization of `x` takes, which kernel runs it, and why.

    Args:
        x: The input of a normalization, shape `(N, C, *)`.
        dims: The dimensions its statistics run over; by default all but
            dimension 1, as in batch norm.

    Returns:
        The route, the backend that is chosen, and for each other one the reasons
        against it.

    Example:
        >>> import torch
        >>> explain(torch.zeros(8, 3, 640, 640)).route
        'kernels'
        >>> torch.vmap(lambda x: (explain(x).route == "differentiable") * x)(
        ...     torch.ones(2, 3, 4)
        ... ).sum()
        tensor(24.)
    """
    found = among_backends(x, dims)
    if dims is None:
        dims = tuple(d for d in range(x.dim()) if d != 1)
    vector = keepdim_shape(x, dims)
    route = route_of(Spec(dims, 1e-5, vector=vector), (x, None, None, None, None), None)
    return replace(found, route=route.value)

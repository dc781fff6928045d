"""Protocol of backends that run whole layers in fewer passes than the primitives.

    normalize        moments → apply → epilogue
    normalize_grads  epilogue back → reduce_grads → algebra → apply_grads

`functional.passes` uses `fused` where it can, and else the primitives in turn.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from normkit.kernels.deterministic import is_deterministic
from normkit.kernels.epilogue import Epilogue, activate
from normkit.kernels.primitives import Backend, Grads
from normkit.moments import Moments, statistics_dtype

__all__ = ["Fused", "absorbed", "apply_given", "fused", "shared_dims"]

_NONE = Epilogue()


class Fused(Protocol):
    """A backend with kernels for whole layers."""

    def fuses(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        *others: Tensor | None,
    ) -> bool:
        """Return whether the operations below run on these tensors."""
        ...

    def apply_given(
        self,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        epilogue: Epilogue,
    ) -> Tensor:
        """Return act((x − center)·scale·weight + bias + residual)."""
        ...

    def normalize(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        centered: bool = True,
        epilogue: Epilogue = _NONE,
    ) -> tuple[Tensor, Moments, Tensor] | None:
        """Return the values, the moments over `dims` and 1/√(var + eps), dims kept.

        None where no kernel does it as a whole.
        """
        ...

    def normalize_grads(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        center: Tensor,
        inv_std: Tensor,
        count: Tensor | None,
        *,
        centered: bool = True,
        epilogue: Epilogue = _NONE,
        y: Tensor | None = None,
        wanted: tuple[bool, bool, bool, bool],
    ) -> Grads | None:
        """Return the gradients of x, weight, bias and residual that are wanted.

        None where no kernel does it as a whole. `count` is None when the statistics are
        constants. `y`, where given, replaces the residual of a relu: it is
        positive where the relu was open.
        """
        ...


def fused(
    kernels: Backend,
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None,
    *others: Tensor | None,
) -> Fused | None:
    """Return `kernels` if it has whole layers and they run on these tensors."""
    if not hasattr(kernels, "normalize"):
        return None
    whole = cast("Fused", kernels)
    return whole if whole.fuses(x, dims, weight, *others) else None


def apply_given(
    kernels: Backend,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
) -> Tensor:
    """Return act((x − center)·scale·weight + bias + residual), from `apply`."""
    compute = statistics_dtype(x.dtype)
    if epilogue and compute != x.dtype:
        # Halves are rounded once, at the end.
        residual = epilogue.residual
        # Not by dataclasses.replace, which torch 2.6 cannot compile.
        wide = Epilogue(
            epilogue.activation,
            epilogue.slope,
            None if residual is None else residual.to(compute),
        )
        y = apply_given(kernels, x.to(compute), center, scale, weight, bias, wide)
        return y.to(x.dtype)
    scale, weight = absorbed(scale, weight)
    y = kernels.apply(x, center, scale, bias, weight=weight)
    if epilogue.residual is not None:
        y = y.add_(epilogue.residual)
    return activate(epilogue.activation, y, epilogue.slope)


def shared_dims(affine: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Return the reduced dimensions along which the learned affine is constant, too."""
    return tuple(d for d in dims if affine.shape[d] == 1)


def absorbed(scale: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return `scale·weight` as one vector where that is smaller than x."""
    if is_deterministic():
        # Whether it is smaller depends on the size of the batch.
        return scale, weight
    dims = tuple(d for d in range(scale.dim()) if scale.shape[d] == 1)
    if weight is None or not shared_dims(weight, dims):
        return scale, weight
    return scale * weight, None

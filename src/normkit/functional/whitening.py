"""The inverse square root of a covariance, and whitening by it.

    W = (Σ + eps·1)^(−1/2),   y = W·(x − mean)

W is the symmetric root (ZCA): of all whitening matrices, the one that changes x least.
Its derivative needs no eigenvectors that may coincide. With S = (Σ + eps·1)^(1/2),

    dW = −W·dS·W,   S·dS + dS·S = dΣ

a Lyapunov equation, whose own derivative is one again: exact to any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.kernels.primitives import vector_dtype
from normkit.masks import broadcast_mask
from normkit.moments import Moments, deviations
from normkit.sync import merge_over, sum_over
from normkit.sync.groups import Group
from normkit.torch_state import is_compiling

__all__ = ["covariance", "inverse_sqrt", "newton_inverse_sqrt"]


def covariance(
    x: Tensor, mask: Tensor | None = None, group: Group = None
) -> tuple[Moments, Tensor, Tensor]:
    """Return mean, centred values and covariance of the columns of `x`.

    Args:
        x: Values, shape `(G, D, M)`: G groups of D channels, M observations.
        mask: Which observations count, broadcastable to `(1, 1, M)`: bool or weights.
        group: Ranks whose observations are taken together, in two collectives; None is
            this rank alone.

    Returns:
        The moments of each channel, shape `(G, D, 1)`; the centred values, in float32
        or wider, 0 where the mask is; and Σ (1/n) Σ (x − mean)(x − mean)ᵀ, shape
        `(G, D, D)`, in float64 where the device has it.
    """
    local = deviations(x, (2,), mask)
    wide = x.to(local.m2.dtype)
    exact = vector_dtype(x.device)
    measured, lo = local.to_moments(exact), local.lo
    if group is not None:
        measured = merge_over(measured, group)
        lo = (measured.mean - local.hi.to(exact)).to(wide.dtype)
    centred = (wide - local.hi) - lo
    total = measured.count.to(exact).clamp(min=1e-30)
    if mask is None:
        rows = centred.to(exact)
        product = rows @ rows.mT
    else:
        share = broadcast_mask(mask, x)
        centred = torch.where(share > 0, centred, torch.zeros_like(centred))
        rows = centred.to(exact)
        product = (rows * share.to(exact)) @ rows.mT
        total = total[..., :1, :1]
    if group is not None:
        (product,) = sum_over([product], group)
    return measured.detach(), centred, product / total


def inverse_sqrt(matrix: Tensor, eps: float) -> Tensor:
    """Return (Σ + eps·1)^(−1/2) of symmetric, positive semidefinite matrices, by eigh.

    Args:
        matrix: Shape `(*, D, D)`.
        eps: Added to every eigenvalue; one that rounding made negative counts as 0.

    Returns:
        The symmetric roots, of the shape and dtype of `matrix`. A matrix with a NaN or
        Inf gives NaN.
    """
    found = _chosen(_InverseSqrt, _InverseSqrtForward).apply(matrix, eps)
    assert isinstance(found, Tensor)
    return found


def newton_inverse_sqrt(matrix: Tensor, eps: float, iterations: int) -> Tensor:
    """Return the same by Newton's iteration: matrix products only, and approximate.

        P₀ = 1,  Pₖ₊₁ = (3·Pₖ − Pₖ³·N)/2,  N = (Σ + eps·1)/tr(Σ + eps·1)

    P/√tr tends to the root. Directions whose variance is a small share of the trace
    converge last, and after few iterations stay smaller than 1: a regularization.

    Args:
        matrix: Shape `(*, D, D)`.
        eps: Added to the diagonal.
        iterations: Number of steps; the paper takes 5.

    Raises:
        ArgumentError: `iterations` is below 1.
    """
    if iterations < 1:
        raise ArgumentError(
            f"Newton's iteration needs at least one step, got iterations={iterations}; "
            "5 is usual"
        )
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    shifted = matrix + eps * unit
    trace = shifted.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    # Coupled with Y = P·N: the same iterates, but rounding errors stay small, where
    # the plain iteration is off by 4e5 after 30 steps.
    product, root = shifted / trace, unit
    for _ in range(iterations):
        step = 1.5 * unit - 0.5 * (root @ product)
        product, root = product @ step, step @ root
    return root * torch.rsqrt(trace)


def _chosen(
    backward: type[torch.autograd.Function], forward: type[torch.autograd.Function]
) -> type[torch.autograd.Function]:
    # torch.compile takes no function with a derivative of forward mode.
    return backward if is_compiling() else forward


class _InverseSqrt(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, eps: float) -> Tensor:
        # LAPACK refuses a matrix with a NaN or Inf.
        is_finite = matrix.isfinite().all(-1).all(-1)[..., None, None]
        safe = torch.where(is_finite, matrix, torch.zeros_like(matrix))
        values, vectors = torch.linalg.eigh(safe)
        inv_std = torch.rsqrt(values.clamp(min=0) + eps)
        root = (vectors * inv_std.unsqueeze(-2)) @ vectors.mT
        return torch.where(is_finite, root, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        matrix, ctx.eps = inputs
        ctx.save_for_backward(matrix, output)
        ctx.save_for_forward(matrix, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad_output,) = grad_outputs
        matrix, inverse = ctx.saved_tensors
        # Only the symmetric part of a gradient meets a symmetric matrix.
        grad = 0.5 * (grad_output + grad_output.mT)
        return -_lyapunov(
            _root(matrix, inverse, ctx.eps), inverse @ grad @ inverse
        ), None


class _InverseSqrtForward(_InverseSqrt):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        tangent = tangents[0]
        matrix, inverse = ctx.saved_tensors
        assert tangent is not None
        tangent = 0.5 * (tangent + tangent.mT)
        root = _root(matrix, inverse, ctx.eps)
        return -inverse @ _lyapunov(root, tangent) @ inverse


def _root(matrix: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """Return (Σ + eps·1)^(1/2) = (Σ + eps·1)·W, differentiable in both."""
    root = matrix @ inverse + eps * inverse
    return 0.5 * (root + root.mT)


def _lyapunov(root: Tensor, right: Tensor) -> Tensor:
    """Solve S·X + X·S = Q for a symmetric, positive S and a symmetric Q."""
    found = _chosen(_Lyapunov, _LyapunovForward).apply(root, right)
    assert isinstance(found, Tensor)
    return found


class _Lyapunov(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(root: Tensor, right: Tensor) -> Tensor:
        is_finite = root.isfinite().all(-1).all(-1)[..., None, None]
        safe = torch.where(is_finite, root, torch.zeros_like(root))
        values, vectors = torch.linalg.eigh(safe)
        sums = values.unsqueeze(-1) + values.unsqueeze(-2)
        # A sum of two roots of eigenvalues above eps; 0 only where all is NaN.
        sums = torch.where(sums > 0, sums, torch.ones_like(sums))
        inner = (vectors.mT @ right @ vectors) / sums
        return torch.where(is_finite, vectors @ inner @ vectors.mT, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        root, _ = inputs
        ctx.save_for_backward(root, output)
        ctx.save_for_forward(root, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (grad_output,) = grad_outputs
        root, solution = ctx.saved_tensors
        grad = _lyapunov(root, 0.5 * (grad_output + grad_output.mT))
        return -(grad @ solution + solution @ grad), grad


class _LyapunovForward(_Lyapunov):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        droot, dright = tangents
        root, solution = ctx.saved_tensors
        change = torch.zeros_like(root) if dright is None else dright
        if droot is not None:
            change = change - (droot @ solution + solution @ droot)
        return _lyapunov(root, 0.5 * (change + change.mT))

"""Per-channel affine maps that compose: y = scale·x + shift.

    f.then(g):  scale = g.scale·f.scale,   shift = g.scale·f.shift + g.shift

At inference a normalization is one of these, `standardize` then the learned affine;
folding composes it with the linear map before or after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.moments import Moments

__all__ = ["Affine"]


@dataclass(frozen=True)
class Affine:
    """The map x → scale·x + shift, elementwise over channels.

    A monoid under `then`, with `Affine.identity` as its unit.

    Attributes:
        scale: Factor per channel, shape `(C,)` or any shape that broadcasts to x.
        shift: Summand per channel, of the shape of `scale`.

    Example:
        >>> double = Affine(torch.tensor([2.0]), torch.tensor([1.0]))
        >>> double.then(double)(torch.tensor([3.0]))
        tensor([15.])
        >>> double.then(double.inverse())
        Affine(scale=tensor([1.]), shift=tensor([0.]))
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def identity(
        cls,
        shape: tuple[int, ...] = (),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Affine:
        """Return the map that changes nothing."""
        return cls(
            torch.ones(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )

    @classmethod
    def standardize(cls, moments: Moments, eps: float) -> Affine:
        """Return the map to mean 0, variance var/(var + eps): (x − mean)·inv_std.

        Numerics:
            In float32 `scale·x + shift` loses the digits of x when |mean| is far
            above the standard deviation (6.6e-2 at N(1e4, 1e-2)). Compose in
            float64, as `fold` does; the layers keep the centre apart instead.
        """
        inv_std = moments.inv_std(eps)
        return cls(inv_std, -moments.mean * inv_std)

    def then(self, other: Affine) -> Affine:
        """Compose: this map first, `other` after it."""
        return Affine(other.scale * self.scale, other.scale * self.shift + other.shift)

    def inverse(self) -> Affine:
        """Return the inverse map; inf where scale is 0."""
        scale = self.scale.reciprocal()
        return Affine(scale, -self.shift * scale)

    def __call__(self, x: Tensor, dim: int = -1) -> Tensor:
        """Map `x`, whose channels lie along dimension `dim`.

        Args:
            x: Values, shape `(*, C, *)`.
            dim: The channel dimension of `x`; unused when `scale` is a scalar.

        Raises:
            ArgumentError: `x` has another number of channels there.
        """
        if self.scale.dim() == 0:
            return x * self.scale + self.shift
        if self.scale.dim() != 1:
            return x * self.scale + self.shift
        channels = self.scale.shape[0]
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != channels:
            raise ArgumentError(
                f"Affine of {channels} channels needs x with {channels} along "
                f"dim={dim}, got shape {tuple(x.shape)}; name the channel dimension"
            )
        shape = [1] * x.dim()
        shape[dim] = channels
        return x * self.scale.view(shape) + self.shift.view(shape)

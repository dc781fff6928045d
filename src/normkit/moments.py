"""Count, mean and sum of squared deviations: statistics that merge.

    merge:  n = n₁ + n₂,  δ = mean₂ − mean₁
            mean = mean₁ + δ·n₂/n,   m2 = m2₁ + m2₂ + δ²·n₁·n₂/n

`Moments` under `merge` is a commutative monoid. Minibatch statistics, statistics
synchronised over ranks, gradient accumulation, streaming calibration and the
probes of the doctor are all merges of this one value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.errors import ArgumentError, DtypeError
from normkit.masks import broadcast_mask

__all__ = [
    "Deviations",
    "Moments",
    "deviations",
    "moments",
    "plain_sum",
    "statistics_dtype",
]


@dataclass(frozen=True)
class Moments:
    """The count, mean and sum of squared deviations of a set of values.

    Variances are computed on demand (`var`, `unbiased_var`, `inv_std`), because sums
    of squared deviations merge and variances do not.

    Attributes:
        count: Number of values, int64, a scalar or of the shape of `mean`
            (float64 when the values carried fractional weights).
        mean: (1/n) Σ xᵢ, any shape; 0 where count is 0.
        m2: Σ (xᵢ − mean)², of the shape of `mean`; 0 where count is 0.

    Example:
        >>> left = moments(torch.tensor([1.0, 2.0]), dim=0)
        >>> right = moments(torch.tensor([6.0]), dim=0)
        >>> both = left.merge(right)
        >>> int(both.count), float(both.mean), float(both.m2)
        (3, 3.0, 14.0)
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...] = (),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Moments:
        """Return the identity of `merge`: no values at all."""
        return cls(
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )

    @classmethod
    def merge_all(cls, parts: Iterable[Moments]) -> Moments:
        """Merge any number of parts of equal shape in one step.

        Raises:
            ArgumentError: There are no parts; use `Moments.empty(shape)`.
        """
        parts = list(parts)
        if not parts:
            raise ArgumentError(
                "merge_all needs at least one Moments, got none; "
                "use Moments.empty(shape) for the identity"
            )
        stacked = cls(
            torch.stack([p.count.expand(p.mean.shape) for p in parts]),
            torch.stack([p.mean for p in parts]),
            torch.stack([p.m2 for p in parts]),
        )
        return stacked.merge_dim(0)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together (Chan, Golub & LeVeque 1983)."""
        count = self.count + other.count
        # Counts go to the dtype of the mean first: int64 / int64 is float32 in torch,
        # which cost 8 digits in float64.
        ours, theirs = self.count.to(self.mean.dtype), other.count.to(self.mean.dtype)
        share = theirs / (ours + theirs).clamp(min=_SMALLEST_COUNT)
        delta = other.mean - self.mean
        mean = self.mean + delta * share
        m2 = self.m2 + other.m2 + delta * delta * (ours * share)
        # An empty side leaves the other bitwise as it was, NaN and Inf included.
        only_ours, only_theirs = other.count == 0, self.count == 0
        mean = torch.where(
            only_ours, self.mean, torch.where(only_theirs, other.mean, mean)
        )
        m2 = torch.where(only_ours, self.m2, torch.where(only_theirs, other.m2, m2))
        return Moments(count, mean, m2)

    def merge_dim(
        self, dim: int | tuple[int, ...], *, keepdim: bool = False
    ) -> Moments:
        """Merge the sets that lie along `dim` of the statistics themselves.

        Group norm uses it to merge the moments of the channels of one group.

        Args:
            dim: Dimension or dimensions of `mean` to merge over.
            keepdim: Keep the merged dimensions with size 1.
        """
        dims = (dim,) if isinstance(dim, int) else dim
        count = self.count.expand(self.mean.shape)
        weight = count.to(self.mean.dtype)
        total = weight.sum(dims, keepdim=True)
        share = weight / total.clamp(min=_SMALLEST_COUNT)
        # The first mean that belongs to any value is the shift; what is averaged is
        # small against the spread of the means, so a common offset cancels nothing.
        pilot = (share * self.mean.detach()).sum(dims, keepdim=True)
        pilot = torch.where(pilot.isfinite(), pilot, torch.zeros_like(pilot))
        present = count > 0
        offset = torch.where(present, self.mean - pilot, torch.zeros_like(self.mean))
        shift = (share * offset).sum(dims, keepdim=True)
        between = weight * (offset - shift).square()
        within = torch.where(present, self.m2 + between, torch.zeros_like(self.m2))
        mean, m2 = pilot + shift, within.sum(dims, keepdim=True)
        if not keepdim:
            mean, m2 = mean.squeeze(dims), m2.squeeze(dims)
        return Moments(count.sum(dims, keepdim=keepdim), mean, m2)

    @property
    def var(self) -> Tensor:
        """The population variance, m2 / count; nan when count is 0."""
        return self.m2 / self.count.to(self.m2.dtype)

    @property
    def unbiased_var(self) -> Tensor:
        """The sample variance, m2 / (count − 1); nan when count is below 2."""
        spare = self.count.to(self.m2.dtype) - 1
        return self.m2 / torch.where(spare > 0, spare, math.nan)

    @property
    def mean_square(self) -> Tensor:
        """The mean of x², var + mean²; nan when count is 0."""
        return self.var + self.mean.square()

    def inv_std(self, eps: float) -> Tensor:
        """Return 1 / √(var + eps); `eps` is added inside the root, to the variance."""
        return torch.rsqrt(self.var + eps)

    def detach(self) -> Moments:
        """Return the same values, detached from the autograd graph."""
        return Moments(self.count.detach(), self.mean.detach(), self.m2.detach())

    def to(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Moments:
        """Convert mean and m2 to `dtype`, all to `device`; the count stays int64."""
        return Moments(
            self.count.to(device=device),
            self.mean.to(device=device, dtype=dtype),
            self.m2.to(device=device, dtype=dtype),
        )


@dataclass(frozen=True)
class Deviations:
    """Moments with the mean kept as an unevaluated sum `hi + lo`.

    One float32 cannot hold the mean of values whose spread is 1e-6 of their size;
    two can. All tensors keep the reduced dimensions with size 1.

    Attributes:
        count: Number of values, int64 (float64 for fractional weights).
        hi: The leading part of the mean, a constant for autograd.
        lo: The rest of the mean, differentiable.
        m2: Σ (xᵢ − hi − lo)², differentiable.
    """

    count: Tensor
    hi: Tensor
    lo: Tensor
    m2: Tensor

    def to_moments(self, dtype: torch.dtype) -> Moments:
        """Return the same statistics with the mean rounded once, to `dtype`."""
        mean = self.hi.to(dtype) + self.lo.to(dtype)
        return Moments(self.count, mean, self.m2.to(dtype))


def moments(
    x: Tensor, dim: int | tuple[int, ...], mask: Tensor | None = None
) -> Moments:
    """Measure the count, mean and sum of squared deviations of `x` over `dim`.

    For the n values that fall on one output position,

        count = n,   mean = (1/n) Σ xᵢ,   m2 = Σ (xᵢ − mean)²

    so `m2 / count` is the population variance, which normalization divides by,
    and `m2 / (count − 1)` the unbiased one, which torch keeps in `running_var`.
    The three travel together because they merge: however the values are split,
    merging the moments of the parts gives the moments of the whole.

    Args:
        x: Values, any shape, any floating dtype.
        dim: Dimension or dimensions to reduce; negative counts from the end.
            The dimensions not named are kept, in order.
        mask: Which values count: bool, or weights ≥ 0 of a floating dtype,
            broadcastable to the shape of `x`. Values of `x` where the mask is
            False (or 0) are ignored, NaN included.

    Returns:
        Moments whose `mean` and `m2` have the shape of `x` without `dim`:
        `(N, C, H, W)` reduced over `(0, 2, 3)` gives `(C,)`. Their dtype is
        float32, or float64 when `x` is float64. `count` is an int64 scalar, or
        of the shape of `mean` under a bool mask (float64 under weights):
        float32 would stop counting at 16 777 216.

    Raises:
        DtypeError: `x` is not floating point.
        ArgumentError: `dim` names a dimension twice or one that `x` does not
            have, or `mask` does not broadcast to `x`.

    Numerics:
        The mean is subtracted before squaring, so a large common offset does
        not cancel as it does in E[x²] − E[x]². No values at all give the
        identity of `merge` (count 0); its variance is nan, never a guess.
        Differentiable to any order.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 7.0, 9.0]])
        >>> batch = moments(x, dim=0)
        >>> batch.mean, batch.var
        (tensor([3.0000, 4.5000, 6.0000]), tensor([4.0000, 6.2500, 9.0000]))

        The same from its two halves, as two ranks would hold them:

        >>> moments(x[:1], dim=0).merge(moments(x[1:], dim=0)).var
        tensor([4.0000, 6.2500, 9.0000])

        A large offset does no harm (E[x²] − E[x]² gives 8, 0 and 16 here):

        >>> moments(10_000 + x, dim=0).var
        tensor([4.0000, 6.2500, 9.0000])

        Padding is left out by a mask:

        >>> moments(x, dim=1, mask=torch.tensor([True, True, False])).mean
        tensor([1.5000, 6.0000])

    References:
        Chan, Golub & LeVeque, "Algorithms for computing the sample variance:
        analysis and recommendations", The American Statistician 37(3), 1983.
    """
    dims = _reduced_dims(x, dim)
    measured = deviations(x, dims, mask)
    mean = (measured.hi + measured.lo).squeeze(dims)
    count = measured.count
    if count.dim():
        count = count.squeeze(dims)
    return Moments(count, mean, measured.m2.squeeze(dims))


def plain_sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum over `dims`, kept with size 1, in the order that torch finds best."""
    return x.sum(dims, keepdim=True)


def deviations(
    x: Tensor,
    dims: tuple[int, ...],
    mask: Tensor | None = None,
    *,
    add: Callable[[Tensor, tuple[int, ...]], Tensor] = plain_sum,
) -> Deviations:
    """Measure `x` over the non-negative, distinct `dims`, the mean as hi + lo.

    Three passes: a pilot mean (a constant), the mean of the differences from it, the
    sum of squares around both. The error of the centre is then relative to the spread
    of the values, not to their size.
    """
    x = x.to(statistics_dtype(x.dtype))
    if mask is None:
        # A list: torch.compile cannot trace math.prod over a generator.
        n = math.prod([x.shape[d] for d in dims])
        count = torch.full((), n, dtype=torch.int64, device=x.device)
        total = max(n, 1)
        hi = add(x.detach(), dims) / total
        # A pilot that overflowed or met a NaN must not turn its neighbours to NaN.
        hi = torch.where(hi.isfinite(), hi, torch.zeros_like(hi))
        rest = x - hi
        lo = add(rest, dims) / total
        m2 = add((rest - lo).square(), dims)
        return Deviations(count, hi, lo, m2)

    mask = broadcast_mask(mask, x)
    is_valid = mask if mask.dtype == torch.bool else mask > 0
    if mask.dtype == torch.bool:
        weight = mask.to(x.dtype)
        count = mask.sum(dims, keepdim=True)
    else:
        weight = mask.to(x.dtype)
        count = add(mask.to(torch.float64), dims)
    total = count.to(x.dtype).clamp(min=_SMALLEST_COUNT)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    x = torch.where(is_valid, x, zero)
    hi = add(x.detach() * weight, dims) / total
    hi = torch.where(hi.isfinite(), hi, zero)
    rest = torch.where(is_valid, x - hi, zero)
    lo = add(rest * weight, dims) / total
    around = torch.where(is_valid, rest - lo, zero)
    m2 = add(around.square() * weight, dims)
    return Deviations(count, hi, lo, m2)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics of values of `dtype`: float32 or wider.

    Raises:
        DtypeError: `dtype` is not a real floating dtype.
    """
    if not dtype.is_floating_point:
        raise DtypeError(
            f"normalization needs floating-point values, got {dtype}; "
            "convert first, e.g. x.float()"
        )
    return torch.float64 if dtype == torch.float64 else torch.float32


# Weights may sum to less than 1; only an exact zero must not be divided by.
_SMALLEST_COUNT = 1e-30


def _reduced_dims(x: Tensor, dim: int | tuple[int, ...]) -> tuple[int, ...]:
    named = (dim,) if isinstance(dim, int) else tuple(dim)
    if any(not -x.dim() <= d < x.dim() for d in named):
        raise ArgumentError(
            f"dim={dim} must name dimensions of x, which has shape {tuple(x.shape)}"
        )
    dims = tuple(d % x.dim() for d in named)
    if len(set(dims)) != len(dims):
        raise ArgumentError(
            f"dim={dim} must name distinct dimensions of x, "
            f"which has shape {tuple(x.shape)}"
        )
    return dims

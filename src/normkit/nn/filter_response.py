"""Filter response norm, and the thresholded linear unit (TLU) after it.

    ν² = mean of x² over positions,   y = x/√(ν² + |eps|)·weight + bias
    TLU(y) = max(y, threshold)

Per sample and channel, without a mean: no batch, no running statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normkit.errors import ArgumentError, ShapeError
from normkit.functional import normalize
from normkit.functional.arguments import check_eps, check_floating
from normkit.kernels.deterministic import is_deterministic, pairwise_sum
from normkit.masks import broadcast_mask
from normkit.moments import plain_sum, statistics_dtype
from normkit.nn.tracing import recorded_call

__all__ = ["TLU", "FilterResponseNorm"]


class FilterResponseNorm(nn.Module):
    """Divide each channel of each sample by its root mean square over positions.

        y = x/√(mean(x²) + |eps|)·weight + bias

    Use `TLU` after it: values are not centred, so a relu's threshold at 0 would be
    arbitrary.

    Args:
        num_features: Number of channels C.
        eps: Added to the mean square, inside the root.
        affine: Learn `weight` and `bias`, shape `(C,)`, from 1 and 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters; float32 also serves half inputs.
        bias: Learn a bias when `affine`.
        learnable_eps: Learn eps, from the value given, as a 0-d parameter; its absolute
            value is used. The paper does so where a map is 1 × 1 (with 1e-4).

    Raises:
        ArgumentError: In forward, one position per channel without `learnable_eps`:
            the output would be ±1.
        ShapeError: In forward, another number of channels, or no positions.
        DtypeError: An input that is not floating point.

    Example:
        >>> x = torch.tensor([[[3.0, 4.0], [30.0, 40.0]]])
        >>> FilterResponseNorm(2, affine=False)(x)
        tensor([[[0.8485, 1.1314],
                 [0.8485, 1.1314]]])

    References:
        Singh & Krishnan, "Filter Response Normalization Layer: Eliminating Batch
        Dependence in the Training of Deep Neural Networks", CVPR 2020.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        learnable_eps: bool = False,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.num_features, self.affine = num_features, affine
        self.first_eps = float(eps)
        gain = nn.Parameter(torch.ones(num_features, **place)) if affine else None
        offset = torch.zeros(num_features, **place) if affine and bias else None
        self.register_parameter("weight", gain)
        self.register_parameter(
            "bias", None if offset is None else nn.Parameter(offset)
        )
        self.eps: float | nn.Parameter = self.first_eps
        if learnable_eps:
            del self.eps
            self.eps = nn.Parameter(torch.tensor(self.first_eps, **place))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset weight to 1, bias to 0, and eps to its initial value."""
        if self.weight is not None:
            self.weight.fill_(1)
        if self.bias is not None:
            self.bias.zero_()
        if isinstance(self.eps, Tensor):
            self.eps.fill_(self.first_eps)

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Scale `input`, shape `(N, C, *)` with at least one `*`.

        Args:
            input: Values, any floating dtype.
            mask: Which values count: bool or weights ≥ 0, broadcastable to `input`.
                The output is 0 elsewhere.
        """
        if (node := recorded_call(self, input, mask=mask)) is not None:
            return node
        name = type(self).__name__
        check_floating(input, name)
        if input.dim() < 3 or input.shape[1] != self.num_features:
            raise ShapeError(
                f"{name} needs an input of shape (N, {self.num_features}, *) with at "
                f"least one dimension of positions, got {tuple(input.shape)}"
            )
        is_fixed = not isinstance(self.eps, Tensor)
        if is_fixed and input.shape[2:].numel() == 1:
            raise ArgumentError(
                f"{name} needs more than one position per channel, got shape "
                f"{tuple(input.shape)}: every output would be ±1; use "
                "learnable_eps=True, as the paper does"
            )
        shape = (1, self.num_features) + (1,) * (input.dim() - 2)
        gain = None if self.weight is None else self.weight.view(shape)
        offset = None if self.bias is None else self.bias.view(shape)
        dims = tuple(range(2, input.dim()))
        if isinstance(self.eps, Tensor):
            return _by_learned_eps(input, dims, self.eps, gain, offset, mask)
        check_eps(self.eps, name, "non-negative")
        y, _ = normalize(
            *(input, dims, gain, offset, abs(self.eps)), mask=mask, centered=False
        )
        return y

    def extra_repr(self) -> str:
        """Return the arguments that differ between layers."""
        learned = isinstance(self.eps, Tensor)
        return (
            f"{self.num_features}, eps={self.first_eps}, affine={self.affine}, "
            f"learnable_eps={learned}"
        )


def _by_learned_eps(
    x: Tensor,
    dims: tuple[int, ...],
    eps: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    wide = x.to(statistics_dtype(x.dtype))
    add = pairwise_sum if is_deterministic() else plain_sum
    if mask is None:
        mean_square = add(wide.square(), dims) / x.shape[2:].numel()
        valid = None
    else:
        share = broadcast_mask(mask, x).to(wide.dtype)
        valid = share > 0
        wide = torch.where(valid, wide, torch.zeros_like(wide))
        total = add(share, dims).clamp(min=1e-30)
        mean_square = add(wide.square() * share, dims) / total
    y = wide * torch.rsqrt(mean_square + eps.abs())
    y = y if weight is None else y * weight.to(y.dtype)
    y = y if bias is None else y + bias.to(y.dtype)
    if valid is not None:
        y = torch.where(valid, y, torch.zeros_like(y))
    return y.to(x.dtype)


class TLU(nn.Module):
    """The larger of a value and its channel's learned threshold: max(x, threshold).

    Args:
        num_features: Number of channels C.
        device: Device of the threshold.
        dtype: Its dtype.

    Raises:
        ShapeError: In forward, another number of channels.

    Example:
        >>> TLU(2)(torch.tensor([[-1.0, 2.0]]))
        tensor([[0., 2.]], grad_fn=<MaximumBackward0>)

    References:
        Singh & Krishnan, CVPR 2020: the thresholded linear unit.
    """

    def __init__(
        self, num_features: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        start = torch.zeros(num_features, device=device, dtype=dtype)
        self.threshold = nn.Parameter(start)

    def reset_parameters(self) -> None:
        """Reset the threshold to 0: a relu."""
        nn.init.zeros_(self.threshold)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Cut `input`, shape `(N, C, *)`, from below."""
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ShapeError(
                f"TLU needs an input of shape (N, {self.num_features}, *), got "
                f"{tuple(input.shape)}"
            )
        shape = (1, self.num_features) + (1,) * (input.dim() - 2)
        return torch.maximum(input, self.threshold.view(shape).to(input.dtype))

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return str(self.num_features)

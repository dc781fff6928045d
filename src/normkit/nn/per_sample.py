"""Layer, RMS and group norm: statistics per sample, without state or modes."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from normkit.errors import ArgumentError, ShapeError
from normkit.functional import group_norm, layer_norm, rms_norm
from normkit.functional.remembered import run_remembered
from normkit.masks import broadcast_mask
from normkit.nn.parameters import learned
from normkit.nn.tracing import is_recorded, is_recorded_as_torch, recorded_call
from normkit.torch_state import is_observed

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """Normalize over the last dimensions, separately at each position.

        y = (x − mean)/√(var + eps)·weight + bias

    Drop-in for `torch.nn.LayerNorm`: same arguments, same state, an instance of it.

    Args:
        normalized_shape: The sizes of the last dimensions, which share a statistic; an
            int for the last one alone.
        eps: Added to the variance, inside the root.
        elementwise_affine: Learn `weight` and `bias` of `normalized_shape`.
        bias: Learn a bias when `elementwise_affine`.
        device: Device of the parameters.
        dtype: Dtype of the parameters; float32 also serves half inputs.
        channel_dim: The dimension to normalize over, of size `normalized_shape`: 1 for
            the channels of `(N, C, H, W)`, each position by itself. Nothing is
            permuted or copied for it. -1 is torch's.

    Raises:
        ArgumentError: `channel_dim` with more than one size.
        ShapeError: In forward, an input that does not end in `normalized_shape`, or
            has another size along `channel_dim`.
        DtypeError: An input that is not floating point.

    Numerics:
        Statistics in float32 or better, whatever the input; a large common offset
        causes no cancellation.

    Example:
        >>> LayerNorm(3, elementwise_affine=False)(torch.tensor([[1e4, 2e4, 3e4]]))
        tensor([[-1.2247,  0.0000,  1.2247]])

        Over the channels of an image:

        >>> y = LayerNorm(3, channel_dim=1)(torch.randn(2, 3, 4, 4))
        >>> bool(y.mean(1).abs().max() < 1e-6)
        True

    References:
        Ba, Kiros & Hinton, "Layer Normalization", 2016.
    """

    channel_dim: int = -1

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        channel_dim: int = -1,
    ) -> None:
        super().__init__(
            *(normalized_shape, eps, elementwise_affine, bias),
            device=device,
            dtype=dtype,
        )
        if channel_dim == -1:
            return
        if len(self.normalized_shape) != 1:
            raise ArgumentError(
                f"LayerNorm with channel_dim={channel_dim} needs one size, got "
                f"normalized_shape={tuple(self.normalized_shape)}; leave channel_dim "
                "out to normalize over the last dimensions"
            )
        self.channel_dim = channel_dim

    @overload
    def forward(
        self, input: Tensor, *, mask: Tensor | None = None, residual: None = None
    ) -> Tensor: ...
    @overload
    def forward(
        self, input: Tensor, *, mask: Tensor | None = None, residual: Tensor
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        input: Tensor,  # noqa: A002
        *,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalize `input`, shape `(*, *normalized_shape)`.

        Args:
            input: Values, any floating dtype.
            mask: Which values count: bool or weights ≥ 0, broadcastable to `input`.
                The output is 0 elsewhere.
            residual: Added to `input` first, of its shape. Then the norm of the sum and
                the sum are returned, as the next sub-layer of a transformer block
                takes them: `h, x = norm(x, residual=branch)`.
        """
        if residual is None and self.channel_dim == -1 and not is_observed():
            sizes, (weight, bias) = self.normalized_shape, learned(self)
            operands = input, weight, bias, None, mask
            y = run_remembered(("layer_norm", sizes, self.eps), operands)
            if y is not None:
                return y
        if residual is not None:
            if self.channel_dim != -1 or is_recorded(input):
                total = input + residual
                return self.forward(total, mask=mask), total
            return layer_norm(
                *(input, self.normalized_shape, *learned(self), self.eps),
                mask=mask,
                residual=residual,
            )
        if is_recorded(input):
            if (node := recorded_call(self, input, mask=mask)) is not None:
                return node
            if is_recorded_as_torch(self, input, mask):
                return self._recorded(input)
        if self.channel_dim == -1:
            return self._over_last(input, mask)
        dim, sizes = self.channel_dim, self.normalized_shape
        is_there = -input.dim() <= dim < input.dim()
        if not is_there or input.shape[dim] != sizes[0]:
            raise ShapeError(
                f"LayerNorm needs an input with {sizes[0]} channels along "
                f"dim={dim}, got shape {tuple(input.shape)}"
            )
        if mask is not None:
            mask = broadcast_mask(mask, input).movedim(dim, -1)
        # A view: nothing is copied, and the output has the layout of the input.
        return self._over_last(input.movedim(dim, -1), mask).movedim(-1, dim)

    def extra_repr(self) -> str:
        """Return the arguments of torch's layer, and those that differ from it."""
        usual = super().extra_repr()
        last = self.channel_dim == -1
        return usual if last else f"{usual}, channel_dim={self.channel_dim}"

    def _over_last(self, input: Tensor, mask: Tensor | None) -> Tensor:  # noqa: A002
        weight, bias = learned(self)
        return layer_norm(
            *(input, self.normalized_shape, weight, bias, self.eps),
            mask=mask,
            lies_as_input=self.channel_dim != -1,
        )

    def _recorded(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.channel_dim == -1:
            return super().forward(input)
        return (
            super()
            .forward(input.movedim(self.channel_dim, -1))
            .movedim(-1, self.channel_dim)
        )


class RMSNorm(torch.nn.RMSNorm):
    """Divide by the root mean square over the last dimensions.

        y = x/√(mean(x²) + eps)·weight

    Drop-in for `torch.nn.RMSNorm`: same arguments, same state, an instance of it.

    Args:
        normalized_shape: The sizes of the last dimensions, which share a statistic; an
            int for the last one alone.
        eps: Added to the mean square, inside the root; None takes the machine epsilon
            of float32 (float64 for float64 inputs).
        elementwise_affine: Learn `weight` of `normalized_shape`.
        device: Device of the parameter.
        dtype: Dtype of the parameter; float32 also serves half inputs.

    Raises:
        ShapeError: In forward, an input that does not end in `normalized_shape`.
        DtypeError: An input that is not floating point.

    Example:
        >>> RMSNorm(2, elementwise_affine=False)(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 1.1314]])

    References:
        Zhang & Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
    """

    @overload
    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, residual: None = None
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, residual: Tensor
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scale `x`, shape `(*, *normalized_shape)`.

        Args:
            x: Values, any floating dtype.
            mask: Which values count: bool or weights ≥ 0, broadcastable to `x`. The
                output is 0 elsewhere.
            residual: Added to `x` first, of its shape; then the scaled sum and the sum
                are returned, see `LayerNorm`.
        """
        if residual is None and not is_observed():
            options = "rms_norm", self.normalized_shape, self.eps
            y = run_remembered(options, (x, learned(self)[0], None, None, mask))
            if y is not None:
                return y
        if residual is not None:
            if is_recorded(x):
                total = x + residual
                return self.forward(total, mask=mask), total
            return rms_norm(
                *(x, self.normalized_shape, learned(self)[0], self.eps),
                mask=mask,
                residual=residual,
            )
        if is_recorded(x):
            if (node := recorded_call(self, x, mask=mask)) is not None:
                return node
            if is_recorded_as_torch(self, x, mask):
                return super().forward(x)
        weight, _ = learned(self)
        return rms_norm(x, self.normalized_shape, weight, self.eps, mask=mask)


class GroupNorm(torch.nn.GroupNorm):
    """Normalize each group of channels of each sample over channels and positions.

        y = (x − mean)/√(var + eps)·weight + bias

    Drop-in for `torch.nn.GroupNorm`: same arguments, same state, an instance of it.

    Args:
        num_groups: Number of groups, a divisor of `num_channels`.
        num_channels: Number of channels C.
        eps: Added to the variance, inside the root.
        affine: Learn `weight` and `bias` per channel, shape `(C,)`.
        device: Device of the parameters.
        dtype: Dtype of the parameters; float32 also serves half inputs.
        bias: Learn a bias when `affine`.

    Raises:
        ArgumentError: `num_groups` below 1, at construction; in forward, one value per
            group.
        ValueError: `num_groups` does not divide `num_channels`.
        ShapeError: In forward, an input of another number of channels or of fewer than
            2 dimensions.
        DtypeError: An input that is not floating point.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0], [100.0], [300.0]]])
        >>> GroupNorm(2, 4, affine=False)(x).flatten()
        tensor([-1.0000,  1.0000, -1.0000,  1.0000])

    References:
        Wu & He, "Group Normalization", ECCV 2018.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        if num_groups < 1:
            raise ArgumentError(
                f"GroupNorm needs at least one group, got num_groups={num_groups}; "
                f"use a divisor of num_channels={num_channels}"
            )
        super().__init__(
            *(num_groups, num_channels, eps, affine), device=device, dtype=dtype
        )
        # Older torch has no `bias` argument, so it is removed afterwards.
        if not bias:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Reset weight to 1 and bias to 0."""
        if self.affine:
            torch.nn.init.ones_(self.weight)
            if self.bias is not None:
                torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize `input`, shape `(N, C, *)`.

        Args:
            input: Values, any floating dtype.
            mask: Which values count: bool or weights ≥ 0, broadcastable to `input`.
                The output is 0 elsewhere.
        """
        weight, bias = learned(self)
        if not is_observed():
            options = "group_norm", self.num_groups, self.eps
            y = run_remembered(options, (input, weight, bias, None, mask))
            if y is not None:
                return y
        if is_recorded(input):
            if (node := recorded_call(self, input, mask=mask)) is not None:
                return node
            if is_recorded_as_torch(self, input, mask):
                return super().forward(input)
        return group_norm(input, self.num_groups, weight, bias, self.eps, mask=mask)

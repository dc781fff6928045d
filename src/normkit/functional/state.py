"""Batch norm as a pure function of its input and its running statistics.

    y, state = batch_norm_with_state(x, state, weight, bias)

Nothing is changed in place, so that vmap, grad, jacrev, jvp and torch.compile see an
ordinary function; several models' states stack into one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normkit.errors import ArgumentError, ShapeError
from normkit.functional.arguments import check_eps, check_floating, check_length
from normkit.functional.batch_norms import batch_norm
from normkit.functional.ema import ema
from normkit.functional.engine import normalize
from normkit.moments import Moments

__all__ = ["BatchNormState", "batch_norm_with_state", "init_state"]


class BatchNormState(NamedTuple):
    """Running statistics as a value; a tuple, and so a tree of tensors to torch.func.

    Attributes:
        mean: Running mean, shape `(C,)`.
        var: Running unbiased variance, shape `(C,)`, as in torch.
        batches: Number of batches that entered them, int64 scalar.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor


def init_state(
    num_features: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> BatchNormState:
    """Return the state before any batch: mean 0, variance 1, no batch.

    Args:
        num_features: Number of channels C.
        dtype: Dtype of mean and variance; float32 also serves half inputs.
        device: Device of mean and variance.
    """
    return BatchNormState(
        torch.zeros(num_features, dtype=dtype, device=device),
        torch.ones(num_features, dtype=dtype, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )


def batch_norm_with_state(
    input: Tensor,  # noqa: A002  torch.nn.functional's name
    state: BatchNormState,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | Tensor | None = 0.1,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    channel_dim: int = 1,
    on_nonfinite: str = "skip",
) -> tuple[Tensor, BatchNormState]:
    """Normalize each channel, and return the statistics after this batch.

        y = (x − mean)/√(var + eps)·weight + bias

    Args:
        input: Values, shape `(N, C, *)`, any floating dtype.
        state: Running statistics; from `init_state`, or from the last call.
        weight: Factor per channel, shape `(C,)`.
        bias: Summand per channel, shape `(C,)`.
        training: Normalize by the batch and update the statistics; otherwise
            normalize by `state` and return it unchanged.
        momentum: Share of the batch in the new statistics; None gives every batch the
            same share.
        eps: Added to the variance, inside the root.
        mask: Which values count, bool or weights, broadcastable to `input`; outputs
            are 0 elsewhere.
        channel_dim: The dimension that channels lie along.
        on_nonfinite: `"skip"` keeps a batch with a NaN or Inf out of the statistics
            and of the count; `"update"` lets it in, as torch does.

    Returns:
        The normalized values, of the shape, dtype and layout of `input`, and the new
        state. No gradient flows through the state, as in torch.

    Raises:
        ArgumentError: One value per channel in training, an eps that is not finite
            and positive, another `on_nonfinite`.
        ShapeError: A vector that does not have C elements.
        DtypeError: `input` is not floating point.

    Numerics:
        As `normkit.functional.batch_norm`.

    Example:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> y, state = batch_norm_with_state(x, init_state(2))
        >>> state.mean, state.var, int(state.batches)
        (tensor([0.2000, 2.0000]), tensor([ 1.1000, 20.9000]), 1)

        Three models at once, each with its own statistics:

        >>> states = torch.vmap(lambda _: init_state(2))(torch.arange(3))
        >>> y, states = torch.vmap(batch_norm_with_state)(torch.randn(3, 8, 2), states)
        >>> states.mean.shape
        torch.Size([3, 2])

    References:
        Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", ICML 2015.
    """
    options = {"eps": eps, "mask": mask, "channel_dim": channel_dim}
    if not training:
        y = batch_norm(input, state.mean, state.var, weight, bias, **options)
        return y, state
    if on_nonfinite not in ("skip", "update"):
        raise ArgumentError(f"on_nonfinite={on_nonfinite!r} must be 'skip' or 'update'")
    check_floating(input, "batch_norm_with_state")
    check_eps(eps, "batch_norm_with_state", "positive")
    if not -input.dim() <= channel_dim < input.dim():
        raise ShapeError(
            "batch_norm_with_state needs an input of shape (N, C, *), got "
            f"{tuple(input.shape)}, which has no dimension {channel_dim} for channels "
            "to lie along"
        )
    dim = channel_dim % input.dim()
    channels = input.shape[dim]
    check_length("state.mean", state.mean, channels)
    check_length("state.var", state.var, channels)
    check_length("weight", weight, channels)
    check_length("bias", bias, channels)
    if channels and input.numel() == channels:
        raise ArgumentError(
            "batch_norm_with_state needs more than one value per channel to train, "
            f"got shape {tuple(input.shape)}; use training=False or a larger batch"
        )
    shape = [1] * input.dim()
    shape[dim] = channels
    y, measured = normalize(
        input,
        tuple(d for d in range(input.dim()) if d != dim),
        None if weight is None else weight.view(shape),
        None if bias is None else bias.view(shape),
        eps,
        mask=mask,
    )
    return y, _moved(state, measured, momentum, on_nonfinite == "skip")


def _moved(
    state: BatchNormState,
    batch: Moments,
    momentum: float | Tensor | None,
    skips_nonfinite: bool,
) -> BatchNormState:
    mean, var = batch.mean.flatten(), batch.unbiased_var.flatten()
    filled = batch.count.expand(batch.mean.shape).flatten()
    allowed = torch.ones_like(filled[:1], dtype=torch.bool).all()
    if skips_nonfinite:
        allowed = batch.mean.isfinite().all() & batch.m2.isfinite().all()
    counted = (allowed & (filled > 0).any()).to(state.batches.dtype)
    rate: float | Tensor = (
        (state.batches + 1).to(mean.dtype).reciprocal()
        if momentum is None
        else momentum
    )

    return BatchNormState(
        ema(state.mean, mean, rate, allowed & (filled > 0)).to(state.mean.dtype),
        ema(state.var, var, rate, allowed & (filled > 1)).to(state.var.dtype),
        state.batches + counted,
    )

"""Batch norm and instance norm: statistics per channel, over everything else."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normkit.errors import ArgumentError, ShapeError
from normkit.functional.arguments import (
    check_constants,
    check_eps,
    check_floating,
    check_length,
)
from normkit.functional.autograd import run
from normkit.functional.ema import check_buffers, check_update, update
from normkit.functional.engine import execute
from normkit.functional.layout import Copied
from normkit.functional.remembered import run_remembered
from normkit.functional.signature import find, signature
from normkit.kernels.epilogue import ACTIVATIONS, Epilogue
from normkit.kernels.spec import Running, Spec
from normkit.moments import Moments
from normkit.sync.groups import Ranks, is_group, process_group_of
from normkit.torch_state import is_in_backward, is_observed

__all__ = ["batch_norm", "instance_norm"]


def batch_norm(
    input: Tensor,  # noqa: A002  torch.nn.functional's name
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor | None = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    channel_dim: int = 1,
    on_nonfinite: str = "skip",
    num_batches_tracked: Tensor | None = None,
    num_batches_skipped: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """Normalize each channel over the batch and all positions.

        y = act((x − mean)/√(var + eps)·weight + bias + residual)

    with the mean and population variance of the batch when `training`, which also
    updates the running statistics, and with the running statistics otherwise.

    Args:
        input: Values, shape `(N, C, *)`, any floating dtype.
        running_mean: Running mean, shape `(C,)`; updated in place when training.
        running_var: Running unbiased variance, shape `(C,)`; likewise.
        weight: Factor per channel, shape `(C,)`; may be float32 under a half input.
        bias: Summand per channel, shape `(C,)`.
        training: Use the statistics of the batch.
        momentum: Share of the batch in the new running value, a float or a 0-d tensor
            (then nothing waits for the device); None gives every batch the same share.
            As in torch it is not checked; the layers require [0, 1].
        eps: Added to the variance, inside the root.
        mask: Which values count, bool or weights, broadcastable to `input`; outputs
            are 0 elsewhere.
        channel_dim: The dimension that channels lie along.
        on_nonfinite: `"skip"` keeps a batch with a NaN or Inf out of the running
            statistics; `"update"` lets it in, as torch does.
        num_batches_tracked: Int64 scalar; counts in place the batches that entered the
            running statistics. Required when `momentum` is None.
        num_batches_skipped: Int64 scalar; counts in place the batches that were kept
            out of them because of a NaN or Inf.
        activation: Applied last, in the same pass: `"none"`, `"relu"`, `"leaky_relu"`,
            `"silu"`, `"gelu"` (by erf), `"sigmoid"` or `"tanh"`.
        negative_slope: Slope of leaky_relu below 0.
        residual: Added before the activation, of the shape of `input`.
        process_group: The ranks that take their statistics together when `training`,
            as in `sync.merge_over`; each must call forward and backward, even without
            samples. None is this rank alone.

    Returns:
        The normalized values, shape and dtype of `input`, contiguous but where that is
        in channels_last, or lies as `channel_dim` says.

    Raises:
        ArgumentError: One value per channel in training without other ranks, a
            non-finite or negative eps (or 0 in training), one running statistic without
            the other, `momentum=None` without a counter, a process_group that names no
            group or one that this rank is not in.
        RanksError: The sums of all ranks did not arrive.
        ShapeError: A vector that does not have C elements; no running statistics
            when not training.
        DtypeError: `input` or a running statistic is not floating point; a counter is
            not int64.
        DerivativeError: A running statistic requires a gradient, or forward mode
            carries a derivative along it, and the output reads it.

    Numerics:
        Statistics in float32 or better around a pilot mean; the centre is kept as
        two numbers, so |mean| ≫ std loses nothing. Half inputs give half outputs.

    References:
        Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", ICML 2015.
    """
    running = None
    if running_mean is not None or running_var is not None:
        rate, batches, skipped = momentum, num_batches_tracked, num_batches_skipped
        if not training:
            rate = batches = skipped = None
        skips_nonfinite = on_nonfinite == "skip"
        running = Running(
            running_mean, running_var, rate, batches, skipped, skips_nonfinite
        )
    group = None
    if process_group is not None and training:
        group = process_group
        if type(group) is not Ranks:
            group = process_group_of(group) if is_group(group) else None
    key = None
    if (momentum is None or type(momentum) in (float, int)) and not is_observed():
        options = (
            *("batch_norm", channel_dim, training, eps, momentum, on_nonfinite),
            *(activation, negative_slope, group),
        )
        known = options, (input, weight, bias, residual, mask), running
        if (y := run_remembered(*known)) is not None:
            return y
        key = signature(*known)
    tensors = (
        *(input, running_mean, running_var, weight, bias, mask),
        *(num_batches_tracked, num_batches_skipped),
        residual,
    )
    if has_torch_function_variadic(*tensors):
        extras: dict[str, Any] = {
            "mask": mask,
            "channel_dim": channel_dim,
            "on_nonfinite": on_nonfinite,
            "num_batches_tracked": num_batches_tracked,
            "num_batches_skipped": num_batches_skipped,
            "activation": activation,
            "negative_slope": negative_slope,
            "residual": residual,
            "process_group": process_group,
        }
        return handle_torch_function(
            *(batch_norm, tensors, input, running_mean, running_var, weight, bias),
            **{"training": training, "momentum": momentum, "eps": eps, **extras},
        )
    check_floating(input, "batch_norm")
    if activation not in ACTIVATIONS:
        Epilogue(activation)  # raises
    if residual is not None and residual.shape != input.shape:
        raise ShapeError(
            f"residual of shape {tuple(residual.shape)} must have the shape of the "
            f"input, {tuple(input.shape)}; use expand()"
        )
    check_eps(eps, "batch_norm", "positive" if training else "non-negative")
    _check_pair(running_mean, running_var)
    if not -input.dim() <= channel_dim < input.dim():
        if not input.numel():
            return input.clone()  # torch takes shape (0,), too
        raise ShapeError(
            f"batch_norm needs an input of shape (N, C, *), got {tuple(input.shape)}, "
            f"which has no dimension {channel_dim} for channels to lie along"
        )
    dim = channel_dim % input.dim()
    channels = input.shape[dim]
    named = (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    )
    for name, vector in named:
        if vector is not None and vector.numel() != channels:
            check_length(name, vector, channels)
    shape = [channels if d == dim else 1 for d in range(input.dim())]
    if not training and (running_mean is None or running_var is None):
        raise ShapeError(
            "batch_norm needs running_mean and running_var when training=False, "
            "got None; pass them, or training=True"
        )
    if not training:
        check_constants("batch_norm", running_mean, running_var)
    dims = tuple(d for d in range(input.dim()) if d != dim)
    # Over ranks the count is that of all of them.
    if training and channels and input.numel() == channels and group is None:
        raise ArgumentError(
            "batch_norm needs more than one value per channel to train "
            f"(expected more than 1 value per channel when training), got shape "
            f"{tuple(input.shape)}; use training=False or a larger batch"
        )
    if training and running is not None:
        check_update(momentum, num_batches_tracked, on_nonfinite)
    check_buffers(running_mean, running_var, num_batches_tracked, num_batches_skipped)
    spec = Spec(
        *(dims, eps),
        given=not training,
        activation=activation,
        slope=negative_slope,
        group=group,
        vector=tuple(shape),
    )
    operands = input, weight, bias, residual, mask
    return execute(spec, operands, running, key=key, lies_as_input=dim != 1)


def instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float | Tensor | None = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    lies_as_input: bool = False,
) -> Tensor:
    """Normalize each channel of each sample over its positions.

    Args:
        input: Values, shape `(N, C, *)` with at least one `*`, any floating dtype.
        running_mean: Shape `(C,)`; updated by the mean over samples of the
            instance means.
        running_var: Shape `(C,)`; by the mean of the unbiased instance variances.
        weight: Factor per channel, shape `(C,)`.
        bias: Summand per channel, shape `(C,)`.
        use_input_stats: Use the statistics of the input; False uses the running ones.
        momentum: Share of the batch in the new running value; None gives every batch
            the same share.
        eps: Added to the variance, inside the root.
        mask: Which values count, broadcastable to `input`; outputs are 0 elsewhere.
        num_batches_tracked: Int64 scalar; counts in place the batches that entered the
            running statistics. Required when `momentum` is None.
        lies_as_input: Give the output the strides of `input` whatever they are, so
            that nothing is copied.

    Returns:
        The normalized values, shape and dtype of `input`, contiguous but where that is
        in channels_last.

    Raises:
        ArgumentError: One position per channel when its statistics are asked for.
        ShapeError: A vector that does not have C elements, or no running statistics
            when `use_input_stats=False`.
        DtypeError: `input` or a running statistic is not floating point; the counter
            is not int64.
        DerivativeError: A running statistic requires a gradient, or forward mode
            carries a derivative along it, and the output reads it.

    References:
        Ulyanov, Vedaldi & Lempitsky, "Instance Normalization: The Missing Ingredient
        for Fast Stylization", 2016.
    """
    found: list[Moments] | None = None if running_mean is None else []
    key = None
    if (
        use_input_stats
        and (momentum is None or type(momentum) in (float, int))
        and not is_observed()
    ):
        averages = None
        if running_mean is not None or running_var is not None:
            averages = Running(running_mean, running_var, None, num_batches_tracked)
        operands = input, weight, bias, None, mask
        key = signature(("instance_norm", eps, lies_as_input), operands, averages)
    call = find(key)
    if call is not None:
        x = input
        if type(call) is Copied:
            x, call = x.contiguous(), call.call
        y = run(call, x, weight, bias, None, mask, None, found)
        if found:
            _update_by_instances(
                *(running_mean, running_var, found[0], momentum, num_batches_tracked)
            )
        return y
    tensors = (input, running_mean, running_var, weight, bias, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            *(instance_norm, tensors, input, running_mean, running_var, weight, bias),
            use_input_stats=use_input_stats,
            momentum=momentum,
            eps=eps,
            mask=mask,
            num_batches_tracked=num_batches_tracked,
            lies_as_input=lies_as_input,
        )
    check_floating(input, "instance_norm")
    check_eps(eps, "instance_norm", "finite")
    if use_input_stats and input.shape[2:].numel() == 1:
        raise ArgumentError(
            "instance_norm needs more than one position per channel (expected more "
            "than 1 spatial element when training), got shape "
            f"{tuple(input.shape)}; its output would be 0 everywhere"
        )
    if not use_input_stats and (running_mean is None or running_var is None):
        raise ShapeError(
            "instance_norm needs running_mean and running_var to be defined when "
            "use_input_stats=False, got None"
        )
    _check_pair(running_mean, running_var)
    if not use_input_stats:
        return batch_norm(
            *(input, running_mean, running_var, weight, bias, False, momentum, eps),
            mask=mask,
        )
    channels = input.shape[1]
    named = (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    )
    for name, vector in named:
        check_length(name, vector, channels)
    check_buffers(running_mean, running_var, num_batches_tracked)
    spec = Spec(
        tuple(range(2, input.dim())),
        eps,
        vector=(1, channels) + (1,) * (input.dim() - 2),
    )
    operands = input, weight, bias, None, mask
    y = execute(spec, operands, found=found, key=key, lies_as_input=lies_as_input)
    if found and input.shape[0]:
        _update_by_instances(
            *(running_mean, running_var, found[0], momentum, num_batches_tracked)
        )
    return y


def _update_by_instances(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    instances: Moments,
    momentum: float | Tensor | None,
    batches: Tensor | None,
) -> None:
    """Update the averages by the mean over samples of means and unbiased variances.

    As Moments of two values, whose unbiased variance is their m2. Samples without a
    valid position are left out. A forward that activation checkpointing repeats updates
    nothing a second time.
    """
    if is_in_backward():
        return
    count = instances.count.expand(instances.mean.shape)
    has_spread = count > 1
    # A NaN that is the only valid value of its sample keeps the batch out, too.
    is_bad = ~instances.mean.isfinite() & (count > 0)
    used = has_spread.sum(0).clamp(min=1)
    zero = instances.mean.new_zeros(())
    mean = instances.mean.where(has_spread | is_bad, zero).sum(0) / used
    var = instances.unbiased_var.where(has_spread, zero).sum(0) / used
    over_samples = Moments(has_spread.any(0).long() * 2, mean, var)
    update(Running(running_mean, running_var, momentum, batches), over_samples)


def _check_pair(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    if (running_mean is None) != (running_var is None):
        raise ArgumentError(
            "running_mean and running_var must either both be None or neither be "
            "None; one running statistic is of no use without the other"
        )

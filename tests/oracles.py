"""Definitions in float64, straight from the papers. Imports nothing of normkit.

Everything here is slow, plain and differentiable by torch's own autograd, so that a
hand-derived backward has something independent to agree with.
"""

import torch
from torch import Tensor


def statistics(
    x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and Σ(x − mean)² in float64, dims kept."""
    x = x.double()
    weight = torch.ones_like(x) if mask is None else mask.expand(x.shape).double()
    x = torch.where(weight > 0, x, torch.zeros_like(x))
    count = weight.sum(dims, keepdim=True)
    mean = (weight * x).sum(dims, keepdim=True) / count
    m2 = (weight * (x - mean) ** 2).sum(dims, keepdim=True)
    return count, mean, m2


def normalized(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """(x − mean)/√(var + eps)·weight + bias; 0 where the mask is."""
    count, mean, m2 = statistics(x, dims, mask)
    y = (x.double() - mean) / torch.sqrt(m2 / count + eps)
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    if mask is not None:
        y = torch.where(mask.expand(x.shape) > 0, y, torch.zeros_like(y))
    return y


def rms_normalized(
    x: Tensor, dims: tuple[int, ...], weight: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """x/√(mean(x²) + eps)·weight."""
    x = x.double()
    y = x / torch.sqrt((x * x).mean(dims, keepdim=True) + eps)
    return y if weight is None else y * weight.double()


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """Ioffe & Szegedy 2015, algorithm 1, over dimension 1."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    dims = tuple(d for d in range(x.dim()) if d != 1)
    gain = None if weight is None else weight.view(shape)
    offset = None if bias is None else bias.view(shape)
    return normalized(x, dims, gain, offset, eps, mask)


def layer_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """Ba, Kiros & Hinton 2016, over the last dimensions."""
    dims = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    return normalized(x, dims, weight, bias, eps, mask)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Wu & He 2018: group by group, sample by sample."""
    samples = []
    for sample in x.double().unbind(0):
        groups = []
        for group in sample.chunk(num_groups, 0):
            var, mean = torch.var_mean(group, correction=0)
            groups.append((group - mean) / torch.sqrt(var + eps))
        samples.append(torch.cat(groups, 0))
    y = torch.stack(samples) if samples else x.double()
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = y if weight is None else y * weight.double().view(shape)
    return y if bias is None else y + bias.double().view(shape)


def instance_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Ulyanov, Vedaldi & Lempitsky 2016: group norm with one channel a group."""
    return group_norm(x, x.shape[1], weight, bias, eps)


def rms_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Zhang & Sennrich 2019, over the last dimensions."""
    dims = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    return rms_normalized(x, dims, weight, eps)


def running_after(
    running_mean: Tensor, running_var: Tensor, batches: list[Tensor], momentum: float
) -> tuple[Tensor, Tensor]:
    """The running statistics of torch after training on batches of shape (N, C, *)."""
    mean, var = running_mean.double(), running_var.double()
    for batch in batches:
        channels = batch.double().transpose(0, 1).flatten(1)
        batch_var, batch_mean = torch.var_mean(channels, 1, correction=1)
        mean = (1 - momentum) * mean + momentum * batch_mean
        var = (1 - momentum) * var + momentum * batch_var
    return mean, var

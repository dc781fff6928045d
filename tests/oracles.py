"""Definitions in float64, straight from the papers. Imports nothing of normkit.

Everything here is slow, plain and differentiable by torch's own autograd, so that a
hand-derived backward has something independent to agree with.
"""

import torch
from torch import Tensor


def statistics(
    x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and Σ(x − mean)² in float64, dims kept; mean 0 of no values."""
    x = x.double()
    weight = torch.ones_like(x) if mask is None else mask.expand(x.shape).double()
    x = torch.where(weight > 0, x, torch.zeros_like(x))
    count = weight.sum(dims, keepdim=True)
    mean = (weight * x).sum(dims, keepdim=True) / _or_one(count)
    m2 = (weight * (x - mean) ** 2).sum(dims, keepdim=True)
    return count, mean, m2


def _or_one(count: Tensor) -> Tensor:
    """Of no values a sum is 0 and its gradient 0, where a division by 0 makes NaN."""
    return torch.where(count > 0, count, torch.ones_like(count))


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
    y = (x.double() - mean) / torch.sqrt(m2 / _or_one(count) + eps)
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


def batch_renorm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    r_max: float,
    d_max: float,
    eps: float = 1e-5,
) -> Tensor:
    """Ioffe 2017, algorithm 1, over dimension 1; r and d are constants."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    dims = tuple(d for d in range(x.dim()) if d != 1)
    count, mean, m2 = statistics(x, dims)
    sigma_batch = torch.sqrt(m2 / count + eps)
    sigma = torch.sqrt(running_var.double().view(shape) + eps)
    r = (sigma_batch / sigma).detach().clamp(1 / r_max, r_max)
    d = ((mean - running_mean.double().view(shape)) / sigma).detach()
    y = (x.double() - mean) / sigma_batch * r + d.clamp(-d_max, d_max)
    return y * weight.double().view(shape) + bias.double().view(shape)


def whitened(
    x: Tensor, num_groups: int = 1, eps: float = 1e-5, iterations: int | None = None
) -> Tensor:
    """Huang et al. 2018, by eigh; with `iterations`, Huang et al. 2019, by Newton."""
    columns = x.double().transpose(0, 1).flatten(1)
    parts = []
    for group in columns.chunk(num_groups):
        centred = group - group.mean(1, keepdim=True)
        unit = torch.eye(len(group), dtype=torch.float64)
        sigma = centred @ centred.T / centred.shape[1] + eps * unit
        if iterations is None:
            values, vectors = torch.linalg.eigh(sigma)
            root = vectors @ torch.diag(values**-0.5) @ vectors.T
        else:
            root, trace = unit, sigma.trace()
            for _ in range(iterations):
                cube = torch.linalg.matrix_power(root, 3)
                root = 0.5 * (3 * root - cube @ (sigma / trace))
            root = root / trace.sqrt()
        parts.append(root @ centred)
    turned = x.transpose(0, 1)
    return torch.cat(parts).view(turned.shape).transpose(0, 1)


def filter_response(
    x: Tensor, weight: Tensor, bias: Tensor, eps: Tensor | float
) -> Tensor:
    """Singh & Krishnan 2020, over the positions of (N, C, *)."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    dims = tuple(range(2, x.dim()))
    small = abs(eps) if isinstance(eps, float) else eps.double().abs()
    y = x.double() / torch.sqrt((x.double() ** 2).mean(dims, keepdim=True) + small)
    return y * weight.double().view(shape) + bias.double().view(shape)


def batch_norm_lstm(
    x: Tensor,
    weights: dict[str, Tensor],
    lengths: list[int],
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cooijmans et al. 2017, one layer of (T, N, C), sequence by sequence.

    `weights`: ih, hh, bias, gamma_ih, gamma_hh, gamma_cell, beta_cell.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    size = w["hh"].shape[1]
    h = [torch.zeros(size, dtype=torch.float64) for _ in lengths]
    c = list(h)
    y = torch.zeros(*x.shape[:2], size, dtype=torch.float64)

    def norm(rows: list[Tensor], gamma: Tensor) -> list[Tensor]:
        stacked = torch.stack(rows)
        mean = stacked.mean(0)
        var = ((stacked - mean) ** 2).mean(0)
        return list((stacked - mean) / torch.sqrt(var + eps) * gamma)

    outputs = []
    for t in range(x.shape[0]):
        alive = [n for n, length in enumerate(lengths) if t < length]
        if not alive:
            break
        drive = norm([w["ih"] @ x[t, n].double() for n in alive], w["gamma_ih"])
        term = norm([w["hh"] @ h[n] for n in alive], w["gamma_hh"])
        exits = []
        for k, n in enumerate(alive):
            i, f, g, o = (drive[k] + term[k] + w["bias"]).chunk(4)
            c[n] = torch.sigmoid(f) * c[n] + torch.sigmoid(i) * torch.tanh(g)
            exits.append(torch.sigmoid(o))
        cells = norm([c[n] for n in alive], w["gamma_cell"])
        for k, n in enumerate(alive):
            h[n] = exits[k] * torch.tanh(cells[k] + w["beta_cell"])
            outputs.append((t, n, h[n]))
    for t, n, value in outputs:
        y = y.index_put((torch.tensor(t), torch.tensor(n)), value)
    return y, torch.stack(h), torch.stack(c)

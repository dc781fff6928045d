"""Definitions of the layers in float64 and torch's own autograd.

Imports nothing of normkit. Besides each value it returns the size of the terms that the
value is a sum of: what a rounding error has to be compared with.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fuzz.cases import LayerCase

ACTIVATE = {
    "none": lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.01),
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@dataclass
class State:
    """Running statistics: what the layer should hold."""

    mean: Tensor
    var: Tensor
    batches: int = 0
    skipped: int = 0


@dataclass
class Truth:
    """Output and gradients in float64, and the size of their terms."""

    y: Tensor
    size_y: float
    grads: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, Tensor | float] = field(default_factory=dict)
    # The largest |x|/std: what float64 itself loses.
    ratio: float = 0.0
    # Where a kink of the activation is nearer than rounding: no gradient is right.
    is_ambiguous: bool = False


def parts(case: LayerCase) -> list[slice]:
    """The ghost batches of a batch norm; otherwise the whole."""
    n = case.shape[0]
    if not case.ghost_size or not case.uses_batch:
        return [slice(None)]
    ghosts = max(1, n // case.ghost_size)
    ends = torch.tensor([n // ghosts + (k < n % ghosts) for k in range(ghosts)])
    ends = ends.cumsum(0).tolist()
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def dims(case: LayerCase) -> tuple[int, ...]:
    """The dimensions that share a statistic."""
    every = range(len(case.shape))
    if case.trailing > 1:
        return tuple(every)[-case.trailing :]
    if case.kind in ("LayerNorm", "RMSNorm"):
        return (case.channel,)
    if case.kind == "PerActivationBatchNorm":
        return (0,)
    if case.kind == "GroupNorm":
        return tuple(range(2, len(case.shape) + 1))  # of `grouped`
    first = 1 if case.kind in ("InstanceNorm", "FilterResponseNorm") else 0
    return tuple(d for d in every if d >= first and d != case.channel)


def grouped(case: LayerCase, x: Tensor) -> Tensor:
    """The channels of group norm as two dimensions: groups, and channels of one."""
    return x.unflatten(1, (case.groups, -1)) if case.kind == "GroupNorm" else x


def as_vector(case: LayerCase, v: Tensor) -> Tensor:
    """A weight or bias, broadcastable to the input."""
    if case.kind == "PerActivationBatchNorm":
        return v.unsqueeze(0)
    if case.trailing > 1:
        return v  # broadcasts from the end
    return v.view([-1 if d == case.channel else 1 for d in range(len(case.shape))])


def moments(
    x: Tensor, share: Tensor, over: tuple[int, ...], centered: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and Σ share·(x − mean)², dims kept; 0 where nothing counts."""
    count = share.sum(over, keepdim=True)
    n = count.where(count > 0, torch.ones_like(count))
    # Around one of the values: the sum of equal numbers drifts.
    first = x
    for d in over:
        first = first.narrow(d, 0, 1) if first.shape[d] else first
    first = first.detach() if all(x.shape) else torch.zeros_like(n)
    mean = first + (share * (x - first)).sum(over, keepdim=True) / n
    mean = mean if centered else torch.zeros_like(mean)
    return count, mean, (share * (x - mean).square()).sum(over, keepdim=True)


def standardized(
    case: LayerCase, x: Tensor, share: Tensor, state: State
) -> tuple[Tensor, Tensor]:
    """The standardized values, and inv_std broadcast to them."""
    if not case.uses_batch:
        mean, var = as_vector(case, state.mean), as_vector(case, state.var)
        inv = torch.rsqrt(var + case.eps).expand(x.shape)
        return (x - mean) * inv, inv
    centered = case.kind not in ("RMSNorm", "FilterResponseNorm")
    found, scales = [], []
    for part in parts(case):
        values, counts = grouped(case, x[part]), grouped(case, share[part])
        count, mean, m2 = moments(values, counts, dims(case), centered)
        inv = torch.rsqrt(m2 / count.clamp(min=1e-300) + case.eps)
        found.append(((values - mean) * inv).reshape(x[part].shape))
        scales.append(inv.expand(values.shape).reshape(x[part].shape))
    return torch.cat(found), torch.cat(scales)


def small_batch(
    case: LayerCase, x: Tensor, hat: Tensor, share: Tensor, state: State
) -> Tensor:
    """Replace the channels with one value by what `on_small_batch` says."""
    if case.on_small_batch not in ("running", "renorm") or not case.uses_batch:
        return hat
    if not case.tracks:
        return hat
    mean, var = as_vector(case, state.mean), as_vector(case, state.var)
    other = (x - mean) * torch.rsqrt(var + case.eps)
    if case.on_small_batch == "renorm":
        other = other.detach().clamp(-5, 5)
    return torch.where(share.sum(dims(case), keepdim=True) > 1, hat, other)


def truth(
    case: LayerCase,
    x: Tensor,
    vectors: dict[str, Tensor],
    residual: Tensor | None,
    mask: Tensor | None,
    state: State,
    dy: Tensor,
) -> Truth:
    """Output of the layer, and the gradients of Σ dy·y."""
    sums_first = case.kind in ("LayerNorm", "RMSNorm")
    wide = {"x": x, **vectors}
    if residual is not None and not sums_first:
        wide["residual"] = residual
    leaves = {k: v.detach().double().requires_grad_() for k, v in wide.items()}
    share = torch.ones_like(leaves["x"]) if mask is None else mask.double()
    share = share.detach().expand(x.shape)
    values = leaves["x"].where(share > 0, torch.zeros_like(leaves["x"]))
    hat, inv = standardized(case, values, share, state)
    hat = small_batch(case, values, hat, share, state)
    z = hat
    # Of a constant, x − mean is a rounding and not 0. The formula in float32 has the
    # mean as hi + lo: hi errs by an eps of the mean, and lo by roundings of that error.
    ratio = most((values * inv).detach().abs())
    hats = hat.detach().abs()
    hats = hats.clamp(min=max(1 / 64, ratio * torch.finfo(torch.float32).eps))
    size = hats
    gain = torch.ones((), dtype=torch.float64)
    if "weight" in leaves:
        gain = as_vector(case, leaves["weight"])
        z, size = z * gain, size * gain.detach().abs()
    if "bias" in leaves:
        offset = as_vector(case, leaves["bias"])
        z, size = z + offset, size + offset.detach().abs()
    if "residual" in leaves:
        z, size = z + leaves["residual"], size + leaves["residual"].detach().abs()
    y = ACTIVATE[case.activation](z)
    y = y.where(share > 0, torch.zeros_like(y))
    # The output itself is rounded, too: sigmoid(0) is 0.5.
    found = Truth(y.detach(), max(most(size), most(y.detach().abs())))
    found.ratio = ratio
    upstream = dy.detach().double().where(share > 0, torch.zeros_like(y))
    names = list(leaves)
    grads = torch.autograd.grad(
        y, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True
    )
    found.grads = dict(zip(names, grads, strict=True))
    # An error of z by a rounding of its size moves a smooth slope by as much.
    bend = max(1.0, found.size_y) if case.activation != "none" else 1.0
    pull = upstream.abs() * bend
    spread = most((inv * gain).detach().abs())
    # A mean errs by some roundings of its spread, which x̂ has wherever it is small.
    hats = hats.clamp(min=1 / 4)
    # Any sum of n values in float64 errs by n roundings, which x̂ has in units of its
    # spread; kept bytes move x̂ by a part of the largest one of its statistic.
    reach = torch.full_like(hats, most(hats)) if case.keeps_bytes else hats
    n = grouped(case, share).sum(dims(case)).max() if share.numel() else 0
    roundings = n * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    reach = reach + roundings * found.ratio / 16
    found.sizes = {
        "x": spread * most(pull) * max(1.0, most(hats)),
        "residual": most(pull),
        "weight": summed(case, pull * reach, vectors.get("weight")),
        "bias": summed(case, pull, vectors.get("bias")),
    }
    if case.activation in ("relu", "leaky_relu") and z.numel():
        live = z.detach().abs()[share > 0]
        # Twice the bound of y: within it either side of the kink is right.
        eps = torch.finfo(torch.float32).eps
        found.is_ambiguous = bool((live < 16 * eps * found.size_y).any())
    return found


def moved(case: LayerCase, state: State, x: Tensor, mask: Tensor | None) -> State:
    """The running statistics after a batch."""
    if not case.updates:
        return state
    x = x.detach().double()
    share = torch.ones_like(x) if mask is None else mask.double().expand(x.shape)
    x = x.where(share > 0, torch.zeros_like(x))
    count, mean, m2 = moments(x, share, dims(case))
    is_finite = bool(mean.isfinite().all() and m2.isfinite().all())
    divisor = count if case.estimator == "biased" else (count - 1)
    var = m2 / divisor.where(count > 1, torch.ones_like(count))
    if case.kind == "InstanceNorm":
        spread = (count > 1).double()
        used = spread.sum(0, keepdim=True).clamp(min=1)
        mean = torch.where(spread > 0, mean, 0).sum(0, keepdim=True) / used
        var = torch.where(spread > 0, var, 0).sum(0, keepdim=True) / used
        count = 2 * spread.amax(0, keepdim=True) if len(spread) else 0 * used
    counts = case.kind != "InstanceNorm" or case.momentum is None
    if not is_finite:
        return State(state.mean, state.var, state.batches, state.skipped + 1)
    if case.on_small_batch in ("running", "skip"):
        count = count.where(count > 1, torch.zeros_like(count))
    rate = case.momentum
    if rate is None:
        rate = 1 / (state.batches + 1)
    elif case.debias and rate:
        rate = min(1.0, rate / (1 - (1 - rate) ** (state.batches + 1)))
    shape = state.mean.shape
    count, mean, var = (t.reshape(shape) for t in (count, mean, var))
    return State(
        torch.where(count > 0, (1 - rate) * state.mean + rate * mean, state.mean),
        torch.where(count > 1, (1 - rate) * state.var + rate * var, state.var),
        state.batches + int(counts and bool((count > 0).any())),
        state.skipped,
    )


def most(t: Tensor) -> float:
    """The largest finite value; 0 of none."""
    t = t[t.isfinite()]
    return float(t.max()) if t.numel() else 0.0


def summed(case: LayerCase, terms: Tensor, vector: Tensor | None) -> Tensor | float:
    if vector is None:
        return 0.0
    if case.kind == "PerActivationBatchNorm":
        return terms.sum(0)
    if case.trailing > 1:
        return terms.flatten(0, -case.trailing - 1).sum(0)
    return terms.sum([d for d in range(terms.dim()) if d != case.channel])

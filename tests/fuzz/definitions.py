"""Layers and functions beside their definitions: tensors, ours, the truth."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import normkit
import oracles
from fuzz.cases import OF_STATISTICS, OtherCase
from fuzz.tensors import DTYPES

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensor]


def _vectors(case: OtherCase, *names: str) -> Tensors:
    g = torch.Generator().manual_seed(case.seed + 1)
    return {name: torch.randn(case.channels, generator=g) for name in names}


def _load(layer: Any, given: Tensors) -> None:
    """Put the tensors in the place of the layer's parameters, as they are."""
    for name, tensor in given.items():
        if name in layer._parameters:
            del layer._parameters[name]
            layer.__dict__[name] = tensor


def _statistics(case: OtherCase) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(case.seed + 2)
    draw = torch.rand(2, case.channels, generator=g)
    return draw[0] - 0.5, draw[1] + 0.5


def _by_statistics(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, var = (v.double().view(shape) for v in (mean, var))
    return (x - mean) * torch.rsqrt(var + eps)


def _affine(y: Tensor, given: Tensors) -> Tensor:
    shape = [1, -1] + [1] * (y.dim() - 2)
    return y * given["weight"].view(shape) + given["bias"].view(shape)


Made = tuple[Tensors, Function, Function]


def _renorm(case: OtherCase) -> Made:
    rank = {2: 1, 3: 1, 4: 2, 5: 3}[len(case.shape)]
    cls: Any = getattr(normkit.nn, f"BatchRenorm{rank}d")
    r_max, d_max = [(3.0, 5.0), (1.0, 0.0), (1.2, 0.3)][case.option % 3]
    mean, var = _statistics(case)

    def ours(given: Tensors) -> Tensor:
        layer = cls(
            *(case.channels, case.eps),
            r_max=r_max,
            d_max=d_max,
            renorm_from=0,
            d_max_at=0,
            r_max_at=0,
        )
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
        _load(layer.train(case.training), given)
        return layer(given["x"])

    def truth(given: Tensors) -> Tensor:
        if not case.training:
            return _affine(_by_statistics(given["x"], mean, var, case.eps), given)
        return oracles.batch_renorm(
            *(given["x"], mean, var, given["weight"], given["bias"]),
            *(r_max, d_max, case.eps),
        )

    return _vectors(case, "weight", "bias"), ours, truth


def _whitening(case: OtherCase) -> Made:
    groups = [1, 2, 4][case.option % 3]
    steps = None if case.option % 2 else 3
    eps = max(case.eps, 1e-2)  # of an ill-conditioned covariance nothing can be asked

    def ours(given: Tensors) -> Tensor:
        method = {} if steps is None else {"method": "newton", "iterations": steps}
        layer: Any = normkit.nn.WhiteningBatchNorm(case.channels, groups, eps, **method)
        _load(layer, given)
        return layer(given["x"])

    def truth(given: Tensors) -> Tensor:
        return _affine(oracles.whitened(given["x"], groups, eps, steps), given)

    return _vectors(case, "weight", "bias"), ours, truth


def _recurrent(case: OtherCase) -> Made:
    """(T, N, C) is made of (N, C, T)."""
    g = torch.Generator().manual_seed(case.seed + 5)
    lengths = torch.randint(2, 4, (case.samples,), generator=g)

    def mask(steps: int) -> Tensor | None:
        return torch.arange(steps).view(-1, 1, 1) < lengths.view(1, -1, 1)

    def ours(given: Tensors) -> Tensor:
        x = given["x"].flatten(2).permute(2, 0, 1)
        layer: Any = normkit.nn.RecurrentBatchNorm(case.channels, 2, case.eps)
        _load(layer, given)
        if case.masked:
            return layer(x, mask=mask(len(x)))
        if case.option % 2:
            return torch.stack([layer(one, step) for step, one in enumerate(x)])
        return layer(x)

    def truth(given: Tensors) -> Tensor:
        x = given["x"].flatten(2).permute(2, 0, 1)
        seen = mask(len(x)) if case.masked else None
        y = oracles.normalized(x, (1,), None, None, case.eps, seen)
        y = y * given["weight"] + given["bias"]
        return y if seen is None else y * seen

    return _vectors(case, "weight", "bias"), ours, truth


def _lstm(case: OtherCase) -> Made:
    c, h = case.channels, 3
    g = torch.Generator().manual_seed(case.seed + 1)
    shapes = {"weight_ih_l0": (4 * h, c), "weight_hh_l0": (4 * h, h)}
    shapes["bias_l0"] = (4 * h,)
    weights = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    lengths = torch.randint(1, 4, (case.samples,), generator=g)
    gamma = {"ih": (4 * h,), "hh": (4 * h,), "cell": (h,)}
    gains = {k: torch.rand(s, generator=g) + 0.1 for k, s in gamma.items()}
    beta = torch.randn(h, generator=g)

    def steps(x: Tensor) -> tuple[Tensor, list[int]]:
        x = x.flatten(2).permute(2, 0, 1)
        many = [min(int(n), len(x)) for n in lengths]
        return x, many if case.masked else [len(x)] * case.samples

    def ours(given: Tensors) -> Tensor:
        x, many = steps(given["x"])
        lstm: Any = normkit.nn.BatchNormLSTM(c, h, max_steps=3, eps=case.eps)
        lstm.to(x.dtype)
        for name, gain in gains.items():
            norm = getattr(lstm, f"norm_{name}_l0")
            norm.weight.data = gain.to(x.dtype)
        lstm.norm_cell_l0.bias.data = beta.to(x.dtype)
        _load(lstm, given)
        return lstm(x, lengths=torch.tensor(many) if case.masked else None)[0]

    def truth(given: Tensors) -> Tensor:
        x, many = steps(given["x"])
        dtype = DTYPES[case.dtype]
        w = {k: gains[k].to(dtype).double() for k in gains}
        named = {"ih": given["weight_ih_l0"], "hh": given["weight_hh_l0"]}
        named |= {"bias": given["bias_l0"], "beta_cell": beta.to(dtype).double()}
        named |= {f"gamma_{k}": v for k, v in w.items()}
        return oracles.batch_norm_lstm(x, named, many, case.eps)[0]

    return weights, ours, truth


def _domain(case: OtherCase) -> Made:
    rank = {2: 1, 3: 1, 4: 2, 5: 3}[len(case.shape)]
    cls: Any = getattr(normkit.nn, f"BatchNorm{rank}d")
    mean, var = _statistics(case)

    def ours(given: Tensors) -> Tensor:
        layer: Any = normkit.nn.DomainBatchNorm(
            cls(case.channels, case.eps), ("a", "b")
        )
        layer.norms["b"].running_mean.copy_(mean)
        layer.norms["b"].running_var.copy_(var)
        before = layer.norms["a"].running_mean.clone()
        for norm in layer.norms.values():
            _load(norm, given)
        y = layer.train(case.training)(given["x"], domain="b")
        assert torch.equal(layer.norms["a"].running_mean, before), "a moves with b"
        return y

    def truth(given: Tensors) -> Tensor:
        if case.training:
            y = oracles.batch_norm(given["x"], eps=case.eps)
        else:
            y = _by_statistics(given["x"], mean, var, case.eps)
        return _affine(y, given)

    return _vectors(case, "weight", "bias"), ours, truth


def _standardized_weight(case: OtherCase) -> Made:
    dim = case.option % 2
    size = case.shape[dim]
    gain = torch.randn(size, generator=torch.Generator().manual_seed(case.seed + 1))
    by_fan = bool(case.option % 3)

    def ours(given: Tensors) -> Tensor:
        layer: Any = normkit.nn.WeightStandardization(
            size, dim=dim, eps=case.eps, gain=True, scale_by_fan_in=by_fan
        )
        _load(layer, given)
        return layer(given["x"])

    def truth(given: Tensors) -> Tensor:
        dims = tuple(d for d in range(len(case.shape)) if d != dim)
        y = oracles.normalized(given["x"], dims, None, None, case.eps)
        fan = given["x"].numel() // size
        y = y * given["gain"].view([-1 if d == dim else 1 for d in range(y.dim())])
        return y * fan**-0.5 if by_fan else y

    return {"gain": gain}, ours, truth


def _with_state(case: OtherCase) -> Made:
    mean, var = _statistics(case)
    functional = normkit.functional

    def ours(given: Tensors) -> Tensor:
        state = functional.BatchNormState(mean, var, torch.tensor(3))
        y, after = functional.batch_norm_with_state(
            *(given["x"], state, given["weight"], given["bias"]),
            training=case.training,
            eps=case.eps,
        )
        wanted = mean.double(), var.double()
        if case.training:
            batch = given["x"].detach()
            wanted = oracles.running_after(mean, var, [batch], 0.1)
        for found, truth in zip(after[:2], wanted, strict=True):
            # As in `layers`; of the value, and of the spread in a mean.
            size = max(1.0, float(truth.abs().max()), float(wanted[1].max()) ** 0.5)
            error = float((found.double() - truth).abs().max()) / size
            eps = torch.finfo(torch.float32).eps
            assert error <= OF_STATISTICS * eps, f"the state is off by {error:.2g}"
        assert int(after.batches) == 3 + case.training
        return y

    def truth(given: Tensors) -> Tensor:
        if case.training:
            return _affine(oracles.batch_norm(given["x"], eps=case.eps), given)
        return _affine(_by_statistics(given["x"], mean, var, case.eps), given)

    return _vectors(case, "weight", "bias"), ours, truth


def _response(case: OtherCase) -> Made:
    """With a learned eps, and the threshold after it."""
    eps = torch.tensor([1e-6, 1e-2, -0.1][case.option % 3])

    def ours(given: Tensors) -> Tensor:
        layer: Any = normkit.nn.FilterResponseNorm(case.channels, learnable_eps=True)
        layer.eps.data = eps.clone()
        tlu: Any = normkit.nn.TLU(case.channels)
        _load(layer, given)
        _load(tlu, given)
        return tlu(layer(given["x"]))

    def truth(given: Tensors) -> Tensor:
        shape = [1, -1] + [1] * len(case.positions)
        y = oracles.filter_response(given["x"], given["weight"], given["bias"], eps)
        return torch.maximum(y, given["threshold"].view(shape))

    return _vectors(case, "weight", "bias", "threshold"), ours, truth


def _normalize(case: OtherCase) -> Made:
    """`functional.normalize` over any dimensions."""
    count = len(case.shape)
    dims = tuple(d for d in range(count) if (case.option >> d) & 1) or (count - 1,)
    g = torch.Generator().manual_seed(case.seed + 1)
    mask = torch.rand(case.shape, generator=g) < 0.8 if case.masked else None
    shape = [1 if d in dims else n for d, n in enumerate(case.shape)]
    vectors = {k: torch.randn(shape, generator=g) for k in ("weight", "bias")}

    def ours(given: Tensors) -> Tensor:
        y, _ = normkit.functional.normalize(
            *(given["x"], dims, given["weight"], given["bias"], case.eps), mask=mask
        )
        return y

    def truth(given: Tensors) -> Tensor:
        share = torch.ones(case.shape) if mask is None else mask
        count = share.double().sum(dims, keepdim=True).clamp(min=1)
        x = given["x"].where(share > 0, torch.zeros_like(given["x"]))
        mean = x.sum(dims, keepdim=True) / count
        centred = (x - mean) * share.double()
        var = centred.square().sum(dims, keepdim=True) / count
        y = centred * torch.rsqrt(var + case.eps) * given["weight"] + given["bias"]
        return y * share.double()

    return vectors, ours, truth


def _accumulated(case: OtherCase) -> Made:
    """`backward_as_whole` of small batches is the backward of the large one."""
    whole = case.samples

    def ours(given: Tensors) -> Tensor:
        torch.manual_seed(case.seed)
        model = nn.Sequential(
            nn.Linear(case.channels, 3), normkit.nn.BatchNorm1d(3), nn.Tanh()
        )
        x = given["x"]
        small = x.detach().double().flatten(2).sum(2) if x.dim() > 2 else x.detach()
        model.double()
        batches = small.double().split(2)
        if len(batches[-1]) == 1 and whole > 1:
            batches = small.double().split(whole)
        total = normkit.nn.backward_as_whole(
            model, batches, lambda b: model(b).square().sum()
        )
        torch.manual_seed(case.seed)
        other = nn.Sequential(nn.Linear(case.channels, 3), nn.BatchNorm1d(3), nn.Tanh())
        loss = other.double()(small.double()).square().sum()
        loss.backward()
        # All in float64, in sums of another order. A term of a gradient is up to
        # 6·|x|/√eps, rounded four times in each of four sums: 4e-12·|x|.
        assert torch.allclose(total.double(), loss, rtol=1e-12)
        terms = len(small) * max(1.0, float(small.abs().max()))
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            same = torch.allclose(a.grad, b.grad, rtol=1e-9, atol=4e-12 * terms)
            assert same, "gradients"
        for a, b in zip(model.buffers(), other.buffers(), strict=False):
            assert torch.allclose(a.double(), b.double(), rtol=1e-12), "statistics"
        return x * 1

    return {}, ours, lambda given: given["x"] * 1


BUFFERS = ("contiguous", "strided", "negated", "inside")


def _buffer(values: Tensor, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """Return a buffer in a layout, and what lies around it and must not change."""
    around = torch.full((3, len(values), 2), 7.0, dtype=dtype)
    if layout == "contiguous":
        return values.to(dtype, copy=True), around
    place = around[1, :, 0]
    if layout == "inside":
        place = around.view(-1)[len(values) : 2 * len(values)]
    place.copy_(-values if layout == "negated" else values)
    return (torch._neg_view(place) if layout == "negated" else place), around


def _functional(case: OtherCase) -> Made:
    """Buffers of any dtype and layout, after a call with plain ones."""
    mean, var = _statistics(case)
    dtypes = list(DTYPES.values())
    layout = BUFFERS[(case.option >> 2) % 4]
    dtype = dtypes[case.option % 4]

    def ours(given: Tensors) -> Tensor:
        counters = torch.zeros(3, dtype=torch.int64)
        y = given["x"]
        for way in ("contiguous", layout):
            (m, around), (v, beside) = (_buffer(t, dtype, way) for t in (mean, var))
            free = around.clone(), beside.clone()
            counters.zero_()
            y = normkit.functional.batch_norm(
                *(given["x"], m, v, given["weight"], given["bias"]),
                *(case.training, 0.25, case.eps),
                num_batches_tracked=counters[1],
            )
            assert counters.tolist() == [0, int(case.training), 0], "counters"
            wanted = mean.to(dtype), var.to(dtype)
            if case.training:
                batch = given["x"].detach()
                wanted = oracles.running_after(*wanted, [batch], 0.25)
            for found, truth in zip((m, v), wanted, strict=True):
                # Half precision holds no more than 65,504.
                holds = truth.to(dtype).isfinite()
                if not bool(holds.any()):
                    continue
                truth = truth[holds]
                # The error of a mean is relative to the spread as well.
                spread = float(wanted[1].double().max()) ** 0.5
                size = max(1.0, float(truth.abs().max()), spread)
                error = (found[holds].double() - truth.double()).abs().max()
                error = float(error) / size
                # As in `layers`; of halves, half an eps where it is stored, and half
                # of the value that is moved.
                eps = torch.finfo(dtype).eps
                eps = max(eps, OF_STATISTICS * torch.finfo(torch.float32).eps)
                assert error <= eps, f"a buffer is off by {error:.2g}"
            for now, then, buffer in ((around, free[0], m), (beside, free[1], v)):
                if way == "contiguous":
                    continue
                changed = int((now != then).sum())
                assert changed <= buffer.numel(), "something beside is written"
        return y

    def truth(given: Tensors) -> Tensor:
        if case.training:
            return _affine(oracles.batch_norm(given["x"], eps=case.eps), given)
        kept = (t.to(dtype).double() for t in (mean, var))
        return _affine(_by_statistics(given["x"], *kept, case.eps), given)

    return _vectors(case, "weight", "bias"), ours, truth


KINDS: dict[str, Callable[[OtherCase], Made]] = {
    "batch_norm": _functional,
    "BatchRenorm": _renorm,
    "WhiteningBatchNorm": _whitening,
    "RecurrentBatchNorm": _recurrent,
    "BatchNormLSTM": _lstm,
    "DomainBatchNorm": _domain,
    "WeightStandardization": _standardized_weight,
    "batch_norm_with_state": _with_state,
    "FilterResponseNorm and TLU": _response,
    "normalize": _normalize,
    "backward_as_whole": _accumulated,
}

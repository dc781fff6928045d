"""Run a case of a layer in each of its ways, and compare with the truth."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from fuzz.cases import BATCH, OF_STATISTICS, LayerCase, is_refused
from fuzz.tensors import DTYPES, drawn, laid_out, mask_of
from fuzz.truth import State, Truth, most, moved, summed, truth
from fuzz.ways import WAYS, Found, parts_of
from normkit.functional.aten import MAX_OFFSET

# Bounds, in eps of float32 or float64, of the largest term. An operation rounds by half
# an eps; statistics are float64 and round once, to the type of the operations.
#   y         centre, x − centre, 1/std, two products, two sums: 7 halves; an activation
#             errs by up to 4                                                      7.5
#   residual  dy·act′: z as above, act′ like an activation, a product              8
#   bias      Σ of those, as `OF_STATISTICS` has it: 8 more                       16
#   weight    Σ of those times (x − centre)·1/std                                  16
#   x         three such terms, weight and 1/std: g, Σg/n and x̂·Σg·x̂/n; their
#             roundings are independent                                           16
# Of 1,200 cases the largest were 2.2 (y), 0.3, 1.4, 1.8 and 0.9.
ROUNDINGS = {"y": 8, "again": 8, "x": 16, "residual": 8, "weight": 16, "bias": 16}
# `less_memory("int8")` moves x − mean by half a step, 1/254 of its largest. It is read
# three times: as x̂, in Σg·x̂, and in the slope of the activation. The largest of 600
# cases was 0.8/254.
OF_BYTES = 3 / 254
# Statistics over the samples of a batch; BATCH are the others.
OVER_SAMPLES = ("PerActivationBatchNorm",)
# What records torch's operator, which the layers try first on small inputs.
OF_TORCH = ("NativeGroupNormBackward0", "NativeLayerNormBackward0")
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def built(case: LayerCase) -> tuple[nn.Module, State]:
    """The layer with drawn weights and running statistics, and those in float64."""
    layers, channels = normkit.nn, case.channels
    options: dict[str, Any] = {"eps": case.eps}
    if case.kind in ("BatchNorm", "SyncBatchNorm", "InstanceNorm"):
        options |= {"momentum": case.momentum, "track_running_stats": case.tracks}
        options |= {"affine": case.weight}
    rank = {2: 1, 3: 1, 4: 2, 5: 3}[len(case.shape)]
    if case.kind == "BatchNorm":
        options |= {
            "channel_dim": case.channel,
            "ghost_size": case.ghost_size,
            "estimator": case.estimator,
            "debias": case.debias,
            "on_small_batch": case.on_small_batch,
            "activation": case.activation,
            "memory": case.memory or None,
        }
        layer: Any = getattr(layers, f"BatchNorm{rank}d")(channels, **options)
    elif case.kind == "SyncBatchNorm":
        layer = layers.SyncBatchNorm(channels, activation=case.activation, **options)
    elif case.kind == "FrozenBatchNorm":
        layer = layers.FrozenBatchNorm(channels, eps=case.eps)
        layer.activation = case.activation
    elif case.kind == "InstanceNorm":
        options["channel_dim"] = case.channel
        layer = getattr(layers, f"InstanceNorm{rank}d")(channels, **options)
    elif case.kind == "PerActivationBatchNorm":
        options |= {"momentum": case.momentum, "track_running_stats": case.tracks}
        layer = layers.PerActivationBatchNorm(case.shape[1:], **options)
    elif case.kind == "LayerNorm":
        last = case.channel == len(case.shape) - 1
        options["channel_dim"] = -1 if last else case.channel
        layer = layers.LayerNorm(list(case.vector_shape), **options)
    elif case.kind == "RMSNorm":
        layer = layers.RMSNorm(list(case.vector_shape), **options)
    elif case.kind == "GroupNorm":
        layer = layers.GroupNorm(case.groups, channels, **options)
    else:
        layer = layers.FilterResponseNorm(channels, **options)
    g = torch.Generator().manual_seed(case.seed + 1)
    dtype = DTYPES[case.parameters]
    for name in ("weight", "bias"):
        vector = None
        if getattr(case, name):
            vector = torch.randn(case.vector_shape, generator=g).to(dtype)
            vector = nn.Parameter(vector, requires_grad=_is_trained(case, name))
        layer.register_parameter(name, vector)
    state = State(torch.zeros(case.vector_shape), torch.ones(case.vector_shape))
    if getattr(layer, "running_mean", None) is not None:
        layer.running_mean.normal_(generator=g)
        layer.running_var.uniform_(0.5, 2.0, generator=g)
        state = State(layer.running_mean.clone(), layer.running_var.clone())
    state.mean, state.var = state.mean.double(), state.var.double()
    return layer.train(case.training), state


def _is_trained(case: LayerCase, name: str) -> bool:
    return case.trained in ("all", {"x": "input"}.get(name, "parameters"), name)


def inputs(case: LayerCase) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The input, the residual and the mask."""
    x = drawn(case.shape, case.fill, case.seed, case.dtype)
    mask = mask_of(case.mask, case.shape, case.channel, case.seed)
    if case.poison and x.numel():
        at = case.seed % x.numel()
        if case.poison == "hidden nan":
            # Expanded, it would be repeated where the mask does not hide it.
            if mask is not None and "expanded" not in case.layout:
                x[~(mask > 0).expand(x.shape)] = torch.nan
        else:
            x.view(-1)[at] = float(case.poison)
    x = laid_out(x, case.layout) if x.numel() else x
    residual = None
    if case.residual:
        residual = drawn(case.shape, "normal", case.seed + 2, case.dtype)
        residual = laid_out(residual, case.residual) if x.numel() else residual
    return x, residual, mask


def check(case: LayerCase) -> None:
    """Run the layer; every output, gradient and running statistic must be right.

    Raises:
        AssertionError: One is not.
    """
    layer, state = built(case)
    x, residual, mask = inputs(case)
    if is_refused(case):
        before = [t.clone() for t in layer.state_dict().values()]
        with pytest.raises(ValueError, match=r"more than one") as caught:
            layer(x)
        assert isinstance(caught.value, normkit.errors.NormkitError)
        after = layer.state_dict().values()
        assert all(map(torch.equal, before, after)), "a refused input changed the state"
        return
    dy = drawn(case.shape, "normal", case.seed + 3, case.dtype)
    dy = laid_out(dy, case.grad_layout) if dy.numel() else dy
    for way in case.ways:
        state = _check_way(case, way, layer, state, x, residual, mask, dy)


def _check_way(
    case: LayerCase,
    way: str,
    layer: Any,
    state: State,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    dy: Tensor,
) -> State:
    if way == "graph of backward" and (case.dtype != "float64" or case.keeps_bytes):
        way = "plain"
    if way == "vmap" and case.updates:
        way = "vjp"  # running statistics are no function of one example
    given: dict[str, Any] = {} if mask is None else {"mask": mask}
    leaf = x.detach().requires_grad_(_is_trained(case, "x"))
    extra = None
    if residual is not None:
        extra = residual.detach().requires_grad_(_is_trained(case, "x"))
        given["residual"] = extra
    sums_first = residual is not None and case.kind not in BATCH
    vectors = {
        name: v
        for name in ("weight", "bias")
        if (v := getattr(layer, name, None)) is not None
    }

    def forward(x: Tensor) -> Any:
        return layer(x, **given)

    with torch.random.fork_rng():
        found = WAYS[way](case, forward, leaf, extra, vectors, dy)
    if not case.updates:
        recorded = found["y"] if way == "deterministic" else None
        _check_bits(case, layer, x, residual, mask, recorded)
    read = x
    if sums_first:
        read = (x + residual).detach()
        total = found.pop("sum")
        assert torch.equal(total.detach(), read) or case.poison, "the sum is wrong"
    expected = truth(case, read, vectors, residual, mask, state, dy)
    if "weight" in found and type(found["y"].grad_fn).__name__ in OF_TORCH:
        # Its sums are of dy·x and dy·mean: each term is rounded four times, and is up
        # to MAX_OFFSET times |dy|. The bound of a term has ROUNDINGS.
        expected.sizes["weight"] += (
            4
            / ROUNDINGS["weight"]
            * MAX_OFFSET
            * summed(case, dy.double().abs(), vectors["weight"])
        )
        if "bias" in found:
            # The sum of 512 equal numbers drifts by 5e-6 (functional/aten.py).
            expected.sizes["bias"] = 3 * expected.sizes["bias"]
    if sums_first and "x" in found:
        # The sum has a gradient of its own: `dy` once more.
        expected.grads["x"] = expected.grads["x"] + dy.double()
        expected.sizes["x"] = expected.sizes["x"] + most(dy.abs())
        expected.grads["residual"] = expected.grads["x"]
        expected.sizes["residual"] = expected.sizes["x"]
    _compare(case, way, x, found, expected, dy)
    before, state = state, moved(case, state, read, mask)
    if way in ("vjp", "jvp", "vmap"):
        # torch.func's transforms would take the counter for a constant.
        state = replace(state, skipped=before.skipped)
    _compare_state(case, way, layer, state)
    if case.tracks and getattr(layer, "running_mean", None) is not None:
        # The next way reads them as they are rounded.
        mean, var = layer.running_mean.double(), layer.running_var.double()
        state = replace(
            state, mean=mean.view_as(state.mean), var=var.view_as(state.var)
        )
    return state


def _check_bits(
    case: LayerCase,
    layer: Any,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    recorded: Tensor | None,
) -> None:
    """A sample alone has the bits that it has in the batch, and in a recorded one."""
    if not len(x) or (case.uses_batch and case.kind in (*BATCH, *OVER_SAMPLES)):
        return
    if is_refused(replace(case, shape=(1, *case.shape[1:]))):
        return
    if case.layout not in ("contiguous", "channels last", "unaligned", "odd strides"):
        return  # another layout is another order of operations
    one = slice(case.seed % len(x), case.seed % len(x) + 1)
    whole: dict[str, Any] = {}
    given: dict[str, Any] = {}
    if mask is not None:
        # As broadcastable as in the batch: a mask of rows has sums of its own.
        is_each = mask.dim() == x.dim() and len(mask) == len(x)
        whole["mask"], given["mask"] = mask, mask[one] if is_each else mask
    if residual is not None:
        whole["residual"], given["residual"] = residual, residual[one]
    with normkit.deterministic(), torch.no_grad():
        alone, _ = parts_of(layer(laid_out(x[one], case.layout), **given))
        y, _ = parts_of(layer(x, **whole))
    bits = _BITS[x.dtype.itemsize]
    for among in (y, y if recorded is None else recorded.detach()):
        same = alone.view(bits) == among[one].view(bits)
        both_nan = alone.isnan() & among[one].isnan()
        assert (same | both_nan).all(), "deterministic: alone a sample has other bits"


def _compare(
    case: LayerCase, way: str, x: Tensor, found: Found, expected: Truth, dy: Tensor
) -> None:
    y = found.pop("y")
    assert y.dtype == x.dtype, f"{way}: the output is {y.dtype}"
    assert y.shape == x.shape, f"{way}: the output has shape {tuple(y.shape)}"
    # In float64 the mean, of ours and of the truth, is off by roundings of |x|: `ratio`
    # of them in units of the spread. Of a constant that is all of x − mean, and 64
    # undoes that the size of a term is taken for 1/64 at least.
    own = 64 * (1 + expected.ratio) if case.dtype == "float64" else 1.0
    _near(case, way, "y", y, expected.y, expected.size_y * own)
    if case.poison in ("nan", "inf"):
        return  # gradients of a batch with a NaN are nobody's
    if (tangent := found.pop("moved", None)) is not None:
        _near_jvp(case, tangent, found.pop("tangent").double(), dy, expected, own)
    again = found.pop("output again", None)
    if again is not None:
        truth = expected.y * dy.double()
        _near(case, way, "again", again, truth, expected.size_y * most(dy.abs()) * own)
    if expected.is_ambiguous:
        return
    for name, grad in found.items():
        if name == "y":
            continue
        truth, size = expected.grads[name], expected.sizes[name]
        assert grad.shape == truth.shape, f"{way}: d{name} has shape {grad.shape}"
        more = 0.0
        if case.activation != "none" and name != "residual":
            more = size  # dy·act′ is a tensor of halves on the way
        if case.residual and case.kind not in BATCH and name in ("x", "residual"):
            more = 2 * most(dy.abs()) + 2 * most(truth.abs())  # a sum of two gradients
        _near(case, way, name, grad, truth, size * own, more)


def _near_jvp(
    case: LayerCase, tangent: Tensor, t: Tensor, dy: Tensor, expected: Truth, own: float
) -> None:
    """⟨dy, J·t⟩ is ⟨Jᵀ·dy, t⟩."""
    if expected.is_ambiguous or not tangent.numel():
        return
    terms = dy.double() * tangent.detach().double()
    wanted = (expected.grads["x"] * t).sum()
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    allowed = ROUNDINGS["x"] * torch.finfo(wide).eps * expected.sizes["x"]
    allowed = allowed * t.abs().sum() * own
    out = torch.finfo(DTYPES[case.dtype])
    allowed = allowed + out.eps * terms.abs().sum()
    # A tangent below the normal numbers is rounded to half of the smallest number.
    allowed = allowed + out.smallest_normal * out.eps / 2 * dy.double().abs().sum()
    error = float((terms.sum() - wanted).abs())
    assert error <= allowed, f"jvp is off by {error / float(allowed):.3g} times"


def _near(
    case: LayerCase,
    way: str,
    name: str,
    found: Tensor,
    truth: Tensor,
    size: Any,
    more: Any = 0.0,
) -> None:
    """Within roundings of terms of `size`; of `more` where values are halves."""
    found = found.detach().double()
    out = DTYPES[case.parameters if name in ("weight", "bias") else case.dtype]
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    truth = truth.detach()
    rounded = truth.to(out).double()
    both = found.isfinite() & rounded.isfinite()
    is_nan = rounded.isnan()
    if case.poison == "inf":
        # inf/inf is NaN, also where torch's RMS norm leaves 0 beside it.
        assert not found[is_nan].isfinite().any(), f"{way}: {name} hides a NaN"
        both = both & ~found.isnan()
    else:
        same = torch.equal(found.isnan(), is_nan)
        assert same, f"{way}: {name} is NaN elsewhere than the truth"
    allowed = ROUNDINGS[name] * torch.finfo(wide).eps * size
    if out.itemsize == 2:
        half = torch.finfo(out)
        once = 2 if name == "again" else 1  # the output, and its product
        allowed = allowed + truth.abs() * half.eps * 0.502 * once
        allowed = allowed + half.smallest_normal
    if DTYPES[case.dtype].itemsize == 2:
        allowed = allowed + more * torch.finfo(DTYPES[case.dtype]).eps * 0.502
    if case.keeps_bytes:
        # Without an activation no slope is read, and these are sums of dy.
        exact = ("y",) if case.activation != "none" else ("y", "bias", "residual")
        allowed = allowed + (0 if name in exact else size * OF_BYTES)
    error = (found - truth).abs()
    bad = both & ~(error <= allowed)
    if bad.any():
        allowed = torch.as_tensor(allowed).expand(error.shape)
        worst = float((error / allowed)[bad].max())
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{way}: {name} is off by {worst:.3g} times what is allowed, at {at}: "
            f"{float(found[at]):.9g} for {float(truth[at]):.9g}"
        )


def _compare_state(case: LayerCase, way: str, layer: Any, state: State) -> None:
    if not case.tracks or getattr(layer, "running_mean", None) is None:
        return
    eps = torch.finfo(torch.float32).eps * OF_STATISTICS
    for name, wanted in (("running_mean", state.mean), ("running_var", state.var)):
        error = float((getattr(layer, name).double() - wanted).abs().max())
        of = max(1.0, float(wanted.abs().max()))
        if name == "running_mean":  # errs by roundings of the deviations from a pilot
            of = max(of, float(state.var.max()) ** 0.5)
        assert error <= eps * of, f"{way}: {name} is off by {error:.3g} of {of:.3g}"
    counted = int(layer.num_batches_tracked)
    assert counted == state.batches, f"{way}: {counted} batches, not {state.batches}"
    skipped = getattr(layer, "skipped", None)
    if skipped is not None:
        assert skipped == state.skipped, f"{way}: {skipped} skipped"

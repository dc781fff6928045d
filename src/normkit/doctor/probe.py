"""Probes: hooks on every layer that merge Moments and keep nothing else.

Each layer gets a `LayerProbe`. Its statistics are computed inside the hooks, at once,
because an in-place activation overwrites what it was given, and full backward hooks
break on such models. Inputs are read before the layer runs, outputs after it, and
gradients by a hook on the output tensor. No activation outlives its hook.

The hooks are attached for one stretch of work and removed in `finally`. They take part
in no autograd graph, draw no random number and write no buffer, so a run with probes
is bitwise the run without. A copy or a pickle of the model holds hooks that do nothing.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from normkit.doctor.statistics import ChannelStream, Histogram, Role
from normkit.moments import Moments, moments

__all__ = [
    "Hook",
    "LayerProbe",
    "Probes",
    "first_tensor",
    "norm_of",
    "role_of",
    "slope_limits",
]

# Every module of torch.nn whose forward is one elementwise non-linearity.
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.LogSigmoid),
    *(nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
    *(nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.GLU),
)
WEIGHTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
# A percentile needs no more values than this; more are thinned evenly.
MOST_BAND_VALUES = 4096
BAND = (0.15, 0.50, 0.85)
# Bins of a histogram, its half width in standard deviations of the first batch, and
# the values of a batch that are counted; more are thinned evenly.
BINS, REACH, MOST_COUNTED = 48, 4.0, 65_536


def role_of(module: nn.Module) -> Role:
    """What a layer is for; "other" layers get no probe."""
    if isinstance(module, WEIGHTS):
        return "weight"
    if isinstance(module, NORMS) or type(module).__name__.endswith("Norm"):
        return "norm"
    if isinstance(module, ACTIVATIONS):
        return "activation"
    return "other"


def slope_limits(module: nn.Module) -> tuple[float, float] | None:
    """The inputs between which the slope is at least 5 % of its greatest.

    Only for functions that flatten on both sides: a ReLU whose unit is off is not
    saturated. None for every other layer.
    """
    if isinstance(module, nn.Sigmoid):
        limit = 2 * math.atanh(math.sqrt(0.95))  # σ'(z) = ¼ sech²(z/2)
    elif isinstance(module, nn.Tanh):
        limit = math.atanh(math.sqrt(0.95))  # tanh'(z) = sech²(z)
    elif isinstance(module, nn.Softsign):
        limit = math.sqrt(20) - 1  # 1 / (1 + |z|)²
    elif isinstance(module, nn.Hardsigmoid):
        limit = 3.0
    elif isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return float(module.min_val), float(module.max_val)
    else:
        return None
    return -limit, limit


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor with any values in nested lists and dicts."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.numel() else None
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return None
    return next((t for t in map(first_tensor, value) if t is not None), None)


@dataclass(frozen=True)
class _Output:
    """The last output that was seen; not kept alive."""

    probe: LayerProbe
    tensor: Callable[[], Tensor | None]
    version: int
    overall: Moments


class Hook:
    """A hook that does nothing once it is copied or pickled with its model."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call what it wraps; the result is dropped."""
        # A compiler would trace it into the model, and compile another model then.
        if not torch.compiler.is_compiling():
            self._call(*args, **kwargs)

    def retire(self) -> None:
        """Do nothing from now on: torch calls the hooks it had when a call began."""
        self._call = _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What is left of a hook in a copy of the model."""


class LayerProbe:
    """What one layer saw since the last `reset`, merged over all its calls.

    Attributes:
        name: Dotted name of the layer.
        module: The layer.
        role: What the layer is for.
        order: Place in the order of execution; None before the first call.
        is_output: Whether the layer's output was the model's output.
        input: Moments of all input values (scalars); None before the first call.
        output: Moments of all output values.
        gradient_norm: ‖dL/d output‖ over everything seen.
        saturated: Number of values beyond `slope_limits`; None where undefined.
        alive: Which units had an output other than zero; None for other roles.
        units: Features or channels of the output.
        stream: Per-channel statistics of the input, when asked for.
        kept: Moments per channel without the constant ends of sequences; None where
            inputs are no sequences.
        num_padded: Positions in such ends.
        calls: Moments per channel of each call since the model was entered.
        fed_by: Name of the layer whose output was given to this one as it was.
        band: The {15, 50, 85} percentiles of one unit's input, when asked for.
        samples: Samples seen.
        before: Histogram of all inputs, when asked for; `reset` keeps it.
        after: Histogram of all outputs.
    """

    def __init__(self, name: str, module: nn.Module, role: Role) -> None:
        self.name = name
        self.module = module
        self.role: Role = role
        self.order: int | None = None
        self.is_output = False
        self.units = 1
        self.limits = slope_limits(module)
        self.before: Histogram | None = None
        self.after: Histogram | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was seen; the order of execution stays."""
        self.samples = 0
        self.input: Moments | None = None
        self.output: Moments | None = None
        self.gradient_norm: Tensor | None = None
        self.saturated: Tensor | None = None
        self.alive: Tensor | None = None
        self.stream: ChannelStream | None = None
        self.kept: Moments | None = None
        self.num_padded = 0
        self.calls: list[Moments] = []
        self.fed_by = ""
        self.band: Tensor | None = None

    @property
    def kind(self) -> str:
        """Name of the layer's class."""
        return type(self.module).__name__

    @property
    def saturated_share(self) -> Tensor | None:
        """Share of input values where the slope is below 5 % of its greatest."""
        if self.saturated is None or self.input is None:
            return None
        return self.saturated / self.input.count

    def see_input(
        self, x: Tensor, overall: Moments, unit_dim: int, unit: int | None
    ) -> None:
        """Merge one input, whose moments over everything are `overall`."""
        self.samples += x.shape[0] if x.dim() > 1 else 1
        self.input = _merged(self.input, overall)
        if self.limits is not None:
            low, high = self.limits
            # `not inside` rather than `outside`: a NaN is no healthy slope.
            saturated = x.numel() - ((x >= low) & (x <= high)).sum()
            self.saturated = _added(self.saturated, saturated)
        if unit is not None:
            self.band = _band(x, unit_dim, unit)

    def see_channels(self, x: Tensor, mask: Tensor | None) -> None:
        """Merge one input channel by channel, as a batch norm sees it."""
        dim = getattr(self.module, "channel_dim", 1)
        x = x.movedim(dim, 1)
        if mask is not None:
            mask = mask.expand(x.shape) if mask.dim() == x.dim() else None
        others = tuple(range(2, x.dim()))
        values = moments(x, (0, *others), mask)
        if others:
            per_sample = moments(x, others, mask)
            held = None if mask is None else per_sample.count > 0
            sample_means = moments(per_sample.mean, 0, held)
        else:
            sample_means = values
        length = x.shape[2] if x.dim() == 3 else 0
        batch = ChannelStream.of_batch(values, sample_means, length)
        self.calls.append(batch.pooled)
        if self.stream is None:
            self.stream = batch
        else:
            self.stream = self.stream.merge(batch.to(self.stream.within.device))
        if length > 1 and mask is None:
            self._see_ends(x, values)

    def _see_ends(self, x: Tensor, values: Moments) -> None:
        """Merge a batch of sequences `(N, C, L)` without their constant ends."""
        # A run of positions that all equal the last one, in every channel.
        last = x[..., -1:]
        same = ((x - last).abs() <= 1e-5 * last.abs()).all(1)
        ends = same.flip(1).long().cumprod(1).flip(1).bool()
        # The last position equals itself: a run of one is no padding.
        ends &= ends.sum(1, keepdim=True) > 1
        padded = int(ends.sum())
        kept = moments(x, (0, 2), ~ends[:, None].expand(x.shape)) if padded else values
        kept = kept.to(dtype=torch.float64)
        self.kept = kept if self.kept is None else self.kept.merge(kept)
        self.num_padded += padded

    def see_output(self, y: Tensor, overall: Moments, unit_dim: int) -> None:
        """Merge one output, whose moments over everything are `overall`."""
        self.output = _merged(self.output, overall)
        unit_dim = _dim_within(y, unit_dim)
        self.units = y.shape[unit_dim] if y.dim() else 1
        if self.role == "activation" and y.dim() > 1:
            others = tuple(d for d in range(y.dim()) if d != unit_dim)
            alive = (y != 0).any(dim=others) if others else y != 0
            if self.alive is None or self.alive.shape != alive.shape:
                self.alive = alive
            else:
                self.alive = self.alive | alive.to(self.alive.device)

    def see_gradient(self, gradient: Tensor) -> None:
        """Merge one gradient with respect to an output."""
        norm = norm_of(gradient)
        if self.gradient_norm is None:
            self.gradient_norm = norm
        else:
            self.gradient_norm = torch.hypot(
                self.gradient_norm, norm.to(self.gradient_norm.device)
            )


class Probes:
    """The probes of one model, attached as long as `attached()` lasts.

    Args:
        model: The model; only layers that are called through it are seen.
        streams: Collect per-channel streams at batch norms.
        gradients: Collect gradients with respect to outputs.
        unit: Which unit's input to take percentiles of; None for none.
        histograms: Count what goes into normalizations and what comes out.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        streams: bool = False,
        gradients: bool = True,
        unit: int | None = None,
        histograms: bool = False,
    ) -> None:
        self.histograms = histograms
        self.model = model
        self.streams = streams
        self.gradients = gradients
        self.unit = unit
        # Shared modules are met once, under their first name.
        self.layers = {
            name: LayerProbe(name, module, role)
            for name, module in model.named_modules()
            if (role := role_of(module)) != "other"
        }
        # Forward statistics count only inside the model's own call: activation
        # checkpointing runs layers a second time, in backward.
        self.inside = False
        self._unit_dim = -1
        self._calls = 0
        self._last: _Output | None = None
        self._lock = threading.Lock()
        self._handles: list[tuple[Any, Hook]] = []

    def attach(self) -> None:
        """Put the hooks on, but for the one that calls `enter`.

        Call `detach` in a `finally`.
        """
        for probe in self.layers.values():
            for attached in self._attach_layer(probe):
                self._handles.append(attached)
        # After the hooks of the layers, for the model may be one layer itself.
        leave = Hook(lambda module, args, output: self.leave(output))
        register = self.model.register_forward_hook
        self._handles.append((register(leave, always_call=True), leave))

    def _attach_layer(self, probe: LayerProbe) -> Iterator[tuple[Any, Hook]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._before(probe, args, kwargs)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._after(probe, output)

        pre, post = Hook(before), Hook(after)
        yield probe.module.register_forward_pre_hook(pre, with_kwargs=True), pre
        yield probe.module.register_forward_hook(post), post

    def detach(self) -> None:
        """Take every hook off again."""
        while self._handles:
            handle, hook = self._handles.pop()
            handle.remove()
            hook.retire()
        self.inside = False

    @contextmanager
    def attached(self) -> Iterator[Probes]:
        """The hooks are on inside the block, and off after it whatever happens."""
        enter = Hook(lambda *_: self.enter())
        register = self.model.register_forward_pre_hook
        self._handles.append((register(enter, prepend=True), enter))
        try:
            self.attach()
            yield self
        finally:
            self.detach()

    def reset(self) -> None:
        """Forget what all layers saw."""
        for probe in self.layers.values():
            probe.reset()

    @property
    def in_order(self) -> list[LayerProbe]:
        """The layers that were called, in the order of their first call."""
        called = [p for p in self.layers.values() if p.order is not None]
        return sorted(called, key=lambda p: p.order or 0)

    def enter(self) -> None:
        """The model's own forward begins."""
        self.inside = True
        self._unit_dim = -1

    def attach_inside(self, args: Any, kwargs: Any) -> None:
        """Attach in a hook of the model that runs as its forward begins."""
        self.attach()
        self.enter()
        if "" in self.layers:
            # The model is one layer, whose new hook comes too late for this call.
            self._before(self.layers[""], args, kwargs)

    def leave(self, output: Any) -> None:
        """The model's own forward ended with `output` (None after an exception)."""
        self.inside = False
        last, result = self._last, first_tensor(output)
        if last is not None and result is not None:
            y = last.tensor()
            last.probe.is_output |= y is not None and (result is y or result._base is y)
        self._last = None

    @torch.no_grad()
    def _before(self, probe: LayerProbe, args: Any, kwargs: Any) -> None:
        x = first_tensor(args)
        x = first_tensor(kwargs) if x is None else x
        if not self.inside or x is None or _is_traced(x):
            return
        overall = self._overall_of(x)
        with self._lock:
            if probe.order is None:
                probe.order = self._calls
                self._calls += 1
            if self._last is not None and self._last.overall is overall:
                probe.fed_by = self._last.probe.name
            x = x.detach()
            if isinstance(probe.module, _BatchNorm):
                self._unit_dim = getattr(probe.module, "channel_dim", 1)
                if self.streams and x.dim() > 1:
                    mask = kwargs.get("mask")
                    probe.see_channels(x, mask if isinstance(mask, Tensor) else None)
            probe.see_input(x, overall, self._unit_dim, self.unit)
            if self.histograms and probe.role == "norm":
                probe.before = _counted(probe.before, x, overall)

    def _overall_of(self, x: Tensor) -> Moments:
        """The moments of x; those of the last output, if x is that and unchanged."""
        last = self._last
        if last is None or last.tensor() is not x or last.version != _version(x):
            return _overall(x.detach())
        return last.overall

    def _after(self, probe: LayerProbe, output: Any) -> None:
        y = first_tensor(output)
        if y is None or _is_traced(y):
            return
        if self.gradients and y.requires_grad:
            y.register_hook(Hook(lambda g: self._see_gradient(probe, g)))
        if not self.inside:
            return
        with self._lock, torch.no_grad():
            self._unit_dim = _unit_dim_after(probe.module, self._unit_dim)
            overall = _overall(y.detach())
            probe.see_output(y.detach(), overall, self._unit_dim)
            if self.histograms and probe.role == "norm":
                probe.after = _counted(probe.after, y.detach(), overall)
            self._last = _Output(probe, weakref.ref(y), _version(y), overall)

    @torch.no_grad()
    def _see_gradient(self, probe: LayerProbe, gradient: Tensor) -> None:
        if gradient.numel() and not _is_traced(gradient):
            with self._lock:
                probe.see_gradient(gradient.detach())


def _unit_dim_after(module: nn.Module, before: int) -> int:
    """Along which dimension the units of a layer's output lie."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return -len(module.kernel_size) - 1
    if isinstance(module, nn.Linear | nn.Bilinear | nn.LayerNorm | nn.RMSNorm):
        return -1
    if isinstance(module, nn.GroupNorm | _NormBase):
        return getattr(module, "channel_dim", 1)
    return before


def _dim_within(x: Tensor, dim: int) -> int:
    """`dim` counted from the start, or the last one where x has no such dimension."""
    return dim % x.dim() if -x.dim() <= dim < x.dim() else x.dim() - 1


def _is_traced(x: Tensor) -> bool:
    """Whether x stands for values that are not there (vmap, grad, meta)."""
    return x.is_meta or is_functorch_wrapped_tensor(x)


def _overall(x: Tensor) -> Moments:
    """The moments of all values of x, in two passes.

    On a CPU this takes a fifth of the time of torch.var_mean over everything, and a
    third of that of `moments`, which keeps the dimensions it does not reduce apart.
    """
    x = x.to(_dtype(x))
    mean = x.mean()
    m2 = torch.linalg.vector_norm(x - mean).square()
    return Moments(torch.full((), x.numel(), device=x.device), mean, m2)


def norm_of(x: Tensor) -> Tensor:
    """‖x‖, in float32 or better."""
    return torch.linalg.vector_norm(x if x.is_complex() else x.to(_dtype(x)))


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype for statistics of x: never a half one."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _merged(old: Moments | None, new: Moments) -> Moments:
    return new if old is None else old.merge(new.to(device=old.mean.device))


def _added(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else old + new.to(old.device)


def _band(x: Tensor, unit_dim: int, unit: int) -> Tensor:
    """The {15, 50, 85} percentiles of one unit over samples and positions."""
    dim = _dim_within(x, unit_dim)
    values = x.select(dim, unit % x.shape[dim]).flatten()
    if values.numel() > MOST_BAND_VALUES:
        values = values[:: math.ceil(values.numel() / MOST_BAND_VALUES)]
    # Linear between neighbours, as torch.quantile and 5 times faster on a batch.
    values = values.float().sort().values
    below, step = _places(values.numel(), values.device)
    edges = values[below]
    # A value that is not finite has no percentile: NaN instead.
    return torch.lerp(edges[0], edges[1], step) + 0 * (values[-1] - values[0])


def _counted(old: Histogram | None, x: Tensor, overall: Moments) -> Histogram | None:
    """The histogram with the values of x; its ends are set by the first of them."""
    values = x.flatten()
    if values.numel() > MOST_COUNTED:
        values = values[:: math.ceil(values.numel() / MOST_COUNTED)]
    values = values.float()
    values = values[values.isfinite()]
    if old is None:
        middle, reach = float(overall.mean), REACH * float(overall.var.sqrt())
        if not math.isfinite(middle + reach):
            return None
        # A constant gets a bin of its own, wide enough for float32.
        reach = max(reach, 1e-3 * abs(middle), 1e-6)
        old = Histogram(middle - reach, middle + reach, torch.zeros(BINS))
    inside = values.clamp(old.low, old.high)
    counts = torch.histc(inside, BINS, old.low, old.high).cpu()
    return Histogram(old.low, old.high, old.counts + counts)


@functools.lru_cache(maxsize=64)
def _places(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the percentiles of sorted values lie: the two neighbours, and between."""
    places = [share * (count - 1) for share in BAND]
    neighbours = [[math.floor(p) for p in places], [math.ceil(p) for p in places]]
    steps = [p - math.floor(p) for p in places]
    return torch.tensor(neighbours, device=device), torch.tensor(steps, device=device)

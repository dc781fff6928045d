"""`initialize`: variance in, variance out, for every linear map of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normkit.errors import ArgumentError
from normkit.init.automatic import Plan, plan
from normkit.init.choice import check_sizes, chosen_maps, trained_maps
from normkit.init.data_dependent import unit_variance_
from normkit.init.fans import LinearMap, linear_maps, sample_variance
from normkit.init.options import SCHEMES, check_numbers, check_options
from normkit.init.report import InitLine, InitReport
from normkit.init.signal_graph import SignalGraph
from normkit.init.theory import gain_of
from normkit.init.tracer import trace_signals
from normkit.init.variance_scaling import (
    SMALL_STD,
    Activation,
    constant_,
    normal_,
    orthogonal_,
    variance_scaling_,
)
from normkit.modeling.batch import (
    Forward,
    call_on,
    check_has_values,
    check_model,
    device_of,
    run_model,
    to_device,
)
from normkit.modeling.snapshot import Snapshot
from normkit.modeling.unwrap import unwrapped

__all__ = ["initialize"]


def initialize(
    model: nn.Module,
    scheme: str = "auto",
    *,
    example_inputs: Any = None,
    forward: Forward | None = None,
    activation: Activation | None = None,
    slope: float = 0.01,
    gain: float | None = None,
    mode: str = "fan_in",
    distribution: str = "normal",
    std: float = SMALL_STD,
    value: float = 0.0,
    bias: float | None = 0.0,
    residual: bool = True,
    per_channel: bool = False,
    layers: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> InitReport:
    """Draw the weights of every linear map of a model anew, in place.

    The fans of linear layers, convolutions, transposed convolutions, the projections of
    attention and each gate of an RNN are those of what they compute; the report gives
    n·Var[w] of each, as intended and as drawn. Normalizations, embeddings and the
    layers that share a weight with one are left alone.

    Args:
        model: Any module.
        scheme: What the variance of the weights is,

            - `"auto"`: for each layer by the activations that precede and follow it, as
              seen in a run on `example_inputs`; with `residual`, the ends of L residual
              branches scaled by 1/L in variance, or their normalization's weight 0.
            - `"constant"`: all weights `value`. No two units of a layer ever differ.
            - `"normal"`: std² for every layer. 0.01 is the "small" of the textbooks,
              0.05 the "not so small": at width 4096 activations vanish and saturate.
            - `"xavier"`: gain²·2/(fan_in + fan_out).
            - `"kaiming"`: gain²/fan_in (or fan_out by `mode`), gain of `activation`.
            - `"orthogonal"`: orthonormal rows or columns, times gain.
            - `"lsuv"`: orthogonal, then each layer in the order they run is scaled so
              that its outputs on `example_inputs` have variance 1.
        example_inputs: A tuple of positional arguments, a mapping of named ones, or the
            single argument. The model runs on it in eval mode, its norms on the
            statistics of the input. With it the report compares signal and gradient
            with theory, layer by layer.
        forward: `forward(model, example_inputs)`, for any other inputs.
        activation: What follows the layers: a name (`"relu"`, `"tanh"`, …) or a
            function of a tensor. None is ReLU for Kaiming, linear for the others;
            `"auto"` reads it.
        slope: Negative slope of a leaky ReLU.
        gain: Factor on the std; None takes that of `activation`.
        mode: For Kaiming: `"fan_in"` keeps the size of activations, `"fan_out"` that of
            gradients, `"fan_avg"` is between the two.
        distribution: `"normal"`, `"uniform"` or `"truncated_normal"`.
        std: For `"normal"`.
        value: For `"constant"`.
        bias: All biases become this; None keeps them.
        residual: For `"auto"`: treat residual branches.
        per_channel: For `"lsuv"`: every channel gets mean 0 (by the bias) and variance
            1, not the layer as a whole.
        layers: Dotted names, `*` for any part, of the layers to draw; None is all whose
            weight is trained. Frozen ones hold what a checkpoint gave them.
        generator: Source of random numbers; None is torch's global one.
        progress: Show a progress bar while `"lsuv"` runs the model layer by layer.

    Returns:
        An InitReport with a line per linear map.

    Raises:
        ArgumentError: An argument that cannot be used. An exception of any kind leaves
            the model unchanged.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> source = torch.Generator().manual_seed(0)
        >>> report = initialize(model, "kaiming", generator=source)
        >>> [(line.name, round(line.predicted, 6)) for line in report.lines]
        [('0', 2.0), ('2', 2.0)]

        Before the output no activation follows, and its inputs have mean square 1:

        >>> x = torch.randn(32, 64, generator=source)
        >>> report = initialize(model, "auto", example_inputs=x, generator=source)
        >>> [(line.rule, round(line.predicted, 6)) for line in report.lines]
        [('auto, before relu', 2.0), ('auto, no activation follows', 1.0)]

    References:
        Glorot & Bengio, "Understanding the difficulty of training deep feedforward
        neural networks", AISTATS 2010. He et al., "Delving Deep into Rectifiers", ICCV
        2015. Saxe et al., "Exact solutions to the nonlinear dynamics of learning in
        deep linear neural networks", ICLR 2014. Mishkin & Matas, "All you need is a
        good init", ICLR 2016.
    """
    check_model("initialize", model)
    if scheme not in SCHEMES:
        raise ArgumentError(f"scheme={scheme!r} must be one of {SCHEMES}")
    if scheme in ("auto", "lsuv") and example_inputs is None:
        raise ArgumentError(
            f"scheme={scheme!r} reads the model from a run: pass example_inputs=, or "
            "choose scheme='kaiming'"
        )
    given = {
        "activation": activation,
        "gain": gain,
        "mode": mode,
        "std": std,
        "distribution": distribution,
        "value": value,
        "per_channel": per_channel,
    }
    check_options(scheme, given, initialize.__kwdefaults__ or {})
    check_numbers(std=std, gain=gain, value=value, bias=bias)
    if gain is None:
        named = activation
        if named is None:
            named = "relu" if scheme == "kaiming" else "linear"
        gain = gain_of(named, slope)
    model = unwrapped(model)
    check_has_values(
        model,
        "initialize draws weights in place: call model.to_empty(device=…) first, and "
        "reset_parameters() of the layers that it leaves alone, such as norms",
        is_changed=True,
    )
    maps, left = linear_maps(model)
    if layers is None:
        maps = trained_maps(maps, left)
    maps = chosen_maps(maps, layers, left)
    check_sizes(maps)
    if scheme == "xavier":
        mode = "fan_avg"
    draw = _Draw(scheme, gain, mode, distribution, std, value, generator)
    run = partial(run_model, forward=forward or call_on)
    inputs = to_device(example_inputs, device_of(model))
    with _restored_on_error(model):
        graph = None
        if example_inputs is not None:
            graph = trace_signals(model, inputs, maps, run, gradients=False)
            place = {name: i for i, name in enumerate(graph.order())}
            maps.sort(key=lambda each: place.get(each.name, len(place)))
        made = None
        if scheme == "auto":
            assert graph is not None
            made = plan(graph, residual=residual)
            draw.plan = made
        lines = []
        for each in maps:
            lines.append(draw(each))
            _set_bias(each, bias)
        notes = [] if made is None else _zero_weights(model, made.zeroed)
        if scheme == "lsuv":
            assert graph is not None
            followed = [each for each in maps if each.name in graph.order()]
            variances = unit_variance_(
                *(model, followed, inputs),
                forward=run,
                per_channel=per_channel,
                progress=progress,
            )
            graph = trace_signals(model, inputs, maps, run)
            lines = _measured_lines(maps, lines, graph, variances)
        elif graph is not None:
            graph = trace_signals(model, inputs, maps, run)
        if graph is not None:
            lines = _with_signals(lines, graph)
            if any(map(_is_partly_unknown, lines)):
                notes.append(graph.reason_unknown())
    return InitReport(scheme, tuple(lines), left, tuple(notes))


def _measured_lines(
    maps: Sequence[LinearMap],
    lines: Sequence[InitLine],
    graph: SignalGraph,
    variances: Mapping[str, float],
) -> list[InitLine]:
    """Return the lines of LSUV: n·Var[w] brings E[x²] to the variance left."""
    incoming = {s.name: s.before for s in reversed(graph.steps) if s.kind == "linear"}
    found: list[InitLine] = []
    for each, line in zip(maps, lines, strict=True):
        if each.name not in variances:
            found.append(line)
            continue
        var = variances[each.name] / (incoming[each.name] or math.nan)
        rule = f"lsuv, outputs of variance {variances[each.name]:.4g}"
        found.append(line_of(each, rule, var / each.fans.fan_in))
    return found


def _with_signals(lines: Sequence[InitLine], graph: SignalGraph) -> list[InitLine]:
    forward = {line.name: line.predicted for line in reversed(lines)}
    backward = {line.name: line.predicted_back for line in reversed(lines)}
    signal, gradient = graph.predicted(forward, backward)
    measured_signal, measured_gradient = graph.measured()
    return [
        replace(
            line,
            signal_predicted=signal.get(line.name),
            signal_measured=measured_signal.get(line.name),
            gradient_predicted=gradient.get(line.name),
            gradient_measured=measured_gradient.get(line.name),
        )
        for line in lines
    ]


def _is_partly_unknown(line: InitLine) -> bool:
    """Return whether a size was measured that theory has no number for."""
    pairs = (
        (line.signal_predicted, line.signal_measured),
        (line.gradient_predicted, line.gradient_measured),
    )
    return any(p is None and m is not None for p, m in pairs)


def _zero_weights(model: nn.Module, names: Sequence[str]) -> list[str]:
    notes: list[str] = []
    for name in names:
        weight = dict(model.named_modules())[name].weight
        if isinstance(weight, Tensor):
            with torch.no_grad():
                weight.zero_()
            notes.append(f"weight of {name!r} is 0: its block starts as the identity")
    return notes


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put the model back on any exception."""
    before = Snapshot.take(model, parameters=True)
    try:
        yield
    except BaseException:
        before.restore()
        raise


@dataclass
class _Draw:
    """Draws one linear map after the other by one scheme."""

    scheme: str
    gain: float
    mode: str
    distribution: str
    std: float
    value: float
    generator: torch.Generator | None
    plan: Plan | None = None

    def __call__(self, each: LinearMap) -> InitLine:
        with torch.no_grad():
            var, rule = self._drawn(each)
        return line_of(each, rule, var)

    def _drawn(self, each: LinearMap) -> tuple[float, str]:
        """Write the weight; return E[w²] as meant, and the rule in words."""
        if self.scheme == "constant":
            constant_(each.weight, self.value)
            return self.value**2, f"constant {self.value:g}"
        if self.scheme == "normal":
            normal_(each.weight, self.std, generator=self.generator)
            return self.std**2, f"normal, std {self.std:g}"
        if self.plan is not None:
            return self._planned(each, self.plan)
        if self.scheme in ("orthogonal", "lsuv"):
            rows = each.rows().clone()
            orthogonal_(rows, gain=self.gain, generator=self.generator)
            each.set_rows(rows)
            return self.gain**2 / max(
                rows.shape[-2:]
            ), f"orthogonal, gain {self.gain:.4g}"
        variance_scaling_(
            each.weight,
            scale=self.gain**2,
            mode=self.mode,
            distribution=self.distribution,
            fans=each.fans,
            generator=self.generator,
        )
        rule = f"{self.scheme} {self.distribution}, {self.mode}, gain {self.gain:.4g}"
        return self.gain**2 / each.fans.mean(self.mode), rule

    def _planned(self, each: LinearMap, made: Plan) -> tuple[float, str]:
        scale, rule = 1.0, "auto, not followed"
        owner, _, last = each.name.rpartition(".")
        if each.name in made.scales:
            scale, rule = made.scales[each.name], f"auto, {made.rules[each.name]}"
        elif last == "out_proj" and owner in made.branch_scale:
            scale = made.branch_scale[owner]
            rule = f"auto, 1 of {round(1 / scale)} residual branches"
        variance_scaling_(
            each.weight,
            scale=scale,
            distribution=self.distribution,
            fans=each.fans,
            generator=self.generator,
        )
        return scale / each.fans.fan_in, rule


def line_of(each: LinearMap, rule: str, var: float) -> InitLine:
    """Return the report's line for a weight that was drawn with E[w²] = var."""
    fan_in, fan_out = each.fans.fan_in, each.fans.fan_out
    drawn = sample_variance(each.weight)
    return InitLine(
        name=each.name,
        kind=each.kind,
        rule=rule,
        fan_in=fan_in,
        fan_out=fan_out,
        predicted=fan_in * var,
        measured=fan_in * drawn,
        predicted_back=fan_out * var,
        measured_back=fan_out * drawn,
    )


def _set_bias(each: LinearMap, bias: float | None) -> None:
    if bias is not None and each.bias is not None:
        with torch.no_grad():
            each.bias.fill_(bias)

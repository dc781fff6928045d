"""Tracer: one run of a model, recorded as a SignalGraph.

Linear maps are known by their weight, activations and sums by the function called,
normalizations by their module. Everything else passes its input on, scaled as measured.
The model runs in eval mode, with normalizations that use the statistics of their input
as at the start of training, and comes back as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from normkit.calibrate.layers import find_layers
from normkit.errors import ArgumentError
from normkit.init.fans import LinearMap
from normkit.init.padding import inside
from normkit.init.signal_graph import SignalGraph, Step, ratio
from normkit.modeling.batch import Forward, call_on
from normkit.modeling.norm_types import NORMS
from normkit.modeling.pytree import tensors_in
from normkit.modeling.snapshot import preserved
from normkit.modeling.unwrap import eager

__all__ = ["at_the_start", "trace_signals"]

ACTIVATIONS = frozenset(
    (
        *("relu", "leaky_relu", "prelu", "rrelu", "relu6", "threshold", "elu", "celu"),
        *("selu", "gelu", "silu", "mish", "softplus", "sigmoid", "logsigmoid", "tanh"),
        *("tanhshrink", "softsign", "softshrink", "hardshrink", "hardtanh"),
        *("hardsigmoid", "hardswish"),
    )
)
# Rectified inputs have a mean of .56 of their root mean square; independent weights
# give each of n units one of .56/√n by the draw, .07 for 64: theory takes that for 0.
LEAST_MEAN = 0.15
CONVOLUTIONS = frozenset(
    f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)
)
_NORM_FUNCTIONS = frozenset(
    ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
)
_OPAQUE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def trace_signals(
    model: nn.Module,
    inputs: Any,
    maps: Sequence[LinearMap],
    forward: Forward = call_on,
    *,
    gradients: bool = True,
) -> SignalGraph:
    """Run `model` once, forward and backward, and record its graph.

    Args:
        model: Bit for bit as it was afterwards, gradients included.
        inputs: The example inputs.
        maps: The linear maps to know by name.
        forward: `forward(model, inputs)`.
        gradients: False sends none back.

    Raises:
        ArgumentError: No tensor comes out of the model.
    """
    graph = SignalGraph()
    with at_the_start(model), torch.enable_grad():
        tracer = _Tracer(model, graph, {id(each.weight): each for each in maps})
        try:
            with tracer:
                output = forward(model, inputs)
        finally:
            tracer.close()
        tensors = [t for t in tensors_in(output) if t.is_floating_point()]
        if not tensors:
            raise ArgumentError(
                f"the model returned {type(output).__name__} without a floating "
                "tensor; initialize needs one to follow"
            )
        graph.outputs = tuple(tracer.number(t) for t in tensors)
        if gradients:
            tracer.measure_gradients(tensors)
    return graph


@contextmanager
def at_the_start(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode, with norms on the statistics of their input.

    Dropout is off. A norm in this state has no buffers to change; one that is frozen
    (in eval inside a model in training) uses its own statistics.
    """
    layers, _ = find_layers(model, None)
    with preserved(model), eager(model), torch.no_grad():
        for module in model.modules():
            module.training = False
        for layer in layers:
            for name in layer.buffers:
                layer.module._buffers[name] = None
            layer.module.training = True
        yield


class _Tracer(TorchFunctionMode):
    """Records each torch function that meets a floating tensor in a SignalGraph."""

    def __init__(
        self, model: nn.Module, graph: SignalGraph, maps: Mapping[int, LinearMap]
    ) -> None:
        super().__init__()
        self.graph = graph
        self.maps = maps
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # ids are those of living tensors only
        self._depth = 0
        self._shared = self._picked = frozenset[int]()
        # Not to a backward pass inside of the model, nor to that of one operation.
        self._is_listening = False
        self._handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if isinstance(module, (*NORMS, *_OPAQUE)):
                kind = "norm" if isinstance(module, NORMS) else "opaque"
                before, after = self._around(kind, name)
                self._handles += [
                    module.register_forward_pre_hook(before),
                    module.register_forward_hook(after),
                ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._depth:
            return func(*args, **kwargs)
        ins = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        # A cache of keys starts without elements: what is appended is the first input.
        ins = [t for t in ins if t.numel()] or ins
        # Before the call: it may write over its input.
        mean_squares = {id(t): _mean_square(t) for t in ins}
        edges = {id(t): _edge(t) for t in ins}
        first = next((t for t in ins if _is_value(t)), None)
        is_nonnegative = first is not None and bool((first >= 0).all())
        mean = 0.0 if first is None else _mean_per_root(first, mean_squares[id(first)])
        numbers = [self.number(t, mean_squares[id(t)]) for t in ins if _is_value(t)]
        output = func(*args, **kwargs)
        outs = [t for t in tensors_in(output) if t.is_floating_point()]
        if not numbers or not outs:
            return output
        kind, name, function = self._classified(func, args, kwargs, ins, outs[0])
        values = [t for t in ins if _is_value(t)]
        size = mean_squares[id(values[0])]
        if kind == "other":
            # Of x·x the gradient of x is that of both places.
            values = list({id(t): t for t in values}.values())
            numbers = list(dict.fromkeys(numbers))
        count = len(values) if kind in ("add", "other") else 1
        for out in outs:
            step = Step(kind, name, tuple(numbers[:count]), 0, size, 0, function)
            step.is_nonnegative, step.mean = is_nonnegative, mean
            if kind == "linear" and _name(func) in CONVOLUTIONS:
                each = next(self.maps[id(t)] for t in ins if id(t) in self.maps)
                step.inside = inside(
                    func, args, kwargs, values[0], each.weight, each.fans
                )
            self._write(step, [edges[id(t)] for t in values[:count]], out)
        return output

    def _classified(
        self, func: Any, args: Any, kwargs: Any, ins: list[Tensor], out: Tensor
    ) -> tuple[str, str, Callable[[Tensor], Tensor] | None]:
        for tensor in ins:
            if id(tensor) in self.maps:
                return "linear", self.maps[id(tensor)].name, None
        plain = _name(func)
        if plain in ACTIVATIONS:
            return "activation", plain, _alone(func, args, kwargs)
        if plain in _NORM_FUNCTIONS:
            return "norm", plain, None
        values = [t for t in ins if _is_value(t)]
        is_sum = plain in ("add", "iadd", "radd", "sub", "isub", "rsub")
        if is_sum and len(values) == 2 and all(t.shape == out.shape for t in values):
            return "add", plain, None
        return "other", plain, None

    def number(self, tensor: Tensor, mean_square: float | None = None) -> int:
        """Return the number of a value; a new one is a source."""
        if id(tensor) not in self._numbers:
            number = self._give_number(tensor)
            if mean_square is None:
                mean_square = _mean_square(tensor)
            self.graph.sources[number] = mean_square
        return self._numbers[id(tensor)]

    def _give_number(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        self._numbers[id(tensor)] = len(self._alive)
        return len(self._alive)

    def _write(
        self, step: Step, inputs: Sequence[GradientEdge | None], out: Tensor
    ) -> None:
        """Complete a step by its output, and append it."""
        step.output, step.after = self._give_number(out), _mean_square(out)
        self.graph.steps.append(step)
        edge = _edge(out)
        if edge is None:
            return

        def arrived(gradient: Tensor) -> None:
            if not self._is_listening:
                return
            step.gradient = _mean_square(gradient)
            is_shared = not self._shared.isdisjoint(step.inputs)
            if is_shared or step.is_measured(self._picked):
                step.kept = self._kept(edge, inputs, gradient, step.gradient)

        out.register_hook(arrived)

    def _kept(
        self,
        out: GradientEdge,
        inputs: Sequence[GradientEdge | None],
        gradient: Tensor,
        mean_square: float,
    ) -> tuple[float | None, ...]:
        """Return what one operation hands each input of the gradient that arrives.

        Of that gradient, not of a random one: what arrives at a concatenation, a choice
        of one token or a mean over positions has the structure of what follows.
        """
        known = [each for each in inputs if each is not None]
        # Behind an operation in place on a view, torch cannot stop at one operation.
        if not known or _is_written_through(out):
            return (None,) * len(inputs)
        self._is_listening = False
        try:
            found = torch.autograd.grad(
                *([out], known, [gradient]), retain_graph=True, allow_unused=True
            )
        finally:
            self._is_listening = True
        own = iter(found)
        kept = [None if each is None else next(own) for each in inputs]
        return tuple(
            None if each is None else ratio(_mean_square(each), mean_square)
            for each in kept
        )

    def _around(self, kind: str, name: str) -> tuple[Any, Any]:
        """Return hooks that record a whole module as one step."""
        before: list[tuple[GradientEdge | None, int, float]] = []

        def enter(module: nn.Module, args: Any) -> None:
            # Deeper first: what is computed here is no part of the model.
            self._depth += 1
            if self._depth == 1:
                values = [t for t in tensors_in(args) if t.is_floating_point()]
                before[:] = [
                    (_edge(t), self.number(t), _mean_square(t)) for t in values[:1]
                ]

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self._depth == 1 and before:
                first, number, mean_square = before[0]
                for out in tensors_in(output):
                    if out.is_floating_point():
                        step = Step(kind, name, (number,), 0, mean_square, 0)
                        self._write(step, [first], out)
            self._depth -= 1

        return enter, leave

    def measure_gradients(self, outputs: Sequence[Tensor]) -> None:
        """Send normal gradients back; the hooks on the way measure them."""
        live = [t for t in outputs if t.requires_grad]
        if not live:
            return
        self._shared, self._picked = self.graph.shared(), self.graph.picked()
        self._is_listening = True
        source = torch.Generator().manual_seed(0)
        cotangents = [
            torch.randn(t.shape, generator=source).to(t.device, t.dtype) for t in live
        ]
        wanted = [t for t in self._alive if t.is_leaf and t.requires_grad]
        wanted += self._parameters(live)
        torch.autograd.grad(
            *(live, wanted, cotangents), allow_unused=True, retain_graph=True
        )

    def _parameters(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the leaves behind outputs, whose .grad autograd.grad leaves alone."""
        found: dict[int, Tensor] = {}
        seen: set[Any] = set()
        stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                found[id(leaf)] = leaf
            stack += [following for following, _ in node.next_functions if following]
        return list(found.values())


def _alone(func: Any, args: Any, kwargs: Any) -> Callable[[Tensor], Tensor]:
    """Return an activation with its other arguments fixed, of one tensor."""
    rest = [a.mean().double() if isinstance(a, Tensor) else a for a in args[1:]]
    keywords = {k: v for k, v in kwargs.items() if k != "input"}
    return lambda z: func(z.clone(), *rest, **keywords)


def _edge(tensor: Tensor) -> GradientEdge | None:
    """Return where a value's gradient arrives; an operation in place moves that."""
    is_followed = tensor.requires_grad and torch.is_grad_enabled()
    return get_gradient_edge(tensor) if is_followed else None


def _is_written_through(edge: GradientEdge) -> bool:
    nodes = [edge.node, *(node for node, _ in edge.node.next_functions if node)]
    return any(node.name().endswith("CopySlices") for node in nodes)


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__).strip("_")


def _is_value(tensor: Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter)


def _mean_per_root(tensor: Tensor, mean_square: float) -> float:
    """Return the mean per root of the mean square; 0 where it may be that of a draw."""
    if not mean_square:
        return 0.0
    wide = torch.float64 if tensor.device.type != "mps" else torch.float32
    mean = float(tensor.detach().to(wide).mean()) / math.sqrt(mean_square)
    if abs(mean) < LEAST_MEAN:
        return 0.0
    return max(-1.0, min(1.0, mean))  # a constant's is one, and its rounding


def _mean_square(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    wide = torch.float64 if tensor.device.type != "mps" else torch.float32
    return float(tensor.detach().to(wide).square().mean())

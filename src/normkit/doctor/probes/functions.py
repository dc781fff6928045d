"""Activations that a model computes by functions, read from the autograd graph.

`torch.relu(self.fc(x))` is no layer and has no hook, but the graph has a node for it,
which keeps the result, or the input, for the backward pass. Nodes are numbered in the
order in which a thread makes them: one whose number lies in no layer's call is the
program's own.
"""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from normkit.doctor.probes.hook import Hook
from normkit.doctor.probes.layer_probe import LayerProbe, merged
from normkit.doctor.probes.tensor_statistics import is_traced, overall_of
from normkit.moments import Moments

__all__ = ["VIEWS", "Functions"]

# Operations that leave the values as they are.
VIEWS = frozenset(
    [
        *("Alias", "AsStrided", "Clone", "Expand", "Flatten", "Permute", "Reshape"),
        *("ReshapeAlias", "Select", "Slice", "Split", "Squeeze", "T", "ToCopy"),
        *("Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View"),
    ]
)
# What layers with a weight do, and programs that hold it themselves.
_PRODUCTS = frozenset(["Addmm", "Mm", "Convolution"])
# What follows a node up to the output: views alone, other operations, a product with a
# weight.
_VIEWED, _USED, _HIDDEN = range(3)

# Inputs from which the results in float32 are ±1, and 0 or 1.
MAX_TANH, MIN_LOGIT, MAX_LOGIT = 9.0, -104.0, 17.0

# Present in the versions of torch that normkit runs on, but private.
_next_number: Callable[[], int] | None = getattr(
    torch.autograd, "_get_sequence_nr", None
)


@dataclass(frozen=True)
class _Call:
    """A call of a layer: the nodes from `start` to before `end` are its own."""

    start: int
    end: int
    probe: LayerProbe
    output: Moments
    unit_dim: int


@dataclass(frozen=True)
class _Activation:
    """The values of one activation.

    Attributes:
        layer: A layer that computes the same.
        input: None where the graph does not keep it.
        output: The result.
    """

    layer: nn.Module
    input: Tensor | None
    output: Tensor


class Functions:
    """Probes of the activations in a model that are no layers.

    Each is named after the layer whose call ended last before it: "relu after fc1".

    Args:
        layers: The probes of the model by name, where those found are added.
        unit: The unit whose input's percentiles are measured; None for none.
        gradients: Measure gradients with respect to outputs.

    Attributes:
        were_found: The last forward with a graph had some.
    """

    def __init__(
        self, layers: dict[str, LayerProbe], unit: int | None, *, gradients: bool
    ) -> None:
        self.were_found = False
        self._layers = layers
        self._unit = unit
        self._gradients = gradients
        self._calls: list[_Call] = []
        self._open: list[tuple[LayerProbe, int]] = []
        self._thread: int | None = None
        self._start = 0

    def enter(self) -> None:
        """Begin a forward."""
        self._calls.clear()
        self._open.clear()
        self._thread = None
        if _next_number is not None:
            self._thread, self._start = threading.get_ident(), _next_number()

    def begin_layer(self, probe: LayerProbe) -> None:
        """Begin the call of a layer."""
        # Each thread numbers its own nodes: replicas of a model are not read.
        if _next_number is None or self._thread != threading.get_ident():
            self._thread = None
            return
        self._open.append((probe, _next_number()))

    def end_layer(self, probe: LayerProbe, output: Moments, unit_dim: int) -> None:
        """End the call of a layer."""
        if self._thread is None or _next_number is None:
            return
        places = [i for i, (begun, _) in enumerate(self._open) if begun is probe]
        if places:
            _, start = self._open[places[-1]]
            # A layer that raised has begun, and did not end.
            del self._open[places[-1] :]
            end = _next_number()
            self._calls.append(_Call(start, end, probe, output, unit_dim))

    @torch.no_grad()
    def leave(self, output: Any) -> None:
        """Measure the activations of the forward that gave `output`."""
        calls, self._calls = self._calls, []
        if self._thread is None:
            return
        ends = [y.grad_fn for y in _tensors(output) if y.grad_fn is not None]
        if not ends:
            return
        outer = _outermost(calls)
        self.were_found = False
        counts: dict[str, int] = {}
        previous = -1
        found_here = _activations(ends, outer, self._start)
        for rank, (number, node, is_output) in enumerate(found_here):
            found = _READ[_operation(node)](node)
            if found is None:
                continue
            index = bisect_right(outer, number, key=attrgetter("end")) - 1
            # A name is counted within what follows one call of a layer.
            if index != previous:
                counts.clear()
                previous = index
            after = outer[index] if index >= 0 else None
            name = _name(node, after)
            counts[name] = counts.get(name, 0) + 1
            if counts[name] > 1:
                name = f"{name} ({counts[name]})"
            order = -1 if after is None else after.probe.order or 0
            self._add(name, node, found, after, order + 0.5 + 1e-6 * rank)
            self._layers[name].is_output |= is_output
            self.were_found = True

    def _add(
        self,
        name: str,
        node: Any,
        found: _Activation,
        after: _Call | None,
        order: float,
    ) -> None:
        probe = self._layers.get(name)
        if probe is None:
            probe = LayerProbe(name, found.layer, "activation")
            self._layers[name] = probe
        probe.order = order if probe.order is None else probe.order
        probe.had_gradients = probe.was_training = True
        unit_dim = -1 if after is None else after.unit_dim
        before: Moments | None = None
        if after is not None and any(
            parent is not None and _number(parent) == after.end - 1
            for parent, _ in node.next_functions
        ):
            probe.fed_by, before = after.probe.name, after.output
        if (x := found.input) is not None:
            # Behind another operation: of a tanh that rounds to ±1 they are bounds.
            probe.add_input(x, before or overall_of(x), unit_dim, self._unit)
        else:
            probe.add_samples(found.output)
            if before is not None:
                probe.input = merged(probe.input, before)
        probe.add_output(found.output, overall_of(found.output), unit_dim)
        if self._gradients:
            node.register_prehook(Hook(lambda given: _add_gradient(probe, given)))


def _add_gradient(probe: LayerProbe, given: tuple[Tensor | None, ...]) -> None:
    gradient = given[0]
    if gradient is not None and gradient.numel() and not is_traced(gradient):
        probe.add_gradient(gradient.detach())


def _activations(
    ends: list[Any], calls: list[_Call], start: int
) -> list[tuple[int, Any, bool]]:
    """Return number, node and whether it gives an output, in their order.

    Those before a layer with a weight, and those that give an output: a gate at the
    end is neither.

    Args:
        ends: The nodes of the outputs.
        calls: The calls of layers, apart and in order.
        start: The number of the first node of the forward.
    """
    found: list[tuple[int, Any, bool]] = []
    followed: dict[Any, int] = {}
    waiting: list[tuple[int, int, Any]] = []

    def add(node: Any, by: int, below: int) -> None:
        if node in followed:
            followed[node] = max(followed[node], by)
            return
        number = _number(node)
        # Leaves of the graph have the largest number that there is.
        if start <= number < below:
            followed[node] = by
            heapq.heappush(waiting, (-number, len(followed), node))

    for node in ends:
        add(node, _VIEWED, 1 << 62)
    # What uses a node has a larger number: it was here before.
    while waiting:
        number, _, node = heapq.heappop(waiting)
        number, by = -number, followed[node]
        index = bisect_right(calls, number, key=attrgetter("start")) - 1
        call = calls[index] if index >= 0 and number < calls[index].end else None
        operation = _operation(node)
        if call is None and operation in _READ and by != _USED:
            found.append((number, node, by == _VIEWED))
        is_layer = call is not None and call.probe.role in ("weight", "recurrent")
        if is_layer or (call is None and operation in _PRODUCTS):
            by = _HIDDEN
        elif operation not in VIEWS:
            by = max(by, _USED)
        for parent, _ in node.next_functions:
            if parent is not None:
                add(parent, by, number)
    return found[::-1]


def _outermost(calls: list[_Call]) -> list[_Call]:
    """Return the calls that lie in no other, in order."""
    outer: list[_Call] = []
    for call in sorted(calls, key=lambda call: (call.start, -call.end)):
        if not outer or call.start >= outer[-1].end:
            outer.append(call)
    return outer


def _name(node: Any, after: _Call | None) -> str:
    operation = _operation(node).lower()
    if after is None:
        return f"{operation} of the input"
    return f"{operation} after {after.probe.name or '(model)'}"


def _operation(node: Any) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")


def _number(node: Any) -> int:
    return node._sequence_nr()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _saved(node: Any, name: str) -> Tensor | None:
    """Return a tensor that a node keeps; None where it cannot be read.

    Hooks on saved tensors, such as those of activation checkpointing, would compute it
    again; and one that was written to since is lost.
    """
    kept = getattr(node, f"_raw_saved_{name}", None)
    if kept is None or getattr(kept, "unpack_hook", kept) is not None:
        return None
    try:
        value = getattr(node, f"_saved_{name}")
    except RuntimeError:
        return None
    if type(value) is not Tensor or not value.numel() or is_traced(value):
        return None
    value = value.detach()
    return value.float() if value.element_size() < 4 else value


def _read_relu(node: Any) -> _Activation | None:
    y = _saved(node, "result")
    return None if y is None else _Activation(nn.ReLU(), None, y)


def _read_tanh(node: Any) -> _Activation | None:
    y = _saved(node, "result")
    if y is None:
        return None
    return _Activation(nn.Tanh(), y.atanh().clamp(-MAX_TANH, MAX_TANH), y)


def _read_sigmoid(node: Any) -> _Activation | None:
    y = _saved(node, "result")
    if y is None:
        return None
    return _Activation(nn.Sigmoid(), y.logit().clamp(MIN_LOGIT, MAX_LOGIT), y)


def _read_hardtanh(node: Any) -> _Activation | None:
    x = _saved(node, "self")
    if x is None:
        return None
    low, high = float(node._saved_min_val), float(node._saved_max_val)
    layer = nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high)
    return _Activation(layer, x, x.clamp(low, high))


_READ: dict[str, Callable[[Any], _Activation | None]] = {
    "Relu": _read_relu,
    "Tanh": _read_tanh,
    "Sigmoid": _read_sigmoid,
    "Hardtanh": _read_hardtanh,
}

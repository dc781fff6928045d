"""Data movement: views, copies, cuts, joins and zero padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.fold.ir.gauge import Gauge, compact
from normkit.fold.ir.graph import (
    NOTHING_MORE,
    Alternative,
    Gauges,
    Node,
    Refusal,
    Slot,
    Value,
)
from normkit.fold.ir.nodes.parameters import edit_value, read
from normkit.fold.ir.nodes.rules import agree, copy_gauge, unchanged

__all__ = ["Move"]


@dataclass(eq=False, repr=False)
class Move(Node):
    """Elements moved, copied, left out or joined by zeros; never changed.

    Where each element goes is found by sending the numbers of the elements through it.

    Attributes:
        replay: The same operation on other tensors; None if every element stays
            where it is.
        acts_on: The dimensions it works along, if it leaves the others alone and
            accepts any size there (a concatenation, a cut); None if it may use all.
    """

    replay: Callable[[list[Tensor]], list[Tensor]] | None = None
    acts_on: tuple[int, ...] | None = None
    _numbers: dict[frozenset[int], _Numbers] = field(default_factory=dict)

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Move the map of each element with the element."""
        if self.replay is None:
            return copy_gauge(self, gauges)
        known_out = [v for v in self.outputs if v in gauges]
        known_in = {v for v in self.inputs if v in gauges}
        if not any(gauges.changed(v) for v in (*known_in, *known_out)):
            # Unchanged inputs would say nothing about outputs that are not set yet.
            same = unchanged(*self.inputs)
            return agree(self, same, gauges) if known_out else NOTHING_MORE
        if known_in == set(self.inputs) or not known_out:
            return agree(self, self._pushed(gauges), gauges)
        return agree(self, self._pulled(gauges), gauges)

    def read(self, value: Value) -> Tensor:
        """Return the moved content of its inputs."""
        if self.replay is None:
            return read(self.inputs[0])
        outputs = self.replay([read(v) for v in self.inputs])
        return outputs[self.outputs.index(value)]

    def edit_for(self, value: Value, new: Tensor, label: str) -> dict[Slot, Tensor]:
        """Return the edit of the tensor that is moved."""
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            raise Refusal(f"the weight of {label} is assembled in its forward")
        source = self.inputs[0]
        old = read(source)
        if self.replay is not None:
            numbers = self._numbered([source.shape])
            returned = _send_back(numbers, new.reshape(-1), self.label)
            new = returned.reshape(old.shape)
            new = torch.where(new.isnan(), old, new)
        return edit_value(source, new, label)

    def _numbered(self, shapes: list[tuple[int, ...]]) -> _Numbers:
        """Enumerate the elements of inputs of `shapes` and find where they go."""
        assert self.replay is not None
        starts, inputs = [1], []
        for shape in shapes:
            count = math.prod(shape)
            numbers = torch.arange(starts[-1], starts[-1] + count, dtype=torch.float64)
            inputs.append(numbers.reshape(shape))
            starts.append(starts[-1] + count)
        outputs = [numbers.long() for numbers in self.replay(inputs)]
        return _Numbers(tuple(starts), tuple(shapes), tuple(outputs))

    def _numbers_for(self, needed: set[int]) -> _Numbers:
        """Enumerate the inputs' elements, with size 1 where no gauge needs more."""
        if self.acts_on is None:
            return self._numbered([value.shape for value in self.inputs])
        key = frozenset(needed)
        if key not in self._numbers:  # A search asks again for each changed input.
            shapes = []
            for shape in (value.shape for value in self.inputs):
                kept = needed | {dim % len(shape) for dim in self.acts_on}
                shapes.append(tuple(n if d in kept else 1 for d, n in enumerate(shape)))
            self._numbers[key] = self._numbered(shapes)
        return self._numbers[key]

    def _pushed(self, gauges: Gauges) -> Alternative:
        given = [gauges.of(v) for v in self.inputs]
        needed = {dim for gauge in given for dim in gauge.depends_on}
        numbers = self._numbers_for(needed)
        wanted: Alternative = {v: gauges.of(v) for v in self.inputs if v not in gauges}
        flat = _directions(given, list(numbers.shapes), self.label)
        for value, index in zip(self.outputs, numbers.outputs, strict=True):
            gauge = _assembled([_map(pair, lambda t, at=index: t[at]) for pair in flat])
            padded = bool((index == 0).any())
            if padded and gauge.has_shift and set(gauge.depends_on) - needed:
                raise Refusal(
                    f"{self.label} pads with zeros, where a shift would be missing"
                )
            wanted[value] = gauge
        return wanted

    def _pulled(self, gauges: Gauges) -> Alternative:
        given = [gauges.of(v) for v in self.outputs]
        needed = {dim for gauge in given for dim in gauge.depends_on}
        numbers = self._numbers_for(needed)
        wanted: Alternative = {v: gauges.of(v) for v in self.outputs if v not in gauges}
        shapes = [tuple(index.shape) for index in numbers.outputs]
        flat = _directions(given, shapes, self.label)
        returned = [
            _map(pair, lambda t: _send_back(numbers, t[1:], self.label))
            for pair in flat
        ]
        padded = torch.cat([index.reshape(-1) for index in numbers.outputs]) == 0
        known = [pair[1][1:] for pair in flat if pair is not None]
        if any(bool((shift[padded] != 0).any()) for shift in known):
            raise Refusal(f"{self.label} pads with zeros, which would have to change")
        for i, value in enumerate(self.inputs):
            part = slice(numbers.starts[i] - 1, numbers.starts[i + 1] - 1)
            shape = numbers.shapes[i]
            gauge = _assembled(
                [
                    _map(pair, lambda t, at=part, to=shape: t[at].reshape(to))
                    for pair in returned
                ]
            )
            if value in wanted and not wanted[value].agrees_with(gauge):
                raise Refusal(f"{self.label} reads {value.name} twice, differently")
            wanted[value] = gauge
        return wanted


@dataclass(frozen=True)
class _Numbers:
    """The places that the elements of some inputs go to.

    Attributes:
        starts: The number of the first element of each input, and one past the last;
            0 is the number of an element that no input gave.
        shapes: The shapes of the inputs.
        outputs: The outputs, filled with the numbers of their elements.
    """

    starts: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    outputs: tuple[Tensor, ...]


def _send_back(numbers: _Numbers, values: Tensor, label: str) -> Tensor:
    """Return `values`, one per element of the outputs, at the places of the inputs.

    NaN where an input element is in no output.
    """
    index = torch.cat([output.reshape(-1) for output in numbers.outputs])
    returned = torch.full((numbers.starts[-1],), math.nan, dtype=torch.float64)
    returned[index] = values
    agree = (returned[index] == values) | values.isnan() | (index == 0)
    if not bool(agree.all()):
        raise Refusal(f"{label} copies elements that would have to differ")
    return returned[1:]


def _map(
    pair: tuple[Tensor, Tensor] | None, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Return the pair with `change` applied to both; None for None."""
    return None if pair is None else (change(pair[0]), change(pair[1]))


# (scale, shift) of all elements; None where a direction is not known.
_Vectors = list[tuple[Tensor, Tensor] | None]

_FREE = torch.tensor([math.nan], dtype=torch.float64)
_NONE = torch.zeros(1, dtype=torch.float64)


def _directions(
    gauges: list[Gauge], shapes: list[tuple[int, ...]], label: str
) -> _Vectors:
    """Return (scale, shift) of all elements in a row, element 0 free.

    First true → stored, then stored → true.
    """
    spreads = [g.spread(shape) for g, shape in zip(gauges, shapes, strict=True)]
    result: _Vectors = []
    for direction in (0, 1):
        parts = [part for spread in spreads if (part := spread[direction]) is not None]
        if len(parts) < len(spreads):
            result.append(None)
            continue
        scales, shifts = zip(*parts, strict=True)
        result.append((torch.cat([_FREE, *scales]), torch.cat([_NONE, *shifts])))
    if result == [None, None]:
        raise Refusal(f"{label} joins maps of which each lacks another direction")
    return result


def _assembled(parts: _Vectors) -> Gauge:
    """Return the gauge of these scales and shifts; free places follow the others."""
    directions: list[Affine | None] = []
    for part in parts:
        if part is None:
            directions.append(None)
            continue
        scale, shift = part
        scale = compact(scale).nan_to_num(nan=1.0)
        directions.append(Affine(scale, compact(shift).nan_to_num(nan=0.0)))
    return Gauge(directions[0], directions[1])

"""Nodes that carry elements elsewhere and change none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.fold.gauge import Gauge, compact
from normkit.fold.graph import Gauges, Refusal, Slot, Value
from normkit.fold.nodes.node import (
    NOTHING_MORE,
    Alternative,
    Node,
    carry_one,
    current,
    fill,
    store,
)

__all__ = ["Move"]


@dataclass(eq=False, repr=False)
class Move(Node):
    """Elements carried elsewhere, copied, left out or joined by zeros; never changed.

    Attributes:
        replay: The same operation on other tensors of the inputs' shapes; None if
            every element stays where it is. What it does is learnt by sending the
            numbers of the elements through it.
    """

    replay: Callable[[list[Tensor]], list[Tensor]] | None = None

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Each element's map goes where the element goes."""
        if self.replay is None:
            return carry_one(self, gauges)
        known_in = [v for v in self.inputs if v in gauges]
        known_out = [v for v in self.outputs if v in gauges]
        if len(known_in) == len(set(self.inputs)) or not known_out:
            if not any(gauges.moved(v) for v in (*known_in, *known_out)):
                return NOTHING_MORE
            return fill(self, self._pushed(gauges), gauges)
        if not any(gauges.moved(v) for v in known_out):
            wanted = {v: Gauge.identity(len(v.shape)) for v in self.inputs}
            wanted |= {v: Gauge.identity(len(v.shape)) for v in self.outputs}
            return fill(self, wanted, gauges)
        return fill(self, self._pulled(gauges), gauges)

    def content(self, value: Value) -> Tensor:
        """The moved content of its inputs."""
        if self.replay is None:
            return current(self.inputs[0])
        outputs = self.replay([current(v) for v in self.inputs])
        return outputs[self.outputs.index(value)]

    def holding(self, value: Value, new: Tensor, label: str) -> dict[Slot, Tensor]:
        """The edit of what was moved."""
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            raise Refusal(f"the weight of {label} is put together in its forward")
        source = self.inputs[0]
        return store(source, self.pull(new, current(source)), label)

    def pull(self, values: Tensor, old: Tensor) -> Tensor:
        """The single input that makes the single output `values`."""
        if self.replay is None:
            return values
        labels, source = self._labels()
        kept = torch.full((source[-1],), math.nan, dtype=torch.float64)
        flat = labels[0].reshape(-1).long()
        kept[flat] = values.reshape(-1)
        if bool((flat == 0).any()) or not torch.equal(kept[flat], values.reshape(-1)):
            raise Refusal(f"{self.label} copies elements that would have to differ")
        kept = kept[1:].reshape(old.shape)
        return torch.where(kept.isnan(), old, kept)

    def _labels(self) -> tuple[list[Tensor], list[int]]:
        """Outputs filled with element numbers; 0 is an element that came from nowhere.

        `source[i]` is the first number of input i, `source[-1]` one past the last.
        """
        assert self.replay is not None
        source, inputs = [1], []
        for value in self.inputs:
            count = math.prod(value.shape)
            numbers = torch.arange(source[-1], source[-1] + count, dtype=torch.float64)
            inputs.append(numbers.reshape(value.shape))
            source.append(source[-1] + count)
        return self.replay(inputs), source

    def _pushed(self, gauges: Gauges) -> Alternative:
        labels, _ = self._labels()
        wanted = {v: gauges.of(v) for v in self.inputs}
        flat = _directions(
            [gauges.of(v) for v in self.inputs], [v.shape for v in self.inputs], self
        )
        for value, numbers in zip(self.outputs, labels, strict=True):
            index = numbers.long()

            def take(vector: Tensor, index: Tensor = index) -> Tensor:
                return compact(vector[index])

            wanted[value] = _gauge_from_flat(flat, take, index == 0, self)
        return wanted

    def _pulled(self, gauges: Gauges) -> Alternative:
        labels, source = self._labels()
        wanted = {v: gauges.of(v) for v in self.outputs}
        flat = _directions(
            [gauges.of(v) for v in self.outputs], [v.shape for v in self.outputs], self
        )
        index = torch.cat([numbers.reshape(-1).long() for numbers in labels])
        invented = index == 0
        for i, value in enumerate(self.inputs):
            first, last = source[i], source[i + 1]

            def gather(
                vector: Tensor,
                first: int = first,
                last: int = last,
                shape: tuple[int, ...] = value.shape,
            ) -> Tensor:
                landed = vector[1:]
                at = torch.full((source[-1],), math.nan, dtype=torch.float64)
                at[index] = landed
                agree = at[index] == landed
                if not bool((agree | landed.isnan() | invented).all()):
                    raise Refusal(
                        f"{self.label} copies elements that would have to differ"
                    )
                return compact(at[first:last].reshape(shape))

            gauge = _gauge_from_flat(flat, gather, None, self)
            if value in wanted and not wanted[value].agrees_with(gauge):
                raise Refusal(f"{self.label} reads {value.name} twice, differently")
            wanted[value] = gauge
        if bool(invented.any()):
            moved_zero = any(
                bool((shift[1:][invented] != 0).any())
                for _, shift in flat
                if shift is not None
            )
            if moved_zero:
                raise Refusal(
                    f"{self.label} pads with zeros, which would have to change"
                )
        return wanted


def _directions(
    gauges: list[Gauge], shapes: list[tuple[int, ...]], node: Node
) -> list[tuple[Tensor | None, Tensor | None]]:
    """(scale, shift) of all elements in a row, element 0 blank, for both directions."""
    result: list[tuple[Tensor | None, Tensor | None]] = []
    for pick in ("to_stored", "to_true"):
        parts = [getattr(gauge, pick) for gauge in gauges]
        if any(part is None for part in parts):
            result.append((None, None))
            continue
        rows = []
        for name, blank in (("scale", math.nan), ("shift", 0.0)):
            flat = [
                getattr(part, name).expand(shape).reshape(-1)
                for part, shape in zip(parts, shapes, strict=True)
            ]
            rows.append(torch.cat([torch.tensor([blank], dtype=torch.float64), *flat]))
        result.append((rows[0], rows[1]))
    if all(scale is None for scale, _ in result):
        raise Refusal(f"{node.label} joins maps that can be crossed one way only")
    return result


def _gauge_from_flat(
    flat: list[tuple[Tensor | None, Tensor | None]],
    arrange: Callable[[Tensor], Tensor],
    invented: Tensor | None,
    node: Node,
) -> Gauge:
    directions: list[Affine | None] = []
    for scale, shift in flat:
        if scale is None or shift is None:
            directions.append(None)
            continue
        arranged = arrange(shift)
        directions.append(
            Affine(arrange(scale).nan_to_num(nan=1.0), arranged.nan_to_num(nan=0.0))
        )
    gauge = Gauge(directions[0], directions[1])
    if (
        invented is not None
        and gauge.has_shift
        and bool(invented.any())
        and any(
            bool((d.shift.expand(invented.shape)[~invented] != 0).any())
            and len(gauge.depends_on) > 1
            for d in directions
            if d is not None
        )
    ):
        raise Refusal(f"{node.label} pads with zeros, where a shift would be missing")
    return gauge

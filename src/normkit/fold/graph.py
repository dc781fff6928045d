"""The traced network: values, the slots that hold parameters, and the nodes between.

One graph for every front end: a torch module run once, an exported program, an ONNX
file. The nodes' kinds, and what each can bear, are in `nodes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from normkit.errors import NormkitError
from normkit.fold.gauge import Gauge

if TYPE_CHECKING:
    from normkit.fold.nodes import Node

__all__ = ["Gauges", "Graph", "Refusal", "Slot", "Value"]


class Refusal(NormkitError):  # noqa: N818 - an answer, not a failure
    """Why a change of gauge cannot be borne, in words for the ledger."""


@dataclass(eq=False, repr=False)
class Slot:
    """One place that holds a parameter or a constant of the network.

    Attributes:
        name: As a person finds it, e.g. `layer1.0.conv1.weight`.
        tensor: What it holds now; None while it is empty (a bias that a fold may
            create).
        locked: Why it must not be edited; empty if it may.
        readers: The nodes whose result depends on it.
    """

    name: str
    tensor: Tensor | None
    locked: str = ""
    readers: list[Node] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<Slot {self.name}>"


@dataclass(eq=False, repr=False)
class Value:
    """One tensor of the network, at one moment of its life.

    Attributes:
        shape: Its shape in the traced run.
        producer: The node that made it; None for an input of the model.
        readers: The nodes that read it.
        pinned: Why it must stay what it is; empty if it need not.
        constant: What it holds, if it depends neither on the model's inputs nor on
            a slot that may be edited.
        roots: The slots it is computed from, if from slots alone.
        alias_group: Values with the same number share memory.
    """

    shape: tuple[int, ...]
    producer: Node | None = None
    readers: list[Node] = field(default_factory=list)
    pinned: str = ""
    constant: Tensor | None = None
    roots: tuple[Slot, ...] = ()
    alias_group: int = -1

    @property
    def is_fixed(self) -> bool:
        """Whether it is the same in every run of the model."""
        return self.constant is not None or bool(self.roots)

    @property
    def name(self) -> str:
        """What a person calls it."""
        if self.producer is None:
            return "the model's input"
        return f"the output of {self.producer.label}"

    def __repr__(self) -> str:
        return f"<Value {self.shape}, {self.name}>"


@dataclass(eq=False, repr=False)
class Graph:
    """All nodes in the order in which they ran.

    Attributes:
        nodes: In execution order, which is a topological order.
        inputs: The values that came from outside.
        outputs: The values that the model returned.
        writes: (position in `nodes`, alias group) of each in-place write.
    """

    nodes: list[Node] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    writes: list[tuple[int, int]] = field(default_factory=list)


class Gauges(dict[Value, Gauge]):
    """The gauges settled so far; a value without one is as it was."""

    def of(self, value: Value) -> Gauge:
        """The gauge of `value`, the identity if none was set."""
        return self.get(value) or Gauge.identity(len(value.shape))

    def moved(self, value: Value) -> bool:
        """Whether `value` is stored as something else than it was."""
        gauge = self.get(value)
        return gauge is not None and not gauge.is_identity

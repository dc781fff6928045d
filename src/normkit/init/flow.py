"""Who feeds whom in a model, as steps between values, and what theory makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from normkit.init.theory import kept_gradient, kept_signal

__all__ = ["Flow", "Step", "ratio"]


@dataclass
class Step:
    """One operation between values.

    Attributes:
        kind: "linear", "activation", "norm", "add", "opaque" (attention, an RNN: linear
            maps inside that are not followed) or "other".
        name: Of the layer, or of the function.
        inputs: Numbers of the values that go in.
        output: Number of the value that comes out.
        before: Mean square of the first input, as measured.
        after: Mean square of the output, as measured.
        function: Of an activation: itself, on a tensor.
        gradient: Mean square of the gradient of the output, once measured.
        shape: Of the output.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    before: float
    after: float
    function: Callable[[Tensor], Tensor] | None = None
    gradient: float | None = None
    shape: tuple[int, ...] = ()


@dataclass
class Flow:
    """The steps of one run, in order.

    Attributes:
        steps: The steps.
        sources: Mean square of each value that no step made, by its number.
        outputs: Numbers of the values that the model returned.
    """

    steps: list[Step] = field(default_factory=list)
    sources: dict[int, float] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()

    def following_activation(self, name: str) -> Step | None:
        """The activation that the outputs of a linear map reach first, if one.

        Through normalizations, sums, pooling and reshaping, not through another map.
        """
        reached = {
            s.output for s in self.steps if s.kind == "linear" and s.name == name
        }
        for step in self.steps:
            if not reached.intersection(step.inputs):
                continue
            if step.kind == "activation":
                return step
            if step.kind not in ("linear", "opaque"):
                reached.add(step.output)
        return None

    def order(self) -> list[str]:
        """Names of the linear maps in the order of their first calls."""
        names = [step.name for step in self.steps if step.kind == "linear"]
        return list(dict.fromkeys(names))

    def branch_ends(self) -> list[Step]:
        """The last linear map or normalization of each residual branch.

        At a sum of two values, one is the branch if more layers were run for it alone
        than for the other alone; without such a difference neither is.
        """
        made_by: dict[int, frozenset[int]] = {}
        last: dict[int, Step | None] = {}
        ends: list[Step] = []
        for index, step in enumerate(self.steps):
            past = frozenset[int]().union(*(made_by.get(v, ()) for v in step.inputs))
            latest = next((last.get(v) for v in step.inputs if last.get(v)), None)
            if step.kind in ("linear", "norm", "opaque"):
                past, latest = past | {index}, step
            elif step.kind == "activation":
                latest = None
            elif step.kind == "add" and len(step.inputs) == 2:
                one, two = (made_by.get(v, frozenset()) for v in step.inputs)
                longer = len(one - two) - len(two - one)
                end = last.get(step.inputs[0 if longer > 0 else 1])
                if longer and one & two and end is not None:
                    ends.append(end)
                latest = None
            made_by[step.output], last[step.output] = past, latest
        return ends

    def predicted(
        self, forward: Mapping[str, float], backward: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Mean squares of each linear map's output and of its gradient, by theory.

        Args:
            forward: fan_in·Var[w] by name.
            backward: fan_out·Var[w] by name.

        Returns:
            Of the first call of each map, signal and gradient; the gradient relative to
            that of the last map that runs. Norms, sums and activations are followed by
            theory, other operations by what they were measured to do.
        """
        q = dict(self.sources)
        for step in self.steps:
            first = q.get(step.inputs[0], step.before)
            if step.kind == "linear":
                q[step.output] = forward.get(step.name, 1.0) * first
            elif step.kind == "activation" and step.function is not None:
                q[step.output] = kept_signal(step.function, first)
            elif step.kind == "norm":
                q[step.output] = step.after
            elif step.kind == "add":
                q[step.output] = sum(q.get(value, 0.0) for value in step.inputs)
            else:
                q[step.output] = first * ratio(step.after, step.before)
        g: dict[int, float] = dict.fromkeys(self.outputs, 1.0)
        for step in reversed(self.steps):
            here = g.get(step.output)
            if here is None:
                continue
            first = q.get(step.inputs[0], step.before)
            if step.kind == "linear":
                factor = backward.get(step.name, 1.0)
            elif step.kind == "activation" and step.function is not None:
                factor = kept_gradient(step.function, first)
            elif step.kind == "norm":
                factor = ratio(step.after, first)
            elif step.kind == "add":
                factor = 1.0
            else:
                factor = ratio(step.after, step.before)
            for value in step.inputs:
                g[value] = g.get(value, 0.0) + here * factor
        signal: dict[str, float] = {}
        gradient: dict[str, float] = {}
        maps = [step for step in self.steps if step.kind == "linear"]
        scale = g.get(maps[-1].output, math.nan) if maps else math.nan
        for step in maps:
            signal.setdefault(step.name, q[step.output])
            gradient.setdefault(step.name, ratio(g.get(step.output, math.nan), scale))
        return signal, gradient

    def measured(self) -> tuple[dict[str, float], dict[str, float]]:
        """The same, as measured; maps whose gradient was not have none."""
        signal: dict[str, float] = {}
        gradient: dict[str, float] = {}
        maps = [step for step in self.steps if step.kind == "linear"]
        scale = maps[-1].gradient if maps else None
        for step in maps:
            signal.setdefault(step.name, step.after)
            if step.gradient is not None and scale:
                gradient.setdefault(step.name, step.gradient / scale)
        return signal, gradient


def ratio(a: float, b: float) -> float:
    """The quotient a/b; nothing of nothing is 0."""
    return a / b if b else (0.0 if a == 0 else math.nan)

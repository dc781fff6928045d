"""Graph of a model's signals: steps between values, measured and predicted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit.init.theory import kept_gradient, kept_signal

__all__ = ["SignalGraph", "Step", "is_homogeneous", "ratio"]


# Functions that multiply by a matrix. Where one is no linear map known by name, as in
# transformers' Conv1D, what came before it does not end the branch.
PRODUCTS = frozenset(("linear", "addmm", "mm", "matmul", "einsum", "tensordot"))

# Operations that send a gradient to the largest of their inputs alone.
PICKING = frozenset(
    (
        *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d"),
        *("adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "max", "maximum"),
    )
)


@dataclass
class Step:
    """One operation between values.

    Attributes:
        kind: "linear", "activation", "norm", "add", "opaque" (attention, an RNN: linear
            maps inside that are not followed) or "other".
        name: Name of the layer, or of the function.
        inputs: Numbers of the values that go in.
        output: Number of the value that comes out.
        before: Mean square of the first input, as measured.
        after: Mean square of the output, as measured.
        function: The activation, as a function of a tensor.
        gradient: Mean square of the gradient of the output, once measured.
        kept: Mean square of the gradient that each input receives, per that of the
            output, as measured; None where it was not.
        is_nonnegative: Whether the first input has no negative value.
        mean: Mean of the first input, per root of its mean square.
        inside: Share of the products of a linear map that meet values and no padding,
            for the output and for the gradient of the input.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    before: float
    after: float
    function: Callable[[Tensor], Tensor] | None = None
    gradient: float | None = None
    kept: tuple[float | None, ...] = ()
    is_nonnegative: bool = False
    mean: float = 0.0
    inside: tuple[float, float] = (1.0, 1.0)

    def activated(
        self, mean_square: float, *, is_nonnegative: bool, mean: float = 0.0
    ) -> float:
        """Return the mean square after the activation.

        By theory for normal inputs; where those are not negative and the activation is
        the identity up to a factor there, as ReLU after ReLU, by that factor.
        """
        assert self.function is not None
        if is_nonnegative and is_homogeneous(self.function):
            return self._slope_squared() * mean_square
        mean *= math.sqrt(mean_square)
        return kept_signal(self.function, mean_square, mean=mean)

    def kept_by_theory(self, mean_square: float) -> float:
        """Return what the activation keeps of the mean square of a gradient."""
        assert self.function is not None
        if self.is_nonnegative and is_homogeneous(self.function):
            return self._slope_squared()
        mean = self.mean * math.sqrt(mean_square)
        return kept_gradient(self.function, mean_square, mean=mean)

    def is_measured(self, picked: frozenset[int]) -> bool:
        """Return whether theory does not say what the step keeps of a gradient.

        Nor of an activation before a choice of the largest: positive values are chosen,
        of which a ReLU keeps the whole gradient.
        """
        if self.kind == "activation":
            return self.output in picked
        return self.kind in ("norm", "opaque", "other")

    def _slope_squared(self) -> float:
        assert self.function is not None
        return float(self.function(torch.ones(1, dtype=torch.float64)).square())


@dataclass
class SignalGraph:
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
        """Return the activation that the outputs of a linear map reach first.

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

    def shared(self) -> frozenset[int]:
        """Return the values that several steps read."""
        readers = Counter(v for step in self.steps for v in set(step.inputs))
        return frozenset(value for value, count in readers.items() if count > 1)

    def picked(self) -> frozenset[int]:
        """Return the values of which an operation chooses the largest."""
        choices = (step for step in self.steps if step.name in PICKING)
        return frozenset(value for step in choices for value in step.inputs)

    def _coherence(self) -> dict[int, float]:
        """Return the measured gradient of shared values per sum of their readers'.

        1 where what the readers send is uncorrelated, as theory takes it to be.
        """
        shared, sent = self.shared(), dict[int, float]()
        for step in self.steps:
            if step.gradient is None:
                continue
            known = (1.0,) * len(step.inputs) if step.kind == "add" else step.kept
            for value, kept in zip(step.inputs, known, strict=False):
                kept = math.nan if kept is None else kept
                sent[value] = sent.get(value, 0.0) + kept * step.gradient
        return {
            step.output: step.gradient / sent[step.output]
            for step in self.steps
            if step.output in shared and step.gradient and sent.get(step.output, 0) > 0
        }

    def order(self) -> list[str]:
        """Return the names of the linear maps in the order of their first calls."""
        names = [step.name for step in self.steps if step.kind == "linear"]
        return list(dict.fromkeys(names))

    def branch_ends(self) -> list[Step]:
        """Return the last linear map or normalization of each residual branch.

        At a sum of two values of common origin, one is the branch if more layers were
        run for it alone than for the other alone, and for that no more than a
        projection and its norm; without such a difference neither is.
        """
        # What a value was made by: the indices of layers, and sources as negatives.
        made_by = {value: frozenset([-value]) for value in self.sources}
        last: dict[int, Step | None] = {}
        ends: list[Step] = []
        for index, step in enumerate(self.steps):
            past = frozenset[int]().union(*(made_by.get(v, ()) for v in step.inputs))
            ends_here = {id(e): e for v in step.inputs if (e := last.get(v))}
            # Of two that are put side by side, neither alone ends the branch; one at 0
            # whose other reader is a norm would send that norm constants.
            latest = next(iter(ends_here.values())) if len(ends_here) == 1 else None
            if step.kind in ("linear", "norm", "opaque"):
                past, latest = past | {index}, step
            elif step.kind == "activation" or step.name in PRODUCTS:
                # Behind an activation, or a map of a class that is not followed.
                latest = None
            elif step.kind == "add" and len(step.inputs) == 2:
                one, two = (made_by.get(v, frozenset()) for v in step.inputs)
                longer = len(one - two) - len(two - one)
                end = last.get(step.inputs[0 if longer > 0 else 1])
                shortcut = min(len(one - two), len(two - one))
                if longer and one & two and shortcut <= 2 and end is not None:
                    ends.append(end)
                latest = None
            made_by[step.output], last[step.output] = past, latest
        return ends

    def predicted(
        self, forward: Mapping[str, float], backward: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return the mean squares of each map's output and gradient, by theory.

        Args:
            forward: fan_in·Var[w] by name.
            backward: fan_out·Var[w] by name.

        Returns:
            Signal and gradient of the first call of each map; the gradient relative to
            that of the last map that runs. Maps and activations are followed by theory,
            with what padding takes from a convolution. Norms and other operations keep
            of a gradient what they were measured to keep, and the gradients that meet
            at a value add up as they were measured to. A map whose
            number is unknown is left out; `reason_unknown` says why.
        """
        q = dict(self.sources)
        for step in self.steps:
            first = q.get(step.inputs[0], step.before)
            if step.kind == "linear":
                q[step.output] = forward.get(step.name, 1.0) * step.inside[0] * first
            elif step.kind == "activation" and step.function is not None:
                q[step.output] = step.activated(
                    first, is_nonnegative=step.is_nonnegative, mean=step.mean
                )
            elif step.kind == "norm":
                q[step.output] = step.after
            elif step.kind == "add":
                q[step.output] = sum(q.get(value, 0.0) for value in step.inputs)
            else:
                q[step.output] = first * ratio(step.after, step.before)
        g: dict[int, float] = dict.fromkeys(self.outputs, 1.0)
        coherence, picked = self._coherence(), self.picked()
        for step in reversed(self.steps):
            if step.output not in g:
                continue
            g[step.output] *= coherence.get(step.output, 1.0)
            here = g[step.output]
            first = q.get(step.inputs[0], step.before)
            if step.kind == "linear":
                factor = backward.get(step.name, 1.0) * step.inside[1]
            elif step.kind == "activation" and step.function is not None:
                factor = step.kept_by_theory(first)
            elif step.kind == "add":
                factor = 1.0
            else:
                factor = ratio(step.after, step.before)
            kept: tuple[float | None, ...] = (None,) * len(step.inputs)
            if step.kept and step.is_measured(picked):
                kept = step.kept
            for value, own in zip(step.inputs, kept, strict=True):
                # Of a product each factor's gradient has the size of the other's.
                g[value] = g.get(value, 0.0) + here * (factor if own is None else own)
        signal: dict[str, float] = {}
        gradient: dict[str, float] = {}
        maps = [step for step in self.steps if step.kind == "linear"]
        scale = g.get(maps[-1].output, math.nan) if maps else math.nan
        for step in maps:
            signal.setdefault(step.name, q[step.output])
            gradient.setdefault(step.name, ratio(g.get(step.output, math.nan), scale))
        return _numbers(signal), _numbers(gradient)

    def reason_unknown(self) -> str:
        """Return why `predicted` leaves maps out, for the report."""
        makers = {
            step.name: None
            for step in self.steps
            if step.kind in ("other", "opaque")
            and math.isnan(ratio(step.after, step.before))
        }
        if makers:
            return (
                f"predicted as - past {', '.join(makers)}: theory has no factor where "
                "inputs are 0 and outputs are not"
            )
        return (
            "predicted as -: no path from the layer, or from the last one, to the "
            "output was followed"
        )

    def measured(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the same as measured; a map whose gradient was not has none."""
        signal: dict[str, float] = {}
        gradient: dict[str, float] = {}
        maps = [step for step in self.steps if step.kind == "linear"]
        scale = maps[-1].gradient if maps else None
        for step in maps:
            signal.setdefault(step.name, step.after)
            if step.gradient is not None and scale:
                gradient.setdefault(step.name, step.gradient / scale)
        return signal, gradient


def _numbers(found: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if not math.isnan(value)}


def is_homogeneous(function: Callable[[Tensor], Tensor]) -> bool:
    """Return whether φ(cz) = c·φ(z) for c > 0, as for ReLU and leaky ReLU."""
    z = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64)
    with torch.no_grad():
        return bool(torch.allclose(function(4 * z), 4 * function(z), rtol=1e-9))


def ratio(a: float, b: float) -> float:
    """Return a/b; 0/0 is 0."""
    return a / b if b else (0.0 if a == 0 else math.nan)

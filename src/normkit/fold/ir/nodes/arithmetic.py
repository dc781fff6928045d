"""Nodes that add and multiply, element by element."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit.fold.ir.gauge import Gauge, close, compact, fit, storing, with_rank
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
from normkit.fold.ir.nodes.rules import agree, carry, stored_direction, unchanged

__all__ = ["Add", "Gate", "Quotient", "Scale"]


@dataclass(eq=False, repr=False)
class Add(Node):
    """Σ factorᵢ·inputᵢ + constant, with broadcasting.

    Attributes:
        factors: One per input.
        constant: A tensor or number that the code adds, float64.
    """

    factors: list[float] = field(default_factory=list)
    constant: Tensor | None = None

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Give every summand one scale; the shifts add up."""
        if not self.is_touched(gauges):
            return self._last_unknown_stays(gauges)
        y = self.outputs[0]
        terms = self._terms()
        known = [v for v in terms if v in gauges]
        unknown = [v for v in terms if v not in gauges]
        if y in gauges:
            return self._from_output(gauges, terms, known, unknown)
        scale = self._common_scale(gauges, known)
        total = self._sum_of_shifts(gauges, terms, known)
        alternatives: list[Alternative] = []
        if bool((scale == 1).all()):
            for chosen in unknown:
                shifts = {chosen: -total / terms[chosen]}
                alternatives += self._shared(scale, shifts, unknown, unchanged(y))
        shift = total - (scale - 1) * self._constant()
        alternatives += self._shared(scale, {}, unknown, {y: storing(scale, shift)})
        if not alternatives:
            raise Refusal(f"{self.label} broadcasts the other summand")
        return alternatives

    @property
    def shifts_a_parameter(self) -> bool:
        """True if it is ±w + c of one fixed tensor: Gemma's 1 + weight."""
        return (
            len(self.inputs) == 1
            and self.inputs[0].is_fixed
            and self.factors[0] != 0
            and self.inputs[0].shape == self.outputs[0].shape
        )

    def read(self, value: Value) -> Tensor:
        """Return ±w + c, if that is all it is."""
        if not self.shifts_a_parameter:
            return super().read(value)
        return self.factors[0] * read(self.inputs[0]) + self._constant()

    def edit_for(self, value: Value, new: Tensor, label: str) -> dict[Slot, Tensor]:
        """Return the edit of w."""
        if not self.shifts_a_parameter:
            return super().edit_for(value, new, label)
        held = (new - self._constant()) / self.factors[0]
        return edit_value(self.inputs[0], held, label)

    def _from_output(
        self,
        gauges: Gauges,
        terms: dict[Value, float],
        known: list[Value],
        unknown: list[Value],
    ) -> list[Alternative]:
        y = self.outputs[0]
        out = stored_direction(gauges.of(y), self.label)
        scale = out.scale
        if known and not close(self._common_scale(gauges, known), scale):
            raise Refusal(
                f"{self.label} adds {known[0].name}, which would need the same scale"
            )
        rest = out.shift + (scale - 1) * self._constant()
        rest = rest - self._sum_of_shifts(gauges, terms, known)
        if not unknown:
            size = float(out.shift.abs().amax()) + 1.0
            if bool((rest.abs() > 1e-11 * size).any()):
                raise Refusal(f"{self.label} adds shifts that do not cancel")
            return NOTHING_MORE
        alternatives: list[Alternative] = []
        for chosen in unknown:
            shifts = {chosen: rest / terms[chosen]}
            alternatives += self._shared(scale, shifts, unknown, {})
            if not bool((rest != 0).any()):
                break
        if not alternatives:
            raise Refusal(f"{self.label} broadcasts one of its summands")
        return alternatives

    def _shared(
        self,
        scale: Tensor,
        shifts: dict[Value, Tensor],
        unknown: list[Value],
        more: Alternative,
    ) -> list[Alternative]:
        """Return the common scale for each unknown summand, if it fits their shapes."""
        wanted = dict(more)
        for value in unknown:
            fitted = fit(storing(scale, shifts.get(value)), value.shape)
            if fitted is None:
                return []
            wanted[value] = fitted
        return [wanted]

    def _terms(self) -> dict[Value, float]:
        terms: dict[Value, float] = {}
        for value, factor in zip(self.inputs, self.factors, strict=True):
            terms[value] = terms.get(value, 0.0) + factor
        if any(factor == 0 for factor in terms.values()):
            raise Refusal(f"{self.label} cancels one of its summands")
        return terms

    def _common_scale(self, gauges: Gauges, known: list[Value]) -> Tensor:
        scales = [stored_direction(gauges.of(v), self.label).scale for v in known]
        rank = len(self.outputs[0].shape)
        scales = [with_rank(scale, rank) for scale in scales]
        for value, scale in zip(known[1:], scales[1:], strict=True):
            if not close(scale, scales[0]):
                raise Refusal(
                    f"{self.label} adds {known[0].name} and {value.name}, "
                    "which would need the same scale"
                )
        return scales[0]

    def _sum_of_shifts(
        self, gauges: Gauges, terms: dict[Value, float], known: list[Value]
    ) -> Tensor:
        rank = len(self.outputs[0].shape)
        total = torch.zeros((1,) * rank, dtype=torch.float64)
        for value in known:
            shift = stored_direction(gauges.of(value), self.label).shift
            total = total + terms[value] * with_rank(shift, rank)
        return total

    def _constant(self) -> Tensor:
        rank = len(self.outputs[0].shape)
        if self.constant is None:
            return torch.zeros((1,) * rank, dtype=torch.float64)
        return compact(with_rank(self.constant, rank))

    def _last_unknown_stays(self, gauges: Gauges) -> list[Alternative]:
        around = {*self.inputs, *self.outputs}
        if len(around - set(gauges)) == 1 and len(around) > 1:
            (value,) = around - set(gauges)
            return [unchanged(value)]
        return NOTHING_MORE


@dataclass(eq=False, repr=False)
class Scale(Node):
    """factor·x with a factor that is the same in every run.

    Attributes:
        factor: The tensor or number, float64, if the code fixes it.
        weight: The parameter that holds it (LayerScale), if one does.
    """

    factor: Tensor | None = None
    weight: Value | None = None

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Use that stored_y = s·c·x + t comes from stored_x = s·x + t/c."""
        x, y = self.inputs[0], self.outputs[0]
        if not self.is_touched(gauges):
            return NOTHING_MORE
        rank, factor = len(y.shape), with_rank(self._factor(), len(y.shape))
        if x in gauges and y in gauges:
            self.edits(gauges)
            return NOTHING_MORE
        alternatives: list[Alternative] = []
        known = gauges.of(x if x in gauges else y)
        if x in gauges:
            pushed = known.map(lambda t: with_rank(t, rank))
            to_stored = stored_direction(pushed, self.label)
            shift = compact(to_stored.shift * factor)
            wanted: Gauge | None = storing(to_stored.scale, shift)
            other = y
        else:
            to_stored = stored_direction(known, self.label)
            shifted = to_stored.shift != 0
            if bool((shifted & (factor == 0)).any()):
                raise Refusal(f"{self.label} multiplies by 0 what would have to shift")
            shift = torch.where(shifted, to_stored.shift / factor, 0.0)
            wanted = fit(storing(to_stored.scale, shift), x.shape)
            other = x
        if wanted is not None:
            alternatives.append({other: wanted})
        if self.weight is not None and not known.has_shift:
            alternatives.append(unchanged(other))
        if not alternatives:
            raise Refusal(f"{self.label} broadcasts its input")
        return alternatives

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """Return the factor c·s_y/s_x, if it has to change."""
        if not self.is_touched(gauges):
            return {}
        rank = len(self.outputs[0].shape)
        factor = with_rank(self._factor(), rank)
        before = stored_direction(gauges.of(self.inputs[0]), self.label)
        after = stored_direction(gauges.of(self.outputs[0]), self.label)
        if bool((before.scale == 0).any()):
            raise Refusal(f"{self.label} cannot invert a scale of 0")
        new = factor * after.scale / with_rank(before.scale, rank)
        left, right = torch.broadcast_tensors(
            new * with_rank(before.shift, rank), after.shift
        )
        if not torch.allclose(left, right, rtol=1e-11, atol=1e-12):
            raise Refusal(f"{self.label} has no shift of its own")
        if close(new, factor):
            return {}
        if self.weight is None:
            raise Refusal(f"{self.label} has a fixed factor")
        held = read(self.weight)
        small = compact(new)
        if fit(storing(small), held.shape) is None:
            raise Refusal(f"{self.label} has one factor for what would have to differ")
        while small.dim() > held.dim():
            small = small.squeeze(0)
        return edit_value(self.weight, small.expand(held.shape).clone(), self.label)

    def _factor(self) -> Tensor:
        if self.weight is not None:
            return read(self.weight)
        assert self.factor is not None
        return self.factor


@dataclass(eq=False, repr=False)
class Gate(Node):
    """The product of two tensors that both depend on the model's input."""

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Let a scale through, to one factor, and no shift."""
        if not self.is_touched(gauges):
            return NOTHING_MORE
        y = self.outputs[0]
        for value in (*self.inputs, y):
            if gauges.of(value).has_shift:
                raise Refusal(f"{self.label} lets a scale through, not a shift")
        if self.inputs[0] is self.inputs[1]:
            raise Refusal(f"{self.label} multiplies {self.inputs[0].name} by itself")
        rank = len(y.shape)
        known = [v for v in self.inputs if v in gauges]
        unknown = [v for v in self.inputs if v not in gauges]
        product = torch.ones((1,) * rank, dtype=torch.float64)
        for value in known:
            scale = stored_direction(gauges.of(value), self.label).scale
            product = product * with_rank(scale, rank)
        if y not in gauges:
            return [unchanged(*unknown) | {y: storing(product)}]
        after = stored_direction(gauges.of(y), self.label).scale
        if not unknown:
            if not close(product, after):
                raise Refusal(f"{self.label} has no factor of its own")
            return NOTHING_MORE
        if bool((product == 0).any()):
            raise Refusal(f"{self.label} cannot invert a scale of 0")
        rest = after / product
        alternatives: list[Alternative] = []
        for chosen in unknown:
            fitted = fit(storing(rest), chosen.shape)
            if fitted is not None:
                others = unchanged(*(v for v in unknown if v is not chosen))
                alternatives.append(others | {chosen: fitted})
        if not alternatives:
            raise Refusal(f"{self.label} broadcasts both factors")
        return alternatives


@dataclass(eq=False, repr=False)
class Quotient(Node):
    """x / r of two tensors that both depend on the model's input."""

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Let a scale of x through, and no change of r."""
        if not self.is_touched(gauges):
            return NOTHING_MORE
        x, divisor, y = *self.inputs, self.outputs[0]
        if gauges.changed(divisor):
            raise Refusal(f"{self.label} divides by {divisor.name}")
        if gauges.of(x if x in gauges else y).has_shift:
            raise Refusal(f"{self.label} lets a scale through, not a shift")
        wanted = unchanged(divisor)
        carry(self, x, y, wanted, gauges)
        return agree(self, wanted, gauges)

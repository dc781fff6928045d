"""What each kind of node can bear: the rules by which a gauge crosses the network.

A rule answers one question. Given the gauges already set on the values around a
node, which gauges on the values not yet set let the folded node compute the same
network? It answers with a list of alternatives, each a dict of gauges to add; one
empty dict says that nothing more is needed. If there is none it raises `Refusal` with
the reason. A rule that relies on a value staying as it was says so by setting the
identity there.

    linear, norms     any map per channel, by editing weight and bias
    moves             a map is carried along with the elements it belongs to
    add               Σ fᵢ·xᵢ + c: one scale for all, the shifts add up
    scale, gate       a factor: constants pass both, a dynamic factor the scale only
    relu, max, mean   what they commute with
    attention         a map of v's features, since rows of a softmax sum to 1
    anything else     nothing
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.fold.algebra import WeightLayout, fold_input_affine, fold_output_affine
from normkit.fold.gauge import Gauge, compact, per_channel
from normkit.fold.graph import Gauges, Refusal, Slot, Value

__all__ = [
    "Add",
    "BatchNorm",
    "Gate",
    "Linear",
    "Mix",
    "Move",
    "Node",
    "Opaque",
    "Scale",
    "Stored",
    "Table",
    "Tail",
    "Through",
]

Alternative = dict[Value, Gauge]
NOTHING_MORE: list[Alternative] = [{}]


@dataclass(eq=False)
class Node:
    """One operation of the traced network.

    Attributes:
        label: As a person finds it: `'layer1.conv2'`, or `add in 'layer1'`.
        inputs: The values it reads, parameters excepted.
        outputs: The values it makes.
        position: Its place in the order of execution.
    """

    label: str
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    position: int = -1

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Which gauges on the values not yet set make the node right again."""
        raise NotImplementedError

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """What its slots must hold under `gauges`, float64."""
        return {}

    def is_touched(self, gauges: Gauges) -> bool:
        """Whether any value around it is stored as something else."""
        return any(gauges.moved(value) for value in (*self.inputs, *self.outputs))


@dataclass(eq=False)
class Opaque(Node):
    """An operation about which nothing is known, or that commutes with nothing."""

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Everything around it must stay as it was."""
        for value in self.inputs:
            if gauges.moved(value):
                raise Refusal(
                    f"{self.label} reads {value.name} and bears no change of it"
                )
        for value in self.outputs:
            if gauges.moved(value):
                raise Refusal(f"nothing can be moved into {self.label}")
        return NOTHING_MORE


@dataclass(eq=False)
class Stored(Node):
    """A parameter read as a tensor of the network (a position embedding, a token)."""

    slot: Slot | None = None

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Any map, by editing the parameter."""
        if self.is_touched(gauges):
            _editable(self.slot, self.label)
            _stored_direction(gauges.of(self.outputs[0]), self.label)
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """The parameter in its new gauge."""
        if self.slot is None or not self.is_touched(gauges):
            return {}
        to_stored = _stored_direction(gauges.of(self.outputs[0]), self.label)
        return {self.slot: to_stored(current(self.outputs[0]))}


@dataclass(eq=False)
class Linear(Node):
    """y = alpha·W·x + beta·b with a parameter W, over one channel dimension.

    Attributes:
        weight: W; a slot, or moved elements of one.
        bias: b, or None.
        bias_slot: Where a bias can be created if there is none.
        layout: The order of the axes of W.
        input_dim: The dimension of x that W contracts.
        output_dim: The dimension of y that it makes.
        sees_all_taps: Whether every output position sees the whole kernel, which
            zero padding forbids.
    """

    weight: Value | None = None
    bias: Value | None = None
    bias_slot: Slot | None = None
    layout: WeightLayout = field(default_factory=lambda: WeightLayout(("O", "I")))
    input_dim: int = -1
    output_dim: int = -1
    sees_all_taps: bool = True
    alpha: float = 1.0
    beta: float = 1.0

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Any map of its output channels; of its input channels if all taps count."""
        if self.is_touched(gauges):
            self._maps(gauges)
            self.edits(gauges)
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """W and b with both maps folded in."""
        if not self.is_touched(gauges):
            return {}
        before, after = self._maps(gauges)
        assert self.weight is not None
        weight = self.alpha * current(self.weight)
        bias = held(self.bias, self.bias_slot)
        bias = None if bias is None else self.beta * bias
        weight, new_bias = fold_input_affine(weight, bias, before, self.layout)
        weight, new_bias = fold_output_affine(weight, new_bias, after, self.layout)
        edits = store(self.weight, weight / self.alpha, self.label)
        # Created even where it comes out 0, so that which parameters a folded model
        # has does not hang on the numbers in it; not for a mere change of scale.
        is_needed = bool((new_bias != 0).any())
        is_needed |= self.bias_slot is not None and gauges.moved(self.outputs[0])
        if bias is not None or is_needed:
            if self.beta == 0:
                raise Refusal(f"{self.label} multiplies its bias by 0")
            new_bias = new_bias / self.beta
            edits |= put(self.bias, self.bias_slot, new_bias, self.label, "bias")
        return edits

    def _maps(self, gauges: Gauges) -> tuple[Affine, Affine]:
        assert self.weight is not None
        x, y = self.inputs[0], self.outputs[0]
        before, after = gauges.of(x), gauges.of(y)
        shape = self.weight.shape
        input_dim = self.input_dim % len(x.shape)
        output_dim = self.output_dim % len(y.shape)
        _needs_channels_only(after, output_dim, self.label, "maps its output")
        _needs_channels_only(before, input_dim, self.label, "contracts")
        if before.has_shift and not self.sees_all_taps:
            raise Refusal(
                f"{self.label} pads with zeros, where a shift of its input would "
                "have to be padded too"
            )
        return (
            per_channel(
                _true_direction(before, self.label),
                input_dim,
                self.layout.input_channels(shape),
            ),
            per_channel(
                _stored_direction(after, self.label),
                output_dim,
                self.layout.output_channels(shape),
            ),
        )


@dataclass(eq=False)
class BatchNorm(Node):
    """(x − mean)/√(var + eps)·weight + bias per channel, with fixed statistics.

    Attributes:
        mean: The statistics, fixed values; None is 0.
        var: None is 1.
        weight: The learned affine, or None.
        bias: The learned affine, or None.
        weight_slot: Where a weight can be created if there is none.
        bias_slot: Where a bias can be created if there is none.
        eps: Added to `var`.
        channel_dim: The dimension of x that the channels lie along.
        locked: Why it is no fixed map; empty if it is one.
        is_gone: Whether it was folded: the node is then the identity.
    """

    mean: Value | None = None
    var: Value | None = None
    weight: Value | None = None
    bias: Value | None = None
    weight_slot: Slot | None = None
    bias_slot: Slot | None = None
    eps: float = 0.0
    channel_dim: int = 1
    locked: str = ""
    is_gone: bool = False

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.inputs[0].shape[self.channel_dim]

    def affine(self) -> Affine:
        """The map it is at inference, two `(C,)` vectors in float64."""
        ones = torch.ones(self.channels, dtype=torch.float64)
        var = ones if self.var is None else current(self.var)
        mean = torch.zeros_like(var) if self.mean is None else current(self.mean)
        inv_std = torch.rsqrt(var + self.eps)
        weight = held(self.weight, self.weight_slot)
        bias = held(self.bias, self.bias_slot)
        scale = inv_std if weight is None else weight * inv_std
        shift = -mean * scale
        return Affine(scale, shift if bias is None else shift + bias)

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Any map per channel on either side, composed into weight and bias."""
        if self.is_gone:
            return _carry_one(self, gauges)
        if self.is_touched(gauges):
            if self.locked:
                raise Refusal(f"{self.label} {self.locked}")
            self.edits(gauges)
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """The weight and bias that make the composed map with the same statistics."""
        if self.is_gone or not self.is_touched(gauges):
            return {}
        before = gauges.of(self.inputs[0])
        after = gauges.of(self.outputs[0])
        _needs_channels_only(before, self.channel_dim, self.label, "normalizes")
        _needs_channels_only(after, self.channel_dim, self.label, "normalizes")

        def vectors(affine: Affine) -> Affine:
            return per_channel(affine, self.channel_dim, self.channels)

        composed = (
            vectors(_true_direction(before, self.label))
            .then(self.affine())
            .then(vectors(_stored_direction(after, self.label)))
        )
        var = torch.ones_like(composed.scale)
        var = var if self.var is None else current(self.var)
        mean = torch.zeros_like(var) if self.mean is None else current(self.mean)
        weight = composed.scale * (var + self.eps).sqrt()
        bias = composed.shift + mean * composed.scale
        return {
            **put(self.weight, self.weight_slot, weight, self.label, "weight"),
            **put(self.bias, self.bias_slot, bias, self.label, "bias"),
        }


@dataclass(eq=False)
class Tail(Node):
    """A normalization by its own statistics that ends in ·weight + bias.

    Layer, group, instance and RMS norm: what follows folds into the learned affine,
    what precedes does not.

    Attributes:
        weight: The learned factor, or None.
        bias: The learned summand, or None.
        weight_slot: Where a weight can be created.
        bias_slot: Where a bias can be created; None for RMS norm.
        dims: The dimensions of the output that weight and bias run along, in order.
    """

    weight: Value | None = None
    bias: Value | None = None
    weight_slot: Slot | None = None
    bias_slot: Slot | None = None
    dims: tuple[int, ...] = ()

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Any map of its output over the dimensions of its weight."""
        x, y = self.inputs[0], self.outputs[0]
        if gauges.moved(x):
            raise Refusal(f"{self.label} measures {x.name}, which must not change")
        if gauges.moved(y):
            self.edits(gauges)
        return [{x: Gauge.identity(len(x.shape))}] if x not in gauges else NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """Weight and bias with the map of the output folded in."""
        y = self.outputs[0]
        if not gauges.moved(y):
            return {}
        after = _stored_direction(gauges.of(y), self.label)
        dims = tuple(dim % len(y.shape) for dim in self.dims)
        if not set(gauges.of(y).depends_on) <= set(dims):
            raise Refusal(
                f"{self.label} has no weight along the dimension to be mapped"
            )
        sizes = tuple(y.shape[dim] for dim in dims)

        def along(values: Tensor) -> Tensor:
            shape = [y.shape[d] if d in dims else 1 for d in range(len(y.shape))]
            return values.expand(shape).reshape(sizes)

        scale, shift = along(after.scale), along(after.shift)
        old_weight = held(self.weight, self.weight_slot)
        old_bias = held(self.bias, self.bias_slot)
        weight = scale if old_weight is None else scale * old_weight
        bias = shift if old_bias is None else scale * old_bias + shift
        edits: dict[Slot, Tensor] = {}
        if old_weight is not None or bool((weight != 1).any()):
            edits |= put(self.weight, self.weight_slot, weight, self.label, "weight")
        if old_bias is not None or bool((bias != 0).any()):
            edits |= put(self.bias, self.bias_slot, bias, self.label, "bias")
        return edits


@dataclass(eq=False)
class Table(Node):
    """Rows of a parameter picked by number: an embedding."""

    weight: Value | None = None

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Any map of the features."""
        if self.is_touched(gauges):
            self.edits(gauges)
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """The mapped rows."""
        y = self.outputs[0]
        if not gauges.moved(y):
            return {}
        gauge = gauges.of(y)
        _needs_channels_only(gauge, len(y.shape) - 1, self.label, "fills")
        assert self.weight is not None
        after = per_channel(
            _stored_direction(gauge, self.label), len(y.shape) - 1, y.shape[-1]
        )
        return store(self.weight, after(current(self.weight)), self.label)


@dataclass(eq=False)
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
            return _carry_one(self, gauges)
        known_in = [v for v in self.inputs if v in gauges]
        known_out = [v for v in self.outputs if v in gauges]
        if len(known_in) == len(set(self.inputs)) or not known_out:
            if not any(gauges.moved(v) for v in (*known_in, *known_out)):
                return NOTHING_MORE
            return _fill(self, self._pushed(gauges), gauges)
        if not any(gauges.moved(v) for v in known_out):
            wanted = {v: Gauge.identity(len(v.shape)) for v in self.inputs}
            wanted |= {v: Gauge.identity(len(v.shape)) for v in self.outputs}
            return _fill(self, wanted, gauges)
        return _fill(self, self._pulled(gauges), gauges)

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


@dataclass(eq=False)
class Add(Node):
    """Σ factorᵢ·inputᵢ + constant, with broadcasting.

    Attributes:
        factors: One per input.
        constant: A tensor or number that the code adds, float64.
    """

    factors: list[float] = field(default_factory=list)
    constant: Tensor | None = None

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """One scale for every summand; the shifts add up."""
        if not self.is_touched(gauges):
            return self._pin_if_settled(gauges)
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
            same = Gauge.identity(len(y.shape))
            for chosen in unknown:
                shifts = {chosen: -total / terms[chosen]}
                alternatives += self._shared(scale, shifts, unknown, {y: same})
        out = Affine(scale, total - (scale - 1) * self._constant())
        alternatives += self._shared(scale, {}, unknown, {y: _storing(out)})
        if not alternatives:
            raise Refusal(f"{self.label} broadcasts the other summand")
        return alternatives

    def _from_output(
        self,
        gauges: Gauges,
        terms: dict[Value, float],
        known: list[Value],
        unknown: list[Value],
    ) -> list[Alternative]:
        y = self.outputs[0]
        out = _stored_direction(gauges.of(y), self.label)
        scale = out.scale
        if known and not _close(self._common_scale(gauges, known), scale):
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
        """Each unknown summand with the common scale, if it fits their shapes."""
        wanted = dict(more)
        for value in unknown:
            shift = shifts.get(value, torch.zeros((), dtype=torch.float64))
            fitted = fit(_storing(Affine(scale, shift)), value.shape)
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
        scales = [_stored_direction(gauges.of(v), self.label).scale for v in known]
        rank = len(self.outputs[0].shape)
        scales = [_lead(scale, rank) for scale in scales]
        for value, scale in zip(known[1:], scales[1:], strict=True):
            if not _close(scale, scales[0]):
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
            shift = _stored_direction(gauges.of(value), self.label).shift
            total = total + terms[value] * _lead(shift, rank)
        return total

    def _constant(self) -> Tensor:
        rank = len(self.outputs[0].shape)
        if self.constant is None:
            return torch.zeros((1,) * rank, dtype=torch.float64)
        return compact(_lead(self.constant, rank))

    def _pin_if_settled(self, gauges: Gauges) -> list[Alternative]:
        around = {*self.inputs, *self.outputs}
        if len(around - set(gauges)) == 1 and len(around) > 1:
            (value,) = around - set(gauges)
            return [{value: Gauge.identity(len(value.shape))}]
        return NOTHING_MORE


@dataclass(eq=False)
class Scale(Node):
    """factor·x with a factor that is the same in every run.

    Attributes:
        factor: The tensor or number, float64, if the code fixes it.
        weight: Where it is held, if it is a parameter (LayerScale).
    """

    factor: Tensor | None = None
    weight: Value | None = None

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """stored_y = s·c·x + t comes from stored_x = s·x + t/c."""
        x, y = self.inputs[0], self.outputs[0]
        if not self.is_touched(gauges):
            return NOTHING_MORE
        rank, factor = len(y.shape), _lead(self._factor(), len(y.shape))
        if x in gauges and y in gauges:
            self.edits(gauges)
            return NOTHING_MORE
        alternatives: list[Alternative] = []
        known = gauges.of(x if x in gauges else y)
        if x in gauges:
            pushed = known.map(lambda t: _lead(t, rank))
            to_stored = _stored_direction(pushed, self.label)
            shift = compact(to_stored.shift * factor)
            wanted: Gauge | None = _storing(Affine(to_stored.scale, shift))
            other = y
        else:
            to_stored = _stored_direction(known, self.label)
            shifted = to_stored.shift != 0
            if bool((shifted & (factor == 0)).any()):
                raise Refusal(f"{self.label} multiplies by 0 what would have to shift")
            shift = torch.where(shifted, to_stored.shift / factor, 0.0)
            wanted = fit(_storing(Affine(to_stored.scale, compact(shift))), x.shape)
            other = x
        if wanted is not None:
            alternatives.append({other: wanted})
        if self.weight is not None and not known.has_shift:
            alternatives.append({other: Gauge.identity(len(other.shape))})
        if not alternatives:
            raise Refusal(f"{self.label} broadcasts its input")
        return alternatives

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """The factor c·s_y/s_x, if it has to change."""
        if not self.is_touched(gauges):
            return {}
        rank = len(self.outputs[0].shape)
        factor = _lead(self._factor(), rank)
        before = _stored_direction(gauges.of(self.inputs[0]), self.label)
        after = _stored_direction(gauges.of(self.outputs[0]), self.label)
        if bool((before.scale == 0).any()):
            raise Refusal(f"{self.label} cannot take back a scale of 0")
        new = factor * after.scale / _lead(before.scale, rank)
        left, right = torch.broadcast_tensors(
            new * _lead(before.shift, rank), after.shift
        )
        if not torch.allclose(left, right, rtol=1e-11, atol=1e-12):
            raise Refusal(f"{self.label} has no shift of its own")
        if _close(new, factor):
            return {}
        if self.weight is None:
            raise Refusal(f"{self.label} has a fixed factor")
        held = current(self.weight)
        small = compact(new)
        if fit(_storing(Affine(small, torch.zeros_like(small))), held.shape) is None:
            raise Refusal(f"{self.label} has one factor for what would have to differ")
        while small.dim() > held.dim():
            small = small.squeeze(0)
        return store(self.weight, small.expand(held.shape).clone(), self.label)

    def _factor(self) -> Tensor:
        if self.weight is not None:
            return current(self.weight)
        assert self.factor is not None
        return self.factor


@dataclass(eq=False)
class Gate(Node):
    """The product of two tensors that both depend on the model's input."""

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Lets a scale through, to one factor, and no shift."""
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
            scale = _stored_direction(gauges.of(value), self.label).scale
            product = product * _lead(scale, rank)
        if y not in gauges:
            wanted = {v: Gauge.identity(len(v.shape)) for v in unknown}
            return [wanted | {y: _storing(Affine(product, torch.zeros_like(product)))}]
        after = _stored_direction(gauges.of(y), self.label).scale
        if not unknown:
            if not _close(product, after):
                raise Refusal(f"{self.label} has no factor of its own")
            return NOTHING_MORE
        if bool((product == 0).any()):
            raise Refusal(f"{self.label} cannot take back a scale of 0")
        rest = after / product
        alternatives: list[Alternative] = []
        for chosen in unknown:
            fitted = fit(_storing(Affine(rest, torch.zeros_like(rest))), chosen.shape)
            if fitted is not None:
                others = {
                    v: Gauge.identity(len(v.shape)) for v in unknown if v is not chosen
                }
                alternatives.append(others | {chosen: fitted})
        if not alternatives:
            raise Refusal(f"{self.label} broadcasts both factors")
        return alternatives


@dataclass(eq=False)
class Through(Node):
    """What commutes with a map that does not change inside its windows.

    relu(s·x) = s·relu(x) for s ≥ 0; max and mean also carry a shift; a mean, any sign.

    Attributes:
        mixes: The dimensions of x over which elements are combined.
        dropped: Those of them that the output lacks.
        bears_shift: Whether f(x + t) = f(x) + t.
        bears_negative: Whether f(−x) = −f(x).
        why_no_shift: For the ledger.
    """

    mixes: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    bears_shift: bool = False
    bears_negative: bool = False
    why_no_shift: str = "lets a scale through, not a shift"

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """The same map on both sides."""
        if not self.is_touched(gauges):
            return NOTHING_MORE
        x, y = self.inputs[0], self.outputs[0]
        wanted: Alternative = {}
        if x in gauges:
            gauge = gauges[x]
            self._check(gauge)
            wanted[y] = gauge.map(self._drop)
        else:
            gauge = gauges[y].map(self._restore)
            self._check(gauge)
            wanted[x] = gauge
        return _fill(self, wanted, gauges)

    def _check(self, gauge: Gauge) -> None:
        rank = len(self.inputs[0].shape)
        mixes = {dim % rank for dim in self.mixes}
        if mixes & set(gauge.depends_on):
            raise Refusal(f"{self.label} combines elements that are mapped differently")
        if gauge.has_shift and not self.bears_shift:
            raise Refusal(f"{self.label} {self.why_no_shift}")
        if not gauge.is_positive and not self.bears_negative:
            raise Refusal(f"{self.label} lets no negative scale through")

    def _drop(self, values: Tensor) -> Tensor:
        rank = len(self.inputs[0].shape)
        for dim in sorted({d % rank for d in self.dropped}, reverse=True):
            values = values.squeeze(dim)
        return values

    def _restore(self, values: Tensor) -> Tensor:
        rank = len(self.inputs[0].shape)
        for dim in sorted({d % rank for d in self.dropped}):
            values = values.unsqueeze(dim)
        return values


@dataclass(eq=False)
class Mix(Node):
    """A·v, where A depends on the input: inputs are [v, and whatever makes A].

    Attributes:
        rows_sum_to_one: Whether A is a softmax over its last dimension.
    """

    rows_sum_to_one: bool = False

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """A map of v's last dimension, with its shift if the rows of A sum to 1."""
        v, y = self.inputs[0], self.outputs[0]
        for value in self.inputs[1:]:
            if gauges.moved(value) and value is not v:
                raise Refusal(
                    f"{self.label} reads {value.name} and bears no change of it"
                )
        if not gauges.moved(v) and not gauges.moved(y):
            return NOTHING_MORE
        if v in self.inputs[1:]:
            raise Refusal(f"{self.label} reads {v.name} twice")
        wanted: Alternative = {
            value: Gauge.identity(len(value.shape)) for value in self.inputs[1:]
        }
        gauge = gauges.of(v if v in gauges else y)
        if gauge.has_shift and not self.rows_sum_to_one:
            raise Refusal(f"{self.label} weighs rows by factors that do not sum to 1")
        if (gauge.rank - 2) in gauge.depends_on:
            raise Refusal(f"{self.label} combines elements that are mapped differently")
        if v in gauges:
            wanted[y] = gauge.map(lambda t: _lead(t, len(y.shape)))
        else:
            fitted = fit(gauge, v.shape)
            if fitted is None:
                raise Refusal(f"{self.label} broadcasts {v.name}")
            wanted[v] = fitted
        return _fill(self, wanted, gauges)


def current(value: Value) -> Tensor:
    """What a fixed value holds after the edits made so far; float64, on the CPU."""
    if value.constant is not None:
        return value.constant.to("cpu", torch.float64)
    producer = value.producer
    if isinstance(producer, Stored) and producer.slot is not None:
        assert producer.slot.tensor is not None
        return producer.slot.tensor.to("cpu", torch.float64)
    if isinstance(producer, Move):
        if producer.replay is None:
            return current(producer.inputs[0])
        outputs = producer.replay([current(v) for v in producer.inputs])
        return outputs[producer.outputs.index(value)]
    raise Refusal(f"{value.name} is computed anew in every run")


def store(value: Value, new: Tensor, label: str) -> dict[Slot, Tensor]:
    """The edit after which `value` holds `new`."""
    producer = value.producer
    if isinstance(producer, Stored):
        return {_editable(producer.slot, label): new}
    if (
        isinstance(producer, Move)
        and len(producer.inputs) == 1
        and len(producer.outputs) == 1
    ):
        source = producer.inputs[0]
        return store(source, producer.pull(new, current(source)), label)
    raise Refusal(f"the weight of {label} is computed in its forward, not held")


def held(value: Value | None, slot: Slot | None) -> Tensor | None:
    """A weight or bias as it is now: the one read, or the one created in `slot`."""
    if value is not None:
        return current(value)
    if slot is None or slot.tensor is None:
        return None
    return slot.tensor.to("cpu", torch.float64)


def put(
    value: Value | None, slot: Slot | None, new: Tensor, label: str, what: str
) -> dict[Slot, Tensor]:
    """The edit after which `held` answers `new`."""
    if value is not None:
        return store(value, new, label)
    return {_editable(slot, label, what): new}


def fit(gauge: Gauge, shape: tuple[int, ...]) -> Gauge | None:
    """`gauge` for a tensor of `shape` that is broadcast to the gauge's own."""
    extra = gauge.rank - len(shape)
    for dim in gauge.depends_on:
        if dim < extra or shape[dim - extra] == 1:
            return None
    if extra <= 0:
        return gauge
    return gauge.map(lambda t: t.reshape(t.shape[extra:]))


def _storing(affine: Affine) -> Gauge:
    scale, shift = affine.scale, affine.shift
    rank = max(scale.dim(), shift.dim())
    return Gauge.storing(
        Affine(_lead(compact(scale), rank), _lead(compact(shift), rank))
    )


def _lead(values: Tensor, rank: int) -> Tensor:
    """`values` with leading dimensions of size 1 up to `rank`."""
    return values.reshape((1,) * (rank - values.dim()) + tuple(values.shape))


def _close(left: Tensor, right: Tensor) -> bool:
    left, right = torch.broadcast_tensors(left, right)
    return torch.allclose(left, right, rtol=1e-11, atol=0.0)


def _fill(node: Node, wanted: Alternative, gauges: Gauges) -> list[Alternative]:
    """`wanted` less what is set already, which must agree."""
    more: Alternative = {}
    for value, gauge in wanted.items():
        if value not in gauges:
            more[value] = gauge
        elif not gauges[value].agrees_with(gauge):
            raise Refusal(f"{value.name} would have to be two things at {node.label}")
    return [more]


def _carry_one(node: Node, gauges: Gauges) -> list[Alternative]:
    """One input and one output, element for element."""
    x, y = node.inputs[0], node.outputs[0]
    if x in gauges:
        return _fill(node, {y: gauges[x]}, gauges)
    if y in gauges:
        return _fill(node, {x: gauges[y]}, gauges)
    return NOTHING_MORE


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


def _needs_channels_only(gauge: Gauge, dim: int, label: str, does: str) -> None:
    others = [d for d in gauge.depends_on if d != dim]
    if others:
        raise Refusal(
            f"{label} {does} along dimension {dim}, "
            f"the map changes along dimension {others[0]}"
        )


def _stored_direction(gauge: Gauge, label: str) -> Affine:
    if gauge.to_stored is None:
        raise Refusal(f"{label} cannot take back a scale of 0")
    return gauge.to_stored


def _true_direction(gauge: Gauge, label: str) -> Affine:
    if gauge.to_true is None:
        raise Refusal(f"{label} cannot take back a scale of 0")
    return gauge.to_true


def _editable(slot: Slot | None, label: str, what: str = "parameter") -> Slot:
    if slot is None:
        raise Refusal(f"{label} has no {what} to change")
    if slot.locked:
        raise Refusal(f"{slot.name} {slot.locked}")
    return slot

"""The first place where two recordings differ.

A value *agrees* if the other model computed the same numbers somewhere: by any name, in
any shape. A fold changes values on purpose (the output of a convolution before its
batch norm), so one value that the other model lacks proves nothing. Going back from
the outputs that differ, a path ends at the first value that agrees: what lies between
is the *region* in which a model departs. Its first value is where the models part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from normkit.audit.comparison import Pair, Parting
from normkit.audit.recording import Recording, Step

__all__ = ["agreeing", "gap", "gap_of", "part"]


def part(
    a: Recording, b: Recording, differing: Sequence[int], limits: Sequence[float]
) -> Parting:
    """Return where two recordings part.

    Args:
        a: The first model's run.
        b: The second model's run on the same input.
        differing: Positions of the outputs that differ.
        limits: The largest difference that counts as rounding, for each step of `a`.
    """
    same = agreeing(a, b, limits)
    back = {there: here for here, there in same.items()}
    region_a, edge = _region(a, differing, set(same))
    region_b, _ = _region(b, differing, set(back))
    place, pair, note = _place(a, b, region_a, back, limits)
    last = tuple((a.steps[i].label, b.steps[same[i]].label) for i in edge)
    return Parting(
        place=place,
        pair=pair,
        last=last,
        region_a=tuple(a.steps[i].label for i in region_a),
        region_b=tuple(b.steps[i].label for i in region_b),
        note=note,
    )


def agreeing(a: Recording, b: Recording, limits: Sequence[float]) -> dict[int, int]:
    """Return, by position in `a`, the step of `b` that computed the same numbers.

    Constant values (all zeros after a relu, say) agree by chance and count only where
    both models give them the same name.
    """
    groups: dict[int, list[int]] = {}
    for i, step in enumerate(b.steps):
        if step.values is not None and step.values.numel():
            groups.setdefault(math.prod(step.shape), []).append(i)
    prints = [_fingerprint(step) for step in b.steps]
    found: dict[int, int] = {}
    taken: set[int] = set()
    for i, step in enumerate(a.steps):
        if step.values is None or not step.values.numel():
            continue
        own = _fingerprint(step)
        room = 2 * limits[i] * _size(step.values)
        near = [
            j
            for j in groups.get(math.prod(step.shape), [])
            if not abs(prints[j] - own) > room
        ]
        names = set(step.names)
        near.sort(key=lambda j: (not names & set(b.steps[j].names), j in taken, j))
        for j in near:
            is_named = bool(names & set(b.steps[j].names))
            if _is_constant(step) and not is_named:
                continue
            if gap_of(step, b.steps[j]) <= limits[i]:
                found[i] = j
                taken.add(j)
                break
    return found


def gap_of(one: Step, other: Step) -> float:
    """Return the difference of two values; see `gap`."""
    if one.values is None or other.values is None:
        return math.inf
    return gap(one.values, other.values)


def gap(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors relative to the largest of `a`.

    inf where their shapes, integers or non-finite places differ. Without a floor for
    small values: what rounding does to them is measured.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if not a.numel():
        return 0.0
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else math.inf
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    return float((a[finite] - b[finite]).abs().max()) / _size(a)


def _size(values: Tensor) -> float:
    """Return the largest finite value; 1 if all are 0."""
    finite = values[values.isfinite()]
    return (float(finite.abs().max()) if finite.numel() else 0.0) or 1.0


def _fingerprint(step: Step) -> float:
    """Return the mean of the values; equal values have equal ones, up to rounding."""
    if step.values is None or not step.values.numel():
        return math.nan
    return float(step.values.mean())


def _is_constant(step: Step) -> bool:
    assert step.values is not None
    return step.values.numel() > 1 and float(step.values.max()) == float(
        step.values.min()
    )


def _region(
    run: Recording, differing: Sequence[int], good: set[int]
) -> tuple[list[int], list[int]]:
    """Return the steps between values that agree and outputs that differ, and the edge.

    The edge are the steps that agree and are read in the region.
    """
    todo = [run.returned[i] for i in differing if i < len(run.returned)]
    region: set[int] = set()
    edge: set[int] = set()
    while todo:
        i = todo.pop()
        if i is None or i in region:
            continue
        region.add(i)
        for source in run.steps[i].inputs:
            if source in good:
                edge.add(source)
            else:
                todo.append(source)
    return sorted(region), sorted(edge)


def _place(
    a: Recording,
    b: Recording,
    region: Sequence[int],
    back: dict[int, int],
    limits: Sequence[float],
) -> tuple[str, Pair | None, str]:
    """Return the place, the pair of values there, and a note."""
    if not region:
        return "the outputs, which are no values that the models compute", None, ""
    by_name = {name: j for j, step in enumerate(b.steps) for name in step.names}
    # A fold leaves the value of a norm under the name of the layer before it as well.
    last_of = {}
    for i, step in enumerate(a.steps):
        for name in step.names:
            if name in by_name:
                last_of[by_name[name]] = i
    for i in region:
        step = a.steps[i]
        named = [(name, by_name[name]) for name in step.names if name in by_name]
        if not named:
            continue
        name, j = named[0]
        if last_of[j] != i and j not in back:
            continue
        other = b.steps[j]
        apart = gap_of(step, other)
        if apart <= limits[i]:
            continue
        note = ""
        if j in back and back[j] != i:
            note = (
                f"b computes at '{name}' what a computes at {a.steps[back[j]].label}; "
                f"there it is read by {_readers(b, j)}"
            )
        related = relation(step, other, limits[i])
        pair = Pair(name, step.label, other.label, apart, related)
        return f"'{name}'", pair, note
    return a.steps[region[0]].label, None, ""


def _readers(run: Recording, position: int) -> str:
    labels = [step.label for step in run.steps if position in step.inputs]
    return " and ".join(labels[:3]) or "the output"


def relation(one: Step, other: Step, tolerance: float) -> str:
    """Describe how `other` depends on `one`, if it does so in a known way.

    A scale and a shift per channel, as of a wrong eps or wrong statistics; or the same
    but at the border of an image, as of a shift folded through zero padding.
    """
    if one.shape != other.shape or not (one.is_whole and other.is_whole):
        return f"of shape {one.shape} and {other.shape}" * (one.shape != other.shape)
    if len(one.shape) < 2 or one.values is None or other.values is None:
        return ""
    if not bool((one.values.isfinite() & other.values.isfinite()).all()):
        return ""
    a, b = one.values.reshape(one.shape), other.values.reshape(other.shape)
    size = _size(a)
    if len(one.shape) == 4 and min(one.shape[2:]) > 4:
        inner = (a - b)[..., 2:-2, 2:-2]
        if float(inner.abs().max()) <= tolerance * size:
            return "at the border alone: zero padding of another value"
    rows_a, rows_b = a.transpose(0, 1).flatten(1), b.transpose(0, 1).flatten(1)
    if rows_a.shape[1] < 3:
        return ""
    scale, shift = _affine(rows_a, rows_b)
    left = rows_b - (scale[:, None] * rows_a + shift[:, None])
    if float(left.abs().max()) > 10 * tolerance * max(size, float(b.abs().max())):
        return ""
    return (
        f"b is a scale and a shift of a per channel: scales {float(scale.min()):.4g} "
        f"to {float(scale.max()):.4g}, shifts {float(shift.min()):.4g} to "
        f"{float(shift.max()):.4g}"
    )


def _affine(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and shift per row that map `a` onto `b` in least squares."""
    mean_a, mean_b = a.mean(1), b.mean(1)
    centered = a - mean_a[:, None]
    energy = (centered**2).sum(1)
    moved = (centered * (b - mean_b[:, None])).sum(1)
    scale = torch.where(energy > 0, moved / energy.clamp(min=1e-300), 1.0)
    return scale, mean_b - scale * mean_a

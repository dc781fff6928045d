"""Cross-layer equalization: the ranges of a weight's channels made alike, exactly.

A quantizer with one scale for a weight gives a channel whose range is 2ᵏ times below
the largest k bits less. Between two linear maps a channel has a free positive scale:
the rows before it times s, the columns after it divided by s. With a and b the ranges
of a channel before and behind, s = √(b/a) makes both √(a·b). (Nagel et al., 2019,
https://arxiv.org/abs/1906.04721, eq. 11) Where several maps write or read the channel,
as in a residual stream, a and b are their geometric means.

s is a gauge like any other, so the search finds every map that writes or reads the
channels, through all that a positive scale passes, and refuses what it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.fold.ir.gauge import per_channel, storing
from normkit.fold.ir.graph import Gauges, Graph, Node, Refusal, Value
from normkit.fold.ir.nodes import Linear
from normkit.fold.ir.nodes.parameters import read
from normkit.fold.search.solve import Search, Solution

__all__ = ["Equalized", "bits_lost", "equalize", "equalize_all"]

# Sweeps over all maps; of 20 maps in a chain each passes on what it got.
_SWEEPS = 8
# A scale below 2^0.05 changes no bit.
_SETTLED = 0.05
# Of eight bits, half.
_COSTLY = 4.0
# Channels of nearly nothing are not blown up beyond it.
_MAX_LOG = 16.0


@dataclass(frozen=True)
class Equalized:
    """One linear map whose output channels were to be equalized.

    Attributes:
        layer: Its name.
        readers: The names of the maps that took the inverse scales.
        before: Bits lost by the channel of the least range, before.
        after: The same afterwards.
        costly: The output channels that lose 4 bits or more afterwards.
        reason: Why nothing changed; empty if something did.
    """

    layer: str
    readers: tuple[str, ...] = ()
    before: float = 0.0
    after: float = 0.0
    costly: tuple[int, ...] = ()
    reason: str = ""


def bits_lost(ranges: Tensor) -> Tensor:
    """Return the bits that each channel loses to one scale for all; 0 if it is empty.

    Args:
        ranges: The largest absolute weight of each channel, `(C,)`.

    Example:
        >>> bits_lost(torch.tensor([8.0, 4.0, 1.0, 0.0]))
        tensor([0., 1., 3., 0.])
    """
    return torch.where(ranges > 0, (ranges.amax() / ranges).log2(), 0.0)


def equalize_all(
    graph: Graph, accept: Callable[[Solution], None]
) -> tuple[list[Equalized], list[Solution]]:
    """Equalize every linear map that permits it; the slots hold the new weights.

    Args:
        graph: The network.
        accept: Raises `Refusal` if the model does not permit a solution.
    """
    linears = [n for n in graph.nodes if isinstance(n, Linear) and n.weight is not None]
    before = {each: float(bits_lost(_output_ranges(each)).amax()) for each in linears}
    reasons: dict[Linear, str] = {}
    readers: dict[Linear, tuple[str, ...]] = {}
    done: list[Solution] = []
    for _ in range(_SWEEPS):
        moved = False
        for linear in linears:
            if linear in reasons:
                continue
            try:
                solution, behind = equalize(linear, accept)
            except Refusal as refusal:
                reasons[linear] = str(refusal)
                continue
            readers[linear] = behind
            if solution is not None:
                done.append(solution)
                moved = True
        if not moved:
            break
    found = []
    for linear in linears:
        lost = bits_lost(_output_ranges(linear))
        found.append(
            Equalized(
                linear.label.strip("'"),
                readers.get(linear, ()),
                before[linear],
                float(lost.amax()),
                tuple((lost >= _COSTLY).nonzero().flatten().tolist()),
                reasons.get(linear, ""),
            )
        )
    return found, done


def equalize(
    linear: Linear, accept: Callable[[Solution], None]
) -> tuple[Solution | None, tuple[str, ...]]:
    """Equalize the output channels of `linear`; edit the slots.

    Returns:
        The solution, None if the ranges are alike already; and the maps behind.

    Raises:
        Refusal: a positive scale per channel cannot pass.
    """
    y, dim = linear.outputs[0], linear.output_dim % len(linear.outputs[0].shape)
    count = y.shape[dim]
    # Numbers from 2 on, by which the channels are known wherever they turn up.
    probe = torch.arange(count, dtype=torch.float64) + 2
    numbered = _scaled(y, dim, probe)
    written, read_by = _Mean.of(count), _Mean.of(count)
    behind: list[str] = []
    for node in dict.fromkeys((*numbered.touched, linear)):
        if not isinstance(node, Linear):
            continue
        if numbered.gauges.changed(node.outputs[0]):
            numbers = _numbers(numbered.gauges, node.outputs[0], node.output_dim)
            written.take(numbers, _output_ranges(node))
        if numbered.gauges.changed(node.inputs[0]):
            numbers = _numbers(numbered.gauges, node.inputs[0], node.input_dim)
            read_by.take(numbers, _input_ranges(node))
            behind.append(node.label.strip("'"))
    if not behind:
        raise Refusal("no linear map reads its channels")
    has_both = (written.counts > 0) & (read_by.counts > 0)
    log = (read_by.value() - written.value()) / 2
    log = (log - log[has_both].mean()).clamp(-_MAX_LOG, _MAX_LOG)
    log = torch.where(has_both, log, 0.0)
    if not bool(has_both.any()) or float(log.abs().amax()) < _SETTLED:
        return None, tuple(behind)
    solution = _scaled(y, dim, log.exp2())
    accept(solution)
    for slot, tensor in solution.edits.items():
        if slot.tensor is not None or bool((tensor != 0).any()):
            slot.tensor = tensor
    return solution, tuple(behind)


def _scaled(y: Value, dim: int, scale: Tensor) -> Solution:
    """Return the edits under which `y` is stored times `scale` along `dim`."""
    search = Search(set())
    gauges = Gauges()
    shape = [1] * len(y.shape)
    shape[dim] = -1
    search.put(gauges, y, storing(scale.reshape(shape)))
    todo: list[Node] = search.around(y)
    return search.solution("equalize", gauges, todo, needs_copy=False, remainder=None)


def _numbers(gauges: Gauges, value: Value, dim: int) -> Tensor:
    """Return which channel of the first map each channel of `value` is; −1 for none."""
    gauge = gauges.of(value)
    dim %= len(value.shape)
    if gauge.to_stored is None or set(gauge.depends_on) - {dim}:
        raise Refusal(f"{value.name} would be scaled along several dimensions")
    scale = per_channel(gauge.to_stored, dim, value.shape[dim]).scale
    return torch.where(scale == 1, -1, (scale - 2).round().long())


@dataclass
class _Mean:
    """Mean of the logarithms of the ranges of each channel.

    Attributes:
        total: Sum of log₂ of the ranges, `(C,)`.
        counts: Number of summands; those of 0 are left out.
    """

    total: Tensor
    counts: Tensor

    @classmethod
    def of(cls, count: int) -> _Mean:
        """Return the mean of nothing, for `count` channels."""
        zero = torch.zeros(count, dtype=torch.float64)
        return cls(zero, zero.clone())

    def take(self, numbers: Tensor, ranges: Tensor) -> None:
        """Count the ranges of one weight, whose channels have these numbers."""
        if bool(((numbers >= len(self.counts)) | (numbers < -1)).any()):
            raise Refusal("a product of two scales passes there")
        known = (numbers >= 0) & (ranges > 0)
        at, logs = numbers[known], ranges[known].log2()
        self.total.index_add_(0, at, logs)
        self.counts.index_add_(0, at, torch.ones_like(logs))

    def value(self) -> Tensor:
        """Return the means, 0 without a summand."""
        return self.total / self.counts.clamp(min=1)


def _output_ranges(node: Linear) -> Tensor:
    assert node.weight is not None
    return node.layout.to_goik(read(node.weight).abs()).amax((2, 3)).reshape(-1)


def _input_ranges(node: Linear) -> Tensor:
    assert node.weight is not None
    return node.layout.to_goik(read(node.weight).abs()).amax((1, 3)).reshape(-1)

"""Measure the time of a call over the number of values: ours, torch.nn's, a clone's.

Most layers of real networks have between a few thousand values, where Python dominates
the time, and some millions, where memory does. Every cell is one layer at one size, in
training (forward, and the gradients of the input and of the parameters) or in eval
(under `torch.no_grad()`). The contestants take turns in one process; the clone of the
input, in its layout and without a graph, is a lower bound.

The grid is measured in three passes that are minutes apart, each with new layers and
tensors, so that neither load on the machine nor placement in memory decides a cell: a
heap that returns its top after every call and maps it again page by page changes single
passes by a factor of two. The last part of the budget goes to the cells
whose passes were disturbed or differ most.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch

from normkit.bench.call_cases import (
    CALL_CASES,
    FEW_SIZES,
    KINDS,
    CallCase,
    ours,
    theirs,
)
from normkit.bench.call_cost import call_cost
from normkit.bench.calls import MODES, CallCell, Calls, is_calm
from normkit.bench.peers import PEERS, Given, Peer
from normkit.bench.timing import Timing, in_turns, seeded
from normkit.environment import environment
from normkit.errors import ArgumentError

__all__ = ["PEER_CASES", "calls", "contestants_of", "resumed"]

# Each pass takes this share of the budget; the rest is for the cells whose passes
# differ by more than a twentieth, each of them so often at most.
_PASSES, _SHARE_OF_A_PASS, _MAX_REPEATS, _SETTLED = 3, 0.25, 5, 0.05
# One turn of a large training step takes 0.1 to 0.5 s; small ones take thousands.
_LARGE, _WEIGHT_OF_LARGE = 1_000_000, 2.0
_COST_BUDGET, _SHARE_OF_PEERS = 12.0, 0.25

PEER_CASES = tuple(
    CallCase(*kind, "plain", size) for kind in KINDS for size in FEW_SIZES
)


def calls(
    cases: Sequence[CallCase] = CALL_CASES,
    *,
    threads: Sequence[int] = (1, 2),
    budget: float = 960.0,
    with_peers: bool = False,
) -> Calls:
    """Measure the cases against torch.nn and a clone, in training and in eval.

    Args:
        cases: The cases to run.
        threads: Numbers of threads; the whole grid runs with each.
        budget: Seconds in all. A cell takes at least three turns of each
            contestant in each of three passes, so a slow machine may need more.
        with_peers: Also measure other libraries that are installed, at some sizes;
            they get a quarter of the budget.
    """
    peers = [peer for peer in PEERS if with_peers and peer.version() is not None]
    absent = [peer.name for peer in PEERS if with_peers and peer not in peers]
    with seeded(threads=1):
        cost = call_cost(min(_COST_BUDGET, 0.1 * budget))
        found = Calls(
            _unmeasured(cases, threads),
            cost,
            json.loads(environment().to_json()),
            _unmeasured(PEER_CASES, threads, peers) if peers else (),
            tuple(absent),
        )
        return _measured(found, max(0.9 * budget, budget - _COST_BUDGET))


def resumed(record: Calls, *, budget: float) -> Calls:
    """Measure those cells of a record again that were disturbed or whose passes differ.

    Args:
        record: A record of this machine, with the same versions.
        budget: Seconds in all, at most.

    Raises:
        ArgumentError: The record is of another machine or of other versions.
    """
    here = json.loads(environment().to_json())
    differ = [
        (fact, record.environment[fact], here[fact])
        for fact in ("cpu", "cores", "torch", "normkit", "python")
        if record.environment[fact] != here[fact]
    ]
    known = {name for cell in record.peers for name in cell.passes[0]}
    peers = {f"{p.name} {p.version()}" for p in PEERS} if known else set[str]()
    if gone := sorted(known - peers - {"ours", "torch", "clone"}):
        differ.append(("peers", ", ".join(gone), ", ".join(sorted(peers))))
    if differ:
        fact, there, now = differ[0]
        raise ArgumentError(
            f"the record has {fact} {there!r}, here it is {now!r}; passes of both "
            "cannot be mixed: measure a new record"
        )
    with seeded(threads=1):
        return _measured(record, budget)


def _unmeasured(
    cases: Sequence[CallCase], threads: Sequence[int], peers: Sequence[Peer] = ()
) -> tuple[CallCell, ...]:
    return tuple(
        CallCell(case, mode, count, ())
        for count in threads
        for case in cases
        for mode in MODES
        if not peers or _serving(peers, case, mode)
    )


def _measured(found: Calls, budget: float) -> Calls:
    installed = [p for p in PEERS if found.peers and p.version() is not None]
    of_peers = _SHARE_OF_PEERS * budget if found.peers else 0.0
    seconds = (budget - of_peers) / len(found.threads)
    cells: list[CallCell] = []
    peers: list[CallCell] = []
    for count in found.threads:
        torch.set_num_threads(count)
        own = [cell for cell in found.cells if cell.threads == count]
        cells += _Grid(own).measure(seconds)
        others = [cell for cell in found.peers if cell.threads == count]
        if others:
            peers += _Grid(others, installed).measure(of_peers / len(found.threads))
    return replace(found, cells=tuple(cells), peers=tuple(peers))


class _Grid:
    """Cells with one number of threads, and which of them needs another pass."""

    def __init__(self, cells: Sequence[CallCell], peers: Sequence[Peer] = ()) -> None:
        self.cells, self.peers = list(cells), peers
        self.limit = [max(len(c.passes), _PASSES) + _MAX_REPEATS for c in cells]

    def measure(self, seconds: float) -> list[CallCell]:
        end = time.perf_counter() + seconds
        if not all(cell.passes for cell in self.cells):
            for _ in range(_PASSES):
                self._pass(time.perf_counter() + _SHARE_OF_A_PASS * seconds)
        share = _SHARE_OF_A_PASS * seconds / len(self.cells)
        while time.perf_counter() < end:
            worst = max(range(len(self.cells)), key=self._need)
            if self._need(worst) < _SETTLED:
                break
            self._run(worst, share)
        return self.cells

    def _pass(self, end: float) -> None:
        left = sum(_weight(cell.case) for cell in self.cells)
        for place, cell in enumerate(self.cells):
            weight = _weight(cell.case)
            self._run(place, (end - time.perf_counter()) * weight / left)
            left -= weight

    def _run(self, place: int, seconds: float) -> None:
        end = time.perf_counter() + seconds
        cell = self.cells[place]
        contestants = contestants_of(cell.case, cell.mode, cell.threads, self.peers)
        # The cost of first calls (imports, plans of a shape) does not count.
        for call in contestants.values():
            call()
        seconds = end - time.perf_counter()
        found = in_turns(contestants, seconds, avoid_waiting=True)
        measured = {name: _rounded(timing) for name, timing in found.items()}
        self.cells[place] = replace(cell, passes=(*cell.passes, measured))

    def _need(self, place: int) -> float:
        """Return the spread the passes must have; it falls with each beyond three.

        A cell without any undisturbed pass comes first, one with a single one next.
        """
        cell = self.cells[place]
        if len(cell.passes) >= self.limit[place]:
            return 0.0
        names = [n for n in cell.passes[0] if n not in ("ours", "clone")]
        lacking = max(
            max(0, 2 - sum(is_calm(measured, name) for measured in cell.passes))
            for name in names
        )
        return (cell.spread + 100 * lacking) / (1 + max(0, len(cell.passes) - _PASSES))


def _weight(case: CallCase) -> float:
    return _WEIGHT_OF_LARGE if prod(case.shape) > _LARGE else 1.0


def _rounded(timing: Timing) -> Timing:
    """Round to nanoseconds, so that a record of hundreds of cells stays readable."""
    return Timing(
        *(round(timing.cpu, 9), round(timing.cpu_median, 9)),
        *(round(timing.wall, 9), round(timing.wall_median, 9)),
        timing.turns,
        round(timing.waiting, 4),
    )


def _serving(peers: Sequence[Peer], case: CallCase, mode: str) -> list[Peer]:
    return [peer for peer in peers if peer.serves(case, mode == "training")]


def contestants_of(
    case: CallCase, mode: str, threads: int = 1, peers: Sequence[Peer] = ()
) -> dict[str, Callable[[], object]]:
    """Return the contestants "ours", "torch", "clone", and the peers that run it."""
    training = mode == "training"
    of_normkit, of_torch = case.layers(training=training)
    given = case.inputs()
    x, dy = given["x"], given["dy"]
    plain = x.detach()
    for_peers = Given(case, training, threads, of_torch, plain, dy)
    inputs = [x, given["residual"]] if "residual" in given else [x]
    forwards = {
        "ours": (of_normkit, ours(of_normkit, given)),
        "torch": (of_torch, theirs(case, of_torch, given)),
    }
    found: dict[str, Callable[[], object]] = {}
    for tensor in inputs:
        tensor.requires_grad_(training)
    for name, (layer, forward) in forwards.items():
        wanted = [*inputs, *layer.parameters()]
        found[name] = (
            _step(forward, wanted, dy) if training else _without_graph(forward)
        )
    found["clone"] = plain.clone
    for peer in _serving(peers, case, mode):
        found[f"{peer.name} {peer.version()}"] = peer.call(for_peers)
    return found


def _step(
    forward: Callable[[], torch.Tensor], wanted: list[torch.Tensor], dy: torch.Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(), wanted, dy)


def _without_graph(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
    def evaluate() -> None:
        with torch.no_grad():
            forward()

    return evaluate

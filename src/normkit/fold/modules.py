"""Fold every batch norm of a torch module that can go, prove it, and keep a ledger.

The model is copied, its copy is run once in float64 and read (`capture`), a change of
gauge is looked for that removes each batch norm (`solve`), the edited copy is run again
and compared (`proof`), and only then is anything written to what the caller gets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.errors import FoldError
from normkit.fold.capture import ModuleCall, Trace
from normkit.fold.graph import Gauges, Refusal, Slot
from normkit.fold.ledger import FoldEntry, FoldLedger
from normkit.fold.proof import TOLERANCE, Bench, Run, difference, gap_under
from normkit.fold.rewrite import NormModule, Replace, SetParameter, norm_modules
from normkit.fold.solve import WAYS, Solution, solve, solve_beside

__all__ = ["fold"]


def fold(
    model: nn.Module, example_inputs: Any, *, inplace: bool = False
) -> tuple[nn.Module, FoldLedger]:
    """Remove each batch norm of `model` that can go, exactly, and say why others stay.

    At inference a batch norm is y = scale·x + shift per channel. It is moved into the
    weights before it, or after it, or partly into each, through whatever lies between
    that commutes with it. The model keeps its class, its attributes and its call; a
    batch norm becomes an `Identity` (or what its class holds besides, such as an
    activation), and a bias is created where there was none.

    Args:
        model: A module in eval mode. Any that runs: it is read by running it.
        example_inputs: What to call it with: a tuple of positional arguments, a dict
            of named ones, or anything else as the single argument. The shapes do
            not limit the folded model; the control flow they lead through does.
        inplace: Edit `model` itself instead of a copy.

    Returns:
        The folded model, and the `FoldLedger` with an entry for each batch norm.

    Raises:
        FoldError: the model cannot be copied, or fails on `example_inputs`. It is
            unchanged.

    Numerics:
        The algebra is in float64 and rounded once, to the dtype of each weight. Before
        anything is returned, original and folded model are compared in float64 on
        `example_inputs` and on random inputs of the same shapes; a fold that differs
        there is undone, and its entry says so. Nothing else changes: no gradient, no
        random state, no hook, no training flag.

    Example:
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8),
        ... ).eval()
        >>> folded, ledger = fold(net, torch.randn(2, 3, 8, 8))
        >>> folded
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
        >>> [(entry.name, entry.how) for entry in ledger.folded]
        [('1', "into '0' before it")]
    """
    if not isinstance(model, nn.Module):
        raise FoldError(
            f"fold needs a torch.nn.Module, got {type(model).__name__}; "
            "for a file in ONNX format use fold_onnx"
        )
    args, kwargs = _arguments(example_inputs)
    with torch.no_grad():  # A scripted module's copy has no leaves otherwise.
        work = _copied(model)
    try:
        bench = Bench(work, args, kwargs)
    except FoldError:
        raise
    except Exception as error:
        return model, _nothing_provable(model, args, kwargs, error)
    folding = _Folding(model, bench)
    plan = folding.proven()
    result = model if inplace else _copied(model)
    with torch.no_grad():
        for rewrite in plan.rewrites:
            rewrite.apply(result)
    return result, folding.ledger(plan)


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}


def _copied(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in vars(module).values():
            # The weight that an old-style weight_norm leaves behind; deepcopy
            # would refuse it.
            if isinstance(held, Tensor) and not held.is_leaf:
                memo[id(held)] = held.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise FoldError(
            f"{type(model).__name__} cannot be deep-copied ({error}), and fold works "
            "on copies so that a failure leaves the model whole; drop what cannot be "
            "copied (open files, locks, streams) from its attributes first"
        ) from error


def _nothing_provable(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> FoldLedger:
    """The ledger of a model that runs, but not in float64."""
    try:
        with torch.no_grad():
            _copied(model)(*args, **kwargs)
    except Exception as own:
        raise FoldError(
            f"{type(model).__name__} failed on example_inputs: {own}; pass a tensor, a "
            "tuple of positional or a dict of named arguments that it accepts"
        ) from own
    why = f"the model does not run in float64, so nothing can be proven ({error})"
    return FoldLedger(
        tuple(
            FoldEntry(path, type(module).__name__, folded=False, reason=why)
            for path, module in model.named_modules()
            if isinstance(module, _BatchNorm)
        ),
        max_difference=0.0,
    )


@dataclass(eq=False)
class _Plan:
    """Folds found together, each resting on the ones before it.

    Attributes:
        rewrites: What to do to a copy of the model, in order.
        solutions: By the path of the batch norm.
        reasons: Why the others stay.
        gauges: What each value of the trace is stored as in the end.
        differences: Measured, per batch norm.
        max_difference: Measured at the outputs.
    """

    rewrites: list[SetParameter | Replace] = field(default_factory=list)
    solutions: dict[str, Solution] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    gauges: Gauges = field(default_factory=Gauges)
    differences: dict[str, float] = field(default_factory=dict)
    max_difference: float = 0.0


class _Folding:
    """Finds folds on one trace, and keeps those that the bench confirms."""

    def __init__(self, original: nn.Module, bench: Bench) -> None:
        self.original = original
        self.bench = bench
        self.trace: Trace = bench.trace
        self.norms = norm_modules(self.trace)
        self.calls: dict[str, list[ModuleCall]] = {}
        todo = [self.trace.root]
        while todo:
            call = todo.pop(0)
            self.calls.setdefault(call.path, []).append(call)
            todo = call.children + todo
        self.held = {slot: slot.tensor for slot in self.trace.slots.values()}

    # Finding ---------------------------------------------------------------

    def plan(self, allowed: set[str]) -> _Plan:
        """Every fold that the algebra permits among the batch norms `allowed`."""
        for slot in self.trace.slots.values():
            slot.tensor = self.held.get(slot)
        plan = _Plan()
        waiting: list[NormModule] = []
        for norm in self.norms:
            for node in norm.nodes:
                node.is_gone = False
            if norm.refusal:
                plan.reasons[norm.path] = norm.refusal
            elif norm.path in allowed:
                waiting.append(norm)
        refused: dict[str, dict[str, str]] = {}
        found = True
        while found and waiting:
            found = False
            for way in (*WAYS, "beside"):
                for norm in list(waiting):
                    refusals = refused.setdefault(norm.path, {})
                    try:
                        solution = self._solved(norm, way)
                        self._believe(norm, solution)
                    except Refusal as refusal:
                        refusals[way] = str(refusal)
                        continue
                    self._commit(plan, norm, solution)
                    waiting.remove(norm)
                    found = True
        for norm in waiting:
            plan.reasons[norm.path] = _reason(refused[norm.path])
        return plan

    def _solved(self, norm: NormModule, way: str) -> Solution:
        if way == "beside":
            return solve_beside(self.trace.graph, norm.nodes)
        return solve(self.trace.graph, norm.nodes, way)

    def _believe(self, norm: NormModule, solution: Solution) -> None:
        """Refuse what another branch of the code could make wrong, or a cast."""
        # A parameter read as a tensor is a node that no forward runs.
        nodes = [n for n in solution.touched if n in self.trace.call_of]
        calls = [self.trace.call_of[node] for node in (*nodes, *norm.nodes)]
        lines = [_ancestry(call) for call in calls]
        shared = sum(all(c is own[0] for c in own) for own in zip(*lines, strict=False))
        for line in lines:
            for call in line[shared - 1 :]:
                if call.looked_at_values:
                    raise Refusal(
                        f"the forward of '{call.path}' looks at values of tensors, and "
                        "may take another way on other inputs"
                    )
        for slot, tensor in solution.edits.items():
            if _as_rewrite(slot, tensor).overflows_in(self.original):
                raise Refusal(f"{slot.name} would overflow its dtype")

    def _commit(self, plan: _Plan, norm: NormModule, solution: Solution) -> None:
        for slot, tensor in solution.edits.items():
            slot.tensor = tensor
            plan.rewrites.append(_as_rewrite(slot, tensor))
        for node in norm.nodes:
            node.is_gone = True
        plan.rewrites.append(Replace(norm, solution.needs_copy))
        plan.solutions[norm.path] = solution
        for value, gauge in solution.gauges.items():
            plan.gauges[value] = plan.gauges.of(value).then(gauge)

    # Proving ---------------------------------------------------------------

    def proven(self) -> _Plan:
        """The folds that remain when every one that disagrees is left out."""
        allowed = [norm.path for norm in self.norms]
        plan = self.plan(set(allowed))
        self.near = {path: self._near(plan.solutions[path]) for path in plan.solutions}
        self.watched = {name for names in self.near.values() for name in names}
        self.expected = [self.bench.run(which, self.watched) for which in (0, 1)]
        undone: dict[str, str] = {}
        while plan.solutions:
            culprit, why = self._judge(plan)
            if not why:
                break
            if not culprit:
                culprit = self._last_straw(list(plan.solutions))
            undone[culprit] = f"folding it was undone: {why}"
            plan = self.plan(set(allowed) - set(undone))
            plan.reasons |= undone
        return plan

    def _near(self, solution: Solution) -> list[str]:
        """The modules whose outputs tell whether a fold is right."""
        nodes = (*solution.norms, *solution.touched)
        calls = [self.trace.call_of[n] for n in nodes if n in self.trace.call_of]
        names = dict.fromkeys(call.path for call in calls)
        return [
            name
            for name in names
            if name and all(len(call.outputs) == 1 for call in self.calls[name])
        ]

    def _judge(self, plan: _Plan) -> tuple[str, str]:
        """(the batch norm to blame if it is known, what is wrong if anything is)."""
        undo: list[Callable[[], None]] = []
        try:
            with torch.no_grad():
                undo += [rewrite.apply(self.bench.model) for rewrite in plan.rewrites]
            found = [self.bench.run(which, self.watched) for which in (0, 1)]
        except Exception as error:
            return "", f"the folded model fails ({type(error).__name__}: {error})"
        finally:
            for step in reversed(undo):
                step()
        for path in plan.solutions:
            gap = max(self._gap_at(name, plan, found) for name in self.near[path])
            plan.differences[path] = gap
        for path, gap in plan.differences.items():
            if not gap <= TOLERANCE:
                return path, f"it differed by {gap:.1e} in float64"
        plan.max_difference = max(
            difference(expected.result, run.result)
            for expected, run in zip(self.expected, found, strict=True)
        )
        if not plan.max_difference <= TOLERANCE:
            return "", f"the outputs differed by {plan.max_difference:.1e} in float64"
        return "", ""

    def _gap_at(self, name: str, plan: _Plan, found: list[Run]) -> float:
        """How far the calls of module `name` are from what the gauges say."""
        gap = 0.0
        for expected, run in zip(self.expected, found, strict=True):
            true, stored = expected.seen[name], run.seen[name]
            if len(true) != len(stored):
                return math.inf
            if len(true) != len(self.calls[name]):
                continue  # The second input took another way; the outputs decide.
            for call, one, other in zip(self.calls[name], true, stored, strict=True):
                value = call.outputs[0]
                if one is None or other is None:
                    continue
                gauge = plan.gauges.of(value)
                gap = max(gap, gap_under(gauge, value.shape, one, other))
        return gap

    def _last_straw(self, paths: list[str]) -> str:
        """The first batch norm whose fold, with all before it, is one too many."""
        good, bad = 0, len(paths)
        while bad - good > 1:
            middle = (good + bad) // 2
            _, why = self._judge(self.plan(set(paths[:middle])))
            good, bad = (good, middle) if why else (middle, bad)
        return paths[bad - 1]

    # Telling ---------------------------------------------------------------

    def ledger(self, plan: _Plan) -> FoldLedger:
        """What was done, for the caller."""
        entries = []
        for norm in self.norms:
            solution = plan.solutions.get(norm.path)
            if solution is None:
                reason = plan.reasons.get(norm.path, "")
                entry = FoldEntry(norm.path, norm.kind, folded=False, reason=reason)
            else:
                entry = self._entry(norm, solution, plan.differences[norm.path])
            entries.append(entry)
        proof = "float64, on the example inputs and on random ones"
        return FoldLedger(tuple(entries), plan.max_difference, proof)

    def _entry(
        self, norm: NormModule, solution: Solution, difference: float
    ) -> FoldEntry:
        module = norm.module
        held = [*module._parameters.values(), *module._buffers.values()]
        saved = sum(t.numel() for t in held if t is not None and t.is_floating_point())
        created = sum(
            tensor.numel()
            for slot, tensor in solution.edits.items()
            if slot in solution.created
        )
        return FoldEntry(
            name=norm.path,
            kind=norm.kind,
            folded=True,
            where=tuple(slot.name for slot in solution.edits),
            how=solution.in_words(),
            difference=difference,
            parameters_saved=saved - created,
            multiplications_saved=sum(
                math.prod(node.outputs[0].shape) for node in norm.nodes
            ),
        )


def _as_rewrite(slot: Slot, tensor: Tensor) -> SetParameter:
    path, _, name = slot.name.rpartition(".")
    return SetParameter(path, name, tensor)


def _ancestry(call: ModuleCall) -> list[ModuleCall]:
    line = [call]
    while line[0].parent is not None:
        line.insert(0, line[0].parent)
    return line


def _reason(refusals: dict[str, str]) -> str:
    before, after = refusals["before"], refusals["after"]
    if before == after:
        return before
    return f"not into what comes before: {before}; nor into what comes after: {after}"

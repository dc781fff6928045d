"""Fold every batch norm of a torch module that can go, prove it, and keep a ledger.

The model is copied, its copy is run once in float64 and read (`capture`), a change of
gauge is looked for that removes each batch norm (`solve`), the edited copy is run again
and compared (`proof`), and only then is anything written to what the caller gets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.errors import FoldError
from normkit.fold.equivalence import MAX_SAMPLES, TOLERANCE, difference, gap_under
from normkit.fold.ir.graph import Refusal, Slot
from normkit.fold.ledger import FoldEntry, FoldLedger, entry_of
from normkit.fold.search.plan import Norm, Plan, Planner
from normkit.fold.search.solve import Solution
from normkit.fold.torch.harness import Harness, Run
from normkit.fold.torch.rewrite import NormModule, Replace, SetParameter, norm_modules
from normkit.fold.torch.trace import ModuleCall, Trace

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["fold"]


def fold(
    model: nn.Module | ExportedProgram, example_inputs: Any, *, inplace: bool = False
) -> tuple[nn.Module, FoldLedger]:
    """Remove each batch norm of `model` that can go, exactly, and say why others stay.

    At inference a batch norm is y = scale·x + shift per channel. It is moved into the
    weights before it, or after it, or partly into each, through whatever lies between
    that commutes with it. The model keeps its class, its attributes and its call; a
    batch norm becomes an `Identity` (or what its class holds besides, such as an
    activation), and a bias is created where there was none.

    Args:
        model: A module in eval mode. Any that runs: it is read by running it. An
            exported program is folded as the module it stands for.
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
    if type(model).__name__ == "ExportedProgram":
        # Imported here: torch.export takes long to load, and few need it.
        from normkit.fold.torch.exported import as_module

        model = as_module(cast("ExportedProgram", model))
    if not isinstance(model, nn.Module):
        raise FoldError(
            f"fold needs a torch.nn.Module, got {type(model).__name__}; "
            "for a file in ONNX format use fold_onnx"
        )
    args, kwargs = _arguments(example_inputs)
    with torch.no_grad():  # A scripted module's copy has no leaves otherwise.
        work = _copied(model)
    try:
        harness = Harness(work, args, kwargs)
    except FoldError:
        raise
    except Exception as error:
        return model, _nothing_provable(model, args, kwargs, error)
    folding = _Folding(model, harness)
    plan = folding.proven_plan()
    result = model if inplace else _copied(model)
    with torch.no_grad():
        for rewrite in folding.rewrites(plan):
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


class _Folding(Planner):
    """Plans on the trace of a harness, believes and judges by it, and tells."""

    def __init__(self, original: nn.Module, harness: Harness) -> None:
        self.original = original
        self.harness = harness
        self.trace: Trace = harness.trace
        self.modules = {norm.path: norm for norm in norm_modules(self.trace)}
        self.calls: dict[str, list[ModuleCall]] = {}
        todo = [self.trace.root]
        while todo:
            call = todo.pop(0)
            self.calls.setdefault(call.path, []).append(call)
            todo = call.children + todo
        norms: list[Norm] = list(self.modules.values())
        super().__init__(self.trace.graph, norms, list(self.trace.slots.values()))

    def rewrites(self, plan: Plan) -> list[SetParameter | Replace]:
        """What to do to a copy of the model, in order."""
        rewrites: list[SetParameter | Replace] = []
        for norm, solution in plan.steps:
            rewrites += [_as_rewrite(*edit) for edit in solution.edits.items()]
            module = self.modules[norm.path]
            rewrites.append(Replace(module, solution.needs_copy, solution.remainder))
        return rewrites

    def validate(self, norm: Norm, solution: Solution) -> None:
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

    # Proving ---------------------------------------------------------------

    def prepare(self, plan: Plan) -> None:
        """Note what the original answers, at its outputs and around each fold."""
        self.near = {path: self._near(plan.solutions[path]) for path in plan.solutions}
        self.watched = {name for names in self.near.values() for name in names}
        self.expected = [self.harness.run(which, self.watched) for which in (0, 1)]

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

    def check(self, plan: Plan) -> tuple[str, str]:
        """(the batch norm to blame if it is known, what is wrong if anything is)."""
        undo: list[Callable[[], None]] = []
        try:
            with torch.no_grad():
                undo += [step.apply(self.harness.model) for step in self.rewrites(plan)]
            found = [self.harness.run(which, self.watched) for which in (0, 1)]
        except Exception as error:
            return "", f"the folded model fails ({type(error).__name__}: {error})"
        finally:
            for step in reversed(undo):
                step()
        for path, solution in plan.solutions.items():
            names = self.near.get(path) or self._near(solution)
            gaps = [self._gap_at(n, plan, found) for n in names if n in self.watched]
            plan.differences[path] = max(gaps, default=0.0)
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

    def _gap_at(self, name: str, plan: Plan, found: list[Run]) -> float:
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
                if one.numel() != min(math.prod(value.shape), MAX_SAMPLES):
                    continue  # Other data, other shapes; the outputs decide.
                if one.shape != other.shape:
                    return math.inf
                gauge = plan.gauges.of(value)
                gap = max(gap, gap_under(gauge, value.shape, one, other))
        return gap

    # Telling ---------------------------------------------------------------

    def ledger(self, plan: Plan) -> FoldLedger:
        """What was done, for the caller."""
        entries = [self._entry(norm, plan) for norm in self.modules.values()]
        proof = "float64, on the example inputs and on random ones"
        return FoldLedger(tuple(entries), plan.max_difference, proof)

    def _entry(self, norm: NormModule, plan: Plan) -> FoldEntry:
        held = [*norm.module._parameters.values(), *norm.module._buffers.values()]
        stored = sum(t.numel() for t in held if t is not None and t.is_floating_point())
        return entry_of(norm, norm.kind, plan, stored)


def _as_rewrite(slot: Slot, tensor: Tensor) -> SetParameter:
    path, _, name = slot.name.rpartition(".")
    return SetParameter(path, name, tensor)


def _ancestry(call: ModuleCall) -> list[ModuleCall]:
    line = [call]
    while line[0].parent is not None:
        line.insert(0, line[0].parent)
    return line

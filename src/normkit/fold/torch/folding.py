"""The folds of a traced torch model, and their proof by runs of its copies."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from normkit.fold.equivalence import TOLERANCE, difference, gap_under
from normkit.fold.ir.graph import Node, Refusal, Slot
from normkit.fold.ir.nodes import Experts, Move, Rows
from normkit.fold.ledger import FoldEntry, FoldLedger, entry_of
from normkit.fold.search.plan import Norm, Plan, Planner
from normkit.fold.search.solve import Solution
from normkit.fold.torch.affine_norms import (
    AffineNorm,
    DropAffine,
    ToRMS,
    affine_norms,
)
from normkit.fold.torch.batch_norms import NormModule, Replace, norm_modules
from normkit.fold.torch.float64 import REDUCED, widen
from normkit.fold.torch.harness import Harness, Run
from normkit.fold.torch.rewrite import SetParameter
from normkit.fold.torch.trace import ModuleCall, Trace
from normkit.modeling.pytree import map_tensors, tensors_in
from normkit.nn import LayerNorm
from normkit.nn.tracked_layer import TrackedLayer

__all__ = ["Folding"]

# Rounding in float32 reaches 1e-2 in deep random networks.
_MAX_ROUNDING = 0.1

_LAYER_NORMS = (torch.nn.LayerNorm.forward, LayerNorm.forward)

_NO_SCALE = "in eval it is no scale and shift for each channel"
_NOT_COVERED = (
    "branches of the code that these runs do not take: on other sizes or arguments, "
    "with gradients, on other memory layouts"
)


class Folding(Planner):
    """Plan folds on the trace of a model and check them by runs of its copies.

    Args:
        original: The model, which is not edited here.
        exact: Its copy in float64, traced.
        own: Its copy that runs as it is called, traced; None if there is none.
        kinds: "batch" or "all".
    """

    def __init__(
        self,
        original: nn.Module,
        exact: Harness,
        own: Harness | None,
        kinds: str,
        *,
        layer_to_rms: bool,
        equalize: bool,
        progress: bool,
    ) -> None:
        self.original, self.exact, self.own = original, exact, own
        self.trace: Trace = exact.trace
        if own is not None:
            self.trace.root.mark_differences(own.trace.root, "the dtype of tensors")
        self.modules: dict[str, NormModule | AffineNorm] = {
            norm.path: norm for norm in _norms(self.trace, kinds)
        }
        self.calls: dict[str, list[ModuleCall]] = {}
        for call in self.trace.root.walk():
            self.calls.setdefault(call.path, []).append(call)
        norms: list[Norm] = [*self.modules.values()]
        slots = list(self.trace.slots.values())
        super().__init__(
            *(self.trace.graph, norms, slots),
            layer_to_rms=layer_to_rms,
            equalize=equalize,
            progress=progress,
        )

    def rewrites(self, plan: Plan) -> list[SetParameter | Replace | DropAffine | ToRMS]:
        """Return the edits of a copy of the model, in order."""
        rewrites: list[SetParameter | Replace | DropAffine | ToRMS] = []
        for norm, solution in plan.steps:
            rewrites += [SetParameter.of(*edit) for edit in solution.edits.items()]
            rewrites += self.modules[norm.path].rewrites(solution)
        rewrites += [SetParameter.of(*edit) for edit in plan.equalizing.items()]
        for stream in plan.centered:
            rewrites += [SetParameter.of(*edit) for edit in stream.edits.items()]
        for path in (path for path, why in plan.as_rms.items() if not why):
            norm = self.modules[path]
            assert isinstance(norm, AffineNorm)
            rewrites.append(ToRMS(norm.module_path, norm.places))
        return rewrites

    def validate_edits(self, solution: Solution) -> None:
        """Refuse a fold around code that may branch, and one that would overflow."""
        self.validate_branches([*solution.touched, *solution.norms])
        for slot, tensor in solution.edits.items():
            if SetParameter.of(slot, tensor).overflows_in(self.original):
                raise Refusal(f"{slot.name} would overflow its dtype")

    def validate_branches(self, nodes: list[Node]) -> None:
        """Refuse code around `nodes` that looks at values."""
        # A parameter read as a tensor is a node that no forward runs.
        nodes = [node for node in nodes if node in self.trace.call_of]
        mixtures = {
            self.trace.call_of[node] for node in nodes if isinstance(node, Experts)
        }
        lines = [_ancestry(self.trace.call_of[node]) for node in nodes]
        shared = sum(all(c is own[0] for c in own) for own in zip(*lines, strict=False))
        for node, line in zip(nodes, lines, strict=True):
            for call in line[shared - 1 :]:
                # On other rows a mixture runs the same operations with other experts.
                is_routed = call is line[-1] and call in mixtures
                is_routed &= isinstance(node, Rows | Experts | Move)
                looked_at = call.branches_on or (not is_routed and call.routes_on)
                if looked_at:
                    raise Refusal(
                        f"the forward of '{call.path}' looks at {looked_at}, "
                        "and may take another branch on other inputs"
                    )

    def validate_rms(self, norm: Norm) -> None:
        """Refuse a layer norm that is no module of torch's class."""
        found = self.modules[norm.path]
        module = found.module
        is_alone = isinstance(found, AffineNorm) and found.path == found.module_path
        if not is_alone or type(module).forward not in _LAYER_NORMS:
            raise Refusal("it is no layer norm of torch or normkit")
        if len(tuple(cast("Any", module.normalized_shape))) != 1:
            raise Refusal("it normalizes over several dimensions")

    # Proving ---------------------------------------------------------------

    def prepare(self, plan: Plan) -> str:
        """Record the original's outputs, and the values around each fold."""
        self.covered = "float64, on the example inputs"
        if plan.is_empty:
            return ""
        self.covered += ", " + self.exact.add_inputs()
        self.near = {path: self._near(plan.solutions[path]) for path in plan.solutions}
        self.watched = {name for names in self.near.values() for name in names}
        self.expected = [
            self.exact.run(which, self.watched)
            for which in range(len(self.exact.inputs))
        ]
        self.own_limit = math.inf
        if self.own is not None:
            answer = map_tensors(self.own.trace.result, widen)
            rounding = difference(self.expected[0].result, answer)
            dtypes = {t.dtype for t in tensors_in(self.own.trace.result)} & {*REDUCED}
            eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
            # Folded weights are rounded as well, and round the sums otherwise.
            self.own_limit = max(20 * (rounding + eps), TOLERANCE)
            name = _listed(dtypes) or "as called"
            self.covered += f"; {name} on the example inputs"
            if rounding > _MAX_ROUNDING and dtypes == {torch.float32}:
                return (
                    f"in {name} the model itself differs by {rounding:.1e} from its "
                    "copy in float64, so a proof there tells nothing"
                )
        return ""

    def _near(self, solution: Solution) -> list[str]:
        """Return the modules whose outputs show whether a fold is right."""
        nodes = (*solution.norms, *solution.touched)
        calls = [self.trace.call_of[n] for n in nodes if n in self.trace.call_of]
        names = dict.fromkeys(call.path for call in calls)
        return [
            name
            for name in names
            if name and all(len(call.outputs) == 1 for call in self.calls[name])
        ]

    def check(self, plan: Plan) -> tuple[str, str]:
        """Return (the wrong batch norm if it is known, the error if there is one)."""
        try:
            with self._edited(self.exact, plan):
                found = [
                    self.exact.run(which, self.watched)
                    for which in range(len(self.expected))
                ]
        except Exception as error:
            return "", f"the folded model fails ({type(error).__name__}: {error})"
        for path, solution in plan.solutions.items():
            names = self.near.get(path) or self._near(solution)
            gaps = [self._gap_at(n, plan, found) for n in names if n in self.watched]
            plan.differences[path] = max(gaps, default=0.0)
        plan.max_difference = max(
            difference(expected.result, run.result)
            for expected, run in zip(self.expected, found, strict=True)
        )
        path, why = plan.wrong()
        return path, why or self._check_in_own_dtype(plan)

    def _check_in_own_dtype(self, plan: Plan) -> str:
        if self.own is None:
            return ""
        try:
            with self._edited(self.own, plan):
                found = map_tensors(self.own.run(0).result, widen)
        except Exception as error:
            return f"the folded model fails ({type(error).__name__}: {error})"
        gap = difference(self.expected[0].result, found)
        if gap <= self.own_limit or not math.isfinite(self.own_limit):
            return ""
        return (
            f"in the model's own dtype the outputs differed by {gap:.1e} from float64, "
            f"with at most {self.own_limit:.1e} explained by rounding"
        )

    @contextlib.contextmanager
    def _edited(self, harness: Harness, plan: Plan) -> Iterator[None]:
        """Apply `plan` to the copy of `harness` and undo it afterwards."""
        undo: list[Callable[[], None]] = []
        try:
            with torch.no_grad():
                undo += [step.apply(harness.model) for step in self.rewrites(plan)]
            yield
        finally:
            for step in reversed(undo):
                step()

    def _gap_at(self, name: str, plan: Plan, found: list[Run]) -> float:
        """Return the largest deviation of module `name`'s outputs from their gauges."""
        gap = 0.0
        for expected, run in zip(self.expected, found, strict=True):
            true, stored = expected.seen[name], run.seen[name]
            if len(true) != len(stored):
                return math.inf
            if len(true) != len(self.calls[name]):
                continue  # Another branch on these inputs; the outputs decide.
            for call, one, other in zip(self.calls[name], true, stored, strict=True):
                value = call.outputs[0]
                if one[0] != other[0]:
                    return math.inf
                if one[0] != value.shape or one[1] is None or other[1] is None:
                    continue  # Another shape on these inputs; the outputs decide.
                gauge = plan.gauges.of(value)
                gap = max(gap, gap_under(gauge, value.shape, one[1], other[1]))
        return gap

    def _untied(self, norm: Norm, plan: Plan) -> dict[Slot, Slot]:
        """Return the slots that no longer share a parameter, and one that each left."""
        solution = plan.solutions.get(norm.path)
        edits = {} if solution is None else solution.edits
        return {
            slot: other
            for slot in edits
            for other in self.trace.tied.get(slot, ())
            if other not in edits
        }

    # The ledger ------------------------------------------------------------

    def ledger(self, plan: Plan) -> FoldLedger:
        """Return the record of `plan`."""
        entries = [
            entry_of(
                *(norm, norm.kind, plan, norm.stored, self._untied(norm, plan)),
                note=norm.note,
            )
            for norm in self.modules.values()
        ]
        known = {entry.name for entry in entries}
        entries += [
            FoldEntry(name, type(module).__name__, folded=False, reason=_NO_SCALE)
            for name, module in self.trace.root.module.named_modules()
            if isinstance(module, TrackedLayer) and name not in known
        ]
        return FoldLedger(
            tuple(entries),
            plan.max_difference,
            self.covered,
            not_covered=_NOT_COVERED,
            equalized=tuple(plan.equalized),
            notice=self.not_equalized,
        )


def _norms(trace: Trace, kinds: str) -> list[NormModule | AffineNorm]:
    """Return the norms to fold, in the order of the model's modules."""
    found: list[NormModule | AffineNorm] = [*norm_modules(trace)]
    if kinds == "batch":
        return found
    found += affine_norms(trace)
    order = {module: i for i, module in enumerate(trace.root.module.modules())}
    return sorted(found, key=lambda norm: order[norm.module])


def _ancestry(call: ModuleCall) -> list[ModuleCall]:
    line = [call]
    while line[0].parent is not None:
        line.insert(0, line[0].parent)
    return line


def _listed(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))

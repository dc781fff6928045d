"""Which batch norms go, in which way, and what is left when the proof has spoken.

One search for every front end. A front end says what a batch norm is (`Norm`), what
it would not believe of a solution (`believe`), and how far the folded network is from
the original (`judge`); the planner tries the ways in turn, each fold resting on the
ones before it, and leaves out what the judge does not confirm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from normkit.fold.beside import solve_beside
from normkit.fold.graph import Gauges, Graph, Refusal, Slot
from normkit.fold.nodes import BatchNorm
from normkit.fold.solve import PARTIAL_WAYS, WAYS, Solution, solve

__all__ = ["Norm", "Plan", "Planner"]


class Norm(Protocol):
    """A batch norm as a front end knows it.

    Attributes:
        path: Its name, which no other has.
        nodes: Its calls.
        refusal: Why it cannot be taken out; empty if it can.
    """

    path: str
    nodes: list[BatchNorm]
    refusal: str


@dataclass(eq=False)
class Plan:
    """Folds found together, each resting on the ones before it.

    Attributes:
        steps: The batch norms and how each goes, in order.
        solutions: The same by the path of the batch norm.
        reasons: Why the others stay; for one that keeps its shift, why that does.
        gauges: What each value is stored as in the end.
        differences: Measured, per batch norm.
        max_difference: Measured at the outputs.
    """

    steps: list[tuple[Norm, Solution]] = field(default_factory=list)
    solutions: dict[str, Solution] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    gauges: Gauges = field(default_factory=Gauges)
    differences: dict[str, float] = field(default_factory=dict)
    max_difference: float = 0.0


class Planner:
    """Finds folds on one graph, and keeps those that its judge confirms.

    Args:
        graph: The network.
        norms: Its batch norms.
        slots: Every place that holds a parameter.
    """

    def __init__(self, graph: Graph, norms: list[Norm], slots: list[Slot]) -> None:
        self.graph = graph
        self.norms = norms
        self.slots = slots
        self._held: dict[Slot, Tensor | None] = {slot: slot.tensor for slot in slots}

    def believe(self, norm: Norm, solution: Solution) -> None:
        """Refuse what the algebra permits and this front end does not."""

    def prepare(self, plan: Plan) -> None:
        """Get ready to judge parts of `plan`, the first one found."""

    def judge(self, plan: Plan) -> tuple[str, str]:
        """(the batch norm to blame if it is known, what is wrong if anything is)."""
        raise NotImplementedError

    def plan(self, allowed: set[str]) -> Plan:
        """Every fold that the algebra permits among the batch norms `allowed`."""
        for slot in self.slots:
            slot.tensor = self._held.get(slot)
        plan = Plan()
        waiting: list[Norm] = []
        for norm in self.norms:
            for node in norm.nodes:
                node.is_gone = node.is_reduced = False
            if norm.refusal:
                plan.reasons[norm.path] = norm.refusal
            elif norm.path in allowed:
                waiting.append(norm)
        refused: dict[str, dict[str, str]] = {norm.path: {} for norm in waiting}
        found = True
        while found and waiting:
            found = False
            for way in (*WAYS, "beside"):
                for norm in list(waiting):
                    if self._try(plan, norm, way, refused[norm.path]):
                        waiting.remove(norm)
                        found = True
        for norm in waiting:
            reason = _reason(refused[norm.path])
            plan.reasons[norm.path] = self._signs(norm, refused[norm.path]) or reason
            for way in PARTIAL_WAYS:
                if self._try(plan, norm, way, {}):
                    break
        return plan

    def proven(self) -> Plan:
        """The folds that remain when every one that disagrees is left out."""
        allowed = [norm.path for norm in self.norms]
        plan = self.plan(set(allowed))
        self.prepare(plan)
        undone: dict[str, str] = {}
        while plan.solutions:
            culprit, why = self.judge(plan)
            if not why:
                break
            if not culprit:
                culprit = self._last_straw(list(plan.solutions))
            undone[culprit] = f"folding it was undone: {why}"
            plan = self.plan(set(allowed) - set(undone))
            plan.reasons |= undone
        return plan

    def _signs(self, norm: Norm, refusals: dict[str, str]) -> str:
        """Why `norm` stays if negative scales alone keep it; else empty."""
        scales = [node.affine().scale for node in norm.nodes]
        negative = max(int((scale < 0).sum()) for scale in scales)
        if not negative:
            return ""
        try:
            solution = solve(self.graph, norm.nodes, "lift", as_if_positive=True)
            self.believe(norm, solution)
        except Refusal:
            return ""
        return (
            f"{refusals['lift']}, and {negative} of its {len(scales[0])} scales are "
            "negative after the folds before it; were all positive, its shift would go "
            "before and its scale after"
        )

    def _try(self, plan: Plan, norm: Norm, way: str, refusals: dict[str, str]) -> bool:
        try:
            if way == "beside":
                solution = solve_beside(self.graph, norm.nodes)
            else:
                solution = solve(self.graph, norm.nodes, way)
            self.believe(norm, solution)
        except Refusal as refusal:
            refusals[way] = str(refusal)
            return False
        for slot, tensor in solution.edits.items():
            slot.tensor = tensor
        for node in norm.nodes:
            node.is_gone = solution.remainder is None
            node.is_reduced = solution.remainder is not None
        plan.steps.append((norm, solution))
        plan.solutions[norm.path] = solution
        for value, gauge in solution.gauges.items():
            plan.gauges[value] = plan.gauges.of(value).then(gauge)
        return True

    def _last_straw(self, paths: list[str]) -> str:
        """The first batch norm whose fold, with all before it, is one too many."""
        good, bad = 0, len(paths)
        while bad - good > 1:
            middle = (good + bad) // 2
            _, why = self.judge(self.plan(set(paths[:middle])))
            good, bad = (good, middle) if why else (middle, bad)
        return paths[bad - 1]


def _reason(refusals: dict[str, str]) -> str:
    before, after = refusals["before"], refusals["after"]
    if before == after:
        return before
    return f"not into what comes before: {before}; nor into what comes after: {after}"

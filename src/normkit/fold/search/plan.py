"""The plan of a fold: which batch norms are removed, and in which way.

One planner for every front end. A front end finds the batch norms (`Norm`), refuses
solutions that hold in the graph and not in its model (`validate_edits`), and compares
the folded network with the original (`check`). The planner tries the ways in turn, each
fold based on the ones before it, and leaves out every fold that the check rejects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from normkit.fold.equivalence import TOLERANCE
from normkit.fold.ir.gauge import Gauge
from normkit.fold.ir.graph import Gauges, Graph, Node, Refusal, Slot
from normkit.fold.ir.nodes import BatchNorm, NormAffine
from normkit.fold.search.centered import Centered, center
from normkit.fold.search.equalize import Equalized, equalize_all
from normkit.fold.search.norm_weights import NORM_WAYS, explained, solve_norm_weights
from normkit.fold.search.parallel_branch import solve_parallel_branch
from normkit.fold.search.solve import PARTIAL_WAYS, WAYS, Solution, solve
from normkit.progress import progress_bar

__all__ = ["Norm", "Plan", "Planner"]


class Norm(Protocol):
    """A norm of a front end: calls of a batch norm, or of one that measures its input.

    Attributes:
        path: Its unique name.
        refusal: Reason why it must stay; empty if it may go.
    """

    path: str
    refusal: str

    @property
    def nodes(self) -> Sequence[BatchNorm | NormAffine]:
        """Its calls."""
        ...


@dataclass(eq=False)
class Plan:
    """Folds found together, each based on the ones before it.

    Attributes:
        steps: The batch norms and the solution of each, in order.
        solutions: The same by the path of the batch norm.
        reasons: Why the others stay; for one that keeps its shift, why the shift stays.
        gauges: The final gauge of each value.
        differences: The measured difference of each batch norm.
        max_difference: The measured difference at the outputs.
        centered: Streams whose layer norms become RMS norms, after the steps.
        equalized: The linear maps whose channels were to be equalized, or were not.
        equalizing: The edits of all that were, after the steps.
        as_rms: For each layer norm that was asked for, "" or why it stays one.
    """

    steps: list[tuple[Norm, Solution]] = field(default_factory=list)
    solutions: dict[str, Solution] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    gauges: Gauges = field(default_factory=Gauges)
    differences: dict[str, float] = field(default_factory=dict)
    max_difference: float = 0.0
    centered: list[Centered] = field(default_factory=list)
    equalized: list[Equalized] = field(default_factory=list)
    equalizing: dict[Slot, Tensor] = field(default_factory=dict)
    as_rms: dict[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """True if nothing was changed."""
        return not (self.solutions or self.centered or self.equalizing)

    def wrong(self) -> tuple[str, str]:
        """Return (the wrong norm, "" for the outputs; how it is wrong, "" if not)."""
        for path, gap in self.differences.items():
            if not gap <= TOLERANCE:
                return path, f"it differed by {gap:.1e} in float64"
        if not self.max_difference <= TOLERANCE:
            return "", f"the outputs differed by {self.max_difference:.1e} in float64"
        return "", ""


class Planner:
    """Find the folds of one graph and keep those that `check` confirms.

    Args:
        graph: The network.
        norms: Its norms.
        slots: Every slot that holds a parameter.
        layer_to_rms: Turn layer norms into RMS norms where the writers permit it.
        equalize: Make the ranges of channels alike, after the folds.
        progress: Show progress bars of the search and of the proof.
    """

    def __init__(
        self,
        graph: Graph,
        norms: list[Norm],
        slots: list[Slot],
        *,
        layer_to_rms: bool = False,
        equalize: bool = False,
        progress: bool = False,
    ) -> None:
        self.graph = graph
        self.progress = progress
        self.layer_to_rms = layer_to_rms
        self.not_centered = ""
        self.equalize = equalize
        self.not_equalized = ""
        self.norms = norms
        self.slots = slots
        self._original = {slot: slot.tensor for slot in slots}
        # The last step that changed a node; the number of steps at each refusal.
        self._changed: dict[Node, int] = {}
        self._refused: dict[tuple[str, str], tuple[int, frozenset[Node]]] = {}

    def validate_edits(self, solution: Solution) -> None:
        """Raise `Refusal` if the algebra permits `solution` and the model does not."""

    def validate_branches(self, nodes: list[Node]) -> None:
        """Raise `Refusal` if code around `nodes` may take another branch."""

    def validate_rms(self, norm: Norm) -> None:
        """Raise `Refusal` if the model has no RMS norm for the layer norm `norm`."""

    def prepare(self, plan: Plan) -> str:
        """Prepare to check parts of `plan`; return why nothing can be proven, or ""."""
        return ""

    def check(self, plan: Plan) -> tuple[str, str]:
        """Return (the wrong norm if it is known, the error if there is one)."""
        raise NotImplementedError

    def plan(
        self, allowed: set[str], advance: Callable[[], None] = lambda: None
    ) -> Plan:
        """Return every fold that the algebra permits for the norms `allowed`.

        `advance` is called once for each norm of the graph.
        """
        for slot in self.slots:
            slot.tensor = self._original.get(slot)
        plan = Plan()
        self._changed, self._refused = {}, {}
        pending: list[Norm] = []
        for norm in self.norms:
            for node in norm.nodes:
                node.is_removed = node.is_reduced = False
            if norm.refusal:
                plan.reasons[norm.path] = norm.refusal
            elif norm.path in allowed:
                pending.append(norm)
                continue
            advance()
        measuring = [norm for norm in pending if _calls(norm)]
        pending = [norm for norm in pending if not _calls(norm)]
        refused: dict[str, dict[str, str]] = {norm.path: {} for norm in pending}
        found = True
        while found and pending:
            found = False
            for way in (*WAYS, "parallel"):
                for norm in list(pending):
                    if self._try(plan, norm, way, refused[norm.path]):
                        pending.remove(norm)
                        found = True
                        advance()
        for norm in pending:
            reason = _reason(refused[norm.path])
            plan.reasons[norm.path] = self._signs(norm, refused[norm.path]) or reason
            for way in PARTIAL_WAYS:
                if self._try(plan, norm, way, {}):
                    break
            advance()
        # Batch norms first: they may go into the weight of a norm, which then goes on.
        for norm in measuring:
            reasons: dict[str, str] = {}
            for way in NORM_WAYS:
                if self._try(plan, norm, way, reasons):
                    break
            if reasons:
                is_left = norm.path not in plan.solutions
                known = explained(_calls(norm)[0]) if is_left else ""
                plan.reasons[norm.path] = known or reasons["weight and bias"]
            advance()
        if self.equalize:
            self._equalize(plan)
        if self.layer_to_rms:
            self._center(plan, measuring)
        return plan

    def _equalize(self, plan: Plan) -> None:
        """Make the ranges of channels alike, wherever a positive scale passes."""
        plan.equalized, solutions = equalize_all(self.graph, self.validate_edits)
        for solution in solutions:
            for slot in solution.edits:
                if slot.tensor is not None:
                    plan.equalizing[slot] = slot.tensor
            for value, gauge in solution.gauges.items():
                plan.gauges[value] = plan.gauges.of(value).then(gauge)

    def _center(self, plan: Plan, norms: list[Norm]) -> None:
        """Center each stream that only layer norms without a bias read."""
        done: set[Node] = set()
        for norm in norms:
            calls = _calls(norm)
            if not all(call.centers for call in calls):
                continue
            plan.as_rms[norm.path] = ""
            try:
                self.validate_rms(norm)
                if not all(call.is_removed for call in calls):
                    raise Refusal("its weight or bias stays")
                for call in calls:
                    if call in done:
                        continue
                    stream = center(call)
                    self.validate_branches(stream.nodes)
                    done.update(stream.norms)
                    for slot, tensor in stream.edits.items():
                        slot.tensor = tensor
                    for value in stream.values:
                        plan.gauges[value] = Gauge(None, None)
                    plan.centered.append(stream)
            except Refusal as refusal:
                plan.as_rms[norm.path] = str(refusal)

    def proven_plan(self) -> Plan:
        """Return the folds that remain when every rejected one is left out."""
        allowed = [norm.path for norm in self.norms]
        with progress_bar("search", len(allowed), shown=self.progress) as advance:
            plan = self.plan(set(allowed), advance)
        with progress_bar("prove", 2, shown=self.progress) as advance:
            unproven = self.prepare(plan)
            advance()
            plan = self._proven(plan, allowed, unproven)
            advance()
        return plan

    def _proven(self, plan: Plan, allowed: list[str], unproven: str) -> Plan:
        undone = dict.fromkeys(plan.solutions, unproven) if unproven else {}
        if undone:
            self.equalize = False
            plan = self.plan(set())
            plan.reasons |= undone
        while not plan.is_empty:
            culprit, why = self.check(plan)
            if not why:
                break
            if plan.equalizing:
                self.equalize = False
                self.not_equalized = f"equalization was undone: {why}"
            elif plan.centered:
                self.layer_to_rms = False
                self.not_centered = f"centering was undone: {why}"
            else:
                culprit = culprit or self._first_wrong(list(plan.solutions))
                undone[culprit] = f"folding it was undone: {why}"
            plan = self.plan(set(allowed) - set(undone))
            plan.reasons |= undone
        if self.not_centered:
            plan.as_rms = dict.fromkeys(plan.solutions, self.not_centered)
        return plan

    def _signs(self, norm: Norm, refusals: dict[str, str]) -> str:
        """Return the reason if `norm` stays for its negative scales alone, else ""."""
        nodes = [node for node in norm.nodes if isinstance(node, BatchNorm)]
        scales = [node.affine().scale for node in nodes]
        negative = max(int((scale < 0).sum()) for scale in scales)
        if not negative:
            return ""
        try:
            solution = solve(self.graph, nodes, "lift", as_if_positive=True)
            self.validate_edits(solution)
        except Refusal:
            return ""
        return (
            f"{refusals['lift']}, and {negative} of its {len(scales[0])} scales are "
            "negative after the folds before it; were all positive, its shift would go "
            "before and its scale after"
        )

    def _try(self, plan: Plan, norm: Norm, way: str, refusals: dict[str, str]) -> bool:
        step, visited = self._refused.get((norm.path, way), (-1, None))
        if visited and all(self._changed.get(node, -1) < step for node in visited):
            return False  # Nothing that the refusal depends on has changed since.
        try:
            solution = self._solve(norm, way)
            self.validate_edits(solution)
        except Refusal as refusal:
            refusals[way] = str(refusal)
            if refusal.visited is not None:
                self._refused[norm.path, way] = len(plan.steps), refusal.visited
            return False
        readers = (node for slot in solution.edits for node in slot.readers)
        for node in (*solution.touched, *norm.nodes, *readers):
            self._changed[node] = len(plan.steps)
        for slot, tensor in solution.edits.items():
            slot.tensor = tensor
        for node in norm.nodes:
            node.is_removed = solution.remainder is None
            node.is_reduced = solution.remainder is not None
        plan.steps.append((norm, solution))
        plan.solutions[norm.path] = solution
        for value, gauge in solution.gauges.items():
            plan.gauges[value] = plan.gauges.of(value).then(gauge)
        return True

    def _solve(self, norm: Norm, way: str) -> Solution:
        if way in NORM_WAYS:
            return solve_norm_weights(_calls(norm), way)
        nodes = [node for node in norm.nodes if isinstance(node, BatchNorm)]
        if way == "parallel":
            return solve_parallel_branch(self.graph, nodes)
        return solve(self.graph, nodes, way)

    def _first_wrong(self, paths: list[str]) -> str:
        """Bisect for the first batch norm whose fold makes the outputs wrong."""
        good, bad = 0, len(paths)
        while bad - good > 1:
            middle = (good + bad) // 2
            _, why = self.check(self.plan(set(paths[:middle])))
            good, bad = (good, middle) if why else (middle, bad)
        return paths[bad - 1]


def _calls(norm: Norm) -> list[NormAffine]:
    """Return the calls of a norm that measures its input; none for a batch norm."""
    return [node for node in norm.nodes if isinstance(node, NormAffine)]


def _reason(refusals: dict[str, str]) -> str:
    before, after = refusals["before"], refusals["after"]
    if before == after:
        return before
    return f"not into what comes before: {before}; nor into what comes after: {after}"

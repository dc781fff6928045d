"""Fold every batch norm of a torch module that can go, prove it, and keep a ledger.

A copy of the model is traced in float64 (`capture`), the search finds a change of gauge
that removes each batch norm (`search`), the edited copy is run again and compared
(`harness`, `equivalence`). The same in the model's own dtype. Only then is the model
edited that the caller gets.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.errors import FoldError
from normkit.fold.equivalence import TOLERANCE, difference, gap_under
from normkit.fold.ir.graph import Refusal, Slot
from normkit.fold.ledger import FoldEntry, FoldLedger, entry_of
from normkit.fold.search.plan import Norm, Plan, Planner
from normkit.fold.search.solve import Solution
from normkit.fold.torch.copying import copied
from normkit.fold.torch.float64 import REDUCED, widen
from normkit.fold.torch.harness import Harness, Run
from normkit.fold.torch.rewrite import NormModule, Replace, SetParameter, norm_modules
from normkit.fold.torch.trace import ModuleCall, Trace
from normkit.modeling.pytree import map_tensors, tensors_in

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["fold"]

# Rounding in float32 reaches 1e-2 in deep random networks.
_MAX_ROUNDING = 0.1

_NOT_COVERED = (
    "branches of the code that these runs do not take: on other sizes or arguments, "
    "with gradients, on other memory layouts"
)


def fold(
    model: nn.Module | ExportedProgram, example_inputs: Any, *, inplace: bool = False
) -> tuple[nn.Module, FoldLedger]:
    """Remove each batch norm of `model` that can go, exactly, and say why others stay.

    At inference a batch norm is y = scale·x + shift per channel. It is moved into the
    weights before it, or after it, or partly into each, through operations between
    that commute with it. The model keeps its class, its attributes and its call; a
    batch norm becomes an `Identity` (or the rest of its class, such as an
    activation), and a bias is created where there was none.

    Args:
        model: A module in eval mode. Any that runs, since it is traced by running it.
            An exported program is folded as the module it stands for.
        example_inputs: Its arguments: a tuple of positional ones, a dict of named
            ones, or anything else as the single argument. The shapes do not limit the
            folded model; the branches of its code that they select do.
        inplace: Edit `model` itself instead of a copy.

    Returns:
        The folded model, and the `FoldLedger` with an entry for each batch norm.

    Raises:
        FoldError: the model cannot be copied, or fails on `example_inputs`. It is
            unchanged.

    Numerics:
        The algebra is in float64 and rounded once, to the dtype of each weight. Before
        anything is returned, the original and the folded model are compared: in
        float64 on `example_inputs`, on random inputs of the same shapes, and on random
        inputs of another batch and spatial size if the model takes them; in the
        model's own dtype on `example_inputs`. A fold that differs is undone, and its
        entry gives the difference. Nothing else changes: no gradient, no random
        state, no hook, no training flag. The proof covers the branches of the code
        that these runs take: other arguments, a run with gradients, or another memory
        layout may take another one.

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
    try:
        exact = Harness(copied(model), args, kwargs, in_float64=True)
    except FoldError:
        raise
    except Exception as error:
        return model, _nothing_provable(model, args, kwargs, error)
    folding = _Folding(model, exact, _in_own_dtype(model, args, kwargs))
    plan = folding.proven_plan()
    ledger = folding.ledger(plan)
    del exact, folding.own
    result = model if inplace else copied(model)
    with torch.no_grad():
        for rewrite in folding.rewrites(plan):
            rewrite.apply(result)
    return result, ledger


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}


def _in_own_dtype(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Harness | None:
    """Return a copy of `model` that runs as it is; None if it is in float64 or fails.

    Example inputs in float64 for a model in float32 are such a failure.
    """
    held = (*model.parameters(), *model.buffers(), *tensors_in((args, kwargs)))
    if not any(tensor.dtype in REDUCED for tensor in held):
        return None
    work = copied(model)
    with contextlib.suppress(Exception):
        return Harness(work, args, kwargs, in_float64=False)
    return None


def _nothing_provable(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> FoldLedger:
    """Return the ledger of a model that runs, but not in float64."""
    try:
        with torch.no_grad():
            copied(model)(*args, **kwargs)
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
    """Plan folds on the trace of a model and check them by runs of its copies.

    Args:
        original: The model, which is not edited here.
        exact: Its copy in float64, traced.
        own: Its copy in its own dtype, traced; None if there is none.
    """

    def __init__(
        self, original: nn.Module, exact: Harness, own: Harness | None
    ) -> None:
        self.original, self.exact, self.own = original, exact, own
        self.trace: Trace = exact.trace
        if own is not None:
            self.trace.root.mark_differences(own.trace.root, "the dtype of tensors")
        self.modules = {norm.path: norm for norm in norm_modules(self.trace)}
        self.calls: dict[str, list[ModuleCall]] = {}
        for call in self.trace.root.walk():
            self.calls.setdefault(call.path, []).append(call)
        norms: list[Norm] = list(self.modules.values())
        super().__init__(self.trace.graph, norms, list(self.trace.slots.values()))

    def rewrites(self, plan: Plan) -> list[SetParameter | Replace]:
        """Return the edits of a copy of the model, in order."""
        rewrites: list[SetParameter | Replace] = []
        for norm, solution in plan.steps:
            rewrites += [_as_rewrite(*edit) for edit in solution.edits.items()]
            module = self.modules[norm.path]
            rewrites.append(Replace(module, solution.needs_copy, solution.remainder))
        return rewrites

    def validate(self, norm: Norm, solution: Solution) -> None:
        """Refuse a fold around code that may branch, and one that would overflow."""
        # A parameter read as a tensor is a node that no forward runs.
        nodes = [n for n in solution.touched if n in self.trace.call_of]
        calls = [self.trace.call_of[node] for node in (*nodes, *norm.nodes)]
        lines = [_ancestry(call) for call in calls]
        shared = sum(all(c is own[0] for c in own) for own in zip(*lines, strict=False))
        for line in lines:
            for call in line[shared - 1 :]:
                if call.branches_on:
                    raise Refusal(
                        f"the forward of '{call.path}' looks at {call.branches_on}, "
                        "and may take another branch on other inputs"
                    )
        for slot, tensor in solution.edits.items():
            if _as_rewrite(slot, tensor).overflows_in(self.original):
                raise Refusal(f"{slot.name} would overflow its dtype")

    # Proving ---------------------------------------------------------------

    def prepare(self, plan: Plan) -> str:
        """Record the original's outputs, and the values around each fold."""
        self.covered = "float64, on the example inputs"
        if not plan.solutions:
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
            self.own_limit = 20 * (rounding + eps)
            name = _listed(dtypes)
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
        for path, gap in plan.differences.items():
            if not gap <= TOLERANCE:
                return path, f"it differed by {gap:.1e} in float64"
        plan.max_difference = max(
            difference(expected.result, run.result)
            for expected, run in zip(self.expected, found, strict=True)
        )
        if not plan.max_difference <= TOLERANCE:
            return "", f"the outputs differed by {plan.max_difference:.1e} in float64"
        return "", self._check_in_own_dtype(plan)

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

    # The ledger ------------------------------------------------------------

    def ledger(self, plan: Plan) -> FoldLedger:
        """Return the record of `plan`."""
        entries = [self._entry(norm, plan) for norm in self.modules.values()]
        return FoldLedger(
            tuple(entries), plan.max_difference, self.covered, not_covered=_NOT_COVERED
        )

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


def _listed(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))

"""Fold an ONNX model: read, plan, compare, write."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto

from normkit.errors import ArgumentError
from normkit.fold.equivalence import TOLERANCE, difference, gap_under
from normkit.fold.ir.graph import Refusal
from normkit.fold.ledger import FoldEntry, FoldLedger, entry_of
from normkit.fold.onnx import files, norm_operators, operators, runtime
from normkit.fold.onnx.evaluate import run_once, tensors_among, to_float64
from normkit.fold.onnx.held import SampledRun, sampled_run, without_contents
from normkit.fold.onnx.inputs import drawn_inputs, redrawn
from normkit.fold.onnx.limits import TimeLimitError
from normkit.fold.onnx.loading import check, loaded
from normkit.fold.onnx.reading import OnnxGraph, read_graph
from normkit.fold.onnx.subgraphs import fold_inside, has_norms_inside, left_inside
from normkit.fold.onnx.writing import rewritten
from normkit.fold.search.plan import Norm, Plan, Planner
from normkit.fold.search.solve import Solution
from normkit.progress import progress_bar

__all__ = ["fold_model"]


_RULES = operators.RULES | norm_operators.RULES

_OPEN_WEIGHTS = (
    "the file lists weights as inputs, so a caller may replace them and they stay as "
    "they are; if no caller does, pass fixed_weights=True (--fixed-weights)"
)


def fold_model(
    model: str | PathLike[str] | onnx.ModelProto,
    out: str | PathLike[str] | None,
    example_inputs: dict[str, Any] | None,
    inputs: int,
    fixed_weights: bool | None,
    norms: str,
    *,
    progress: bool,
) -> tuple[onnx.ModelProto, FoldLedger]:
    """Fold, within the limits that are set; see `normkit.fold_onnx`."""
    if norms not in ("batch", "all"):
        raise ArgumentError(f'norms must be "batch" or "all", got {norms!r}')
    read = loaded(model, fixed_weights)
    original, proto = read.original, read.model
    opset, is_old = read.opset, read.is_old
    wide = to_float64(proto)
    given = drawn_inputs(wide, example_inputs, max(inputs, 1))
    result = _fold_graph(
        *(proto, given, opset, norms), inside=not is_old, progress=progress
    )
    if has_norms_inside(proto) and not is_old:
        truth = tensors_among(run_once(wide, given[0]), _outputs(wide))
        found = tensors_among(result.expected, _outputs(wide))
        if not difference(truth, found) <= TOLERANCE:
            result = _fold_graph(proto, given, opset, norms, inside=False)
    folded = result.model if any(entry.how for entry in result.entries) else original
    if is_old and folded is not original:
        _list_weights(folded)
    check(folded, "the folded model")
    agrees = runtime.agrees(original, folded, given[0], result.expected)
    if out is not None:
        files.write(folded, Path(fspath(out)), read.sources)
    proof = f"float64, on {len(given)} inputs"
    proof += "; onnxruntime agrees" if agrees else "; onnxruntime cannot run it"
    entries = tuple(result.entries)
    is_open = fixed_weights is None and not all(entry.folded for entry in entries)
    notice = _OPEN_WEIGHTS if is_open and _has_defaults(proto) else ""
    return folded, FoldLedger(entries, result.difference, proof, notice=notice)


def _has_defaults(model: onnx.ModelProto) -> bool:
    inputs = {value.name for value in model.graph.input}
    return any(tensor.name in inputs for tensor in model.graph.initializer)


def _list_weights(model: onnx.ModelProto) -> None:
    """List each weight among the inputs, as old versions of the format require."""
    listed = {value.name for value in model.graph.input}
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in model.graph.initializer
        if tensor.name not in listed
    )


_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT: torch.float32,
}


class _OnnxFolding(Planner):
    """Plan folds on the ONNX graph and check them by runs of its float64 copy."""

    def __init__(
        self,
        model: onnx.ModelProto,
        wide: onnx.ModelProto,
        given: list[dict[str, Any]],
        opset: int,
        kinds: str,
        *,
        progress: bool,
    ) -> None:
        self.model, self.wide, self.given = model, wide, given
        self.outputs = _outputs(wide)
        with progress_bar("run", len(given), shown=progress) as advance:
            # One run at a time is held whole.
            first = run_once(wide, given[0])
            self.expected = [sampled_run(first, self.outputs)]
            first = without_contents(first, wide)
            self.read: OnnxGraph = read_graph(wide, first, _RULES, opset, kinds)
            advance()
            for each in given[1:]:
                self.expected.append(self._run(wide, each))
                advance()
        self.types = _types(model)
        norms: list[Norm] = list(self.read.norms)
        slots = list(self.read.slots.values())
        super().__init__(self.read.graph, norms, slots, progress=progress)

    def validate_edits(self, solution: Solution) -> None:
        """Refuse edits that are not finite in the type of the weight."""
        for (position, index), slot in self.read.slots.items():
            if slot not in solution.edits:
                continue
            names = self.model.graph.node[position].input
            name = names[index] if index < len(names) and names[index] else names[1]
            dtype = _DTYPES.get(self.types.get(name, 0), torch.float64)
            if not bool(solution.edits[slot].to(dtype).isfinite().all()):
                raise Refusal(f"{slot.name} would overflow its dtype")

    def check(self, plan: Plan) -> tuple[str, str]:
        """Return (the wrong batch norm if it is known, the error if there is one)."""
        try:
            folded = rewritten(self.wide, self.read, plan)
            found = [self._run(folded, each) for each in self.given]
        except TimeLimitError:
            raise
        except Exception as error:
            return "", f"the folded model fails ({type(error).__name__}: {error})"
        for path, solution in plan.solutions.items():
            plan.differences[path] = self._gap(solution, plan, found)
        pairs = list(zip(self.expected, found, strict=True))
        plan.max_difference = max(
            difference(
                tensors_among(true.outputs, self.outputs),
                tensors_among(run.outputs, self.outputs),
            )
            for true, run in pairs
        )
        return plan.wrong()

    @functools.cached_property
    def _names(self) -> dict[Any, str]:
        return {value: name for name, value in self.read.values.items()}

    def _run(self, model: onnx.ModelProto, given: dict[str, Any]) -> SampledRun:
        return sampled_run(run_once(model, given), self.outputs)

    def _gap(self, solution: Solution, plan: Plan, found: list[SampledRun]) -> float:
        """Return the largest deviation of values around a fold from their gauges."""
        gap = 0.0
        for value in solution.gauges:
            name = self._names.get(value)
            if name is None:
                continue
            for expected, run in zip(self.expected, found, strict=True):
                true, stored = expected.samples.get(name), run.samples.get(name)
                if true is not None and stored is not None and true[0] == value.shape:
                    gauge = plan.gauges.of(value)
                    gap = max(gap, gap_under(gauge, value.shape, true[1], stored[1]))
        return gap

    def entries(self, plan: Plan) -> list[FoldEntry]:
        """Return the entries of the batch norms, without those of inner graphs."""
        return [
            entry_of(norm, norm.kind, plan, norm.stored) for norm in self.read.norms
        ]


@dataclass(frozen=True)
class _Folded:
    """A folded model and its record.

    Attributes:
        model: The folded model; the one given if nothing was folded.
        entries: One per batch norm, those of inner graphs last.
        difference: The largest one at its outputs and those of inner graphs.
        expected: The outputs of the first run in float64 before the outer folds.
    """

    model: onnx.ModelProto
    entries: list[FoldEntry]
    difference: float
    expected: dict[str, Any]


def _fold_graph(
    model: onnx.ModelProto,
    given: list[dict[str, Any]],
    opset: int,
    norms: str,
    *,
    inside: bool,
    progress: bool = False,
) -> _Folded:
    """Fold the inner graphs first, each as a model of its own, then the outer one.

    `progress` shows bars for the outer one.
    """
    entries: list[FoldEntry] = []
    largest = 0.0
    if not inside:
        entries = left_inside(model)
    elif has_norms_inside(model):

        def alone(
            part: onnx.ModelProto, first: dict[str, Any]
        ) -> tuple[onnx.ModelProto, list[FoldEntry], float]:
            onnx.checker.check_model(part)
            twice = [first, redrawn(first, 1)]
            folded = _fold_graph(part, twice, opset, norms, inside=True)
            return folded.model, folded.entries, folded.difference

        found = run_once(to_float64(model), given[0])
        model, entries, largest = fold_inside(model, found, alone)
    folding = _OnnxFolding(
        *(model, to_float64(model), given, opset, norms), progress=progress
    )
    plan = folding.proven_plan()
    return _Folded(
        rewritten(model, folding.read, plan) if plan.steps else model,
        folding.entries(plan) + entries,
        max(plan.max_difference, largest),
        folding.expected[0].outputs,
    )


def _types(model: onnx.ModelProto) -> dict[str, int]:
    types = {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                types[node.output[0]] = attribute.t.data_type
    for value in model.graph.value_info:
        types.setdefault(value.name, value.type.tensor_type.elem_type)
    return types


def _outputs(model: onnx.ModelProto) -> list[str]:
    return [output.name for output in model.graph.output]

"""`verify`: run two models on the same inputs and compare what they compute."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from normkit.audit.comparison import Comparison, LayerAgreement, Parting
from normkit.audit.equivalence import Equivalence
from normkit.audit.parting import agreeing, gap, gap_of, part
from normkit.audit.recording import Recording
from normkit.audit.torch_side import TorchSide
from normkit.errors import ArgumentError, DependencyError, NormkitError
from normkit.fold.equivalence import TOLERANCE
from normkit.fold.onnx.rejection import RejectedModelError
from normkit.fold.torch.harness import perturbed, resized
from normkit.modeling.batch import check_has_values, check_model
from normkit.progress import progress_bar

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from normkit.audit.onnx_side import OnnxSide

__all__ = ["verify"]

# Rounding in float32 reaches 1e-3 in networks that are no worse than others.
_OWN_TOLERANCE = 1e-2
# A tool that folds in float32 rounds a weight several times.
_ROUNDINGS = 20
_MAX_LAYERS = 2000


def verify(
    a: nn.Module | ExportedProgram | str | PathLike[str] | Any,
    b: nn.Module | ExportedProgram | str | PathLike[str] | Any,
    example_inputs: Any = None,
    *,
    tolerance: float | None = None,
    progress: bool = False,
) -> Equivalence:
    """Compare two models: are they the same function, and where do they part.

    Either may be a torch module, an exported program, or an ONNX model or file, so
    this proves or refutes a fold, a fusion or an export of any tool. Both are run in
    the mode that they are in; neither is changed.

    Args:
        a: The model that is right by definition; an ONNX model in memory is an
            `onnx.ModelProto`.
        b: The model in question.
        example_inputs: Inputs as for `fold`: the arguments of the torch model. An ONNX
            model takes them in the same order, or by the same names. For two ONNX
            models they may be left out; then they are random.
        tolerance: The largest difference of outputs, relative to the largest value,
            that counts as rounding. By default 20 times what moving every weight of
            `a` by up to half a unit in its last place does, and at least 1e-7; 1e-2
            if one of the models does not run in float64.
        progress: Show a progress bar.

    Returns:
        The `Equivalence`, true if they agree on all inputs. If not, `parting` gives
        the first value of `a` that `b` lacks where it should have it.

    Raises:
        ArgumentError: `a` does not run on the inputs, or there are none.
        FoldError: A model cannot be copied, or a file is no sound ONNX model.
        DependencyError: An ONNX model without onnx and onnxruntime installed.

    Numerics:
        Both run in float64, on the example inputs, on random ones of the same shapes,
        and on random ones of another batch and spatial size where both take them.
        Wrong folds differ by 1e-3 and more; right ones by what the rounding of their
        weights does, which is measured. A value counts
        as the same if all its numbers agree (2¹⁸ of them where it has more), by
        whatever name and in whatever shape. ONNX models are run by onnx's reference
        evaluator within limits of memory and time, then by onnxruntime in their own
        types, with the graph optimizations that it makes by default.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> import copy, torch
        >>> other = copy.deepcopy(net)
        >>> other[2].bias.data += 1
        >>> x = torch.randn(3, 4)
        >>> verdict = verify(net, other, x)
        >>> verdict.equal, verdict.parting.place
        (False, "'2'")
        >>> verify(net, net, x).equal
        True
    """
    # Tensors of inference mode have no version counter, which the trace reads.
    with torch.inference_mode(mode=False):
        left = _side("a", a)
        try:
            right = _side("b", b)
        except RejectedModelError as error:
            limit = TOLERANCE if tolerance is None else tolerance
            return _unequal(str(error).replace("the model given", "b"), limit)
        inputs = example_inputs
        if inputs is None:
            inputs = _drawn(left, right)
        with progress_bar("verify", 4, shown=progress) as advance:
            return _verdict(left, right, inputs, tolerance, advance)


def _verdict(
    left: TorchSide | OnnxSide,
    right: TorchSide | OnnxSide,
    inputs: Any,
    tolerance: float | None,
    advance: Callable[[], None],
) -> Equivalence:
    """Run and compare both sides; call `advance` after each of the four stages."""
    precision, base, failure = _first_runs(left, right, inputs)
    advance()
    in_float64 = precision == "float64"
    if failure:
        limit = TOLERANCE if tolerance is None else tolerance
        return _unequal(failure, limit)
    limit, first_limits = _limits(left, inputs, base[0], in_float64, tolerance)
    advance()
    runs = [("the example inputs", *base)]
    problems: list[Comparison] = []
    for name, other in _more_inputs(inputs):
        try:
            one = left.run(other, in_float64=in_float64)
        except Exception:
            continue  # The original need not take them.
        try:
            two = right.run(other, in_float64=in_float64)
        except Exception as error:
            told = f"b does not take them ({_in_short(error)}), a does"
            problems.append(Comparison(name, float("inf"), told))
            continue
        runs.append((name, one, two))
        if "size" in name:
            break
    advance()
    compared = [Comparison(name, _apart(one, two)) for name, one, two in runs]
    largest = max(each.difference for each in compared)
    wrong = next(
        (i for i, each in enumerate(compared) if not each.difference <= limit), None
    )
    parting = None
    if wrong is not None:
        _, one, two = runs[wrong]
        limits = first_limits
        if len(limits) != len(one.steps):  # Another branch of its code.
            limits = [max([limit, *limits])] * len(one.steps)
        parting = _parted(one, two, limit, limits)
    notes, runtime_failure = _in_runtime(left, right, inputs)
    advance()
    _, first, second = runs[0]
    return Equivalence(
        equal=wrong is None and not runtime_failure,
        max_difference=largest,
        tolerance=limit,
        precision=precision,
        comparisons=(*compared, *problems),
        parting=parting,
        failure=runtime_failure if wrong is None else "",
        layers=_layers(first, second, first_limits),
        notes=tuple(notes),
    )


def _unequal(failure: str, limit: float) -> Equivalence:
    """Return the verdict on a pair that cannot be compared, for the second's fault."""
    return Equivalence(False, float("inf"), limit, "float64", (), failure=failure)


def _side(which: str, model: Any) -> TorchSide | OnnxSide:
    if type(model).__name__ == "ExportedProgram":
        # Imported here: torch.export takes long to load, and few need it.
        from normkit.fold.torch.exported import as_module

        return TorchSide(as_module(cast("ExportedProgram", model)))
    if isinstance(model, nn.Module):
        check_has_values(
            model,
            f"verify runs {which}: load the weights first (to_empty, load_state_dict)",
            may_fetch=True,
        )
        return TorchSide(model)
    if isinstance(model, str | PathLike) or type(model).__name__ == "ModelProto":
        try:
            from normkit.audit.onnx_side import OnnxSide
        except ImportError as error:
            raise DependencyError(
                f"verify needs onnx and onnxruntime for an ONNX model ({error}); "
                "pip install 'normkit[onnx]'"
            ) from error
        return OnnxSide(model)
    check_model(f"verify, as {which},", model)
    raise AssertionError("check_model refuses what is no module")


def _drawn(left: TorchSide | OnnxSide, right: TorchSide | OnnxSide) -> Any:
    """Return random inputs that an ONNX model among the two asks for.

    Raises:
        ArgumentError: There is none.
    """
    if not isinstance(left, TorchSide):
        return left.drawn()
    if not isinstance(right, TorchSide):
        return tuple(right.drawn().values())
    raise ArgumentError(
        "verify got two torch models and no example_inputs; pass a tensor, a tuple of "
        "positional or a dict of named arguments that both accept"
    )


def _first_runs(
    left: TorchSide | OnnxSide, right: TorchSide | OnnxSide, inputs: Any
) -> tuple[str, tuple[Recording, Recording], str]:
    """Return the precision in which both run, their runs, and why `right` does not."""
    trouble: list[str] = []
    for precision in ("float64", "own"):
        in_float64 = precision == "float64"
        try:
            one = left.run(inputs, in_float64=in_float64)
        except NormkitError:
            raise
        except Exception as error:
            if not in_float64:
                raise ArgumentError(
                    f"a, the {left.kind}, fails on example_inputs "
                    f"({_in_short(error)}); pass inputs that it accepts"
                ) from error
            continue
        try:
            return precision, (one, right.run(inputs, in_float64=in_float64)), ""
        except NormkitError:
            raise
        except Exception as error:
            trouble.append(_in_short(error))
    empty = Recording([])
    told = trouble[-1] if trouble else ""
    return "own", (empty, empty), f"b, the {right.kind}, fails where a runs ({told})"


def _more_inputs(inputs: Any) -> list[tuple[str, Any]]:
    """Return further inputs, with names; the last two are alternatives."""
    return [
        ("random ones", perturbed(inputs, seed=1)),
        *(
            (
                f"random ones of another {name}",
                perturbed(resized(inputs, spatial=at), 2),
            )
            for at, name in ((True, "batch and spatial size"), (False, "batch size"))
        ),
    ]


def _limits(
    side: TorchSide | OnnxSide,
    inputs: Any,
    run: Recording,
    in_float64: bool,
    tolerance: float | None,
) -> tuple[float, list[float]]:
    """Return what counts as rounding, at the outputs and at each step of `run`.

    A fold stores weights that are rounded once. How far that moves a value is measured
    by moving every weight by up to half a unit in the last place of its type.
    """
    if not in_float64:
        limit = _OWN_TOLERANCE if tolerance is None else tolerance
        return limit, [limit] * len(run.steps)
    moved = side.run(inputs, in_float64=True, jittered=True)
    limit = tolerance
    if limit is None:
        limit = max(TOLERANCE, _ROUNDINGS * _apart(run, moved))
    if len(moved.steps) != len(run.steps):
        return limit, [limit] * len(run.steps)
    steps = [
        max(TOLERANCE, _ROUNDINGS * gap_of(one, other))
        for one, other in zip(run.steps, moved.steps, strict=True)
    ]
    return limit, [min(each, _OWN_TOLERANCE) for each in steps]


def _apart(one: Recording, two: Recording) -> float:
    """Return the largest difference of the outputs of two runs."""
    if len(one.outputs) != len(two.outputs):
        return float("inf")
    pairs = zip(one.outputs, two.outputs, strict=True)
    return max((gap(*pair) for pair in pairs), default=0.0)


def _parted(
    one: Recording, two: Recording, limit: float, limits: list[float]
) -> Parting | None:
    if len(one.outputs) != len(two.outputs):
        return Parting(
            "the outputs",
            None,
            (),
            (),
            (),
            note=f"a returns {len(one.outputs)} tensors, b {len(two.outputs)}",
        )
    differing = [
        i
        for i, pair in enumerate(zip(one.outputs, two.outputs, strict=True))
        if not gap(*pair) <= limit
    ]
    return part(one, two, differing, limits)


def _layers(
    one: Recording, two: Recording, limits: list[float]
) -> tuple[LayerAgreement, ...]:
    same = agreeing(one, two, limits)
    layers = []
    for i, step in enumerate(one.steps):
        if not step.names:
            continue
        j = same.get(i)
        other = None if j is None else two.steps[j]
        at = "" if other is None else (other.names[-1] if other.names else other.label)
        apart = None if other is None else gap_of(step, other)
        layers.append(LayerAgreement(step.names[0], step.label, at, apart))
    return tuple(layers[:_MAX_LAYERS])


def _in_runtime(
    left: TorchSide | OnnxSide, right: TorchSide | OnnxSide, inputs: Any
) -> tuple[list[str], str]:
    """Return what onnxruntime makes of the files, and a failure if b alone fails."""
    told: dict[str, tuple[str, int]] = {}
    for which, side in (("a", left), ("b", right)):
        if not isinstance(side, TorchSide):
            told[which] = _runtime_of(which, side, inputs)
    worse = "b" in told and told["b"][1] > told.get("a", ("", 0))[1]
    failure = told["b"][0] if worse else ""
    return [note for note, _ in told.values() if note != failure], failure


def _runtime_of(which: str, side: OnnxSide, inputs: Any) -> tuple[str, int]:
    """Return what onnxruntime makes of a file, and 0 if that is right.

    1: only what its optimizations make of it is wrong. 2: the file as it is.
    """
    truth = side.run(inputs, in_float64=True)
    gaps: list[float] = []
    for optimized in (False, True):
        how = "with its optimizations" if optimized else "as it is"
        try:
            found = side.run_in_runtime(inputs, optimized=optimized)
        except Exception as error:
            # Types and operators that it lacks are no fault of the file.
            is_lack = "NOT_IMPLEMENTED" in str(error)
            severity = 0 if is_lack else 1 if optimized else 2
            return f"onnxruntime cannot run {which} {how}: {_in_short(error)}", severity
        gaps.append(_apart(truth, Recording(found)))
    # Rounding alone can reach 1e-2 of the largest value in deep random networks.
    if gaps[1] <= 1e-2 + 100 * gaps[0]:
        return f"onnxruntime on {which}: {gaps[1]:.1e} from float64", 0
    return (
        f"onnxruntime with its optimizations on {which}: {gaps[1]:.1e} from float64, "
        f"{gaps[0]:.1e} without them",
        1,
    )


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"

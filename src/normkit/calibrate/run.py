"""`calibrate`: population statistics of every layer, as one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normkit.calibrate.arguments import check_arguments, check_repeatable
from normkit.calibrate.estimators import (
    Average,
    Estimator,
    Exact,
    Running,
    merge_estimators,
)
from normkit.calibrate.fake_quantization import observers_held, weight_ranges_follow
from normkit.calibrate.layers import NO_STATISTICS, Layer, find_layers
from normkit.calibrate.lockstep import needs_step
from normkit.calibrate.outcome import check_data, described, written
from normkit.calibrate.padding import without_padding
from normkit.calibrate.passes import PassResult, run_pass
from normkit.calibrate.report import (
    CalibrationReport,
    relative_error,
)
from normkit.calibrate.sharding import (
    all_or_none,
    chosen_group,
    number_of_ranks,
    union_of_orders,
)
from normkit.calibrate.transaction import Transaction
from normkit.errors import ArgumentError, CalibrationError
from normkit.modeling.batch import (
    Forward,
    check_function,
    check_has_values,
    check_model,
)
from normkit.modeling.graph_norms import graph_model, norms_as_modules
from normkit.modeling.unwrap import unwrapped
from normkit.progress import tracked
from normkit.sync import sum_over
from normkit.sync.groups import Group

__all__ = ["calibrate"]

# Below this many batches a standard error is itself too uncertain to stop on.
FEWEST_BATCHES_TO_STOP = 8


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mode: str = "exact",
    order: str = "train",
    forward: Forward | None = None,
    mask: Callable[[Any], Tensor] | None = None,
    layers: Sequence[str] | None = None,
    momentum: float | None = None,
    keep: float = 0.0,
    max_batches: int | None = None,
    tolerance: float | None = None,
    on_nonfinite: str = "skip",
    process_group: Group = None,
    metric: Callable[[nn.Module], float] | None = None,
    progress: bool = False,
) -> CalibrationReport:
    """Measure the running statistics of every layer anew, on data.

    The statistics that eval mode uses are replaced by estimates over `batches` with
    the weights as they are. In between, the model runs in eval mode, so that dropout
    is off; each measured layer normalizes by the statistics of its batch. Either all
    layers are written, in place, or on any exception the model is bit for bit what it
    was.

    Args:
        model: Any module. Layers of torch.nn and normkit.nn with running statistics are
            found (batch norm of all ranks, SyncBatchNorm, PerActivationBatchNorm,
            InstanceNorm that tracks),
            and batch norm calls in graphs of torch.fx and torch.export. An exported
            program is calibrated as the module it stands for, whose tensors it shares.
        batches: The data, e.g. a DataLoader. A batch is `(inputs, …)` or inputs alone:
            a tensor, a tuple of positional arguments or a mapping of named ones; they
            are moved to the device of the model where it has only one.
        mode: The estimator; with m the number of values per channel of a batch,

            - `"exact"`: merged moments of all values: a short batch counts by its size,
              and the variance between batches is included. Unbiased,
              Σ(x − mean)²/(n − 1).
            - `"average"`: the average over batches of their means and of their
              unbiased variances, batch variance · m/(m − 1), as in the BN paper. Every
              batch counts the same; the variance between batch means is left out.
            - `"running"`: torch's moving average, in one pass over the data, from the
              present statistics: new = (1 − momentum)·old + momentum·batch. A decay
              written α = 0.9 is momentum = 1 − α = 0.1. After n batches the initial
              statistics still have the weight (1 − momentum)ⁿ.

            For instance norm a batch is an instance: `"exact"` averages over all
            instances, the others over the averages of the batches, as torch does.
        order: What the earlier layers do while a later one is measured. `"train"`: they
            normalize by their batch; one pass over the data. `"eval"`: they use their
            new statistics, as they will in eval; one more pass per layer, each up to
            that layer, over `batches` that can be iterated again.
        forward: `forward(model, batch)`, for any other batch.
        mask: `mask(batch)` returns which samples or positions count: bool or weights
            ≥ 0 (a weight of 2 is a value seen twice), `(N,)` or `(N, *positions)`.
            A layer that the model calls with `mask=` uses that instead.
        layers: Dotted names, `*` for any part, of the layers to calibrate. None takes
            all but frozen ones: those in eval mode inside a model in training mode.
        momentum: For `"running"`: the momentum of every layer. None takes each layer's
            own; a layer's own None averages all batches so far.
        keep: Share of the old statistics to keep, 0 to 1, for adapting to little data.
        max_batches: Use no more than these.
        tolerance: Stop once the standard error of every layer is below this, as a
            distance `d_mean` and `d_var` of the report; after 8 batches at the
            earliest. It takes the order of the data as random.
        on_nonfinite: For a batch that brings a NaN or Inf to a layer: `"skip"` leaves
            it out of all layers and names it in the report, `"raise"` undoes all.
        process_group: The ranks that each hold a part of the data. All end with the
            statistics of the whole, bit for bit the same. Required when
            torch.distributed runs on more than one rank: a group, or `"local"` to use
            this rank's data alone.
        metric: `metric(model)`, measured in eval mode before and after: new statistics
            are not always better where the data are not those of training.
        progress: Show a progress bar.

    Returns:
        A CalibrationReport: per layer the distances moved and their standard errors.
        Its `undo(model)` puts the old statistics back.

    Raises:
        ArgumentError: An argument that cannot be used, a batch that the model cannot be
            called on, or no layer to calibrate.
        ShapeError: A layer got another number of channels than it has.
        CalibrationError: No batches, none finite, fewer than two values for a channel,
            or another rank failed. The model is as it was; so it is on any exception of
            the data or the model, which is passed on.

    Numerics:
        Moments are taken around a pilot mean and merged in float64, so that a large
        offset causes no cancellation. Where the model simulates quantization, that
        stays on, and its observers record nothing. `num_batches_tracked` becomes the
        number of batches. All random states (torch, Python, NumPy) are restored, as are
        training flags, hooks and every other buffer.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> data = [torch.tensor([[1.0], [3.0]]), torch.tensor([[11.0]])]
        >>> report = calibrate(model, data)
        >>> model[0].running_mean, model[0].running_var
        (tensor([5.]), tensor([28.]))
        >>> report.layers[0].name, report.layers[0].count
        ('0', 3.0)
        >>> report.undo(model)
        >>> model[0].running_mean
        tensor([0.])

    References:
        Ioffe & Szegedy, "Batch Normalization", ICML 2015, algorithm 2. Wu & Johnson,
        "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    """
    check_arguments(mode, order, momentum, keep, max_batches, tolerance, on_nonfinite)
    model = graph_model(model)
    check_model("calibrate", model, batches)
    check_function("metric", metric)
    check_function("mask", mask)
    check_repeatable(batches, order)
    group = chosen_group(process_group)
    if group is not None and mode == "running":
        raise ArgumentError(
            "mode='running' depends on the order of the batches, which ranks do not "
            "share; use mode='exact' or 'average', or process_group='local'"
        )
    model = unwrapped(model)
    check_has_values(
        model,
        "calibrate runs the model: load the weights first (to_empty, load_state_dict)",
        is_changed=True,
        may_fetch=True,
    )
    with (
        norms_as_modules(model),
        weight_ranges_follow(model),
        observers_held(model),
    ):
        return _calibrated(
            *(model, batches, mode, order, forward, mask, layers, momentum, keep),
            *(max_batches, tolerance, on_nonfinite, group, metric, progress),
        )


def _calibrated(
    model: nn.Module,
    batches: Iterable[Any],
    mode: str,
    order: str,
    forward: Forward | None,
    mask: Callable[[Any], Tensor] | None,
    layers: Sequence[str] | None,
    momentum: float | None,
    keep: float,
    max_batches: int | None,
    tolerance: float | None,
    on_nonfinite: str,
    group: Group,
    metric: Callable[[nn.Module], float] | None,
    progress: bool,
) -> CalibrationReport:
    """Calibrate; the arguments are those of `calibrate`, checked."""
    chosen, untouched = find_layers(model, layers)
    if not chosen:
        raise ArgumentError(_nothing_to_calibrate(model, untouched))
    if group is not None:
        batches = without_padding(batches)
    if progress:
        batches = _Tracked(batches, max_batches)
    device = chosen[0].buffers["running_mean"].device
    in_step = needs_step(model, group)
    # Each rank sees its share of the data, and knows less by √ranks than all together.
    goal = None if tolerance is None else tolerance * number_of_ranks(group) ** 0.5

    def measure(
        of: Sequence[Layer], *, stop_at_first: bool = False
    ) -> tuple[PassResult, dict[str, Estimator]]:
        estimators = {layer.name: _estimator(layer, mode, momentum) for layer in of}

        def is_sure() -> bool:
            assert goal is not None
            return all(_is_sure(estimator, goal) for estimator in estimators.values())

        with all_or_none(group, device):
            result = run_pass(
                *(transaction, of, estimators, batches),
                forward=forward,
                mask=mask,
                on_nonfinite=on_nonfinite,
                max_batches=max_batches,
                is_done=None if goal is None else is_sure,
                stop_at_first=stop_at_first,
                group=group if in_step else None,
            )
        if group is not None:
            merge_estimators(list(estimators.values()), group)
            used = torch.tensor(float(result.batches), device=device)
            result.batches = round(float(sum_over([used], group)[0]))
        return result, estimators

    def evaluate() -> float | None:
        with all_or_none(group, device):
            return None if metric is None else float(metric(model))

    with Transaction(model, chosen) as transaction:
        before = evaluate()
        result, estimators = measure(chosen)
        check_data(result)
        reached = [layer for layer in chosen if estimators[layer.name].batches]
        if not reached:
            raise CalibrationError(
                f"no batch reached any of the {len(chosen)} layers, e.g. "
                f"{chosen[0].name!r}; forward= must run the model; the model is as it "
                "was"
            )
        if order == "eval":
            by_name = {layer.name: layer for layer in reached}
            repeated = set(union_of_orders(sorted(result.repeated), group))
            finished: dict[str, dict[str, Tensor | int]] = {}
            for name in union_of_orders(result.order, group):
                transaction.try_out(finished)
                layer = by_name[name]
                _, again = measure([layer], stop_at_first=name not in repeated)
                estimators[name] = again[name]
                finished[name] = written(layer, again[name], keep)
        new = {la.name: written(la, estimators[la.name], keep) for la in reached}
        done = tuple(described(la, estimators[la.name], new[la.name]) for la in reached)
        transaction.commit(new)
        after = evaluate()
    for layer in chosen:
        if layer not in reached:
            untouched[layer.name] = "no batch reached it"
    return CalibrationReport(
        mode=mode,
        order=order,
        batches=result.batches,
        layers=done,
        untouched=untouched,
        skipped=tuple(result.skipped),
        stopped=result.stopped,
        metric_before=before,
        metric_after=after,
    )


def _nothing_to_calibrate(model: nn.Module, untouched: Mapping[str, str]) -> str:
    if isinstance(model, torch.jit.ScriptModule):
        return (
            "a scripted model takes no hooks, so nothing can be measured in it; "
            "calibrate the module before torch.jit.script"
        )
    if not untouched:
        return (
            f"{type(model).__name__} has no layer with running statistics, so there is "
            "nothing to calibrate; batch and instance norms have them"
        )
    listed = "; ".join(f"{name!r}: {why}" for name, why in untouched.items())
    if set(untouched.values()) == {NO_STATISTICS}:
        way_out = "Make the layers with track_running_stats=True to give them some"
    elif any("frozen" in why or "layers=" in why for why in untouched.values()):
        way_out = (
            "Name layers by layers= to calibrate frozen ones, or call model.eval() "
            "first"
        )
    else:
        way_out = "Train longer, or at a larger momentum, before eval"
    return f"there is nothing to calibrate: {listed}. {way_out}"


def _estimator(layer: Layer, mode: str, momentum: float | None) -> Estimator:
    if mode == "running":
        own: Any = layer.module.momentum
        return Running(layer, own if momentum is None else momentum)
    if mode == "average" or layer.is_instance:
        return Average(layer, by_weight=mode == "exact")
    return Exact(layer)


def _is_sure(estimator: Estimator, goal: float) -> bool:
    if estimator.batches < FEWEST_BATCHES_TO_STOP:
        return False
    found = estimator.estimate()
    eps = estimator.layer.module.eps
    return relative_error(found.var, found.mean_error, found.var_error, eps) <= goal


class _Tracked:
    """Batches that show a progress bar each time they are iterated."""

    def __init__(self, batches: Iterable[Any], max_batches: int | None) -> None:
        self.batches, self.most = batches, max_batches

    def __iter__(self) -> Iterator[Any]:
        return tracked(self.batches, "calibrate", self.most)

"""Examine a model: several passes over the same batches with the weights held still.

    pass         modes                                    measured for
    training     as in training, dropout on               what the EMA should hold
    batch        batch statistics, dropout off, gradients loss, activations, gradients
    running      eval                                     the loss in eval mode

The three passes see the same batches, so the statistics are their only difference.
Without batch norms they would be one: the second is the only one.
They run on a copy of the model, or, when it cannot be copied, on the model itself,
which is restored bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from normkit.doctor.channel_statistics import MIN_EFFECTIVE_BATCHES
from normkit.doctor.examination.case import Case
from normkit.doctor.examination.forward_pass import ForwardPass
from normkit.doctor.examination.start import (
    any_has_moved,
    flat_tables,
    has_just_begun,
    has_moved,
)
from normkit.doctor.examination.trimmed import has_one_length, trimmed_losses
from normkit.doctor.examination.working_copy import (
    SingleValueError,
    WorkingCopy,
    open_working_copy,
)
from normkit.doctor.measurements import DataStatistics, Evaluation, Statistics
from normkit.doctor.probes.norm_statistics import norm_statistics
from normkit.doctor.probes.tensor_statistics import MAX_COUNTED
from normkit.progress import progress_bar

__all__ = ["examine"]


def examine(case: Case, *, progress: bool = False) -> Statistics:
    """Measure everything that the checks read on the case's model.

    Where a batch norm has one value per channel and cannot be trained, only that layer
    is reported, in `single_value`. `progress` shows a bar over the batches of all
    passes.
    """
    try:
        return _examine(case, progress=progress)
    except SingleValueError as error:
        samples = case.batch_size * len(case.batches)
        return Statistics(
            samples=samples, batches=len(case.batches), single_value=error.layer
        )


def _examine(case: Case, *, progress: bool) -> Statistics:
    with open_working_copy(case) as working:
        training, batch, running = _passes(case, working, progress=progress)
        norms = {
            name: replace(
                norm,
                in_training=training.channels(name),
                without_dropout=batch.channels(name),
                in_eval=running.channels(name),
                is_read_in_eval=name in running.seen,
                is_switched_on=name in running.switched_on,
                ignores_eval=name in running.left_on,
                calls=training.calls(name),
                padding=training.padding(name),
                had_mask=training.had_mask(name),
            )
            for name, norm in norm_statistics(working.model, working.frozen).items()
        }
        layers = [
            replace(
                layer,
                norm=norms.get(layer.name),
                weight=batch.weight(layer.name),
                own_batches=None if layer.name in norms else batch.channels(layer.name),
            )
            for layer in batch.layers()
        ]
        output = batch.answers.output(case.loss_fn)
        # Without gradients only the two modes are compared. Over ranks each would run
        # as many forwards as its own answers ask for, and those of a sharded model wait
        # for each other.
        is_judged = case.gradient_batches and _world_size() == 1
        depends = working.dependence() if is_judged else None
        trimmed, is_of_one_length = None, False
        lost: tuple[str, ...] = ()
        if is_judged:
            lost = working.detached(batch.unreached)
            working.use_running_statistics()
            trimmed = trimmed_losses(
                case, working.model, working.device, running.losses
            )
            is_padded = any(norm.padding is not None for norm in norms.values())
            is_of_one_length = is_padded and has_one_length(
                case, working.model, working.device
            )
        if output is not None and output.sums_to_one:
            output = replace(output, softmax=working.last_softmax())
    return Statistics(
        tuple(layers),
        _evaluation(batch, running),
        samples=sum(batch.samples),
        batches=len(batch.samples),
        data=DataStatistics(
            batch.input,
            case.batch_size,
            case.last,
            batch.input_columns,
            is_table=batch.is_table,
            are_shares=batch.are_shares and batch.input is not None,
            far=batch.far.found(),
            others=batch.others,
            are_ids=batch.are_integers and _has_tables(case.model),
        ),
        output=output,
        targets=batch.answers.targets.statistics(),
        dependence=depends,
        detached=lost,
        has_moved_detached=any_has_moved(case.model, lost),
        trimmed=trimmed,
        has_one_length=is_of_one_length,
        has_moved=has_moved(case.model),
        flat_tables=flat_tables(case.model),
        came_in_eval=not case.model.training,
        has_dropout=any(
            "drop" in type(module).__name__.lower() for module in case.model.modules()
        ),
        has_just_begun=has_just_begun(case.model),
        world_size=_world_size(),
        is_averaged=case.is_averaged,
        blocks=batch.parts.blocks(),
        attention=batch.parts.attention(),
    )


def _has_tables(model: nn.Module) -> bool:
    tables = (nn.Embedding, nn.EmbeddingBag)
    return any(isinstance(module, tables) for module in model.modules())


def _passes(
    case: Case, working: WorkingCopy, *, progress: bool
) -> tuple[ForwardPass, ForwardPass, ForwardPass]:
    """Return the passes in training, under batch and under running statistics."""
    working.find_calls()
    has_calls = bool(working.functional_means)
    number = 3 if working.has_batch_norms else 2 if has_calls else 1
    number *= len(case.batches)
    with progress_bar("examine", number, shown=progress) as working.advance:
        training = None
        if working.has_batch_norms:
            with torch.no_grad():
                training = working.run("batch_norms", evaluate=False)
        working.use_batch_statistics()
        batch = working.run(
            "layers", gradients=case.loss_fn is not None, counted=MAX_COUNTED
        )
        if training is None and not has_calls:
            return batch, batch, batch
        working.use_running_statistics()
        with torch.no_grad():
            # Below so many batches nothing is read from their inputs.
            is_enough = len(case.batches) >= MIN_EFFECTIVE_BATCHES
            running = working.run("batch_norms" if is_enough else "calls")
    return training or batch, batch, running


def _world_size() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def _evaluation(batch: ForwardPass, running: ForwardPass) -> Evaluation | None:
    if not batch.losses:
        return None
    shuffled = tuple(batch.answers.shuffled)
    common = tuple(batch.answers.common)
    if len(shuffled) != len(batch.losses):
        shuffled = common = ()
    return Evaluation(
        samples=tuple(batch.samples),
        batch_loss=tuple(batch.losses),
        running_loss=tuple(running.losses),
        batch_metric=tuple(batch.metrics),
        running_metric=tuple(running.metrics),
        shuffled_loss=shuffled,
        common_loss=common,
        has_targets=batch.answers.has_targets,
    )

"""Checks of training and eval mode: D07, D08, D09."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.dependence import DEPENDS_BY_NORM, reads_batch
from normkit.doctor.checks.thresholds import NOT_ITS_LOOP
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.measurements import NormStatistics, Statistics

__all__ = [
    "CHECKS",
    "eval_forgotten",
    "frozen_but_training",
    "is_kept_new",
    "stuck_in_eval",
]

_KEPT_NEW = (
    "; its running statistics are the mean 0 and variance 1 of a new layer, so that it "
    "normalizes nothing"
)

_FROZEN = "weight and bias get no gradients"
_CUT_OFF = (
    "weight and bias require gradients and get none: the layer runs without them, as "
    "under torch.no_grad or in a reentrant checkpoint whose inputs require none"
)
_CHANGING = ", but in training mode the running statistics keep changing"
_RUN_WITH_GRADIENTS = (
    "if the layer is to be trained, run it with gradients, and checkpoints with "
    "use_reentrant=False; if not, "
)
_KEEP = (
    "keep the layer in eval mode, also after model.train(): "
    "normkit.convert(model, to='frozen') does"
)
_UNFREEZE = (
    "where no checkpoint was loaded, requires_grad_(True): a new layer has nothing to "
    "keep; else "
)
_PLAIN = "; scale and shift are those of a new layer"
_STILL = "; the model came in eval mode, where they stand still"

_D07 = partial(Finding, "D07", "frozen_but_training")
_D08 = partial(Finding, "D08", "stuck_in_eval")
_D09 = partial(Finding, "D09", "eval_forgotten")


def frozen_but_training(statistics: Statistics) -> Iterator[Finding]:
    """Check D07: scale and shift are frozen, the running statistics still change.

    Statistics that eval mode never reads, as those of a helper network whose features
    are compared in the loss, may change.
    """
    norms = [
        (layer, norm) for layer, norm in statistics.norms if norm.weight is not None
    ]
    is_training = any(norm.is_trainable for _, norm in norms) or any(
        layer.weight is not None and layer.weight.gradient_norm
        for layer in statistics.layers
    )
    # A head may be trained on a network that is left in eval mode.
    is_still = statistics.came_in_eval and not any(n.is_trainable for _, n in norms)
    # A diagnosis without a loss runs no layer with gradients.
    by_name = {layer.name: layer for layer in statistics.layers if layer.name}
    has_graph = any(layer.had_gradients for layer in statistics.layers)
    for layer, norm in norms:
        if norm.frozen:
            continue
        is_cut_off = has_graph and layer.had_gradients is False
        # Where no parameter is trained, the layer is not frozen on purpose.
        has_no_gradient = not norm.is_trainable or is_cut_off
        is_bad = has_no_gradient and is_training and norm.is_read_in_eval is not False
        severity: Severity = "error" if is_bad else "clear"
        # Never trained, and so of no checkpoint: the layer has no scale and shift. But
        # behind a weight that is frozen, too, it is a part of a frozen network.
        is_plain = is_bad and not is_cut_off and norm.is_at_start
        before = by_name.get(layer.fed_by)
        if before is not None and before.weight is not None:
            is_plain &= before.gets_gradients
        if is_bad and (is_still or is_plain):
            severity = "info"
        yield _D07(
            layer.name,
            severity,
            float(is_bad),
            0.5,
            (_CUT_OFF if is_cut_off and norm.is_trainable else _FROZEN)
            + _CHANGING
            + _STILL * is_still
            + _PLAIN * (is_bad and norm.is_at_start)
            if is_bad
            else "eval mode does not read its statistics"
            if has_no_gradient and is_training
            else "no parameter of the model is trained"
            if has_no_gradient
            else "weight and bias are trained",
            _RUN_WITH_GRADIENTS + _KEEP
            if is_bad and is_cut_off and norm.is_trainable
            else _UNFREEZE + _KEEP
            if is_bad and norm.is_at_start
            else _KEEP,
        )


def stuck_in_eval(statistics: Statistics) -> Iterator[Finding]:
    """Check D08: training steps with batch norms in eval mode."""
    loop = statistics.training
    if loop is None or not statistics.norms:
        return
    if loop.is_trial:
        yield _D08("", "not_judged", evidence=NOT_ITS_LOOP)
        return
    if loop.updates is None:
        reason = "no optimizer was given, so no step shows the mode it was made in"
        yield _D08("", "not_judged", evidence=reason)
    if loop.updates_in_eval:
        is_after = loop.updates_before_eval > 0
        severity: Severity = "error" if is_after else "warning"
        if not any(norm.is_trainable for _, norm in statistics.norms):
            severity = "info"  # as where a head is trained on a frozen network
        yield _D08(
            "",
            severity,
            loop.updates_in_eval,
            0.0,
            f"{loop.updates_in_eval} optimizer steps with the whole model in eval mode"
            + (f", after {loop.updates_before_eval} in training mode" * is_after),
            "call model.train() again after each validation",
        )
    for layer, norm in statistics.norms:
        seen = norm.eval_steps + norm.train_steps
        if not norm.eval_steps:
            if norm.train_steps:
                evidence = f"in training mode in all {seen} observed steps"
                yield _D08(layer.name, "clear", 0.0, 0.0, evidence)
            continue
        # In eval mode from the first step on, with frozen parameters: on purpose.
        severity = "info"
        if norm.train_steps:
            severity = "warning"
        elif not norm.is_trainable:
            severity = "clear"
        elif is_kept_new(norm):
            severity = "warning"
        yield _D08(
            layer.name,
            severity,
            norm.eval_steps / seen,
            0.0,
            f"in eval mode in {norm.eval_steps} of {seen} observed training steps"
            + (", with a scale that is trained" if norm.is_trainable else "")
            + _KEPT_NEW * is_kept_new(norm),
            "leave new layers in training mode, and freeze those of the checkpoint"
            if is_kept_new(norm)
            else "call model.train() before each epoch, or freeze the layer's "
            "parameters as well: normkit.convert(model, to='frozen')",
            {"is_origin": is_kept_new(norm)},
        )


def is_kept_new(norm: NormStatistics) -> bool:
    """Return True for a layer that trains in eval mode with statistics of a start."""
    is_kept = norm.eval_steps > 0 == norm.train_steps
    return is_kept and norm.is_trainable and norm.has_default_buffers


def eval_forgotten(statistics: Statistics) -> Iterator[Finding]:
    """Check D09: evaluation in training mode, which changes the statistics.

    Judged by the loop, by norms that a call in eval mode switches to training mode, and
    by those that it makes.
    """
    found = statistics.dependence
    if found is not None and reads_batch(found):
        yield _D09(
            "",
            "error",
            found.on_others or 0.0,
            DEPENDS_BY_NORM,
            "the model is in eval mode, and a batch norm that belongs to none of its "
            "modules takes the statistics of the batch: without most of the others "
            f"the answer to a sample changes by {found.on_others:.2g} of the spread",
            "make the norm in __init__, where it keeps running statistics, not in "
            "forward; pass training=self.training and both running statistics to "
            "F.batch_norm",
        )
    for layer, norm in statistics.norms:
        if norm.ignores_eval:
            yield _D09(
                layer.name,
                "error",
                1.0,
                0.0,
                "model.eval() leaves it in training mode: an answer depends on the "
                "others in its batch, and each call changes the running statistics",
                "let train(False) reach it: call super().train(mode) last, or set the "
                "modes of layers only where mode is True",
            )
        elif norm.is_switched_on:
            yield _D09(
                layer.name,
                "error",
                1.0,
                0.0,
                "the model is in eval mode, and its forward switches this layer to "
                "training mode: an answer depends on the others in its batch, and "
                "each call changes the running statistics",
                "switch on the dropout layers alone where random answers are wanted, "
                "and leave every batch norm in eval mode",
            )
    loop = statistics.training
    if loop is None or not any(not norm.frozen for _, norm in statistics.norms):
        return
    if loop.is_trial:
        yield _D09("", "not_judged", evidence=NOT_ITS_LOOP)
        return
    if not loop.forwards and not loop.idle_bursts:
        reason = "the model was not called in training mode"
        yield _D09("", "not_judged", evidence=reason)
        return
    yield _D09(
        "",
        "error" if loop.idle_bursts else "clear",
        loop.idle_bursts,
        0.0,
        f"{loop.idle_bursts} times the model was called several times in a row without "
        "gradients but in training mode: it used batch statistics, and changed the "
        "running ones",
        "call model.eval() before validation and model.train() after it",
    )


CHECKS = {
    "D07": frozen_but_training,
    "D08": stuck_in_eval,
    "D09": eval_forgotten,
}

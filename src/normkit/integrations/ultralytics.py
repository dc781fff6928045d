"""Callbacks of Ultralytics' trainers: watch, calibrate and freeze.

    from normkit.integrations.ultralytics import add_callbacks
    schedule = add_callbacks(yolo, watch_every=50, calibrate="validation")

Ultralytics validates and saves an average of the weights, with an average of the
running statistics. Calibration measures those of the averaged weights.
"""

# Where the package is absent, pyright takes this file for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

from torch import nn
from ultralytics.engine.model import Model

from normkit.integrations.schedule import Schedule

__all__ = ["add_callbacks"]


def add_callbacks(model: Model, **options: Any) -> Schedule:
    """Register the callbacks on a model of Ultralytics, for its next training.

    Args:
        model: A `YOLO`, or another model of Ultralytics.
        options: Those of `normkit.integrations.schedule.Schedule`: `watch_every`,
            `calibrate`, `batches`, `freeze_after`, `data`, `forward`. With
            `calibrate="end"` the average of the last epoch is calibrated, before it is
            saved.

    Returns:
        The schedule, with `watch` and `calibrations`.
    """
    schedule = Schedule(**options)
    given = schedule.forward

    def begin(trainer: Any) -> None:
        def forward(module: nn.Module, batch: Any) -> Any:
            batch = trainer.preprocess_batch(dict(batch))
            return module(batch["img"]) if given is None else given(module, batch)

        schedule.forward = forward
        schedule.begin(trainer.model, trainer.optimizer, trainer.train_loader)

    def begin_epoch(trainer: Any) -> None:
        schedule.begin_epoch(trainer.model, trainer.epoch, trainer.train_loader)

    def end_epoch(trainer: Any) -> None:
        schedule.note_layers(trainer.model)
        average = trainer.model if trainer.ema is None else trainer.ema.ema
        schedule.before_validation(average, trainer.train_loader)
        if trainer.epoch + 1 >= trainer.epochs:
            schedule.end(average, trainer.train_loader)

    model.add_callback("on_train_start", begin)
    model.add_callback("on_train_epoch_start", begin_epoch)
    model.add_callback("on_train_epoch_end", end_epoch)
    # After an early stop no epoch was known to be the last one.
    model.add_callback("on_train_end", lambda trainer: schedule.close())
    return schedule

"""A callback of Hugging Face's Trainer: watch, calibrate and freeze.

    from normkit.integrations.transformers import NormCallback
    trainer = Trainer(…, callbacks=[NormCallback(watch_every=50, calibrate="end")])

`Trainer` calls `model.train()` in each step; frozen layers stay frozen all the same.
"""

# Where the package is absent, pyright takes this file for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from normkit.integrations.schedule import Schedule

__all__ = ["NormCallback"]


class NormCallback(TrainerCallback):
    """Watch, calibrate and freeze the normalizations of the trainer's model.

    Calibration calls the model by the names in a training batch, `model(**batch)`.

    Args:
        options: Those of `normkit.integrations.schedule.Schedule`: `watch_every`,
            `calibrate`, `batches`, `freeze_after`, `data`, `forward`.

    Attributes:
        schedule: The `Schedule`, with `watch` and `calibrations`.

    Example:
        >>> callback = NormCallback(watch_every=50, calibrate="validation")
        >>> callback.schedule.calibrate
        'validation'
    """

    def __init__(self, **options: Any) -> None:
        self.schedule = Schedule(**options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin to watch."""
        data = given.get("train_dataloader")
        self.schedule.begin(given["model"], given.get("optimizer"), data)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Freeze, if it is time."""
        epoch = round(state.epoch or 0)
        data = given.get("train_dataloader")
        self.schedule.begin_epoch(given["model"], epoch, data)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Calibrate where the trainer evaluates after this step."""
        # Trainer evaluates right after this event; its own callback decided before.
        if control.should_evaluate:
            data = given.get("train_dataloader")
            self.schedule.before_validation(given["model"], data)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Calibrate where the trainer evaluates after this epoch."""
        self.on_step_end(args, state, control, **given)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Calibrate at the end, and report."""
        self.schedule.end(given["model"], given.get("train_dataloader"))

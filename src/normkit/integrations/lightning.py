"""A callback of Lightning's Trainer: watch, calibrate and freeze.

    from normkit.integrations.lightning import NormCallback
    trainer = Trainer(callbacks=[NormCallback(watch_every=50, calibrate="validation")])

Callbacks that average weights (`EMAWeightAveraging`, `StochasticWeightAveraging`) stand
before this one: it then measures the statistics of the averaged weights.
"""

# Where the package is absent, pyright takes this file for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from torch import nn

from normkit.doctor.scalars import scalars_by_step
from normkit.errors import ArgumentError
from normkit.integrations.schedule import Schedule
from normkit.modeling.batch import call_on, inputs_of

__all__ = ["NormCallback"]

_AVERAGES = tuple(
    getattr(callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(callbacks, name)
)


class NormCallback(pl.Callback):
    """Watch, calibrate and freeze the normalizations of a LightningModule.

    Calibration calls the module on the inputs of a training batch, under the trainer's
    precision; a module without `forward` needs `forward=`.

    Args:
        options: Those of `normkit.integrations.schedule.Schedule`: `watch_every`,
            `calibrate`, `batches`, `freeze_after`, `data`, `forward`.

    Attributes:
        schedule: The `Schedule`, with `watch` and `calibrations`.

    Example:
        >>> callback = NormCallback(watch_every=50, calibrate="end", freeze_after=8)
        >>> callback.schedule.freeze_after
        8
    """

    def __init__(self, **options: Any) -> None:
        self.schedule = Schedule(**options)
        self._forward = self.schedule.forward

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that the module can be called, and what stands after this callback."""
        after = trainer.callbacks[trainer.callbacks.index(self) + 1 :]
        for other in after:
            if self.schedule.calibrate and isinstance(other, _AVERAGES):
                raise ArgumentError(
                    f"{type(other).__name__} stands after NormCallback, which would "
                    "calibrate before the weights are averaged; list it first: "
                    f"callbacks=[{type(other).__name__}(…), NormCallback(…)]"
                )
        has_forward = type(pl_module).forward is not nn.Module.forward
        has_forward = has_forward and (
            type(pl_module).forward is not pl.LightningModule.forward
        )
        if self.schedule.calibrate and self._forward is None and not has_forward:
            raise ArgumentError(
                f"{type(pl_module).__name__} defines no forward, which calibration "
                "calls; pass forward=, e.g. NormCallback(calibrate='end', "
                "forward=lambda module, batch: module.net(batch[0]))"
            )
        precision = trainer.precision_plugin

        def forward(module: nn.Module, batch: Any) -> Any:
            with precision.forward_context():
                batch = precision.convert_input(batch)
                if self._forward is not None:
                    return self._forward(module, batch)
                return call_on(module, inputs_of(batch))

        self.schedule.forward = forward

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch."""
        # With several optimizers the updates of the first one are recorded.
        optimizer = next(iter(trainer.optimizers), None)
        self.schedule.begin(pl_module, optimizer, trainer.train_dataloader)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note which layers are frozen, once in an epoch."""
        if batch_idx == 0:
            self.schedule.note_layers(pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Freeze, if it is time."""
        data = trainer.train_dataloader
        self.schedule.begin_epoch(pl_module, trainer.current_epoch, data)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Calibrate before a validation within training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.schedule.before_validation(pl_module, trainer.train_dataloader)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Calibrate at the end, write the record to the loggers, and report."""
        self.schedule.end(pl_module, trainer.train_dataloader)
        if self.schedule.watch is not None:
            rows = scalars_by_step(self.schedule.watch.history)
            for logger in trainer.loggers:
                for step, values in rows.items():
                    logger.log_metrics(values, step=step)

    def on_exception(
        self, trainer: Any, pl_module: Any, exception: BaseException
    ) -> None:
        """Remove the hooks."""
        self.schedule.close()

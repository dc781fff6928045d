"""Actions of a callback on a model during training, without any framework.

A schedule watches the training steps, measures the running statistics anew before
validation or at the end, and freezes them after some epochs. The callbacks of the
frameworks tell it where in the training they are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader

from normkit.calibrate import CalibrationReport, calibrate
from normkit.calibrate.layers import find_layers
from normkit.doctor import Watch, watch
from normkit.errors import ArgumentError
from normkit.modeling.batch import Forward
from normkit.modeling.snapshot import preserved_random
from normkit.modeling.unwrap import unwrapped

__all__ = ["Schedule"]

_log = logging.getLogger(__name__)


class Schedule:
    """Watch, calibrate and freeze a model while a framework trains it.

    Args:
        watch_every: Watch every n-th training step (`normkit.watch`); None watches
            none.
        calibrate: When to measure the running statistics anew on training data, with
            the weights as they are: `"validation"` before each validation, `"end"`
            after the last step, None never. The moving averages go on from there.
        batches: Number of batches to calibrate on.
        freeze_after: Number of epochs after which the running statistics, and the mode,
            of every batch norm stay as they are. They are calibrated a last time then,
            if `calibrate` is given. 0 freezes from the start.
        data: Batches to calibrate on; None for the training data.
        forward: `forward(model, batch)` for calibration, where a batch is not
            `(inputs, …)` or inputs alone.

    Attributes:
        watch: The record of the training run; None with `watch_every=None`.
        calibrations: Reports of the calibrations so far, in order.
        is_frozen: Whether the statistics are frozen.

    Raises:
        ArgumentError: An argument has no meaning.
    """

    def __init__(
        self,
        *,
        watch_every: int | None = None,
        calibrate: str | None = None,
        batches: int = 50,
        freeze_after: int | None = None,
        data: Iterable[Any] | None = None,
        forward: Forward | None = None,
    ) -> None:
        if calibrate not in ("validation", "end", None):
            raise ArgumentError(
                f"calibrate={calibrate!r} must be 'validation', 'end' or None"
            )
        for name, value, least in (
            ("watch_every", watch_every, 1),
            ("batches", batches, 1),
            ("freeze_after", freeze_after, 0),
        ):
            if value is not None and value < least:
                raise ArgumentError(f"{name}={value} must be at least {least}, or None")
        if watch_every is None and calibrate is None and freeze_after is None:
            raise ArgumentError(
                "a callback without watch_every=, calibrate= and freeze_after= does "
                "nothing; give one of them"
            )
        self.watch_every = watch_every
        self.calibrate = calibrate
        self.batches = batches
        self.freeze_after = freeze_after
        self.data = data
        self.forward = forward
        self.watch: Watch | None = None
        self.calibrations: list[CalibrationReport] = []
        self.is_frozen = False
        self._frozen: list[nn.Module] = []
        self._layers: list[str] | None = None

    def begin(self, model: nn.Module, optimizer: Any = None, data: Any = None) -> None:
        """Begin to watch `model`, as training begins.

        Raises:
            ArgumentError: No layer has running statistics, or the model cannot be
                called on a batch. One batch is tried now: a training that is over
                should not fail in its calibration.
        """
        self.close()
        self.is_frozen = False
        self.note_layers(model)
        if self.calibrate is not None:
            batches = data if self.data is None else self.data
            if isinstance(batches, Iterator):
                raise ArgumentError(
                    f"calibration got a {type(batches).__name__}, an iterator, which "
                    "ends after one pass; pass data= with a DataLoader or a list"
                )
            self._measured(model, data, batches=1).undo(model)
        if self.watch_every is not None:
            self.watch = watch(model, optimizer, every=self.watch_every)
            self.watch.__enter__()

    def begin_epoch(self, model: nn.Module, epoch: int, data: Any) -> None:
        """Freeze the statistics before epoch number `epoch`, counted from 0, if due."""
        if self.freeze_after is None or epoch < self.freeze_after or self.is_frozen:
            return
        if self.calibrate is not None and epoch > 0:
            self._calibrate(model, data)
        self._freeze(model)

    def note_layers(self, model: nn.Module) -> None:
        """Note which layers are not frozen, while `model` is in training mode.

        A layer is frozen by eval mode inside a model in training mode; in a validation
        all layers are in eval mode.
        """
        if model.training:
            chosen, _ = find_layers(unwrapped(model), None)
            self._layers = [layer.name for layer in chosen]

    def before_validation(self, model: nn.Module, data: Any) -> None:
        """Calibrate before a validation, if asked for."""
        if self.calibrate == "validation" and not self.is_frozen:
            self._calibrate(model, data)

    def end(self, model: nn.Module, data: Any) -> None:
        """Calibrate after the last step, if asked for, and report what was found."""
        if self.calibrate == "end" and not self.is_frozen:
            self._calibrate(model, data)
        self.close()
        if self.watch is not None:
            for finding in self.watch.findings():
                if finding.severity in ("error", "warning"):
                    _log.warning("%s", finding.to_text())

    def close(self) -> None:
        """Leave the model as its own; the record, the reports and the modes stay."""
        if self.watch is not None:
            self.watch.__exit__(None, None, None)
        while self._frozen:
            self._frozen.pop().__dict__.pop("train", None)

    def _calibrate(self, model: nn.Module, data: Any) -> None:
        self.calibrations.append(self._measured(model, data, batches=self.batches))

    def _measured(
        self, model: nn.Module, data: Any, *, batches: int
    ) -> CalibrationReport:
        loader = _again(data if self.data is None else self.data)
        samplers = (getattr(loader, name, None) for name in _SAMPLERS)
        # The order of the training data must not depend on calibration.
        with preserved_random(model, others=[loader, *samplers]):
            return calibrate(
                model,
                loader,
                layers=None if model.training else self._layers,
                forward=self.forward,
                max_batches=batches,
                process_group=_all_ranks(),
            )

    def _freeze(self, model: nn.Module) -> None:
        for module in unwrapped(model).modules():
            if isinstance(module, _NormBase) and module.track_running_stats:
                module.eval()
                # Every framework calls model.train(), some of them in each step.
                module.__dict__["train"] = _StayInEval(module)
                self._frozen.append(module)
        self.is_frozen = True


_SAMPLERS = ("sampler", "batch_sampler")


class _StayInEval:
    """The `train` of a frozen layer; a copy or a pickle of the layer has its own again.

    A hook would not do: compiled code does not look for hooks that came later.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.module

    def __reduce__(self) -> tuple[Any, ...]:
        # Of the copy, which has no attributes yet: the method of its class.
        return getattr, (self.module, "train")


def _again(data: Any) -> Any:
    """Return batches that can be iterated while `data` is.

    Workers that persist belong to one iterator, which a second one would restart.
    accelerate's loaders count who iterates them, and the one inside does not.
    """
    data = getattr(data, "base_dataloader", data)
    if isinstance(data, DataLoader) and data.persistent_workers:
        data = copy.copy(data)
        data._iterator = None
    return data


def _all_ranks() -> Any:
    is_running = dist.is_available() and dist.is_initialized()
    return dist.group.WORLD if is_running and dist.get_world_size() > 1 else None

"""Statistics of another domain for one block, and of averaged weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normkit.calibrate.report import CalibrationReport
from normkit.calibrate.run import calibrate
from normkit.errors import ArgumentError
from normkit.modeling.snapshot import Snapshot
from normkit.modeling.unwrap import unwrapped

__all__ = ["adapted", "averaged"]


@contextmanager
def adapted(
    model: nn.Module, batches: Iterable[Any], **options: Any
) -> Iterator[CalibrationReport]:
    """Use the statistics of another domain inside the block, the old ones after it.

    Args:
        model: The model.
        batches: Data of the domain; no targets are needed.
        options: Of `calibrate`; `keep=` blends in the old statistics, for few data.

    Yields:
        The CalibrationReport.

    Example:
        >>> model = nn.BatchNorm1d(1, affine=False).eval()
        >>> with adapted(model, [torch.tensor([[5.0], [7.0]])]):
        ...     model.running_mean.clone()
        tensor([6.])
        >>> model.running_mean
        tensor([0.])
    """
    report = calibrate(model, batches, **options)
    try:
        yield report
    finally:
        report.undo(model)


def averaged(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Iterable[Any],
    **options: Any,
) -> tuple[dict[str, Tensor], CalibrationReport]:
    """Return a state_dict of averaged weights with statistics measured for them.

    Averaged weights (EMA, SWA, a model soup) make other activations than any model that
    was trained, so its running statistics do not fit them. A whole averaged module, as
    `torch.optim.swa_utils.AveragedModel` is, can be given to `calibrate` itself.

    Args:
        model: The model; bit for bit as it was afterwards.
        weights: Averaged parameters by their names in `model`; those not named stay as
            they are in the model. Buffers in it are used, too, and calibrated after.
        batches: The data.
        options: Of `calibrate`.

    Returns:
        The state_dict of the averaged model, on the model's devices, and the report.

    Raises:
        ArgumentError: A name that the model does not have, or another shape.
    """
    model = unwrapped(model)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            has = tuple(own[name].shape) if name in own else "no such tensor"
            raise ArgumentError(
                f"averaged weight {name!r} of shape {tuple(value.shape)} does not fit "
                f"the model, which has {has}; names are those of named_parameters()"
            )
    before = Snapshot.take(model, parameters=True)
    try:
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)
        report = calibrate(model, batches, **options)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        return state, report
    finally:
        before.restore()

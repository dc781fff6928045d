"""The loss of one batch, or an error that says why it is none."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from normkit.doctor.examination.case import Case
from normkit.doctor.examination.labels import label_beyond
from normkit.errors import ArgumentError

__all__ = ["loss_value"]


def loss_value(
    case: Case, output: Any, targets: Any, batch: Any
) -> tuple[Tensor | None, tuple[int, int] | None]:
    """Return the loss, and a label beyond the output with the number of its units.

    The loss is None where there is no `loss_fn`, or such a label.

    Raises:
        ArgumentError: `loss_fn` gives no tensor of one number, or fails where the batch
            has no targets of its own.
    """
    if case.loss_fn is None:
        return None, None
    ignored = getattr(case.loss_fn, "ignore_index", -100)
    beyond = label_beyond(output, targets, ignored)
    if beyond is not None and not targets.is_cpu:
        # A failed index on a GPU ends the process's use of it.
        return None, beyond
    try:
        loss: Any = case.loss_fn(output, targets)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if beyond is not None:
            return None, beyond
        if targets is batch:
            raise ArgumentError(
                f"loss_fn failed ({error}) on the output and the batch, which has no "
                "second item to be the targets; give batches of (inputs, targets), or "
                "targets=lambda batch: …"
            ) from error
        raise
    if not isinstance(loss, Tensor):
        raise ArgumentError(
            f"loss_fn gave a {type(loss).__name__}; it must give a tensor of one "
            "number, without .item(), and where it gives several things that one alone"
        )
    if loss.numel() != 1:
        raise ArgumentError(
            f"loss_fn gave a tensor of shape {tuple(loss.shape)}; it must give one "
            "number, e.g. by reduction='mean'"
        )
    return loss, None

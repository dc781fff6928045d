"""Write the record of `watch` for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from normkit.doctor.scalars import scalars
from normkit.errors import DependencyError

__all__ = ["write_history"]


def write_history(history: Mapping[str, Any], writer: Any) -> int:
    """Write every series of a history as scalars, one per layer and step.

    Tags are those of `normkit.doctor.scalars`. Gaps are left out.

    Args:
        history: `Watch.history`.
        writer: A folder, or an object with `add_scalar(tag, value, step)` such as
            `torch.utils.tensorboard.SummaryWriter`, which is flushed and stays open.

    Returns:
        The number of scalars.

    Raises:
        DependencyError: A folder was given and tensorboard is not installed.
    """
    if isinstance(writer, str | os.PathLike):
        opened = _opened(writer)
        try:
            return write_history(history, opened)
        finally:
            opened.close()
    written = 0
    for tag, value, step in scalars(history):
        writer.add_scalar(tag, value, step)
        written += 1
    writer.flush()
    return written


def _opened(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DependencyError(
            "writing for TensorBoard needs tensorboard, which is not installed; "
            "pip install tensorboard"
        ) from None
    return SummaryWriter(os.fspath(folder))

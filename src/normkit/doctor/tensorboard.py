"""Write the record of `watch` for TensorBoard."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from normkit.errors import DependencyError

__all__ = ["write_history"]


def write_history(history: Mapping[str, Any], writer: Any) -> int:
    """Write every series of a history as scalars, one per layer and step.

    The tag is `normkit/SERIES/LAYER`, so one chart holds one quantity; logged numbers
    go to `normkit/NAME`. Gaps are left out.

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
    for name, series in history["layers"].items():
        for key, values in series.items():
            if not isinstance(values, list):
                continue
            for step, value in zip(history["steps"], values, strict=True):
                if value is not None and math.isfinite(value):
                    writer.add_scalar(f"normkit/{key}/{name or 'model'}", value, step)
                    written += 1
    for name, pairs in history["logged"].items():
        for step, value in pairs:
            writer.add_scalar(f"normkit/{name}", value, step)
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

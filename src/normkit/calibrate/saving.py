"""A file is the old one or the new one, never half of either."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import torch

__all__ = ["save_atomically"]


def save_atomically(content: Any, path: str | os.PathLike[str]) -> None:
    """Save as `torch.save` does, such that a kill at any moment leaves a whole file.

    Written to a temporary file beside `path`, flushed to the disk, then renamed over
    it; the folder is flushed, too, so that the rename survives a loss of power.

    Args:
        content: What to save, e.g. `model.state_dict()`.
        path: Where. An existing file keeps its permissions; a link is followed.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o7777)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def _flush_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

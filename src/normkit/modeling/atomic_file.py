"""Files that are the old one or the new one, never half of either."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["atomic_file", "save_atomically"]


def save_atomically(content: Any, path: str | os.PathLike[str]) -> None:
    """Save as `torch.save` does, such that a kill at any moment leaves a whole file.

    Args:
        content: What to save, e.g. `model.state_dict()`.
        path: Where; see `atomic_file`.
    """
    with atomic_file(path) as file:
        torch.save(content, file)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` once the block has ended.

    The content goes to a temporary file in the same folder, is flushed to the disk,
    then renamed over `path`; the folder is flushed, too, so that the rename survives a
    loss of power. On an exception the old file stays.

    Args:
        path: Where. An existing file keeps its permissions; a link stays a link, and
            the file that it points to is replaced. A device or a FIFO, such as
            `/dev/null` or `/dev/stdout`, is written to, never replaced.

    Yields:
        A file in binary mode.
    """
    if _is_special(path):
        with open(path, "wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o7777)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def _is_special(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is there and no regular file (a folder's open() raises)."""
    try:
        # Before links are resolved: /dev/stdout may lead to a pipe, which has no path.
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _flush_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

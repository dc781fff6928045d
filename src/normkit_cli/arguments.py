"""Arguments that several commands share, checked before any work is done."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer

__all__ = ["TARGET", "AsJson", "check_file", "check_folder", "notes"]

TARGET = (
    "`file.py:factory` or `package.module:factory`; the factory returns the model, or "
    "a dict with `model`, `loader`, `loss_fn`."
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def check_file(option: str, path: Path | None, *, makes_folder: bool = False) -> None:
    """Require the path of a file that can be written.

    Args:
        option: The option that gave it, for messages.
        path: The path; None requires nothing.
        makes_folder: Its folder is made where it is missing.

    Raises:
        ArgumentError: It is a folder, or its folder is missing or cannot be written to.
    """
    from normkit.errors import ArgumentError

    if path is None:
        return
    if path.is_dir():
        raise ArgumentError(
            f"{option} {path} is a folder; give the path of the file to write"
        )
    folder = path.parent
    if not folder.is_dir() and not (makes_folder and not folder.exists()):
        raise ArgumentError(
            f"{option} {path}: there is no folder {folder}; make it (mkdir -p "
            f"{folder}), or give another path"
        )
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise ArgumentError(
            f"{option} {path}: {folder} cannot be written to; give another path"
        )


def check_folder(option: str, path: Path) -> None:
    """Require the path of a folder, which need not exist.

    Raises:
        ArgumentError: It is a file, or below one.
    """
    from normkit.errors import ArgumentError

    for each in (path, *path.parents):
        if each.exists() and not each.is_dir():
            raise ArgumentError(
                f"{option} {path}: {each} is a file; give the path of a folder"
            )


def notes(as_json: bool) -> TextIO:
    """Return the stream for paths and notes: standard output holds only the JSON."""
    return sys.stderr if as_json else sys.stdout

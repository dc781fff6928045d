"""Files of the safetensors library: a flat mapping of dense tensors, and nothing else.

Hugging Face's models come in them. A tensor that two names share stands in them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from normkit.errors import DependencyError, TargetError
from normkit.modeling.atomic_file import atomic_file

__all__ = ["SUFFIX", "read_safetensors", "write_safetensors"]

SUFFIX = ".safetensors"


def _check_installed() -> None:
    if find_spec("safetensors") is None:
        raise DependencyError(
            f"files in {SUFFIX} need safetensors, not installed here; pip install "
            "safetensors"
        )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors in the order of the file, and its metadata.

    Raises:
        DependencyError: The library is missing.
        TargetError: The file is damaged.
    """
    _check_installed()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return weights, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise TargetError(
            f"{path} cannot be read: it is no file of safetensors, or was cut off"
        ) from error


def write_safetensors(
    weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write the tensors, whole or not at all; the first name of shared ones alone.

    Raises:
        DependencyError: The library is missing.
    """
    _check_installed()
    from safetensors.torch import save

    kept: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, value in weights.items():
        address = value.data_ptr(), value.shape, value.stride()
        if value.numel() and address in seen:
            continue
        seen.add(address)
        # The library refuses views, and parts of one memory.
        kept[name] = value.detach().clone(memory_format=torch.contiguous_format)
    with atomic_file(path) as file:
        file.write(save(kept, dict(metadata) or {"format": "pt"}))

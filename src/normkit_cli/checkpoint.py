"""Checkpoint files: weights in a mapping, alone or with other entries."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from normkit.errors import TargetError
from normkit.modeling.atomic_file import save_atomically
from normkit_cli.safetensors_file import (
    SUFFIX,
    read_safetensors,
    write_safetensors,
)

__all__ = ["Checkpoint"]

# Keys under which training programs store the weights.
PLACES = (
    *("state_dict", "model_state_dict", "model", "net", "module", "weights"),
    *("ema", "model_ema", "state_dict_ema"),  # where a file has no others
)
# Prefixes that wrappers add to every name, one inside the other.
PREFIXES = ("module.", "_orig_mod.", "model.")
# A number that AveragedModel keeps beside the model.
_COUNT = "n_averaged"


@dataclass
class Checkpoint:
    """Contents of a file of `torch.save`, or of safetensors.

    Attributes:
        content: The whole contents.
        place: Key of the weights; "" when they are the whole contents.
        prefix: Prefix of each of the model's names, such as "module.".
        metadata: That of a file of safetensors.
    """

    content: Any
    place: str = ""
    prefix: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a file; no code in it is run (`weights_only=True`).

        Raises:
            TargetError: There is no such file, it holds objects other than tensors and
                plain data, or no weights.
        """
        if not path.is_file():
            raise TargetError(f"there is no checkpoint {path}; give the path of a file")
        if path.suffix == SUFFIX:
            weights, metadata = read_safetensors(path)
            return cls(weights, metadata=metadata)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises anything
            why = "it is no file of torch.save, or was cut off"
            if classes := _classes_in(path):
                why = f"it holds objects of {', '.join(classes[:3])}"
            raise TargetError(
                f"{path} cannot be read as tensors and plain data: {why}; save the "
                "weights by torch.save(model.state_dict(), path)"
            ) from error
        found = next(
            (
                key
                for key in ("", *PLACES)
                if _is_weights(content if not key else _item(content, key))
            ),
            None,
        )
        if found is None:
            raise TargetError(
                f"{path} holds no mapping from names to tensors; save "
                "model.state_dict(), alone or under 'state_dict'"
            )
        return cls(content, found)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Names and tensors, as in the file."""
        return self.content[self.place] if self.place else self.content

    def load_into(self, model: nn.Module) -> None:
        """Load the weights into the model, every one of them.

        Raises:
            TargetError: Names or shapes differ; the model is as it was.
        """
        wanted = model.state_dict()
        self.prefix = self._found_prefix(wanted)
        stripped = {
            name.removeprefix(self.prefix): value
            for name, value in self.weights.items()
            if name in wanted or name != _COUNT
        }
        missing = [name for name in wanted if name not in stripped]
        # A file of safetensors has a tensor that two names share once.
        shared = _shared(wanted, stripped)
        stripped |= {name: stripped[first] for name, first in shared.items()}
        missing = [name for name in missing if name not in shared]
        # Older files have no `num_batches_tracked`.
        if all(name.endswith("num_batches_tracked") for name in missing):
            stripped |= {name: wanted[name] for name in missing}
            missing = []
        extra = [name for name in stripped if name not in wanted]
        differing = [
            f"{name} {tuple(stripped[name].shape)} for {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in stripped and stripped[name].shape != value.shape
        ]
        for what, names in (
            ("lacks", missing),
            ("has too much", extra),
            ("has other shapes", differing),
        ):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise TargetError(
                    f"the checkpoint does not fit the model: it {what}: "
                    f"{', '.join(names[:3])}{more}; let the factory make the model "
                    "that was saved"
                )
        for name, value in wanted.items():
            if reason := _reason_against(stripped[name], value):
                raise TargetError(
                    f"the checkpoint does not fit the model: {name} {reason}; save "
                    "dense tensors of real numbers"
                )
        model.load_state_dict(stripped)

    def save(self, model: nn.Module, path: Path) -> None:
        """Save the file with the tensors that changed in `model`, whole or not at all.

        All others keep their bytes, dtypes and order, and the mapping its class and
        metadata. Names that the file did not hold (a count of batches) are added.

        Raises:
            TargetError: Other contents than weights, for a file of safetensors.
            DependencyError: safetensors is not installed, for such a file.
        """
        if path.suffix == SUFFIX and self.place:
            raise TargetError(
                f"{path} can hold weights alone, and the checkpoint has them under "
                f"{self.place!r}, beside other contents; save to a file in .pt"
            )
        weights: Any = copy.copy(self.weights)
        state = model.state_dict()
        shared: dict[str, str] = {}
        if path.suffix == SUFFIX and weights:
            held = {name for name in state if self.prefix + name in weights}
            shared = _shared(state, held)
        for name, value in state.items():
            if name in shared:
                continue
            key, new = self.prefix + name, value.detach().cpu()
            old = weights.get(key)
            if old is None:
                weights[key] = new
            elif not torch.allclose(
                old.to(new.dtype), new, rtol=0, atol=0, equal_nan=True
            ):
                weights[key] = new.to(old.dtype)
        if path.suffix == SUFFIX:
            write_safetensors(weights, path, self.metadata)
            return
        content = weights
        if self.place:
            content = copy.copy(self.content)
            content[self.place] = weights
        save_atomically(content, path)

    def _found_prefix(self, wanted: Mapping[str, Tensor]) -> str:
        names = [name for name in self.weights if name in wanted or name != _COUNT]
        prefix = ""
        while not any(name.removeprefix(prefix) in wanted for name in names):
            longer = (prefix + each for each in PREFIXES)
            shared = (p for p in longer if all(name.startswith(p) for name in names))
            if not (prefix := next(shared, "")):
                break
        return prefix


def _reason_against(found: Tensor, wanted: Tensor) -> str:
    """Return why `found` cannot be copied into `wanted`; "" if it can.

    `load_state_dict` raises for some of these after it has loaded the others, and for
    complex numbers only warns.
    """
    if found.is_meta:
        return "has no values (it is on the meta device)"
    if found.layout is not torch.strided:
        return f"is a sparse tensor ({found.layout})"
    if found.is_quantized:
        return f"is quantized ({found.dtype})"
    if found.is_complex() and not wanted.is_complex():
        return f"is complex ({found.dtype})"
    return ""


def _shared(state: Mapping[str, Tensor], held: Collection[str]) -> dict[str, str]:
    """Return the names that are not held, and the held one that is the same tensor."""
    at = {
        (t.data_ptr(), t.shape, t.stride()): name
        for name, t in state.items()
        if name in held and t.numel() and not t.is_meta
    }
    found = {
        name: at.get((t.data_ptr(), t.shape, t.stride()))
        for name, t in state.items()
        if name not in held and not t.is_meta
    }
    return {name: first for name, first in found.items() if first is not None}


def _is_weights(found: Any) -> bool:
    return (
        isinstance(found, Mapping)
        and bool(found)
        and all(isinstance(name, str) for name in found)
        and all(isinstance(v, Tensor) for name, v in found.items() if name != _COUNT)
        and list(found) != [_COUNT]
    )


def _classes_in(path: Path) -> list[str]:
    """Return the classes that a file of `torch.save` needs; none of a damaged one."""
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file raises anything
        return []


def _item(found: Any, key: str) -> Any:
    return found.get(key) if isinstance(found, Mapping) else None

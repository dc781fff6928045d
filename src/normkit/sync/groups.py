"""Process groups in every way that a caller may name them.

A ProcessGroup or its name, a DeviceMesh with one dimension of more than one rank, or
(DeviceMesh, dimension), the dimension by number or name; None is the default group.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from normkit.errors import ArgumentError
from normkit.torch_state import process_group_by_name

__all__ = [
    "Group",
    "Ranks",
    "alone",
    "is_alone",
    "is_group",
    "is_running",
    "process_group_of",
]

Group = Any

_TAKES = (
    "process_group takes a ProcessGroup or its name, a DeviceMesh, or (DeviceMesh, "
    "dimension); None is all ranks"
)


class Ranks:
    """Ranks that one layer takes its statistics over, and its name for errors.

    The group is torch.distributed's own: one that is held beyond
    `destroy_process_group` ends with the interpreter, where gloo aborted 4 of 14
    runs of two ranks. Calls are remembered for longer than that.

    Attributes:
        size: Their number.
        name: Returns the name of the layer; called when there is something to say.
    """

    __slots__ = ("__weakref__", "_group", "name", "size")

    def __init__(self, group: Any, name: Callable[[], str]) -> None:
        self._group = weakref.ref(group)
        self.size, self.name = dist.get_world_size(group), name

    @property
    def group(self) -> Any:
        """Return their process group.

        Raises:
            ArgumentError: It was destroyed.
        """
        found = self._group()
        if found is None:
            raise ArgumentError(
                f"{self.name()} has a process group that was destroyed; call "
                "destroy_process_group after the last step"
            )
        return found

    def is_of(self, group: Any) -> bool:
        """Return whether they are the ranks of this process group."""
        return self._group() is group


def is_running() -> bool:
    """Return whether torch.distributed has a default process group."""
    return dist.is_available() and dist.is_initialized()


def is_alone() -> bool:
    """Return whether statistics are of this rank: `alone`, or no torch.distributed."""
    return bool(_alone) or not is_running()


_alone: list[None] = []


@contextmanager
def alone() -> Generator[None]:
    """Take the statistics of all layers over this rank alone, within the block.

    Other ranks need not call anything. For a diagnosis or an evaluation on one rank.
    """
    _alone.append(None)
    try:
        yield
    finally:
        _alone.pop()


def is_group(process_group: Group = None) -> bool:
    """Return whether the group has other ranks; False without torch.distributed.

    False in a block of `alone`, too.

    Args:
        process_group: As in `merge_over`.

    Raises:
        ArgumentError: It names no group, or one that this rank is not in.
    """
    if is_alone():
        return False
    return dist.get_world_size(process_group_of(process_group)) > 1


def process_group_of(process_group: Group = None) -> Any:
    """Return the ProcessGroup that is meant.

    Args:
        process_group: As in `merge_over`.

    Raises:
        ArgumentError: It names no group, or one that this rank is not in.
    """
    if process_group is None:
        return dist.group.WORLD
    if isinstance(process_group, dist.ProcessGroup):
        found = process_group
    elif isinstance(process_group, Ranks):
        found = process_group.group
    elif process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ArgumentError(
            f"rank {dist.get_rank()} is not in the group it was given: new_group() "
            "gave it GroupMember.NON_GROUP_MEMBER; give it the group it is in, or "
            "leave its layers out of the step"
        )
    elif isinstance(process_group, str):
        found = _by_name(process_group)
    elif isinstance(process_group, dist.device_mesh.DeviceMesh):
        found = _of_mesh(process_group)
    elif (
        isinstance(process_group, tuple)
        and len(process_group) == 2
        and isinstance(process_group[0], dist.device_mesh.DeviceMesh)
    ):
        found = _of_dimension(*process_group)
    else:
        raise ArgumentError(f"{_TAKES}; got {process_group!r}")
    if dist.get_rank(found) < 0:
        ranks = dist.get_process_group_ranks(found)
        raise ArgumentError(
            f"rank {dist.get_rank()} is not in the group it was given, of ranks "
            f"{ranks}; give it the group it is in"
        )
    return found


def _by_name(name: str) -> Any:
    try:
        return process_group_by_name(name)
    except (RuntimeError, ValueError):
        raise ArgumentError(
            f"rank {dist.get_rank()} knows no process group named {name!r}: there is "
            f"none, or this rank is not in it. {_TAKES}"
        ) from None


def _of_mesh(mesh: Any) -> Any:
    shared = [d for d in range(mesh.ndim) if mesh.size(d) > 1]
    if len(shared) > 1:
        names = mesh.mesh_dim_names or tuple(range(mesh.ndim))
        raise ArgumentError(
            f"a DeviceMesh of shape {tuple(mesh.shape)} names {len(shared)} groups of "
            f"this rank; pass one, (mesh, {names[shared[0]]!r}) say, or the group of "
            "all its ranks"
        )
    return _of_dimension(mesh, shared[0] if shared else 0)


def _of_dimension(mesh: Any, dimension: int | str) -> Any:
    names = mesh.mesh_dim_names or ()
    if dimension not in names and dimension not in range(-mesh.ndim, mesh.ndim):
        known = ", ".join(map(repr, (*range(mesh.ndim), *names)))
        raise ArgumentError(
            f"the DeviceMesh has no dimension {dimension!r}, only {known}"
        )
    if mesh.get_coordinate() is None:
        raise ArgumentError(
            f"rank {dist.get_rank()} is not in the DeviceMesh it was given, of ranks "
            f"{mesh.mesh.flatten().tolist()}; give it the mesh it is in"
        )
    if isinstance(dimension, int):
        dimension %= mesh.ndim
    return mesh.get_group(dimension)

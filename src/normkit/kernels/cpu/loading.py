"""Loading of the native library, and its functions.

Those of `native/entries.cpp` take tensors; the others one packed struct.

It is built when the package is installed and a compiler is available, and loaded when
the backend first inspects a tensor. It has no OpenMP of its own: it uses the
`GOMP_parallel` of torch, and stays serial where there is none. NORMKIT_CPU_LIBRARY
names another build of it, e.g. with sanitizers.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from normkit.kernels.asked_for import asked_for_name

__all__ = [
    "CENTERED",
    "EQUAL_SHARES",
    "FIXED",
    "GIVEN",
    "POINTERS",
    "RANKS",
    "ROW_MASK",
    "SKIP_NONFINITE",
    "STREAM",
    "UPDATE",
    "WEIGHTED",
    "Library",
    "check",
    "library",
    "why_absent",
]

# The same for every call of one signature: B O G M I P; affine and the dtypes of x,
# weight, bias, running mean and variance; activation flags threads; eps slope
FIXED = struct.Struct("=15q2d")

# New at every call: rate; x residual mask weight bias dy gate dsum y dx dresidual sum
# dweight dbias center scale m2 count sum_dy sum_dyx b c running_mean running_var
# num_batches_tracked num_batches_skipped
POINTERS = struct.Struct("=d26Q")

# channels dtype_mean dtype_var flags; rate; mean m2 count running_mean running_var
# num_batches_tracked num_batches_skipped
UPDATE = struct.Struct("=4qd7Q")

# channels counts values; eps; mean scale m2 count pivot message
RANKS = struct.Struct("=3qd6Q")

# Flags of a call; `call.hpp` says what they mean.
CENTERED, GIVEN, WEIGHTED, STREAM = 1, 2, 4, 8
SKIP_NONFINITE, EQUAL_SHARES, ROW_MASK = 32, 64, 128
_FLAGS = CENTERED + GIVEN + WEIGHTED + STREAM + SKIP_NONFINITE + EQUAL_SHARES + ROW_MASK

_ENTRIES = (
    *("normkit_forward", "normkit_backward", "normkit_apply_grads"),
    *("normkit_move_running", "normkit_gradient_over_ranks"),
    *("normkit_pack_for_ranks", "normkit_finish_from_ranks"),
)

# In the order of `View::dtype` in native/tensor.hpp.
_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.bool),
)

_log = logging.getLogger("normkit")


@dataclass(frozen=True)
class Library:
    """The library.

    Attributes:
        isas: Instruction sets that this machine can run, best first.
        signature: Of a call with plain tensors in CPU memory, see
            `functional.signature`; None for others.
        find: Takes a dict and what `signature` takes; the value under the signature, or
            None.
        forward: Takes FIXED and tensors, see `native/entries.cpp`; returns 0, or a
            status for `check`.
        backward: The same.
        verify: Takes the statistics that torch's layer norm saved (mean, 1/std), and
            the bound on |mean|/std; 1 if exact.
    """

    native: ctypes.CDLL
    isas: tuple[str, ...]
    signature: Callable[..., Hashable | None]
    find: Callable[..., Any]
    forward: Callable[..., int]
    backward: Callable[..., int]
    verify: Callable[[Tensor, Tensor, float], int]

    def run(self, name: str, call: bytes) -> None:
        """Run one kernel by its name.

        Raises:
            MemoryError: No memory for its working vectors.
        """
        check(getattr(self.native, name)(call))

    @property
    def isa(self) -> str:
        """Instruction set in use."""
        return self.native.normkit_chosen_isa().decode()

    def choose_isa(self, name: str) -> None:
        """Use another instruction set, one of `isas`; for tests and measurements."""
        if self.native.normkit_choose_isa(name.encode()):
            raise ValueError(f"isa={name!r} must be one of {self.isas}")


def check(status: int) -> None:
    """Raise the error of a status of the library.

    Raises:
        MemoryError: No memory for working vectors.
    """
    if status:
        raise MemoryError("normkit's CPU kernels had no memory for working vectors")


def library() -> Library | None:
    """Return the library, loaded at the first call; None where there is none."""
    found = _found()
    return found if isinstance(found, Library) else None


def why_absent() -> str:
    """Return why there is no library; empty when there is one."""
    found = _found()
    return found if isinstance(found, str) else ""


@cache
def _found() -> Library | str:
    found = _load()
    if isinstance(found, str):
        _log.warning("no native CPU kernels: %s", found)
    return found


def _path() -> Path | None:
    other = os.environ.get("NORMKIT_CPU_LIBRARY")
    if other:
        return Path(other)
    in_place = Path(__file__).with_name("_native.so")
    if in_place.exists():
        return in_place
    # An editable install builds elsewhere; the import system knows the place.
    spec = find_spec("normkit.kernels.cpu._native")
    return Path(spec.origin) if spec is not None and spec.origin else None


def _load() -> Library | str:
    path = _path()
    if path is None:
        return (
            "the package was installed without a C++ compiler; "
            "the reference backend runs instead"
        )
    try:
        native = ctypes.CDLL(str(path))
        interface = (
            *(native.normkit_call_size(), native.normkit_update_size()),
            native.normkit_ranks_size(),
            native.normkit_known_flags(),
        )
        functions = _functions(path)
    except (OSError, AttributeError) as error:
        return f"{path.name} does not load ({error}); the reference backend runs"
    if interface != (FIXED.size + POINTERS.size, UPDATE.size, RANKS.size, _FLAGS):
        return f"{path} was built from other sources; install the package again"
    for name in ("normkit_isa_name", "normkit_chosen_isa"):
        getattr(native, name).restype = ctypes.c_char_p
    for name in _ENTRIES:
        getattr(native, name).argtypes = [ctypes.c_char_p]
    isas: list[str] = []
    while name := native.normkit_isa_name(len(isas)):
        isas.append(name.decode())
    native.normkit_set_pool.argtypes = [ctypes.c_void_p]
    native.normkit_set_pool(_pool_of_torch())
    return Library(native, tuple(isas), *functions)


def _functions(path: Path) -> tuple[Callable[..., Any], ...]:
    """Return the functions that take tensors, in the order of `Library`."""
    functions = ctypes.PyDLL(str(path)).normkit_functions
    functions.argtypes, functions.restype = [ctypes.py_object], ctypes.py_object
    return functions(
        (
            *(Tensor, Parameter, None, True),
            *(torch.get_num_threads, asked_for_name.get),
            _DTYPES,
            getattr(Tensor, "__dlpack_c_exchange_api__", None),  # torch 2.10
        )
    )


def _pool_of_torch() -> int | None:
    """Return the address of the GOMP_parallel that torch links to, or None.

    torch loads its libraries into the global scope, so a plain lookup finds the one
    that it uses, under any file name.
    """
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError):
        return None
    return ctypes.cast(entry, ctypes.c_void_p).value

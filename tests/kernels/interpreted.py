"""The GPU kernels without a GPU: Triton's interpreter, with its defects fixed.

A pytest plugin for a process of its own (`-p kernels.interpreted`), because Triton
decides at import whether it interprets. It makes the GPU backend take CPU tensors and
puts it first, so that the contract's own tests run on it.

The interpreter of Triton 3.6 cannot take a run-time loop bound with numpy ≥ 2.4,
cuts bfloat16 off instead of rounding it, adds up one after the other, and warns of
inf − inf. Hardware rounds, adds in a tree and is silent. Nothing else is changed.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

from normkit.kernels.choose import _BACKENDS
from normkit.kernels.gpu import GpuBackend, config

# Three programs fill this "device", so that small tensors are split, too.
PROGRAMS = 3

_patch_tensor = interpreter._patch_lang_tensor
_cast = interpreter.InterpreterBuilder.cast_impl


def _patch_tensor_and_index(tensor, scope) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _cast_rounding(self, src, dst_type):
    language = interpreter.tl
    if (src.dtype.scalar, dst_type.scalar) != (language.float32, language.bfloat16):
        return _cast(self, src, dst_type)
    values = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
    data = values.view(torch.int16).numpy().view(np.uint16).reshape(src.data.shape)
    return interpreter.TensorHandle(data, dst_type.scalar)


_patch_lang = interpreter._patch_lang
_patched: set[tuple[str, ...]] = set()


class _PatchedOnce:
    """The patches of a launch; without this each call of a function patched again."""

    def __init__(self, scope) -> None:
        self._scope = scope

    def restore(self) -> None:
        self._scope.restore()
        _patched.clear()


def _patch_lang_once(function):
    modules = {id(interpreter.tl): "tl", id(interpreter.tl.core): "core"}
    values = map(id, function.__globals__.values())
    names = tuple(sorted({modules[v] for v in values if v in modules}))
    if names in _patched:
        return None
    scope = _PatchedOnce(_patch_lang(function))
    _patched.add(names)
    return scope


interpreter._patch_lang = _patch_lang_once
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
    sanitize_overflow=False  # half of the time
)


def _sum_as_tree(self, values):
    data, axis = values.handle.data, self.axis
    if axis is None:
        data, axis = data.reshape(-1), 0
    data = np.moveaxis(data, axis, 0)
    while len(data) > 1:
        half = len(data) // 2  # sizes are powers of two
        data = data[:half] + data[half:]
    total = np.expand_dims(data[0], axis) if self.keep_dims else data[0]
    return self.to_tensor(total, values.dtype)


interpreter.ReduceOps.sum = _sum_as_tree
interpreter._patch_lang_tensor = _patch_tensor_and_index
interpreter.InterpreterBuilder.cast_impl = _cast_rounding

np.seterr(all="ignore")

_BACKENDS["gpu"] = GpuBackend(device_types=("cpu",))
config.reduction_programs = lambda device: PROGRAMS
config.multiprocessors = lambda device: PROGRAMS

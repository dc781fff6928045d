"""Bare names of torch functions, and the names that need no rule."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import resolve_name

__all__ = [
    "ACTIVATIONS",
    "LIKE",
    "METADATA",
    "RANDOM",
    "SIZES",
    "op_name",
    "sized_by_values",
]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


RANDOM = _words(
    "rand randn randint randperm bernoulli normal rand_like randn_like randint_like "
    "multinomial dropout dropout1d dropout2d dropout3d alpha_dropout "
    "feature_alpha_dropout uniform random empty empty_like new_empty"
)

# Functions of one tensor, element by element, and of slopes and bounds.
ACTIVATIONS = _words(
    "relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh "
    "sigmoid logsigmoid tanh softplus softsign tanhshrink hardshrink softshrink clamp "
    "clamp_min threshold dropout"
)

# They make new tensors of the size of another, whatever its values.
LIKE = _words("zeros_like ones_like full_like new_zeros new_ones new_full")

# Attributes of a tensor that do not depend on its values.
METADATA = _words(
    "shape size dim ndim dtype device layout is_cuda is_cpu is_meta is_sparse is_mps "
    "is_mkldnn is_quantized is_nested is_leaf is_complex is_floating_point is_signed "
    "requires_grad requires_grad_ grad grad_fn numel nelement stride storage_offset "
    "is_contiguous element_size __len__ _version names is_inference data_ptr "
    "get_device output_nr retains_grad is_shared untyped_storage _is_view itemsize "
    "nbytes is_conj is_neg is_xla is_xpu is_ipu is_maia is_same_size __hash__ __dir__"
)


# Those of them that tell its size, which may depend on the values of others.
SIZES = _words("shape size numel nelement __len__ nbytes")


def op_name(func: Any) -> str:
    """Return the bare name of a torch function: `conv2d`, `add`, `relu`, `reshape`.

    Example:
        >>> op_name(torch.Tensor.__iadd__), op_name(torch.ops.aten.relu_.default)
        ('iadd', 'relu')
        >>> op_name(torch.nn.functional.conv2d), op_name(torch.Tensor.shape.__get__)
        ('conv2d', 'shape')
    """
    if isinstance(func, torch._ops.OpOverload):
        full = func._schema.name.split("::")[-1]
    else:
        full = resolve_name(func) or getattr(func, "__name__", str(func))
        if full.endswith(".__get__"):
            full = full[: -len(".__get__")]
        full = full.rsplit(".", 1)[-1]
    if full.startswith("__") and full.endswith("__"):
        bare = full[2:-2]
        return full if full in METADATA else bare
    if full.endswith("_") and not full.endswith("__") and full not in METADATA:
        full = full[:-1]
    return full


def sized_by_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Return True for an operator such as nonzero, or an index by a mask."""
    if not isinstance(func, torch._ops.OpOverload):
        return False
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    indices = args[1] if len(args) > 1 else None
    return not isinstance(indices, list | tuple) or any(
        t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices
    )

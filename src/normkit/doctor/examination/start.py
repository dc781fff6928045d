"""Signs that a network was trained, and that its training has just begun.

torch counts the writes to each tensor in place: a step of an optimizer makes one, and a
start a few, or many in a loop over the rows of one parameter. So the median over all
parameters tells of training. Copies and checkpoints begin to count anew, and fused
optimizers do not count.

What the weights hold tells as well. torch draws the bias of a linear layer or
convolution from ±1/√(inputs of a unit), and most other schemes start biases, scales and
shifts at one value. A bias beyond that, or scales that differ, are the trace of an
optimizer. Not the scales where every batch norm has the statistics of its start: RepVGG
draws them, and training would have moved both. Of an embedding or a recurrent layer,
which are drawn in many ways, the weights alone show nothing.
"""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from normkit.doctor.probes.norm_statistics import norm_statistics
from normkit.modeling.norm_types import is_batch_norm, is_norm

__all__ = [
    "any_has_moved",
    "flat_tables",
    "has_just_begun",
    "has_moved",
    "was_trained",
]

# Writes that are no start, and more than the first steps, which may show nothing yet.
# torch's initializers make 1 or 2, sparse_ one per column; Adam 1 per step, AdamW 2.
WRITES = 100
# Batches and writes that are no training yet: at torch's momentum the start has a
# weight of .05 in the running statistics after 29 batches. A start and a checkpoint
# that is loaded make up to 3 writes.
FEW, LOADED = 29, 3
# How far scales and shifts lie from one value after ten steps of Adam at 1e-3.
NEAR = 0.01


@torch.no_grad()
def has_moved(model: nn.Module) -> bool:
    """Return True where weights cannot be those of a start; False where they can."""
    if _was_stepped(model):
        return True
    norms = [n for n in norm_statistics(model).values() if not n.frozen]
    is_new = all((n.tracked or 0) <= 1 and n.has_default_buffers for n in norms)
    is_drawn = bool(norms) and is_new
    return any(
        _has_moved(module)
        for module in model.modules()
        if not (is_drawn and _is_norm(module))
    )


@torch.no_grad()
def any_has_moved(model: nn.Module, names: Iterable[str]) -> bool:
    """Return True where what one of these layers holds cannot be a start."""
    held = dict(model.named_modules())
    return any(_has_moved(held[name]) for name in names if name in held)


def was_trained(model: nn.Module) -> bool:
    """Return True after many steps, by what was counted alone.

    A start may be drawn in any way, and steps of a checkpoint count as batches do.
    """
    tracked = [n.tracked or 0 for n in norm_statistics(model).values()]
    return _was_stepped(model) or max(tracked, default=0) > FEW


@torch.no_grad()
def has_just_begun(model: nn.Module) -> bool:
    """Return True after a few steps.

    By the batches counted where there are counts, else by the writes, or by scales and
    shifts that lie near their start.
    """
    tracked = [n.tracked for n in norm_statistics(model).values() if not n.frozen]
    counted = [number for number in tracked if number]
    if counted:
        return max(counted) <= FEW
    writes = _writes(model)
    if writes > LOADED:
        return writes <= FEW
    norms = [module for module in model.modules() if is_norm(module)]
    held = [p for norm in norms for p in norm.parameters(recurse=False)]
    return bool(held) and all(map(_lies_near, held))


@torch.no_grad()
def flat_tables(model: nn.Module) -> tuple[str, ...]:
    """Return the embeddings whose rows are one number each, and differ by row.

    Rows that differ were trained; a table that begins at one number is one throughout.
    """
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.embedding_dim > 1
        and _is_flat(module.weight)
    )


def _is_flat(table: Tensor) -> bool:
    if table.is_meta or not table.numel():
        return False
    first = table[:, :1]
    is_flat = bool((table - first).abs().max() <= 1e-5 * table.abs().max())
    return is_flat and bool((first != first[0]).any())


def _lies_near(values: Tensor) -> bool:
    if values.is_meta or not values.numel():
        return False
    middle = values.float().median()
    return bool(((values.float() - middle).abs() <= NEAR).all())


def _was_stepped(model: nn.Module) -> bool:
    return _writes(model) >= WRITES


def _writes(model: nn.Module) -> float:
    """Return the median number of writes to a parameter that is trained."""
    writes = [
        0 if p.is_inference() else p._version  # inference mode does not count
        for p in model.parameters()
        if p.requires_grad
    ]
    return numbers.median(writes) if writes else 0


def _is_norm(module: nn.Module) -> bool:
    # A scripted batch norm has the class of any scripted module.
    return is_norm(module) or is_batch_norm(module)


def _has_moved(module: nn.Module) -> bool:
    # A scripted module's `_parameters` is no dict.
    held = dict(module.named_parameters(recurse=False))
    weight, bias = held.get("weight"), held.get("bias")
    if _is_norm(module):
        return any(p is not None and _varies(p) for p in (weight, bias))
    inputs = 0
    if isinstance(module, nn.MultiheadAttention):
        bias, inputs = held.get("in_proj_bias"), module.embed_dim
    elif isinstance(module, nn.Bilinear):
        inputs = module.in1_features
    elif weight is not None and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        # torch counts the inputs of a transposed convolution by its outputs, too.
        inputs = weight[0].numel()
    if not inputs or bias is None or not _varies(bias):
        return False
    return float(bias.abs().max()) > 1.001 / math.sqrt(inputs)


def _varies(values: Tensor) -> bool:
    return (
        values.numel() > 1
        and not values.is_meta
        and not bool((values == values.flatten()[0]).all())
    )

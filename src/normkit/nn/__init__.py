"""Drop-in layers: the arguments, state and errors of `torch.nn`, with better numbers.

Each layer is a subclass of its `torch.nn` namesake, so whatever looks for that class
finds it, and checkpoints go both ways. What differs from torch:

    statistics    exact at any |mean|/std, in every memory format
    NaN, Inf      reach the output, never the running statistics
    mask=         which values count, on every forward
"""

from normkit.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normkit.nn.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from normkit.nn.lazy import (
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from normkit.nn.per_sample import GroupNorm, LayerNorm, RMSNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "RMSNorm",
]

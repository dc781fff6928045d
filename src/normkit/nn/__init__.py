"""Drop-in layers: the arguments, state and errors of `torch.nn`, with better numbers.

Each layer that torch.nn has, except `SyncBatchNorm`, is a subclass of its namesake, so
`isinstance` holds; checkpoints are interchangeable. Differences from torch:

    statistics    exact for |mean| up to 1e6·std, in every memory format
    NaN, Inf      reach the output, never the running statistics
    mask=         on every forward: which values count
"""

from normkit.nn.accumulation import accumulate, backward_as_whole
from normkit.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normkit.nn.batch_norm_lstm import BatchNormLSTM
from normkit.nn.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from normkit.nn.domain import DomainBatchNorm, use_domain
from normkit.nn.filter_response import TLU, FilterResponseNorm
from normkit.nn.frozen_batch_norm import FrozenBatchNorm
from normkit.nn.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from normkit.nn.lazy import (
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from normkit.nn.parameter_groups import parameter_groups
from normkit.nn.per_activation import PerActivationBatchNorm
from normkit.nn.per_sample import GroupNorm, LayerNorm, RMSNorm
from normkit.nn.recurrent import RecurrentBatchNorm
from normkit.nn.sync_batch_norm import SyncBatchNorm
from normkit.nn.weight_standardization import (
    WeightStandardization,
    weight_standardization,
)
from normkit.nn.whitening import WhiteningBatchNorm

__all__ = [
    "TLU",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormLSTM",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "DomainBatchNorm",
    "FilterResponseNorm",
    "FrozenBatchNorm",
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
    "PerActivationBatchNorm",
    "RMSNorm",
    "RecurrentBatchNorm",
    "SyncBatchNorm",
    "WeightStandardization",
    "WhiteningBatchNorm",
    "accumulate",
    "backward_as_whole",
    "parameter_groups",
    "use_domain",
    "weight_standardization",
]

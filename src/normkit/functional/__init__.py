"""Normalizations as functions, with the signatures of `torch.nn.functional`.

    view → moments → affine → apply

`normalize`, `standardize` and `update_running` serve the layers.
"""

from normkit.functional.batch_norms import batch_norm, instance_norm
from normkit.functional.ema import update_running
from normkit.functional.engine import normalize, standardize
from normkit.functional.row_norms import group_norm, layer_norm, rms_norm
from normkit.functional.state import (
    BatchNormState,
    batch_norm_with_state,
    init_state,
)

__all__ = [
    "BatchNormState",
    "batch_norm",
    "batch_norm_with_state",
    "group_norm",
    "init_state",
    "instance_norm",
    "layer_norm",
    "normalize",
    "rms_norm",
    "standardize",
    "update_running",
]

"""Normalizations as functions, with the signatures of `torch.nn.functional`.

    view → moments → affine → apply

`normalize`, `standardize` and `update_running` are the engine that the layers use.
"""

from normkit.functional.batch import batch_norm, instance_norm
from normkit.functional.engine import normalize, standardize
from normkit.functional.rows import group_norm, layer_norm, rms_norm
from normkit.functional.running import update_running

__all__ = [
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "normalize",
    "rms_norm",
    "standardize",
    "update_running",
]

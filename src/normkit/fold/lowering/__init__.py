"""From a torch call to the kind of node it is, one file per family of operations."""

from normkit.fold.lowering import arithmetic, moves, through, weighted
from normkit.fold.lowering.call import TorchCall, lower
from normkit.fold.lowering.frozen import as_batch_norm
from normkit.fold.lowering.fused import one_by_one

__all__ = [
    "TorchCall",
    "arithmetic",
    "as_batch_norm",
    "lower",
    "moves",
    "one_by_one",
    "through",
    "weighted",
]

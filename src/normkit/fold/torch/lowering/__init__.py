"""Lower torch calls to nodes, one file per family of operations."""

from normkit.fold.torch.lowering import arithmetic, commuting, moves, weighted
from normkit.fold.torch.lowering.call import TorchCall, lower, values_in
from normkit.fold.torch.lowering.fused import unfused

__all__ = [
    "TorchCall",
    "arithmetic",
    "commuting",
    "lower",
    "moves",
    "unfused",
    "values_in",
    "weighted",
]

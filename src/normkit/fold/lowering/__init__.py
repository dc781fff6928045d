"""From a torch call to the kind of node it is, one file per family of operations."""

from normkit.fold.lowering import arithmetic, moves, through, weighted
from normkit.fold.lowering.call import TorchCall, lower

__all__ = ["TorchCall", "arithmetic", "lower", "moves", "through", "weighted"]
